"""One attention layer, whole or as the block of one rank, straight through the ops of the pass.

Distributed tests build the whole layer on every rank from the same seed, cut the rank's blocks, run enter and
leave, and compare values and gradients with blocks of the reference's.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from two_level_mha import reference
from two_level_mha.context import constants, layer_numbers, size_numbers
from two_level_mha.mesh import Grid, Place
from two_level_mha.profile import Profile

from .device import DEVICE

# the weights that `enter` takes, in its order
ENTER_WEIGHTS = ("q_weight", "k_weight", "v_weight", "q_bias", "k_bias", "v_bias", "bias_k", "bias_v")


@dataclass(frozen=True)
class Case:
    """A call of a layer: sizes, scheme and features. `mask` is a name, see `make_mask`."""

    scheme: str = "slices"
    combine: str = "reduce"
    heads: int = 12
    kv_heads: int = 12
    head_dim: int = 8
    embed_dim: int = 10
    batch: int = 2
    length: int = 6
    keys: int | None = None  # None: key = value = query
    mask: str = "none"
    causal: int | None = None
    window: int | None = None
    softcap: float = 0.0
    dropout: float = 0.0
    extra_keys: bool = False  # add_bias_kv and add_zero_attn
    gated: bool = False  # and with sinks of the heads; without additive masks, windows and dropout
    sinks: bool = False
    scores: bool = False  # with a function of q and of distances added to the scores; likewise
    bias: bool = True
    batch_first: bool = True
    dtype: torch.dtype = torch.float64
    reduce_dtype: torch.dtype | None = None

    @property
    def whole_heads(self) -> bool:
        return self.scheme == "heads"

    @property
    def all_keys(self) -> int:
        return (self.keys or self.length) + 2 * self.extra_keys


@lru_cache
def place(n: int, m: int, cache_shares: tuple[int, ...] = ()) -> Place:
    """This rank on an (n, m) grid over the whole world."""
    if n * m == 1:
        return Place()
    mesh = init_device_mesh(DEVICE, (n, m), mesh_dim_names=("head", "slice"))
    groups = (mesh.get_group("slice"), mesh.get_group("head"), dist.group.WORLD)
    return Place(
        Grid(n, m), *mesh.get_coordinate(), tuple(group.group_name for group in groups), cache_shares=cache_shares
    )


def grid_arguments(at: Place) -> tuple:
    """grid, slice_group and head_group of the operators that take no call."""
    return [at.grid.head_groups, at.grid.slices, at.head_group, at.slice], *at.groups[:2]


def decided(case: Case, at: Place, *, scheme: str | None = None, position: int = 0) -> tuple:
    """constants and sizes of the operators; scheme: the layout of a cache that holds `position` tokens."""
    layer = layer_numbers(
        at,
        Profile.for_device(DEVICE).numbers,
        num_heads=case.heads,
        num_kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        embed_dim=case.embed_dim,
        key_dim=case.embed_dim,
        value_dim=case.embed_dim,
        bias=case.bias,
        out_bias=case.bias,
        bias_kv=case.extra_keys,
        whole_heads=case.whole_heads,
        concat=case.combine == "concat",
        reduce_dtype=case.reduce_dtype,
        gated=case.gated,
    )
    text = constants(
        layer,
        at.groups,
        shares=at.shares,
        scheme=scheme or case.scheme,
        causal=case.causal is not None,
        element_size=case.dtype.itemsize,
        zero_key=case.extra_keys,
        batch_first=case.batch_first,
    )
    return text, size_numbers(batch=case.batch, length=case.length, keys=case.keys or case.length, position=position)


def make_weights(case: Case) -> dict[str, Tensor]:
    h, k, d, D = case.heads, case.kv_heads, case.head_dim, case.embed_dim
    queries = 2 * h if case.gated else h
    shapes = {"q_weight": (queries, d, D), "k_weight": (k, d, D), "v_weight": (k, d, D), "out_weight": (D, h, d)}
    if case.bias:
        shapes |= {"q_bias": (queries, d), "k_bias": (k, d), "v_bias": (k, d), "out_bias": (D,)}
    if case.extra_keys:
        shapes |= {"bias_k": (k, d), "bias_v": (k, d)}
    if case.sinks:
        shapes |= {"sinks": (h,)}
    return {name: random(shape, case.dtype) / shape[-1] ** 0.5 for name, shape in shapes.items()}


def make_inputs(case: Case) -> list[Tensor]:
    """The distinct inputs, (B, L, D): one, or query, key and value."""
    lengths = [case.length] if case.keys is None else [case.length, case.keys, case.keys]
    return [random((case.batch, length, case.embed_dim), case.dtype) for length in lengths]


def make_mask(case: Case) -> Tensor | None:
    """By name; with extra keys over the given keys only. "bias" is trained,
    the others are bool or constant.
    """
    shape = (case.batch, case.heads, case.length, case.keys or case.length)
    if case.mask == "none":
        return None
    if case.mask == "padding":
        return (torch.arange(shape[3]) < shape[3] - 2).expand(shape[0], 1, 1, shape[3])
    if case.mask == "empty rows":
        mask = torch.rand(shape[0], 1, *shape[2:]) < 0.7
        mask[0, :, 1] = False
        return mask
    if case.mask == "bias":
        return random((1, *shape[1:]), case.dtype)
    raise ValueError(case.mask)


def random(shape, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def make(case: Case, seed: int = 0) -> tuple[dict[str, Tensor], list[Tensor], Tensor | None, Tensor, Tensor]:
    """Weights, inputs, mask, the loss's weight (B, L, D) and the dropout seed; all ranks alike."""
    torch.manual_seed(seed)
    weights, inputs, mask = make_weights(case), make_inputs(case), make_mask(case)
    weight = random((case.batch, case.length, case.embed_dim), case.dtype)
    return weights, inputs, mask, weight, torch.tensor([99])


