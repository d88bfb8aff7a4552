"""What a rank holds of a model and of its optimizers, which ranks hold the same, and checksums of it all."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from two_level_mha.errors import GridError
from two_level_mha.mesh import grid_group
from two_level_mha.stock import HoldsStock

Placed: TypeAlias = tuple[
    int, ...
]  # () for a plain tensor; of a DTensor the number of its mesh, and the axes that replicate it

Brought = TypeVar("Brought")

_WORDS = {1: torch.int8, 2: torch.int16}  # by element size; wider elements are several int32
_OVER_CHUNKS = 0x9E3779B97F4A7C15 - (1 << 64)  # any odd number with many digits


class Held(NamedTuple):
    """A tensor of this rank."""

    name: str
    tensor: Tensor  # as the model or the optimizer has it
    placed: Placed
    optimizer: Optimizer | None  # that writes it
    buffer: bool = False  # which forward may write to, and which may hold infinities, as masks do

    @property
    def local(self) -> Tensor:
        return local_of(self.tensor)

    def written(self) -> tuple[object, ...]:
        """Changes with every write that torch knows of, to the DTensor or to its local tensor, and with new memory."""
        x = self.local
        versions = [None if y.is_inference() else y._version for y in (self.tensor, x)]
        return (x.data_ptr(), x.shape, x.dtype, *versions)


def local_of(x: Tensor) -> Tensor:
    return (x._local_tensor if isinstance(x, DTensor) else x).detach()


class Places:
    """Where the parameters and buffers of a model are, as it is when this is made.

    A DTensor's placements say along which axes of its mesh ranks hold the same; a plain tensor is the same on every
    rank of the grid, and so is a DTensor whose mesh lies across the grid (fully_shard).
    groups: the process groups over which a gather, one after the other, reaches all ranks: the grid, and the axes of
    meshes that lead out of it.
    """

    def __init__(self, model: nn.Module) -> None:
        grids = [module.mesh for module in model.modules() if isinstance(module, HoldsStock)]
        self.grid = next((mesh for mesh in grids if mesh is not None and mesh.size() > 1), None)
        tensors = [*model.parameters(), *model.buffers()]
        self._meshes = list(dict.fromkeys(x.device_mesh for x in tensors if isinstance(x, DTensor)))
        self.known: list[Placed] = list(dict.fromkeys([(), *map(self._place, tensors)]))
        meshes = self._meshes if self.grid is None else [self.grid, *self._meshes]
        self.rank = dist.get_rank() if meshes else 0
        self.device = meshes[0].device_type if meshes else "cpu"
        whole = [] if self.grid is None else [grid_group(self.grid)]
        self._inside = {self.rank, *(rank for group in whole for rank in dist.get_process_group_ranks(group))}
        axes = [mesh.get_group(axis) for mesh in self._meshes for axis in range(mesh.ndim)]
        outside = {
            ranks: group
            for ranks, group in ((tuple(dist.get_process_group_ranks(group)), group) for group in axes)
            if not self._inside.issuperset(ranks)
        }
        # by name: who holds a group keeps its connections open, when the mesh is closed after a failure too
        self._groups = [group.group_name for group in (*whole, *outside.values())]

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        return [dist.distributed_c10d._resolve_process_group(name) for name in self._groups]

    def _place(self, x: Tensor) -> Placed:
        if not isinstance(x, DTensor):
            return ()
        axes = (axis for axis, placement in enumerate(x.placements) if placement.is_replicate())
        return (self._meshes.index(x.device_mesh), *axes)

    def of(self, name: str, x: Tensor) -> Placed:
        """Raises GridError if nothing was placed like x when this was made."""
        if isinstance(x, DTensor) and x.device_mesh not in self._meshes or (placed := self._place(x)) not in self.known:
            assert isinstance(x, DTensor)  # plain tensors are known
            raise GridError(
                f"{name} is placed by {x.placements} on {x.device_mesh}, as nothing of the model was when verify was "
                "called: call it after the model has been split, sharded and moved"
            )
        return placed

    def same_on(self, placed: Placed) -> tuple[int, ...]:
        """Ranks that hold the same as this one, as far as one mesh says."""
        if not placed:
            return tuple(self._inside)
        mesh = self._meshes[placed[0]]
        coordinate = mesh.get_coordinate()
        assert coordinate is not None  # this rank holds what is placed there
        at = [slice(None) if axis in placed[1:] else i for axis, i in enumerate(coordinate)]
        ranks = set(mesh.mesh[tuple(at)].flatten().tolist())
        across = self._inside.intersection(mesh.mesh.flatten().tolist()) == {self.rank}
        return tuple(ranks | self._inside if across else ranks)

    def gather(self, mine: Brought) -> dict[int, Brought]:
        """What every rank brings, by rank. A collective for each group."""
        found = {self.rank: mine}
        for group in self.groups:
            parts: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(parts, found, group=group)
            found = {rank: what for part in parts for rank, what in part.items()}
        return found

    def gather_row(self, row: list[int]) -> dict[int, list[int]]:
        """Rows of as many 64-bit integers from every rank, by rank. One all-gather for each group."""
        rows = torch.tensor([self.rank, *row])
        if self._groups:
            rows = rows.to(self.device)
        for group in self.groups:
            gathered = rows.new_empty(dist.get_world_size(group) * rows.numel())
            dist.all_gather_into_tensor(gathered, rows.view(-1), group=group)
            rows = gathered
        return {found[0]: found[1:] for found in rows.view(-1, 1 + len(row)).tolist()}


def joined(same_on: dict[int, tuple[int, ...]]) -> dict[int, tuple[int, ...]]:
    """All that hold the same as a rank, from what each says for itself: those of those as well."""
    sets = {rank: {rank} for rank in same_on}
    for rank, others in same_on.items():
        union = set().union(*(sets[other] for other in (rank, *others)))
        for other in union:
            sets[other] = union
    return {rank: tuple(sorted(ranks)) for rank, ranks in sets.items()}


def held_by(model: nn.Module, optimizers: Iterable[Optimizer], places: Places) -> list[Held]:
    """The parameters, buffers and moments of this rank, in the same order on all."""
    writers = {p: one for one in optimizers for group in one.param_groups for p in group["params"]}
    names = {p: name for name, p in model.named_parameters()}
    found = [Held(name, p, places.of(name, p), writers.get(p)) for p, name in names.items()]
    found += [Held(name, x, places.of(name, x), None, buffer=True) for name, x in model.named_buffers()]
    for number, (p, one) in enumerate(writers.items()):
        name = names.get(p, f"parameter {number} of the optimizers")
        for key, x in one.state.get(p, {}).items():
            if isinstance(x, Tensor):
                of = f"{key} of {name}"
                # a plain moment of a DTensor, such as the count of steps, is on the ranks that hold its block
                found.append(Held(of, x, places.of(of, x if isinstance(x, DTensor) else p), one))
    return [held for held in found if not held.tensor.is_meta and held.local.layout == torch.strided]


class Checksums:
    """64-bit checksums of the bits of tensors, on their device.

    The sum of the words, each times its place 1, 3, 5, .., modulo 2**64. In a chunk of 2**18 words (2**22 on an
    accelerator) one or two flipped bits, any change of one word, and two words exchanged always change it: a difference
    of two words is below 2**33, one of two places below 2**24. Three words or more can be changed so that the sum
    stays, as by 1, -2 and 1 in neighbours, but stray bits hardly ever are.
    """

    def __init__(self) -> None:
        self._places: dict[torch.device, Tensor] = {}

    def of(self, x: Tensor) -> Tensor:
        """The checksum, int64 () on the device of x, a plain tensor."""
        x = torch.view_as_real(x) if x.is_complex() else x
        words = x.reshape(-1).view(_WORDS.get(x.element_size(), torch.int32))
        chunk = 1 << (18 if x.device.type == "cpu" else 22)
        if x.device not in self._places:
            self._places[x.device] = torch.arange(1, 2 * chunk + 1, 2, device=x.device)
        places = self._places[x.device]
        total = torch.zeros((), dtype=torch.int64, device=x.device)
        for part in words.split(chunk):
            total = total * _OVER_CHUNKS + (part * places[: part.numel()]).sum()
        return total

    def all(self, tensors: Iterable[Tensor]) -> list[int]:
        return numbers([self.of(x) for x in tensors])


def numbers(scalars: list[Tensor]) -> list[Any]:
    """Their values, waiting once for each device."""
    values: list[Any] = [None] * len(scalars)
    for device in dict.fromkeys(x.device for x in scalars):
        at = [i for i, x in enumerate(scalars) if x.device == device]
        for i, value in zip(at, torch.stack([scalars[i] for i in at]).tolist(), strict=True):
            values[i] = value
    return values


def sum_of(x: Tensor) -> Tensor:
    """A sum, float64 (), that is finite only if every element is; it may overflow where all are."""
    x = torch.view_as_real(x) if x.is_complex() else x
    return (x.float() if x.element_size() < 4 else x).sum().double()


def not_finite(named: list[tuple[str, Tensor]]) -> dict[str, str]:
    """How many NaN and Inf values a tensor has, by name, for those that have any."""
    named = [(name, x) for name, x in named if x.is_floating_point() or x.is_complex()]
    sums = numbers([sum_of(x) for _, x in named])
    found = {}
    for (name, x), total in zip(named, sums, strict=True):
        if abs(total) < float("inf"):  # false for NaN
            continue
        x = x.float() if x.element_size() == 1 else x
        nan, inf = x.isnan().sum().item(), x.isinf().sum().item()
        if nan or inf:
            found[name] = f"has {nan} NaN and {inf} Inf among {x.numel()} values"
    return found


def tensors_in(name: str, value: object) -> Iterator[tuple[str, Tensor]]:
    """Tensors in nested lists, tuples and dicts, with their paths."""
    if isinstance(value, Tensor):
        if not value.is_meta and value.layout == torch.strided:
            yield name, value
    elif isinstance(value, (list, tuple, dict)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors_in(f"{name}[{key!r}]", part)


def random_state(device_type: str) -> list[Tensor]:
    """The states of torch's generators that every rank of a grid must have alike."""
    states = [torch.get_rng_state()]
    if device_type != "cpu":
        states.append(torch.get_device_module(device_type).get_rng_state())
    return states


def forward_hooks(model: nn.Module, hook: Callable[[str, object], None]) -> list[RemovableHandle]:
    """hook(name, output) after the forward call of every module inside; the handles."""

    def bound(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        return lambda _module, _args, output: hook(name, output)

    return [module.register_forward_hook(bound(name)) for name, module in model.named_modules() if name]
