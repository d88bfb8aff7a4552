"""Weight blocks: DTensor storage on ("head", "slice"), plain local tensors in compute."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.nn.functional import pad

from two_level_mha.names import MaybeTensor

COMBINES = ("reduce", "concat")

# name -> (tensor dim sharded over the head axis, over the slice axis); None: replicated
SHARDED_DIMS = {
    "q_weight": (0, 1),  # (h, d, D)
    "k_weight": (0, 1),
    "v_weight": (0, 1),
    "q_bias": (0, 1),  # (h, d)
    "k_bias": (0, 1),
    "v_bias": (0, 1),
    "bias_k": (0, 1),
    "bias_v": (0, 1),
    "out_weight": (1, 2),  # (D, h, d)
    "out_bias": (None, None),  # (D,)
}


# Of gates that have a projection of their own; they lie as q_weight and q_bias.
GATE_DIMS = {"gate_weight": (0, 1), "gate_bias": (0, 1)}

# Of projections of relative positions, to what queries and keys are multiplied with.
POSITION_DIMS = {f"pos_{letter}_{part}": (0, 1) for letter in "qk" for part in ("weight", "bias")}

QUERY_SIDE = ("q_weight", "q_bias", "out_weight", *GATE_DIMS)


def placements(name: str, combine: str, whole_heads: bool = False) -> list[Placement]:
    """Placements of parameter `name` on ("head", "slice").

    combine="concat" replicates out_weight; whole_heads shards the query side along heads over both axes. What has no
    layout, such as the weight of a norm, is replicated.
    """
    dims = (SHARDED_DIMS | GATE_DIMS | POSITION_DIMS).get(name, (None, None))
    if name == "out_weight" and combine == "concat":
        dims = (None, None)
    elif whole_heads and name in QUERY_SIDE:
        dims = (dims[0], dims[0])
    return [Replicate() if dim is None else Shard(dim) for dim in dims]


def dealt(size: int, parts: int, part: int) -> tuple[int, int]:
    """First and count of what Shard deals to a part of a dim: ceil(size / parts), the last less or nothing."""
    share = -(-size // parts)
    first = min(share * part, size)
    return first, min(share, size - first)


def filled(x: Tensor, dim: int, width: int) -> Tensor:
    """x with zeros behind it along a dim."""
    if x.shape[dim] == width:
        return x
    return pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, width - x.shape[dim]))


def block(full: Tensor, name: str, mesh: DeviceMesh | None, combine: str, whole_heads: bool = False) -> Tensor:
    """`full`, the same on every rank, as this rank stores it: a DTensor, or a copy without a mesh.

    A copy, so that a rank's block does not keep the storage of the whole alive.
    """
    if mesh is None:
        return full.clone(memory_format=torch.contiguous_format)
    return laid_out(full, mesh, placements(name, combine, whole_heads))


def laid_out(full: Tensor, mesh: DeviceMesh, layout: Sequence[Placement]) -> DTensor:
    """This rank's of `full`, the same on every rank, by placements on the axes of the mesh."""
    ranks = [(mesh.size(axis), mesh.get_local_rank(axis)) for axis in range(mesh.ndim)]
    stride = torch.empty(full.shape, device="meta").stride()
    return DTensor.from_local(
        own_part(full, layout, ranks), mesh, layout, run_check=False, shape=full.shape, stride=stride
    )


def own_part(full: Tensor, layout: Sequence[Placement], ranks: list[tuple[int, int]]) -> Tensor:
    """A copy of what placements give one rank; ranks: size and index along each axis."""
    for placement, (size, rank) in zip(layout, ranks, strict=True):
        if isinstance(placement, Shard):
            full = full.narrow(placement.dim, *dealt(full.shape[placement.dim], size, rank))
    return full.clone(memory_format=torch.contiguous_format)


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor behind a block; a collective for a DTensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def joined(q: Tensor | None, gate: Tensor | None) -> Tensor | None:
    """(2 H, ..), behind each head of q (H, ..) its gate's; None is zeros, or of both None."""
    known = q if gate is None else gate
    if known is None:
        return None
    parts = [known.new_zeros(known.shape) if x is None else x for x in (q, gate)]
    return torch.stack(parts, 1).flatten(0, 1)


class _Local(torch.autograd.Function):
    """All local blocks of a module at once: to_local() parameter by parameter costs several times as much."""

    @staticmethod
    def forward(ctx: Any, *params: DTensor) -> tuple[Tensor, ...]:  # ctx: torch keeps on it what forward leaves there
        ctx.specs = [p._spec for p in params]
        blocks = tuple(p._local_tensor.view_as(p._local_tensor) for p in params)
        ctx.mark_non_differentiable(*(x for x, p in zip(blocks, params, strict=True) if not p.requires_grad))
        return blocks

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[DTensor | None, ...]:
        return tuple(
            None if g is None else DTensor(g, spec, requires_grad=False)
            for g, spec in zip(grads, ctx.specs, strict=True)
        )


def local_blocks(params: Sequence[MaybeTensor]) -> list[MaybeTensor]:
    """The local tensors of parameters, in order; plain ones and None stay as they are."""
    split = [p for p in params if isinstance(p, DTensor)]
    if not split:
        return list(params)
    if torch.compiler.is_compiling():
        return [p.to_local() if isinstance(p, DTensor) else p for p in params]
    if torch.is_grad_enabled():
        locals_ = iter(_Local.apply(*split))
    else:
        locals_ = iter([p._local_tensor for p in split])
    return [next(locals_) if isinstance(p, DTensor) else p for p in params]
