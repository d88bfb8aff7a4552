"""Activations that stay split over all ranks of a grid between layers: each rank has its rows, or its sequences.

The order is csrc/comm/split.h's: rank (i, j) has part j * n + i; of rows two chunks, which balances causal attention.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from two_level_mha import _C
from two_level_mha.context import ACTIVATIONS
from two_level_mha.errors import GridError
from two_level_mha.mesh import Place, place_on
from two_level_mha.names import Activations
from two_level_mha.operators import ops as _ops


def check_activations(activations: str) -> None:
    """Raises GridError for a name that is none."""
    if activations not in ACTIVATIONS:
        raise GridError(f"activations must be one of {', '.join(ACTIVATIONS)}, got {activations!r}")


def shard_activations(
    x: Tensor, activations: Activations, mesh: DeviceMesh | None, *, batch_first: bool = True
) -> Tensor:
    """This rank's part of x (B, L, ..), the same on every rank; (L, B, ..) if not batch_first.

    activations: "sequence", rows of every sequence: chunks t and 2 P - 1 - t of 2 P; "batch", one of P chunks of the
    sequences; "replicated": x itself. Where P does not divide them, the last parts have less, or none. The gradient is
    put together from the parts of all ranks.
    Raises GridError for another name, or for fewer dims than two.
    """
    place = _place(x, activations, mesh)
    if activations == "replicated" or place.grid.size == 1:
        return x
    return keep_part(x, activations, place, batch_first)


def gather_activations(
    x: Tensor, activations: Activations, mesh: DeviceMesh | None, *, batch_first: bool = True
) -> Tensor:
    """The whole of which every rank has the part that shard_activations gives; a collective.

    The gradient is this rank's part of the whole's, which must be the same on every rank, as that of a loss of all is.
    Raises GridError, on every rank, where the parts are none of a whole.
    """
    place = _place(x, activations, mesh)
    if activations == "replicated" or place.grid.size == 1:
        return x
    (size,) = whole_sizes([tuple(x.shape)], activations, place, int(batch_first == (activations == "sequence")))
    return gather_part(x, size, activations, place, batch_first)


def keep_part(x: Tensor, activations: str, place: Place, batch_first: bool) -> Tensor:
    """shard_activations on a grid of several ranks."""
    whole = x if batch_first else x.transpose(0, 1)
    part = _ops.shard_activations(whole, activations == "sequence", place.args[0], place.groups[2])
    return part if batch_first else part.transpose(0, 1).contiguous()


def gather_part(x: Tensor, size: int, activations: str, place: Place, batch_first: bool) -> Tensor:
    """gather_activations where the size of the whole is known."""
    part = x if batch_first else x.transpose(0, 1)
    whole = _ops.gather_activations(part, size, activations == "sequence", place.args[0], place.groups[2])
    return whole if batch_first else whole.transpose(0, 1).contiguous()


def used_apart(xs: Sequence[Tensor], place: Place, reduce_dtype: torch.dtype | None = None) -> list[Tensor]:
    """Tensors that are the same on every rank and used differently, with the sum over the ranks as their gradient."""
    if place.grid.size == 1 or not xs:
        return list(xs)
    return _ops.replicated(xs, place.grid.size, place.groups[2], reduce_dtype)


def dropped(x: Tensor, p: float, shape: tuple[int, ...], own: Callable[[Tensor], Tensor]) -> Tensor:
    """x without what dropout takes of the whole, whose shape is given; own: gives x's part of it."""
    kept = torch.empty(shape, dtype=torch.bool, device=x.device).bernoulli_(1.0 - p)
    scale = 0.0 if p == 1.0 else 1.0 / (1.0 - p)
    return x * own(kept).to(x.dtype).mul_(scale)


def whole_sizes(shapes: list[tuple[int, ...]], activations: str, place: Place, dim: int) -> list[int]:
    """The sizes along `dim` of the wholes of which every rank has its part. A collective, but for a graph being traced,
    which takes the parts for equal.

    Raises GridError, on every rank, for parts of other shapes than those of a whole.
    """
    ranks = place.grid.size
    if torch.compiler.is_compiling() or place.control is None:
        return [shape[dim] * ranks for shape in shapes]
    everyone = place.control.gather(shapes, f"comparing the sizes of activations split by {activations}")
    found = []
    for i, _ in enumerate(shapes):
        parts = [shapes_of_rank[i] for shapes_of_rank in everyone]
        if any(len(part) <= max(dim, 1) for part in parts):
            raise GridError(f"activations={activations!r} splits tensors with dims for sequences and rows, got {parts}")
        size = sum(part[dim] for part in parts)
        n, m = place.grid.head_groups, place.grid.slices
        expected = _C.split_sizes(size, n, m, activations == "sequence")
        for rank, part in enumerate(parts):
            others = part[:dim] + part[dim + 1 :], parts[0][:dim] + parts[0][dim + 1 :]
            if part[dim] != expected[rank] or others[0] != others[1]:
                raise GridError(
                    f"activations={activations!r}: rank {rank} of the grid gave {part}, where dim {dim} of {size} in "
                    f"all must be {expected[rank]} there, and other dims as on rank 0, {parts[0]}: split by "
                    "two_level_mha.shard_activations"
                )
        found.append(size)
    return found


def stand_in(x: Tensor, dim: int, size: int) -> Tensor:
    """A tensor of x's dtype and device with another size along `dim`, of one element's memory."""
    shape = (*x.shape[:dim], size, *x.shape[dim + 1 :])
    return x.new_empty(()).expand(shape)


def _place(x: Tensor, activations: str, mesh: DeviceMesh | None) -> Place:
    check_activations(activations)
    if x.dim() < 2:
        raise GridError(f"x must have dims for sequences and rows, (B, L, ..), got {x.dim()}")
    return place_on(mesh)
