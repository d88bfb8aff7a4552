"""One layer with a KV cache, by the raw pass, against the unsplit layer over all tokens at once."""

from dataclasses import dataclass

import torch
from torch import Tensor

from two_level_mha import reference
from two_level_mha.blocks import full_tensor
from two_level_mha.cache import KVCache
from two_level_mha.cache_layer import NO_CACHE, LayersCache
from two_level_mha.layer import GridAttention

from .calls import mesh
from .layer import random


@dataclass(frozen=True)
class Plan:
    """Sizes, features, and the tokens of each call."""

    calls: tuple[int, ...] = (7, 1, 1, 3, 1)
    layout: str = "position"
    scheme: str = "slices"  # of the module: "heads" stores whole heads
    combine: str = "reduce"
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 8
    embed_dim: int = 10
    batch: int = 3
    window: int | None = None
    padding: bool = False  # on the left, by a mask
    max_length: int | None = None
    dtype: torch.dtype = torch.float64

    @property
    def length(self) -> int:
        return sum(self.calls)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        h, k, d, D = self.heads, self.kv_heads, self.head_dim, self.embed_dim
        weights = {"q_weight": (h, d, D), "k_weight": (k, d, D), "v_weight": (k, d, D), "out_weight": (D, h, d)}
        return weights | {"q_bias": (h, d), "k_bias": (k, d), "v_bias": (k, d), "out_bias": (D,)}


class Cached(GridAttention):
    """Rows of x (B, L, D) against everything in the cache layer before them, and themselves."""

    def __init__(self, plan: Plan, grid: tuple[int, int] | None, weights: dict[str, Tensor]) -> None:
        super().__init__(
            num_heads=plan.heads, num_kv_heads=plan.kv_heads, head_dim=plan.head_dim, mesh=mesh(grid),
            scheme=plan.scheme, combine=plan.combine, debug=None,
        )  # fmt: skip
        self.window = plan.window
        self.store(weights)

    def forward(self, x_BLD: Tensor, layer=None, mask_BhLS: Tensor | None = None) -> Tensor:
        B, L, _ = x_BLD.shape
        call = NO_CACHE if layer is None else layer.begin(B, L)
        y, _ = self.attend(
            x_BLD, x_BLD, x_BLD, attn_mask=mask_BhLS, causal=call.position if mask_BhLS is None else None,
            window=self.window if mask_BhLS is None else None, cache=layer, call=call,
        )  # fmt: skip
        return y


def make(plan: Plan) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Weights, tokens x (B, all, D), and which a row sees (B, 1, all, all); the same on every rank."""
    torch.manual_seed(0)
    weights = {name: random(shape, plan.dtype) / shape[-1] ** 0.5 for name, shape in plan.shapes().items()}
    x_BLD = random((plan.batch, plan.length, plan.embed_dim), plan.dtype)
    return weights, x_BLD, visible(plan)


def visible(plan: Plan) -> Tensor:
    row, key = torch.arange(plan.length)[:, None], torch.arange(plan.length)[None]
    sees = key <= row
    if plan.window is not None:
        sees = sees & (key > row - plan.window)
    pads = torch.arange(plan.batch)[:, None, None, None] * plan.padding
    return sees & (key >= pads)


def new_cache(plan: Plan, grid: tuple[int, int] | None, layers: int = 1) -> LayersCache:
    sizes = {"num_layers": layers, "num_kv_heads": plan.kv_heads, "head_dim": plan.head_dim, "window": plan.window}
    return KVCache(sizes, mesh(grid), layout=plan.layout, max_length=plan.max_length)


def unsplit(weights: dict[str, Tensor], x_BLD: Tensor, sees: Tensor) -> Tensor:
    return reference.multihead_attention(x_BLD, x_BLD, x_BLD, **weights, mask=sees)[0]


def by_calls(module: Cached, plan: Plan, layer, x_BLD: Tensor, sees: Tensor) -> Tensor:
    """The outputs of plan.calls, one after the other."""
    ys, first = [], 0
    for tokens in plan.calls:
        end = first + tokens
        mask = sees[..., first:end, layer.first_key : end] if plan.padding else None
        ys.append(module(x_BLD[:, first:end], layer, mask))
        first = end
    return torch.cat(ys, 1)


def off(plan: Plan, grid: tuple[int, int] | None) -> float:
    """Largest difference of cached calls from the unsplit layer."""
    weights, x_BLD, sees = make(plan)
    module, cache = Cached(plan, grid, weights), new_cache(plan, grid)
    with torch.no_grad():
        y = by_calls(module, plan, cache.layers[0], x_BLD, sees)
    return (y - unsplit(weights, x_BLD, sees)).abs().max().item()


def gradients_off(plan: Plan, grid: tuple[int, int] | None) -> dict[str, float]:
    """The same for gradients through all calls, by name, and the output."""
    weights, x_BLD, sees = make(plan)
    weight = random(x_BLD.shape, plan.dtype)
    module, cache = Cached(plan, grid, weights), new_cache(plan, grid)
    mine = x_BLD.clone().requires_grad_()
    y = by_calls(module, plan, cache.layers[0], mine, sees)
    (y * weight).sum().backward()
    found = {"y": y, "x": mine.grad} | {name: full_tensor(p.grad) for name, p in module.named_parameters()}
    leaf = {name: p.clone().requires_grad_() for name, p in weights.items()}
    theirs = x_BLD.clone().requires_grad_()
    expected = unsplit(leaf, theirs, sees)
    (expected * weight).sum().backward()
    wanted = {"y": expected, "x": theirs.grad} | {name: p.grad for name, p in leaf.items()}
    return {name: (found[name] - wanted[name]).abs().max().item() for name in wanted}