def leaves(weights: dict[str, Tensor], inputs: list[Tensor], mask: Tensor | None) -> dict[str, Tensor]:
    """Everything that gets a gradient, by name, as leaves."""
    found = {**weights, **dict(zip(("query", "key", "value"), inputs, strict=False))}
    if mask is not None and mask.is_floating_point():
        found["mask"] = mask
    return {name: x.detach().clone().requires_grad_() for name, x in found.items()}


def finish(y_BLD: Tensor, weight: Tensor, leaf: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output and the gradient of every leaf, by name."""
    grads = torch.autograd.grad((y_BLD * weight).sum(), list(leaf.values()), allow_unused=True)
    found = {"y": y_BLD.detach()}
    for (name, x), grad in zip(leaf.items(), grads, strict=True):
        found[name] = torch.zeros_like(x) if grad is None else grad
    return found


def whole(case: Case, m: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """The unsplit layer by the reference: output and gradients. m matters to scheme "independent" only."""
    weights, inputs, mask, weight, dropout_seed = make(case, seed)
    leaf = leaves(weights, inputs, mask)
    xs = [leaf[name] for name in ("query", "key", "value") if name in leaf]
    xs = xs * 3 if len(xs) == 1 else xs
    if case.gated or case.sinks or case.scores:
        return finish(with_after(case, xs[0], leaf, mask), weight, leaf)
    keep = None
    if case.dropout:
        sizes = [case.batch, case.heads, case.length, case.all_keys]
        keep = torch.ops.two_level_mha.dropout_keep_mask(dropout_seed, case.dropout, sizes)
        if case.scheme == "independent":  # the slices of a head drop alike
            keep = keep.repeat_interleave(m, 1)
    y_BLD, _ = reference.multihead_attention(
        *xs,
        **{name: leaf[name] for name in weights},
        add_zero_attn=case.extra_keys,
        mask=leaf.get("mask", mask),
        slices=m if case.scheme == "independent" else 1,
        causal=case.causal,
        window=case.window,
        softcap=case.softcap,
        dropout_p=case.dropout,
        keep_BHLS=keep,
    )
    return finish(y_BLD, weight, leaf)


def added(q_BHLd: Tensor, rows_L: Tensor, keys: int) -> Tensor:
    """What is added to the scores of rows at these positions."""
    return q_BHLd.sum(3, keepdim=True) * (rows_L.unsqueeze(1) - torch.arange(keys)).cos()


def with_after(case: Case, x_BLD: Tensor, leaf: dict[str, Tensor], mask: Tensor | None) -> Tensor:
    """The unsplit layer with gates, sinks and added scores, from x alone."""
    q, k, v = (
        torch.einsum("bld,hed->bhle", x_BLD, leaf[f"{name}_weight"])
        + (leaf[f"{name}_bias"][:, None] if case.bias else 0.0)
        for name in "qkv"
    )
    q, gate = q.unflatten(1, (-1, 2)).unbind(2) if case.gated else (q, None)
    k, v = (x.repeat_interleave(case.heads // case.kv_heads, 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * case.head_dim**-0.5
    if case.scores:
        scores = scores + added(q, torch.arange(case.length), case.length)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if case.causal is not None:
        hidden = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1 + case.causal)
        scores = scores.masked_fill(hidden, -torch.inf)
    if case.sinks:
        scores = torch.cat([scores, leaf["sinks"].view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], 3)
    o = scores.softmax(3)[..., : k.shape[2]] @ v
    o = o if gate is None else o * gate.sigmoid()
    y = torch.einsum("bhle,dhe->bld", o, leaf["out_weight"])
    return y + leaf["out_bias"] if case.bias else y


def block(name: str, x: Tensor, case: Case, at: Place) -> Tensor:
    """What rank (i, j) holds of a whole parameter or gradient;
    anything that is not split is returned whole.
    """
    if name == "out_weight":
        if case.combine == "concat":
            return x
        head, width = 1, 2
    elif name in ("q_weight", "k_weight", "v_weight", "q_bias", "k_bias", "v_bias", "bias_k", "bias_v"):
        head, width = 0, 1
    else:
        return x
    if case.whole_heads and name in ("q_weight", "q_bias", "out_weight"):
        width = head
    grid = at.grid
    return part(part(x, head, grid.head_groups, at.head_group), width, grid.slices, at.slice).contiguous()


def part(x: Tensor, dim: int, parts: int, number: int) -> Tensor:
    """What Shard deals to a part: ceil(size / parts), the last ones less or nothing."""
    share = -(-x.shape[dim] // parts)
    return x[(slice(None),) * dim + (slice(number * share, (number + 1) * share),)]


def split(case: Case, at: Place, seed: int = 0, **mutation) -> dict[str, Tensor]:
    """The layer on this rank by the ops: output and the gradients of its blocks.

    mutation: `blocks` = another Place whose projections are taken, `scale`, or fields of `at` to pretend.
    """
    weights, inputs, mask, weight, dropout_seed = make(case, seed)
    owner = mutation.pop("blocks", at)
    scale = mutation.pop("scale", None)
    at = replace(at, **mutation)
    blocks = {name: block(name, x, case, at if name == "out_weight" else owner) for name, x in weights.items()}
    leaf = leaves(blocks, inputs, mask)
    return finish(run(case, at, leaf, mask, dropout_seed, scale), weight, leaf)


def run(
    case: Case,
    at: Place,
    leaf: dict[str, Tensor],
    mask: Tensor | None,
    dropout_seed: Tensor,
    scale: float | None = None,
) -> Tensor:
    """enter and leave on a rank's leaves; y (B, L, D)."""
    ops = torch.ops.two_level_mha
    xs = [leaf[name] for name in ("query", "key", "value") if name in leaf]
    if not case.batch_first:
        xs = [x.transpose(0, 1) for x in xs]
    xs = xs * 3 if len(xs) == 1 else xs
    call = decided(case, at)
    shared = [leaf["sinks"]] if case.sinks else None
    rows = [torch.arange(case.length).view(1, 1, -1, 1)] if case.scores else None
    q, k, v, *after = ops.enter(*xs, *(leaf.get(name) for name in ENTER_WEIGHTS), rows, shared, *call)
    q_rows = after.pop(0) if case.scores else None
    after = after[case.scores :]
    if case.gated:
        q, gate = q.unflatten(1, (-1, 2)).unbind(2)
        after.insert(0, gate.sigmoid())
    scores = added(q, q_rows.flatten(), case.length) if case.scores else None
    attn_mask = leaf.get("mask", mask)
    if attn_mask is not None and case.extra_keys:
        attn_mask = torch.nn.functional.pad(attn_mask, (0, 2), value=float(attn_mask.dtype == torch.bool))
    seed = dropout_seed if case.dropout else None
    y = ops.leave(
        q, k, v, leaf["out_weight"], leaf.get("out_bias"), attn_mask, scale, case.causal, case.window, case.softcap,
        case.dropout, seed, *call, None, after or None, scores,
    )  # fmt: skip
    return y if case.batch_first else y.transpose(0, 1)


def errors(case: Case, at: Place, seed: int = 0, **mutation) -> dict[str, float]:
    """Largest absolute difference between this rank's results and its blocks of the whole layer's,
    by name.
    """
    expected = whole(case, at.grid.slices, seed)
    found = {}
    for name, x in split(case, at, seed, **mutation).items():
        wanted = block(name, expected[name], case, at)
        assert x.shape == wanted.shape, (name, x.shape, wanted.shape)
        found[name] = (x - wanted).abs().max().item() if x.numel() else 0.0
    return found
