"""One call of nn.MultiheadAttention and of TwoLevelMultiheadAttention with the same weights and inputs: everything
that comes back, by name, so that a test can compare it.
"""

import warnings
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor, nn

import two_level_mha as tlm
from two_level_mha.blocks import full_tensor
from two_level_mha.multihead import stock_names
from two_level_mha.stock import from_stock

from .device import DEVICE

EMBED, HEADS = 16, 4
FLOAT64 = {"dtype": torch.float64}
GRIDS = [None, (2, 2), (1, 4), (4, 2)]


@dataclass(frozen=True)
class Call:
    """Sizes, constructor options, and masks by name. `keys` None: key = value = query."""

    options: dict = field(default_factory=dict)
    batch: int | None = 3  # None: unbatched
    length: int = 5
    keys: int | None = None
    attn_mask: str | None = None  # bool2, bool3, float2, float3, causal, "float causal"
    padding: str | None = None  # bool, float
    empty_row: bool = False  # a query that sees no key
    need_weights: bool = True
    average: bool = True
    is_causal: bool = False
    dtype: torch.dtype = torch.float64


@lru_cache
def mesh(grid: tuple | None):
    """One mesh per grid for the life of a rank: (n, m), or (n, m, the shares of a KV cache)."""
    return None if grid is None else tlm.init_mesh(DEVICE, grid[:2], cache_shares=grid[2] if len(grid) > 2 else None)


def on_ranks(pool, function, grid: tuple[int, int] | None, *args) -> list:
    """The results of function(grid, *args), one per rank; in this process without a grid."""
    if grid is None:
        return [function(None, *args)]
    return pool.run(function, grid[0] * grid[1], grid, *args, timeout=120)


def stock_layer(call: Call, seed: int = 0) -> nn.MultiheadAttention:
    """In train mode (stock's slow path), with every parameter random, biases too."""
    torch.manual_seed(seed)
    layer = nn.MultiheadAttention(EMBED, HEADS, dtype=call.dtype, **call.options)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, dtype=torch.float64) / p.shape[-1] ** 0.5)
    return layer


def make_inputs(call: Call, layer: nn.MultiheadAttention) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """The distinct inputs (one, or query, key and value), the attention mask and the padding mask."""
    L, S, B = call.length, call.length if call.keys is None else call.keys, call.batch

    def sequence(length: int, width: int) -> Tensor:
        shape = {True: (B, length, width), False: (length, B, width)}[layer.batch_first]
        shape = (length, width) if B is None else shape
        return torch.randn(shape, dtype=torch.float64).to(call.dtype)

    inputs = [sequence(L, EMBED)]
    if call.keys is not None:
        inputs += [sequence(S, layer.kdim), sequence(S, layer.vdim)]
    return inputs, make_mask(call, L, S), make_padding(call, S)


def make_mask(call: Call, L: int, S: int) -> Tensor | None:
    if call.attn_mask is None:
        return None
    if "causal" in call.attn_mask:
        hidden = torch.ones(L, S, dtype=torch.bool).triu(1)
        return hidden if call.attn_mask == "causal" else torch.zeros(L, S, dtype=call.dtype).masked_fill(hidden, -1e9)
    shape = (L, S) if call.attn_mask.endswith("2") else ((call.batch or 1) * HEADS, L, S)
    if call.attn_mask.startswith("float"):
        return torch.randn(shape, dtype=torch.float64).to(call.dtype)
    hidden = torch.rand(shape) < 0.4
    hidden[..., 0] = False
    if call.empty_row:
        hidden[..., 1, :] = True
    return hidden


def make_padding(call: Call, S: int) -> Tensor | None:
    if call.padding is None:
        return None
    hidden = (torch.arange(S) >= S - 2).expand(call.batch or 1, S).clone()
    hidden[0] = False
    hidden = hidden[-1] if call.batch is None else hidden
    if call.padding == "bool":
        return hidden
    return torch.randn(hidden.shape, dtype=torch.float64).to(call.dtype).masked_fill(hidden, float("-inf"))


def everything(layer: nn.Module, call: Call, seed: int = 1) -> dict[str, Tensor]:
    """Output, attention weights, and the gradients of inputs, float attention mask and parameters, by our names."""
    torch.manual_seed(seed)
    inputs, mask, padding = make_inputs(call, layer)
    inputs = [x.requires_grad_() for x in inputs]
    leaf = dict(zip(("query", "key", "value"), inputs, strict=False))
    if mask is not None and mask.is_floating_point():
        leaf["attn_mask"] = mask.requires_grad_()
    parts = [moved(tlm.shard_activations, x, layer) for x in inputs]
    q, k, v = parts if len(parts) == 3 else parts * 3
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Support for mismatched")
        y, weights = layer(
            q, k, v, key_padding_mask=padding, need_weights=call.need_weights, attn_mask=mask,
            average_attn_weights=call.average, is_causal=call.is_causal,
        )  # fmt: skip
    y = moved(tlm.gather_activations, y, layer)
    found = {"y": y}
    loss = (y * torch.randn(y.shape, dtype=torch.float64).to(y.dtype)).sum()
    if weights is not None:
        found["weights"] = weights
        loss = loss + (weights * torch.randn(weights.shape, dtype=torch.float64).to(y.dtype)).sum()
    for p in layer.parameters():
        p.grad = None
    loss.backward()
    found |= {f"d {name}": x.grad for name, x in leaf.items()}
    grads = {name: full_tensor(p.grad) for name, p in layer.named_parameters() if p.grad is not None}
    if isinstance(layer, nn.MultiheadAttention):
        grads = from_stock(grads, stock_names(layer.embed_dim, layer.num_heads, layer.kdim, layer.vdim))
    return {name: x.detach() for name, x in (found | {f"d {name}": x for name, x in grads.items()}).items()}


def moved(move, x: Tensor, layer: nn.Module) -> Tensor:
    """x as the layer is given it, or what it returns as all of it, by tlm.shard_activations or gather_activations."""
    activations = getattr(layer, "activations", "replicated")
    if activations == "replicated":
        return x
    if x.dim() == 2:
        return move(x.unsqueeze(0), activations, layer.mesh).squeeze(0)
    return move(x, activations, layer.mesh, batch_first=layer.batch_first)


def difference(ours: dict[str, Tensor], stock: dict[str, Tensor]) -> dict[str, float]:
    """Largest absolute difference by name; infinite where a name, a shape, a dtype or a NaN differs."""
    found = {name: float("inf") for name in ours.keys() ^ stock.keys()}
    for name in ours.keys() & stock.keys():
        x, y = ours[name], stock[name]
        same = x.shape == y.shape and x.dtype == y.dtype and torch.equal(x.isnan(), y.isnan())
        error = (x - y).nan_to_num().abs()
        found[name] = (error.max().item() if error.numel() else 0.0) if same else float("inf")
    return found


def off(call: Call, grid: tuple[int, int] | None, **options) -> dict[str, float]:
    """What differs from stock by more than 1e-10, with the difference."""
    stock = stock_layer(call)
    ours = tlm.TwoLevelMultiheadAttention.from_torch(stock, mesh(grid), **options)
    found = difference(everything(ours, call), everything(stock, call))
    return {name: error for name, error in found.items() if not error <= 1e-10}


def text_of(function, *args, **kwargs) -> str:
    """The sentence of the GridError that a call raises, or "no error"."""
    try:
        function(*args, **kwargs)
    except tlm.GridError as error:
        return str(error)
    return "no error"
