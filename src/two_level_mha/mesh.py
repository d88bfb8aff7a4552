"""The grid of ranks: n head groups times m slices of the head dimension."""

import datetime
import enum
import math
import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from two_level_mha import _C
from two_level_mha.control import Control, MeshKey, control_of, controls, default_timeout, same_in, set_timeout
from two_level_mha.errors import GridError
from two_level_mha.facts import facts_alike
from two_level_mha.profile import Profile, resolve_profile
from two_level_mha.turn import Turn, check_groups, checked_shares, of_group, turn_of

AXES = ("head", "slice")


@dataclass(frozen=True)
class Grid:
    """P = head_groups * slices ranks. Rank (i, j), number i * slices + j, owns head group i and slice j of every head.

    Pure arithmetic: valid for a layer if head_groups divides its KV heads. A slice has ceil(head_dim / slices) columns
    of every head; where slices does not divide head_dim the last ones have less, or nothing.
    """

    head_groups: int = 1
    slices: int = 1

    def __post_init__(self) -> None:
        for name, value in (("head_groups", self.head_groups), ("slices", self.slices)):
            if not isinstance(value, Integral):
                raise GridError(f"{name} must be an integer, got {value!r}")
        if self.head_groups < 1 or self.slices < 1:
            raise GridError(
                f"head_groups and slices must be positive, got head_groups={self.head_groups}, slices={self.slices}"
            )

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.head_groups * self.slices

    def for_kv_heads(self, num_kv_heads: int) -> "Grid":
        """Of as many ranks: with one key/value head, which no head groups share, in one row."""
        return self if num_kv_heads > 1 else Grid(1, self.size)

    def for_whole_heads(self, num_heads: int) -> "Grid":
        """Of as many ranks, with as many head groups as there can be where every head has keys of its own."""
        n = math.gcd(num_heads, self.size)
        return Grid(n, self.size // n)

    def deals_parts_as(self, other: "Grid") -> bool:
        """Whether split activations lie on the same ranks: part j * n + i on rank (i, j)."""
        return self == other or all(1 in (grid.head_groups, grid.slices) for grid in (self, other))

    def check(self, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        """Raises GridError, with the grids that would do, unless this grid fits such a layer."""
        if problem := _C.grid_problem(self.head_groups, self.slices, num_heads, num_kv_heads, head_dim):
            raise GridError(problem)

    @staticmethod
    def parse(text: str) -> "Grid":
        """ "2x4" -> Grid(2, 4): head groups x slices, on command lines. Raises GridError for what is no grid."""
        if not (found := re.fullmatch(r"(\d+)[xX](\d+)", text.strip())):
            raise GridError(f"a grid is written as head groups x slices, such as 2x4, got {text!r}")
        return Grid(int(found[1]), int(found[2]))

    @staticmethod
    def candidates(
        ranks: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        device_type: str = "cuda",
        profile: Profile | str | os.PathLike[str] | None = None,
    ) -> list["Grid"]:
        """The valid grids of `ranks` ranks, the fastest first as far as can be predicted; empty if there is none.

        They are ordered by a typical call: the causal forward pass of one sequence of 4096 tokens in half precision, of
        a layer whose embed_dim is num_heads * head_dim, with scheme="auto"; more head groups first where that is equal.
        two_level_mha.plan predicts another call.
        profile: the hardware to predict for, a Profile, its name or its JSON file; None: that of device_type.
        Raises GridError without a head_dim, for a profile that is none, or a device_type without one.
        """
        if head_dim is None:
            raise GridError("head_dim must be given: the price of a grid depends on it")
        rates = resolve_profile(profile, device_type).numbers
        try:
            found = _C.ranked_grids(ranks, num_heads, num_kv_heads or num_heads, head_dim, rates)
        except OverflowError:
            raise GridError(
                f"ranks={ranks} with num_heads={num_heads} and head_dim={head_dim} are too large to price: the numbers "
                "reach 2**63, below which they must stay"
            ) from None
        return [Grid(n, m) for n, m in found]


def init_mesh(
    device_type: str,
    grid: tuple[int, int] | None = None,
    *,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    profile: Profile | str | os.PathLike[str] | None = None,
    timeout: float | datetime.timedelta | None = None,
    cache_shares: Sequence[int] | None = None,
) -> DeviceMesh:
    """A DeviceMesh over all ranks with axes ("head", "slice"), and the flattened axis "grid".

    grid: (n, m); or None, then num_heads, num_kv_heads (num_heads if None) and head_dim choose it for the world size:
    the first of Grid.candidates, which takes profile.
    timeout: how long an exchange of this mesh waits for a rank, seconds or a timedelta; None: as long as the job's
    process group. Then every rank raises RankFailure, which says who is missed and where, and the mesh is closed.
    cache_shares: what each rank, in order, keeps of a KV cache's tokens, [2, 1, 1] for twice as many on the first:
    integers in proportion, for layout "position"; None: equal. They count among the ranks of a head group, which alone
    keep its heads. Weights stay equal; `plan(memory=..)` finds shares for ranks of unequal memory.
    A collective of all ranks. Meshes of one shape and shares are one, with the last timeout that was given; `close`
    frees it.
    Raises GridError, on every rank, if the process group is not initialised, if grid is no pair of positive integers,
    if the world size is not n * m, if no grid fits, for a timeout that is not positive, for cache_shares that are none
    of n * m ranks, add up to more than 1024 or leave a head group nothing, for "cuda" where Gloo serves it
    or the current device is not LOCAL_RANK's, and if the ranks differ in these arguments, in versions or builds of
    torch and of this package, in CPU capability, or in a variable TLM_*.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise GridError("init_mesh needs an initialised process group: call torch.distributed.init_process_group first")
    limit: datetime.timedelta | None = None
    shape: tuple[int, int] | None = None
    shares: tuple[int, ...] = ()
    refusal: GridError | None = None
    try:
        _check_device(device_type)
        limit = _checked_timeout(timeout)
        shape = _shape(device_type, grid, num_heads, num_kv_heads, head_dim, profile)
        shares = checked_shares(cache_shares, dist.get_world_size())
        check_groups(shares, *shape)
    except GridError as error:
        refusal = error
    control = control_of(tuple(range(dist.get_world_size())), limit)
    fields: dict[str, object] = {"refusal": refusal, "device_type": device_type, "grid": shape, "timeout": str(limit)}
    fields["cache_shares"] = shares
    same_in(control, fields | facts_alike(), "start every rank alike")
    assert shape is not None  # or there was a refusal
    key = MeshKey("own", device_type, *shape, shares)
    if key not in control.meshes:
        control.meshes[key] = _new_mesh(device_type, *shape)
        control.adopt(control.meshes[key], _groups(control.meshes[key]))
    mesh = control.meshes[key]
    if limit is not None:
        control.set_timeout(limit)
        _limit(mesh, limit)
    return mesh


def close(mesh: DeviceMesh) -> None:
    """Frees the process groups of a mesh, those of all meshes of the same ranks that init_mesh made among them.

    Layers on it cannot be called afterwards. Every rank of the mesh calls it; it waits for no other rank. Raises
    GridError for what is no mesh.
    """
    _check_mesh(mesh)
    control = controls().get(_ranks(mesh))
    if control is not None and not control.closed:
        control.adopt(mesh, _groups(mesh))
        control.leave_word(f"rank {control.rank} has closed the mesh")
        control.close()


def reopen(mesh: DeviceMesh) -> None:
    """Opens a mesh again after a RankFailure that every rank survived; layers, parameters and optimizers go on with it.

    Every rank of the mesh calls it, the one that failed too; each waits for the others as long as an exchange. The
    random generators, of the CPU and of the mesh's device, are set to those of its first rank. What the failed step has
    left is the caller's: gradients to be cleared, caches of a generation that broke off; and a rank that had finished
    its step has weights that the others have not, which the next call reports as a GridError: load the last checkpoint.

    Raises RankFailure if a rank does not come, after which only a new job helps; GridError for what is no mesh, and for
    one that `close` has freed or that was made anew.
    """
    _check_mesh(mesh)
    control = controls().get(_ranks(mesh))
    if mesh.size() == 1:
        return
    if control is None or not control.holds(mesh):
        raise GridError("the mesh was made anew since it failed: use the one of init_mesh")
    control.reopen()
    generators = [torch.default_generator]
    if mesh.device_type not in ("cpu", "meta"):
        module = torch.get_device_module(mesh.device_type)
        generators.append(module.default_generators[module.current_device()])
    first = control.gather([generator.get_state() for generator in generators], "reopening the mesh")[0]
    for generator, state in zip(generators, first, strict=True):
        generator.set_state(state)


def _check_device(device_type: str) -> None:
    """Raises GridError for what is no type of device, and where CUDA tensors of a mesh would go wrong."""
    try:
        known = isinstance(device_type, str) and torch.device(device_type).index is None
    except RuntimeError:  # torch lists the types it knows, most of which are no backend's
        known = False
    if not known:
        raise GridError(
            f'device_type must be a type of device without a number, "cuda" for GPUs or "cpu", got {device_type!r}; '
            'the grid comes after it: init_mesh("cuda", (n, m))'
        )
    if device_type != "cuda":
        return
    backends = dict(part.split(":") for part in str(dist.get_backend_config()).split(",") if ":" in part)
    if backends.get("cuda") == "gloo":
        # its all_gather of CUDA tensors is a segmentation fault: pytorch #152645
        raise GridError(
            'init_mesh("cuda") needs NCCL for CUDA tensors, and the process group has Gloo: call '
            'init_process_group("nccl"), or with "cpu:gloo,cuda:nccl"'
        )
    local = os.environ.get("LOCAL_RANK", "")
    if local.isdigit() and int(local) < torch.cuda.device_count() and torch.cuda.current_device() != int(local):
        raise GridError(
            f"the current device is cuda:{torch.cuda.current_device()}, and LOCAL_RANK is {local}: call "
            'torch.cuda.set_device(int(os.environ["LOCAL_RANK"])) before init_mesh'
        )


def _shape(
    device_type: str, grid: tuple[int, int] | None, num_heads: int | None, num_kv_heads: int | None,
    head_dim: int | None, profile: Profile | str | os.PathLike[str] | None,
) -> tuple[int, int]:  # fmt: skip
    """What init_mesh's arguments come to. Raises GridError."""
    ranks = dist.get_world_size()
    if grid is None:
        if num_heads is None or head_dim is None:
            raise GridError("init_mesh needs grid=(n, m), or num_heads and head_dim to choose one")
        found = Grid.candidates(ranks, num_heads, num_kv_heads, head_dim, device_type=device_type, profile=profile)
        if not found:
            raise GridError(_C.grid_choices(ranks, num_heads, num_kv_heads or num_heads, head_dim))
        grid = (found[0].head_groups, found[0].slices)
    if not isinstance(grid, (tuple, list)) or len(grid) != 2:
        raise GridError(
            f"grid must be two integers, (head_groups, slices), got {grid!r}; leave it out to choose by num_heads and "
            "head_dim"
        )
    n, m = grid
    if Grid(n, m).size != ranks:
        pairs = ", ".join(f"({d}, {ranks // d})" for d in range(ranks, 0, -1) if ranks % d == 0)
        raise GridError(
            f"grid {n} x {m} needs {n * m} ranks, but the world size is {ranks}; grids of {ranks} ranks: {pairs}"
        )
    return int(n), int(m)


def _checked_timeout(timeout: float | datetime.timedelta | None) -> datetime.timedelta | None:
    """Seconds or a timedelta, or None, as a timedelta. Raises GridError for what is no time or not positive."""
    if timeout is None:
        return None
    found: datetime.timedelta | None
    try:
        found = timeout if isinstance(timeout, datetime.timedelta) else datetime.timedelta(seconds=timeout)
    except (TypeError, OverflowError, ValueError):
        found = None
    if found is None or isinstance(timeout, bool) or found <= datetime.timedelta(0):
        raise GridError(f"timeout must be a positive number of seconds, a timedelta or None, got {timeout!r}")
    return found


def _new_mesh(device_type: str, n: int, m: int) -> DeviceMesh:
    """A mesh whose groups nobody else uses: torch would take the job's own for an axis of all ranks."""
    backend = str(dist.get_backend_config())
    own: dict[int | str, Any] = {
        axis: backend for axis, size in zip(AXES, (n, m), strict=True) if size == n * m and size > 1
    }
    mesh = init_device_mesh(device_type, (n, m), mesh_dim_names=AXES, backend_override=own)
    if n * m > 1:
        mesh._flatten("grid", backend_override=backend)
    _limit(mesh, default_timeout())
    return mesh


def _limit(mesh: DeviceMesh, timeout: datetime.timedelta | None) -> None:
    """How long its groups' exchanges wait; None: as they do."""
    if timeout is not None:
        for group in _groups(mesh):
            set_timeout(group, timeout)


def _rank_rows(mesh: DeviceMesh) -> list[list[int]]:
    with unset_fake_temporarily():  # the ranks are real also where modules are made of fake tensors
        rows: list[list[int]] = mesh.mesh.tolist()
    return rows


def _ranks(mesh: DeviceMesh) -> tuple[int, ...]:
    return tuple(sorted(rank for row in _rank_rows(mesh) for rank in row))


def _groups(mesh: DeviceMesh) -> list[dist.ProcessGroup]:
    """Those of the slice axis, the head axis and the grid."""
    return [mesh.get_group("slice"), mesh.get_group("head"), grid_group(mesh)]


@dataclass(frozen=True)
class Place:
    """Where this rank is on its mesh, as the operators take it."""

    grid: Grid = Grid()
    head_group: int = 0  # i
    slice: int = 0  # j
    groups: tuple[str, str, str] = ("", "", "")  # names of the slice, head and grid groups
    control: Control | None = field(default=None, compare=False)  # None: one rank
    cache_shares: tuple[int, ...] = ()  # of every rank of the grid, as init_mesh has them; empty: equal
    shares: tuple[int, ...] = field(init=False, compare=False)  # those of the slice axis; empty: equal
    turn: Turn = field(init=False, compare=False)  # which tokens of a KV cache by position this rank keeps
    args: tuple[list[int], str, str, str] = field(init=False)

    def __post_init__(self) -> None:
        numbers = [self.grid.head_groups, self.grid.slices, self.head_group, self.slice]
        object.__setattr__(self, "args", (numbers, *self.groups))
        object.__setattr__(self, "shares", of_group(self.cache_shares, self.grid.slices, self.head_group))
        object.__setattr__(self, "turn", turn_of(self.shares, self.grid.slices, self.slice))


def place_on(mesh: DeviceMesh | None) -> Place:
    """This rank's place.

    For a mesh made elsewhere with more than one head group and more than one slice, the first call makes the group of
    the whole grid, which takes every rank of the world: those outside the mesh must call too, and get the error after
    it. Later calls, and any for a mesh of one row or one column, are for the mesh's ranks alone.
    Raises GridError if the mesh is not one of "head" and "slice", or does not hold this rank, or if its ranks do not
    ascend along both axes: torch.distributed orders the ranks of a group, and would exchange blocks of other places;
    and for a mesh that was closed, RankFailure if by a failure.
    """
    if mesh is None:
        return Place()
    _check_mesh(mesh)
    try:
        grid_group(mesh)
    except RuntimeError:  # torch knows the group no more
        control = controls().get(_ranks(mesh))
        if control is not None:
            control.check_open()
        raise GridError("mesh was closed: make another by two_level_mha.init_mesh") from None
    if mesh.size() == 1:
        return Place()
    rows = _rank_rows(mesh)
    if any(line != sorted(line) for line in (*rows, *map(list, zip(*rows, strict=True)))):
        raise GridError(
            f"the ranks of mesh must ascend along head and along slice, got {rows}: torch.distributed "
            "orders the ranks of a group; order the mesh, and start the processes in the order of its ranks"
        )
    (n, m), coordinate = mesh.shape, mesh.get_coordinate()
    assert coordinate is not None  # grid_group refuses a rank outside the mesh
    (i, j), (slices, heads, grid) = coordinate, [group.group_name for group in _groups(mesh)]
    return Place(Grid(n, m), i, j, (slices, heads, grid), control_on(mesh), _shares_on(mesh))


class NoMesh(enum.Enum):
    """The default of a mesh: it tells one that was forgotten from None."""

    NOT_GIVEN = "not given"


def given_mesh(mesh: DeviceMesh | None | NoMesh) -> DeviceMesh | None:
    """The mesh of a layer. Warns where none was given in a job of several ranks: the layer is not split there."""
    if not isinstance(mesh, NoMesh):
        return mesh
    started = dist.is_available() and dist.is_initialized()
    ranks = dist.get_world_size() if started else int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        warnings.warn(
            f"mesh was not given, in a job of {ranks} ranks: mesh=two_level_mha.init_mesh(..) splits the layer over "
            "them, mesh=None, which is taken now, keeps all of it on each rank",
            stacklevel=3,
        )
    return None


def check_no_mesh(arguments: dict[str, object]) -> None:
    """Raises GridError for a mesh in the place of another argument."""
    for name, value in arguments.items():
        if isinstance(value, DeviceMesh):
            raise GridError(f"{name} was given a mesh, which goes by its name: mesh=mesh")


def control_on(mesh: DeviceMesh) -> Control:
    """The control of a mesh's ranks; the first call is a collective of theirs."""
    control = control_of(_ranks(mesh))
    control.adopt(mesh, _groups(mesh))
    return control


def _check_mesh(mesh: DeviceMesh) -> None:
    if not isinstance(mesh, DeviceMesh):
        raise GridError(f"mesh must be a DeviceMesh or None, got {type(mesh).__name__}; use two_level_mha.init_mesh")
    if tuple(mesh.mesh_dim_names or ()) != AXES:
        raise GridError(
            f'mesh must have the axes ("head", "slice"), got {mesh.mesh_dim_names}; use two_level_mha.init_mesh, '
            'or take mesh["head", "slice"] of a bigger one'
        )


def grid_group(mesh: DeviceMesh) -> dist.ProcessGroup:
    """The process group of grid_mesh(mesh)."""
    return grid_mesh(mesh).get_group()


def grid_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The whole grid as one axis: the only axis with more than one rank, or the flattened axis "grid".

    Who must call, and what is raised for a rank outside the mesh: see place_on.
    """
    n, m = mesh.shape
    # before this rank's own error: torch names groups by a count that all ranks of the world must keep alike
    flat = _flattened(mesh) if n > 1 and m > 1 else mesh["slice" if n == 1 else "head"]
    if mesh.get_coordinate() is None:
        raise GridError(
            f"rank {dist.get_rank()} is not in the mesh: once every rank of the world has called "
            'mesh._flatten("grid"), use it on its own ranks alone'
        )
    return flat


def mesh_of(mesh: DeviceMesh | None, choose: Callable[[Grid], Grid]) -> DeviceMesh | None:
    """The ranks of a mesh as the grid that is chosen for its own; the first call for another is a collective, of whom
    place_on says.
    """
    if mesh is None or (grid := choose(own := Grid(*mesh.shape))) == own:
        return mesh
    return _known_grid(control_on(mesh), grid_mesh(mesh), grid, _shares_on(mesh))


def grid_of_axis(axis: DeviceMesh, grid: Grid) -> DeviceMesh:
    """The ranks of a mesh of one axis as a grid; the first call is a collective of all ranks of its bigger mesh.

    Raises GridError for a grid of another size.
    """
    if grid.size != axis.size():
        raise GridError(f"grid {grid.head_groups} x {grid.slices} needs {grid.size} ranks, the mesh has {axis.size()}")
    return _known_grid(control_of(tuple(sorted(axis.mesh.tolist()))), axis, grid)


def _shares_on(mesh: DeviceMesh) -> tuple[int, ...]:
    """What init_mesh was told of a mesh's ranks, or of those that it was made of; also of a copy of one."""

    def names(of: DeviceMesh) -> list[str]:
        return [group.group_name for group in _groups(of)]

    control = controls().get(_ranks(mesh))
    known = {} if control is None else control.meshes
    return next((key.shares for key, made in known.items() if key.shares and names(made) == names(mesh)), ())


def _known_grid(control: Control, axis: DeviceMesh, grid: Grid, shares: tuple[int, ...] = ()) -> DeviceMesh:
    key = MeshKey("of one axis", axis.device_type, grid.head_groups, grid.slices, shares)
    if key not in control.meshes:
        made = axis._unflatten(0, (grid.head_groups, grid.slices), AXES)
        _limit(made, default_timeout())
        control.meshes[key] = made
    return control.meshes[key]


def _flattened(mesh: DeviceMesh) -> DeviceMesh:
    try:
        return mesh._flatten("grid")
    except ValueError as error:  # from torch, alike on every rank
        raise GridError(
            'the mesh that ("head", "slice") were taken of has another axis "grid", the name of the two flattened: '
            "give that one another name"
        ) from error
