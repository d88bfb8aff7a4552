"""scheme="auto" under autocast, with every kind of module that may act between the halves of the pass: at these sizes
2 and 4 bytes an element choose different schemes, so the halves must not each look at a dtype of their own.
"""

import copy

import pytest
import torch
import transformers
from harness.calls import mesh
from harness.device import DEVICE
from torch import nn

import two_level_mha as tlm
from two_level_mha import _C
from two_level_mha.profile import Profile

D, HEADS, HEAD_DIM, GRID = 64, 4, 16, (1, 2)
CONFIG = {
    "hidden_size": D, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": HEADS, "vocab_size": 8,
}  # fmt: skip
# (B, L), both of which choose differently, causal and not; and one size where the choice is one
SIZES, SMALL = ((4, 170), (4, 190)), (2, 16)


class Own(nn.Module):
    """TwoLevelAttention with all that acts between the halves; the same weights with and without a mesh."""

    def __init__(self, grid) -> None:
        super().__init__()
        torch.manual_seed(3)
        options = {"qk_norm": 1e-6, "rope": tlm.Rotary()}
        self.attention = tlm.TwoLevelAttention(D, HEADS, mesh=mesh(grid), **options)

    def forward(self, x_BLD):
        return self.attention(x_BLD)


def transformer(kind: str) -> nn.Module:
    options = CONFIG
    if kind == "GPT2":
        options = {"n_embd": D, "n_head": HEADS, "n_layer": 1, "vocab_size": 8, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
                   "attn_pdrop": 0.0}  # fmt: skip
    elif kind in ("Bert", "ViT"):
        options = CONFIG | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_channels": 1,
                            "image_size": 8, "patch_size": 2}  # fmt: skip
    else:
        options = CONFIG | {"num_key_value_heads": HEADS, "head_dim": HEAD_DIM}
    model = getattr(transformers, f"{kind}Model")
    return model(getattr(transformers, f"{kind}Config")(**options))


def modules(kind: str) -> tuple[nn.Module, nn.Module]:
    """The unsplit model and the split one, of the same weights in float32."""
    torch.manual_seed(0)
    if kind == "own":
        return Own(None), Own(GRID)
    if kind == "mha":
        stock = nn.TransformerEncoderLayer(D, HEADS, 32, dropout=0.0, batch_first=True)
    else:
        stock = transformer(kind)
    return stock, tlm.parallelize(copy.deepcopy(stock), mesh(GRID), rest=False)


def results(kind: str, model: nn.Module, B: int, L: int, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Output, and the gradients of the input and of the model's replicated parameters; with autocast if dtype."""
    torch.manual_seed(1)
    shape = (B, 1, 2 * (L // 10), 20) if kind == "ViT" else (B, L, D)
    leaf = torch.randn(shape, dtype=next(model.parameters()).dtype).requires_grad_()
    with torch.autocast(DEVICE, dtype, enabled=dtype is not None):
        if kind in ("own", "mha"):
            y = model(leaf)
        elif kind == "ViT":
            y = model(leaf, interpolate_pos_encoding=True).last_hidden_state
        else:
            cached = {} if kind == "Bert" else {"use_cache": False}  # the scheme of a cache is its layout
            y = model(inputs_embeds=leaf, **cached).last_hidden_state
    (y.double() * torch.randn(y.shape, dtype=torch.float64)).sum().backward()
    return {"y": y.detach(), "dx": leaf.grad}


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def off(kind: str) -> list[tuple]:
    """By size and name: the relative error of the split model, and of the unsplit one, both under autocast."""
    stock, ours = modules(kind)
    exact_model = copy.deepcopy(stock).double()
    found = []
    for B, L in (*SIZES, SMALL):
        exact = results(kind, exact_model, B, L, None)
        mine, theirs = (results(kind, model, B, L, torch.bfloat16) for model in (ours, stock))
        found += [((B, L), name, error(mine[name], exact[name]), error(theirs[name], exact[name])) for name in exact]
    return found


def chosen(B: int, L: int, element_size: int, causal: bool) -> str:
    call = _C.Call(B=B, L=L, S=L, H=HEADS, K=HEADS, d=HEAD_DIM, m=GRID[1])
    call.D, call.element_size, call.causal = D, element_size, causal
    return _C.resolve_scheme("auto", call, Profile.for_device(DEVICE).numbers)


@pytest.mark.parametrize("causal", [False, True])
def test_the_sizes_choose_differently(causal):
    """Localises: a change of prices that makes the tests below pass without meeting the case."""
    for B, L in SIZES:
        assert chosen(B, L, 2, causal) != chosen(B, L, 4, causal)


@pytest.mark.parametrize("kind", ["mha", "own", "Bert", "ViT", "GPT2", "Llama", "Qwen3", "Gemma"])
def test_autocast(pool, kind):
    """R. Localises: halves of the pass that resolve "auto" from different dtypes, or a projection in another's."""
    for per_rank in pool.run(off, 2, kind, timeout=240):
        for where, name, mine, theirs in per_rank:
            assert mine <= 2 * theirs, (kind, where, name, mine, theirs)


def widened_between(dtype: torch.dtype, need_weights: bool) -> list[float]:
    """A layer whose `between` gives q and k back in another dtype, against the same layer without a mesh."""
    layers = {grid: Own(grid).attention for grid in (None, GRID)}
    errors = []
    for B, L in (*SIZES, SMALL):
        torch.manual_seed(2)
        x_BLD = torch.randn(B, L, D)
        ys = []
        for layer in layers.values():
            leaf = x_BLD.clone().requires_grad_()
            with torch.autocast(DEVICE, torch.bfloat16):
                y, weights = layer.attend(
                    leaf, leaf, leaf, causal=0, need_weights=need_weights,
                    between=lambda q, k, v, aside: (q.to(dtype), k.to(dtype), v),
                )  # fmt: skip
            y.float().square().sum().backward()
            ys.append((y.detach().double(), leaf.grad.double(), *([weights.detach().double()] if need_weights else [])))
        errors += [error(mine, unsplit) for unsplit, mine in zip(*ys, strict=True)]
    return errors


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_between_may_widen(pool, dtype, need_weights):
    """R. Localises: a layout read off what the model made of q and k; weights that want q, k and v of one dtype."""
    for errors in pool.run(widened_between, 2, dtype, need_weights):
        assert max(errors) <= 2e-2
