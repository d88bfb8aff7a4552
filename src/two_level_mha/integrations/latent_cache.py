"""Multi-head latent attention with a cache that keeps latents, and not each head's keys and values, by position.

What takes latents to keys is taken into the queries, what takes them to values behind attention. So all heads attend to
one: its keys are latents and rotary keys, its values the latents, stored once over all ranks in a row.

Letters: as in latent.py, and C = R + T.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import linear

from two_level_mha.activations import used_apart
from two_level_mha.blocks import SHARDED_DIMS, dealt, filled
from two_level_mha.cache_layer import CachedCall, CacheLayer
from two_level_mha.layer import GridAttention
from two_level_mha.low_rank import LowRank, low_rank
from two_level_mha.operators import ops as _ops
from two_level_mha.turn import Turn

if TYPE_CHECKING:
    from two_level_mha.integrations.latent import LatentAttention

MASKED_ROWS = 512  # whose keys are told by a mask at a time


def own_latents(latent_B1LR: Tensor, key_B1LT: Tensor, cache: CacheLayer, position: int) -> tuple[Tensor, Tensor]:
    """What this rank keeps of the tokens from `position` on, as the cache takes it: keys (B, 1, L of its own, C), whose
    first R columns are the values too, so values of no width.
    """
    own = cache.place.turn.of(torch.cat([latent_B1LR, key_B1LT.to(latent_B1LR.dtype)], 3), 2, position)
    return own, own[..., :0]


def attended_latents(
    layer: "LatentAttention",
    query: Tensor,
    cache: CacheLayer,
    call: CachedCall,
    rows: list[Tensor],
    *,
    new: tuple[Tensor, Tensor, int],
    mask: Tensor | None,
    causal: int | None,
    softcap: float,
    gate: Tensor | None,
) -> Tensor:
    """Y (B, L, D), whole on every rank, of what queries are projected from (B, L, ..), whole too.

    rows: what `turned` takes, then the factors of the queries if there are any. new: what own_latents gave, of how many
    tokens. gate: as `attend` takes it.
    """
    place, rank = layer.place, layer.rank
    n, turn = place.grid.head_groups, cache.place.turn
    own = dict(zip(SHARDED_DIMS, GridAttention.own_blocks(layer), strict=True))
    v_weight, out_weight = own["v_weight"], own["out_weight"]
    assert v_weight is not None and out_weight is not None
    H, out_bias, adapted = v_weight.shape[0], own["out_bias"], low_rank(layer)
    if layer.combine == "concat":  # where every rank has all of it
        (out_weight,) = used_apart([out_weight], place, layer.reduce_dtype)
        first, count = dealt(layer.v_dim, place.grid.slices, place.slice)
        out_weight = out_weight.narrow(1, place.head_group * H, H).narrow(2, first, count)
    if adapted is not None:
        out_weight, out_bias = adapted.widened(out_weight, out_bias, in_pass=False)
    q_BHLC = _queries(layer, own, adapted, query, rows)
    q_BhLC = _ops.all_gather(q_BHLC, 1, n, place.groups[1])
    k_B1SC, _ = cache.append(*new, for_gradients=q_BhLC.requires_grad)
    if mask is not None:
        (mask,) = used_apart([mask], place, layer.reduce_dtype)
        mask = turn.of(mask, 3, call.first_key) if mask.shape[-1] != 1 else mask
    if turn.run != 1 and causal is not None and query.shape[1] == 1 and causal >= call.position:
        causal = None  # one row, which sees all that the cache gives
    seen = None if causal is None else causal - call.first_key
    out, logsumexp = _in_turn(
        q_BhLC, k_B1SC, mask, seen, turn, call.first_key, rank=rank, scale=layer.scaling, softcap=softcap
    )
    o_BHLR = _merged(layer, out, logsumexp).to(v_weight.dtype)
    v_BHLE = o_BHLR @ v_weight.transpose(1, 2)
    for a, b in () if adapted is None else adapted.own("v", v_weight):
        v_BHLE = v_BHLE + (linear(o_BHLR.to(a.dtype), a) @ b.transpose(1, 2)).to(v_BHLE.dtype)
    if gate is not None:
        (gate,) = used_apart([layer.gate_function(gate)], place, layer.reduce_dtype)
        v_BHLE = v_BHLE * gate.narrow(2, place.head_group * H, H).transpose(1, 2).unsqueeze(3).to(v_BHLE.dtype)
    y_BLD = _summed(layer, v_BHLE, out_weight, out_bias)
    return y_BLD if adapted is None else adapted.finished(y_BLD)


def _in_turn(
    q_BhLC: Tensor, k_B1SC: Tensor, mask: Tensor | None, causal: int | None, turn: Turn, first_key: int, *, rank: int,
    scale: float, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Out (B, h, L, R) and logsumexp over the keys from first_key on, where causal counts from, that are this rank's.

    They are a cycle apart, as a kernel takes them, or if its run has several not equally far: then a mask says which of
    them a row sees, of so many rows at a time.
    """
    first = turn.before(first_key)
    if turn.run == 1 or causal is None or not turn.run:
        seen = None if causal is None or not turn.run else causal - (turn.position(first) - first_key)
        return _ops.partial_attention(
            q_BhLC, k_B1SC, k_B1SC[..., :rank], mask, scale=scale, causal=seen, softcap=softcap, key_stride=turn.cycle
        )
    at_S = turn.position(torch.arange(k_B1SC.shape[2], device=k_B1SC.device) + first) - first_key
    parts = []
    for begin in range(0, q_BhLC.shape[2], MASKED_ROWS):
        q = q_BhLC[:, :, begin : begin + MASKED_ROWS]
        rows = torch.arange(q.shape[2], device=q.device)[:, None] + begin + causal
        sees = (at_S <= rows)[None, None]
        own = mask if mask is None or mask.shape[2] == 1 else mask[:, :, begin : begin + MASKED_ROWS]
        if own is not None:
            sees = own & sees if own.dtype is torch.bool else own.masked_fill(~sees, float("-inf"))
        parts.append(_ops.partial_attention(q, k_B1SC, k_B1SC[..., :rank], sees, scale=scale, softcap=softcap))
    out, logsumexp = zip(*parts, strict=True)
    return torch.cat(out, 2), torch.cat(logsumexp, 2)


