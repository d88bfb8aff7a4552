"""Stock keys in and out of a parallelized model, exactly (level E).

A failure here with test_convert green is in the table of stock names, or in full_state_dict.
"""

import copy
from pathlib import Path

import pytest
import torch
import transformers
from harness.device import DEVICE
from harness.encoders import MODELS, make, make_torch
from torch import nn
from torch.distributed.tensor import DTensor

import two_level_mha as tlm
from two_level_mha.integrations.projected import ProjectedAttention
from two_level_mha.stock import StockTensor, from_stock, linear_names, put, resolve

BUILD = {**{kind: (lambda kind=kind: make(kind)) for kind in MODELS}, "torch": lambda: make_torch().encoder}


def same(state: dict, expected: dict) -> None:
    assert state.keys() == expected.keys()
    assert all(type(x) is torch.Tensor and torch.equal(x, expected[key]) for key, x in state.items())


def round_trip(kind: str, grid: tuple[int, int] | None, scheme: str, directory: str) -> bool:
    """On rank 0, whether something came out and was right; elsewhere whether it was empty."""
    stock = BUILD[kind]()
    mesh = None if grid is None else tlm.init_mesh(DEVICE, grid)
    model = tlm.parallelize(copy.deepcopy(stock), mesh, scheme=scheme)
    if grid is not None:
        split = [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
        assert any("linear1" in name or "intermediate" in name or "fc1" in name for name in split)
    state = tlm.full_state_dict(model)
    if not state:
        return torch.distributed.get_rank() > 0
    same(state, stock.state_dict())
    other = BUILD[kind]()
    for p in other.parameters():
        nn.init.zeros_(p)
    other.load_state_dict(state)
    same(other.state_dict(), stock.state_dict())
    if kind in MODELS:
        model.save_pretrained(directory, state_dict=state)
        read = getattr(transformers, kind).from_pretrained(directory, dtype=torch.float64)
        same(read.state_dict(), stock.state_dict())
        assert [path.name for path in Path(directory).glob("*.safetensors")] == ["model.safetensors"]
    return True


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("kind", BUILD)
@pytest.mark.parametrize("scheme", ["auto", "heads"])
def test_round_trip(pool, tmp_path, kind, scheme):
    """Stock model, parallelize with the MLPs, full_state_dict, stock model again; save_pretrained too.

    Scheme "heads" stores the query side another way.
    """
    assert all(pool.run(round_trip, 4, kind, (2, 2), scheme, str(tmp_path)))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("kind", BUILD)
def test_round_trip_of_one_process(tmp_path, kind):
    """E. Localises: as above, without a grid: the table of names alone."""
    assert round_trip(kind, None, "auto", str(tmp_path))


def test_one_module():
    """full_state_dict of what was replaced, not of the model: keys from the module on."""
    stock = make("ViTModel")
    attention = tlm.parallelize(copy.deepcopy(stock), None).layers[0].attention
    assert isinstance(attention, ProjectedAttention)
    same(tlm.full_state_dict(attention), stock.layers[0].attention.state_dict())


def test_fused_and_transposed():
    """Q, K and V in one tensor with unequal widths, and (in, out) as GPT-2's Conv1D: views both ways."""
    torch.manual_seed(0)
    h, k, d, D = 6, 2, 4, 10
    rows = {"q": (h, 0), "k": (k, h * d), "v": (k, (h + k) * d)}
    whole = (h + 2 * k) * d
    names, parts, linears = {}, {}, {letter: nn.Linear(D, heads * d) for letter, (heads, _) in rows.items()}
    for letter, (heads, start) in rows.items():
        names[f"{letter}_weight"] = StockTensor("qkv.weight", (D, whole), (heads, d, D), 1, start, transposed=True)
        names[f"{letter}_bias"] = StockTensor("qkv.bias", (whole,), (heads, d), 0, start)
        parts |= {f"{letter}_weight": linears[letter].weight.detach().view(heads, d, D),
                  f"{letter}_bias": linears[letter].bias.detach().view(heads, d)}  # fmt: skip
    state: dict[str, torch.Tensor] = {}
    for name, x in parts.items():
        put(state, names[name].key, names[name], x)
    assert torch.equal(state["qkv.weight"], torch.cat([linear.weight for linear in linears.values()]).t())
    assert torch.equal(state["qkv.bias"], torch.cat([linear.bias for linear in linears.values()]))
    found = from_stock(state, names)
    assert all(torch.equal(found[name], x) for name, x in parts.items())
    assert found["v_weight"].untyped_storage().data_ptr() == state["qkv.weight"].untyped_storage().data_ptr()


def test_names():
    """E. Localises: a path that leaves the module, as of the output projection beside it."""
    out = nn.Linear(24, 10)
    assert linear_names("out", "../output.dense", out, 4) == {
        "out_weight": StockTensor("../output.dense.weight", (10, 24), (10, 6, 4)),
        "out_bias": StockTensor("../output.dense.bias", (10,), (10,)),
    }
    assert resolve("layer.0.attention.self", "../output.dense.bias") == "layer.0.attention.output.dense.bias"
    assert resolve("self", "../output.dense") == "output.dense"
    assert resolve("", "query.weight") == "query.weight"
