"""Attention to sequences that are packed one after the other: towers for images and sound, against the stock model.

A failure here with test_convert green is in integrations/packed.py, or in the rotary function that it takes
(integrations/positions.py).
"""

import copy

import peft
import pytest
import torch
from harness.calls import mesh
from harness.encoder_families import build
from harness.families import off_by, stock_gradients
from torch import Tensor, nn

import two_level_mha as tlm
from two_level_mha.integrations.packed import PackedAttention
from two_level_mha.layer import SCHEMES

# The towers rotate in float32, also in a float64 model.
CLOSE = 1e-6
FAMILIES = ["qwen2_5_vl", "qwen3_vl", "paddleocr_vl", "minimax_m3_vl", "lfm3_vl"]
EXACT = [scheme for scheme in SCHEMES if scheme != "independent"]


def images(family: str, sizes: tuple[tuple[int, int], ...]) -> dict[str, Tensor]:
    """Of these sizes in patches."""
    torch.manual_seed(1)
    count = sum(height * width for height, width in sizes)
    shape = (count, 3, 8, 8) if family == "paddleocr_vl" else (count, 3 * 2 * 8 * 8)
    return {
        "pixel_values": torch.randn(shape, dtype=torch.float64),
        "image_grid_thw": torch.tensor([[1, height, width] for height, width in sizes]),
    }


def features(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    found = model.get_image_features(**given)
    found = getattr(found, "pooler_output", found)
    return torch.cat(list(found)) if isinstance(found, (list, tuple)) else found


def off(family: str, grid, sizes=((4, 4), (2, 6), (2, 2)), **options) -> float:
    """How far features and gradients are from the stock model's; all of the tower's attention is packed."""
    stock = build("image-text", family).double()
    ours = tlm.parallelize(copy.deepcopy(stock), None if grid is None else mesh(grid), rest=False, **options)
    packed = [name for name, part in ours.named_modules() if isinstance(part, PackedAttention)]
    assert packed and not any("attn" in name for name in tlm.report(ours).gathered)
    given, errors = images(family, sizes), []
    for model in (stock, ours):
        model.zero_grad()
        y = features(model, given)
        y.square().mean().backward()
        errors.append(y.detach())
    expected = {name: p.grad for name, p in stock.named_parameters() if p.grad is not None}
    got = stock_gradients(ours)
    least = 1e-3 * max(x.abs().max().item() for x in expected.values())
    found = [off_by(got[name], x, least) for name, x in expected.items()] if got else []
    return max(off_by(errors[1], errors[0]), *found, 0.0)


def on_grids(family: str, grids: list, options: list[dict]) -> dict[str, float]:
    return {f"{grid} {option}": off(family, grid, **option) for grid in grids for option in options}


def check(found: dict[str, float]) -> None:
    assert max(found.values()) <= CLOSE, found


@pytest.mark.parametrize("family", FAMILIES)
def test_one_process(family):
    """T. Localises: the formula of a tower, sequences of other lengths, and of one."""
    check({str(sizes): off(family, None, sizes) for sizes in (((4, 4), (2, 6), (2, 2)), ((4, 4), (4, 4)), ((2, 4),))})


@pytest.mark.parametrize("family", ["qwen2_5_vl", pytest.param("lfm3_vl", marks=pytest.mark.slow)])
def test_grids(pool, family):
    """T. Localises: angles of another rank's rows; a filled-up token that is attended to, or has a gradient."""
    for found in pool.run(on_grids, 4, family, [(2, 2), (1, 4)], [{}, {"combine": "concat"}], timeout=240):
        check(found)


def test_schemes(pool):
    """T. As test_grids, in every layout of attention."""
    options = [{"scheme": scheme} for scheme in EXACT]
    for found in pool.run(on_grids, 4, "qwen3_vl", [(2, 2)], options, timeout=240):
        check(found)


def test_slices_that_differ(pool):
    """T. Localises: slices that are narrower than others, in a fused projection: 6, 6 and 4."""
    for found in pool.run(on_grids, 3, "qwen2_5_vl", [(1, 3)], [{}], timeout=240):
        check(found)


def left_out(activations: str) -> tuple[float, list[str]]:
    ours = tlm.parallelize(build("image-text", "qwen2_5_vl").double(), mesh((2, 2)), activations=activations)
    return off("qwen2_5_vl", (2, 2), activations=activations), list(tlm.report(ours).left_out.values())


@pytest.mark.parametrize("activations", ["sequence", "batch"])
def test_split_activations(pool, activations):
    """T. Localises: hidden states of packed sequences, (T, D), that are taken for rows or sequences of a batch."""
    for error, reasons in pool.run(left_out, 4, activations, timeout=240):
        assert error <= CLOSE
        assert any("packed one after the other" in why for why in reasons)


def adapted_off(before: bool) -> float:
    torch.manual_seed(3)
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=r".*visual.*attn\.(qkv|proj)", init_lora_weights=False)
    stock = build("image-text", "qwen2_5_vl").double()
    ours = copy.deepcopy(stock)
    torch.manual_seed(5)
    stock = peft.get_peft_model(stock, lora)
    torch.manual_seed(5)
    if before:
        ours = tlm.parallelize(peft.get_peft_model(ours, lora), mesh((2, 2)))
    else:
        ours = tlm.parallelize(ours, mesh((2, 2)))
        with tlm.adaptable(ours):
            ours = peft.get_peft_model(ours, lora)
    given = images("qwen2_5_vl", ((4, 4), (2, 6)))
    outputs = [features(model.base_model.model, given) for model in (stock, ours)]
    for y in outputs:
        y.square().mean().backward()
    expected = {name: p.grad for name, p in stock.named_parameters() if "lora" in name}
    got = {name: p.grad for name, p in ours.named_parameters() if "lora" in name}
    assert expected.keys() == got.keys() and len(expected) == 8
    return max(off_by(outputs[1], outputs[0]), *(off_by(got[name], x) for name, x in expected.items()))