def _queries(
    layer: "LatentAttention",
    own: dict[str, Tensor | None],
    adapted: LowRank | None,
    query: Tensor,
    rows: list[Tensor],
) -> Tensor:
    """Queries (B, H, L, C) of this rank's head group on latents and rotary keys, used by each rank for its own keys."""
    place, m, j = layer.place, layer.place.grid.slices, layer.place.slice
    slices, width = place.groups[0], layer.nope + layer.rope
    (x,) = used_apart([query], place, layer.reduce_dtype)
    weight, bias, k_weight = own["q_weight"], own["q_bias"], own["k_weight"]
    assert weight is not None and k_weight is not None
    q = linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
    for a, b in () if adapted is None else adapted.own("q", weight):
        q = q + linear(linear(x.to(a.dtype), a), b.flatten(0, 1)).to(q.dtype)
    q_BHLE = q.unflatten(2, weight.shape[:2]).transpose(1, 2)
    q_BHLd = layer.gathered(_ops.all_gather(filled(q_BHLE, 3, -(-width // m)), 3, m, slices), width)
    nope, rope = q_BHLd.split([layer.nope, layer.rope], 3)
    nope = nope.narrow(3, *dealt(layer.nope, m, j))
    on_latents = nope @ k_weight.to(nope.dtype)
    for a, b in () if adapted is None else adapted.own("k", k_weight):
        on_latents = on_latents + ((nope.to(b.dtype) @ b) @ a).to(nope.dtype)
    if m > 1:  # each rank uses the sum for its own keys: its gradient is summed too
        (on_latents,) = _ops.replicated([_ops.all_reduce(on_latents, m, slices)], m, slices)
    q_BHLC = torch.cat([on_latents, layer.turned(rope, rows)], 3)
    return q_BHLC if layer.temperature is None else q_BHLC * rows[-1].to(q_BHLC.dtype)


def _merged(layer: "LatentAttention", o_BhLR: Tensor, lse_BhL: Tensor) -> Tensor:
    """Over the keys of all ranks, of this rank's head group: (B, H, L, R). One exchange along each axis, in the
    logsumexp's dtype, of both together.
    """
    (n, m), (slices, heads, _) = (layer.place.grid.head_groups, layer.place.grid.slices), layer.place.groups
    both = torch.cat([o_BhLR.to(lse_BhL.dtype), lse_BhL.unsqueeze(3)], 3)
    both = _over_parts(_ops.all_to_all(both, 1, 0, n, heads), n)
    return _over_parts(_ops.all_gather(both, 0, m, slices), m)[..., :-1]


def _over_parts(both: Tensor, parts: int) -> Tensor:
    """(parts * B, H, L, R + 1) -> (B, H, L, R + 1): outputs and their logsumexp."""
    if parts == 1:
        return both
    outs, lses = both[..., :-1], both[..., -1]
    out, lse = _ops.merge_partials(*(x.unflatten(0, (parts, -1)).contiguous() for x in (outs, lses)))
    return torch.cat([out, lse.unsqueeze(3)], 3)


def _summed(layer: "LatentAttention", v_BHLE: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The output projection of every rank's part, summed over the grid."""
    place = layer.place
    y = linear(v_BHLE.transpose(1, 2).flatten(2), weight.flatten(1).to(v_BHLE.dtype))
    y = _ops.all_reduce(y.to(layer.reduce_dtype or y.dtype), place.grid.size, place.groups[2]).to(y.dtype)
    return y if bias is None else y + bias.to(y.dtype)