@pytest.mark.parametrize("before", [True, False])
def test_adapters(pool, before):
    """T. Localises: LoRA on a fused projection of packed tokens, put there before and after the split."""
    assert max(pool.run(adapted_off, 4, before, timeout=240)) <= CLOSE


def under_autocast() -> tuple[float, float]:
    """Relative errors of the split tower, and of stock's, in bfloat16."""
    stock = build("image-text", "qwen2_5_vl")
    given = {name: x.float() if x.is_floating_point() else x for name, x in images("", ((4, 4), (2, 6))).items()}
    ours = tlm.parallelize(copy.deepcopy(stock), mesh((2, 2)))
    exact = features(stock, given)
    with torch.autocast("cpu", torch.bfloat16):
        found = [features(model, given).float() for model in (ours, stock)]
    errors = [((y - exact).norm() / exact.norm()).item() for y in found]
    return errors[0], errors[1]


def test_autocast(pool):
    """R. Localises: tokens or angles in another dtype than stock's."""
    for ours, stock in pool.run(under_autocast, 4, timeout=240):
        assert ours <= 2 * stock


def test_a_mask_beside_bounds():
    """Localises: a mask that a tower would leave out."""
    ours = tlm.parallelize(build("image-text", "lfm3_vl"), None, rest=False)
    attention = next(part for part in ours.modules() if isinstance(part, PackedAttention))
    x = torch.randn(4, attention.q_weight.shape[2])
    angles = (torch.ones(4, attention.head_dim), torch.zeros(4, attention.head_dim))
    given = {"cu_seqlens": torch.tensor([0, 4]), "position_embeddings": angles}
    assert attention(x, **given)[0].shape[-1] == x.shape[1]
    with pytest.raises(tlm.GridError, match="attention_mask is not supported by this attention beside cu_seqlens"):
        attention(x, attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool), **given)
