"""What the ranks of a grid tell each other beside the exchanges of tensors: agreements, and that one has failed.

A Control is there once for the ranks of a mesh: a Gloo group of its own, the groups of their meshes, and a Board in the
job's store (failures.py), to which a thread tells each second where this rank is.
"""

import contextlib
import datetime
import gc
import hashlib
import pickle
import threading
import weakref
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _get_default_store, default_pg_timeout

from two_level_mha import _C
from two_level_mha.deferred import Deferred
from two_level_mha.errors import GridError, RankFailure
from two_level_mha.failures import BEAT, Board, State, are, first_line, is_of_an_exchange

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import GroupName

Sizes: TypeAlias = dict[str, object]  # of a call, by name

# They live as long as the process group that their ranks are numbered in.
_controls: "weakref.WeakKeyDictionary[dist.ProcessGroup, dict[tuple[int, ...], Control]]" = weakref.WeakKeyDictionary()


def controls() -> dict[tuple[int, ...], "Control"]:
    """Those of this job, by their ranks."""
    world = dist.group.WORLD
    return {} if world is None else _controls.setdefault(world, {})


def control_of(ranks: tuple[int, ...], timeout: datetime.timedelta | None = None) -> "Control":
    """The control of these ranks of the job, this one among them; the first call is a collective of theirs."""
    known = controls()
    if ranks not in known or known[ranks].closed:
        number = known[ranks].number + 1 if ranks in known else 0
        known[ranks] = Control(ranks, timeout or default_timeout(), number)
    return known[ranks]


def _known(ranks: tuple[int, ...]) -> "Control | None":
    return controls().get(ranks)


def default_timeout() -> datetime.timedelta | None:
    """What init_process_group was given; None if its backend does not tell."""
    world = dist.group.WORLD
    assert world is not None
    for device in world._device_types:
        options = getattr(world._get_backend(device), "options", None)
        if options is not None:
            timeout: datetime.timedelta = options._timeout
            return timeout
    return None


def set_timeout(group: dist.ProcessGroup, timeout: datetime.timedelta) -> None:
    """torch.distributed.set_timeout, which before torch 2.15 is private."""
    public = getattr(dist, "set_timeout", None)
    (public or dist.distributed_c10d._set_pg_timeout)(timeout, group)


def _tell_each_second(control: "weakref.ref[Control]", ended: threading.Event) -> None:
    while not ended.wait(BEAT) and (living := control()) is not None:
        try:
            living._tell()
        except RuntimeError:  # the store is gone: what fails next says so
            return
        del living


@dataclass
class _Freed:
    """A group that was freed: what it takes to make it again, and the meshes that knew it."""

    name: "GroupName"
    ranks: list[int]
    backend: str
    meshes: list["weakref.ref[DeviceMesh]"] = field(default_factory=list)


class MeshKey(NamedTuple):
    """What tells the meshes of the same ranks apart."""

    made: str  # "own": of init_mesh
    device_type: str
    head_groups: int
    slices: int
    shares: tuple[int, ...]  # of a KV cache, as init_mesh has them


class Inputs:
    """What a model was given, name -> shape and digest, and a number that is the same on ranks that were given it.

    seal: the hash of what was on a GPU, or None.
    """

    def __init__(self, described: dict[str, str], seal: torch.Tensor | None = None) -> None:
        self.described, self.seal = described, seal
        self.hash = zlib.crc32(repr(described).encode())


class Control:
    """Agreements and failures of the ranks of a mesh."""

    def __init__(self, ranks: tuple[int, ...], timeout: datetime.timedelta | None, number: int) -> None:
        self.ranks, self.rank, self.timeout, self.number = ranks, dist.get_rank(), timeout, number
        self.names: dict[GroupName, None] = {}  # of the groups of its meshes, in the order that all ranks have
        self._freed: list[_Freed] = []
        self._job_group: GroupName | None = None  # the name of `job_group`
        self._roots: list[weakref.ref[DeviceMesh]] = []  # of those meshes
        self.meshes: dict[MeshKey, DeviceMesh] = {}
        self.layers = 0  # that were made on it
        self.deferred = Deferred(ranks, self.gather)
        self.call, self.inputs = 0, Inputs({})  # of the model whose call is under way
        # (call of the model, sizes before, sizes since) that the ranks agreed on
        self.turn: tuple[int, Sizes | None, Sizes] | None = None
        self.failure_text: str | None = None
        self.doing = ""
        self._ended, self._lock = threading.Event(), threading.RLock()
        self.alone = dist.get_backend() == "fake"
        if not self.alone:
            self._connect()
            _C.set_failure_handler(_failure_of_group)
            _C.set_seal_handlers(_difference, _expect, _sent)

    def holds(self, mesh: DeviceMesh) -> bool:
        return any(known() is mesh._get_root_mesh() for known in self._roots)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[tuple[int, ...]]]:
        # copies of a layer share it; a process of another job has none
        return _known, (self.ranks,)

    def _keys(self) -> dist.Store:
        return dist.PrefixStore(f"two_level_mha/{self.ranks}/{self.number}", _get_default_store())

    def _connect(self) -> None:
        """Meets the other ranks: each has its state in the store, and a connection with each."""
        self.board = Board(self._keys(), self.ranks, self.rank)
        self._tell()
        limit = self.timeout or default_pg_timeout
        missed = self.board.wait(limit)
        try:
            if missed:
                raise RuntimeError(f"{are(missed)} not there")
            # not by new_group, which all ranks of the job would have to call
            self.group: dist.ProcessGroupGloo | None = dist.ProcessGroupGloo(
                self._keys(), self.ranks.index(self.rank), len(self.ranks), limit
            )
        except RuntimeError as error:
            why = f"rank {self.rank} waited {limit.total_seconds():g} s to make the mesh: {first_line(str(error))}"
            raise RankFailure(why) from error
        states = (weakref.ref(self), self._ended)
        threading.Thread(target=_tell_each_second, args=states, name="two_level_mha states", daemon=True).start()

    def reopen(self) -> None:
        """Makes the groups that a failure has freed again, under their names; a collective of the ranks."""
        known = controls()
        if (self.closed and self.failure_text is None) or (
            known[self.ranks] is not self and not known[self.ranks].closed
        ):
            raise GridError("the mesh was closed, or made anew since it failed: use the one of init_mesh")
        if self.alone:
            return
        if not self.closed:
            self.leave_word(f"rank {self.rank} has left to reopen the mesh")
            self.close()
        failed, self.failure_text = self.failure_text, None
        self.number, known[self.ranks] = known[self.ranks].number + 1, self
        self.call, self.inputs, self.turn, self.doing = 0, Inputs({}), None, ""
        self.deferred.forget()
        self._ended = threading.Event()
        try:
            self._connect()
            order = list(self.names)
            for freed in sorted(self._freed, key=lambda freed: order.index(freed.name)):
                self._make_again(freed)
                self._freed.remove(freed)
        except BaseException:
            self.close()
            self.failure_text = failed or "it was not reopened"
            raise

    def _make_again(self, freed: "_Freed") -> None:
        # new_group would choose another name, and layers, DTensors and compiled graphs have this one
        group, _ = dist.distributed_c10d._new_process_group_helper(
            len(freed.ranks), freed.ranks.index(self.rank), freed.ranks, freed.backend, self._keys(), freed.name,
            timeout=self.timeout or default_pg_timeout,
        )  # fmt: skip
        assert isinstance(group, dist.ProcessGroup)  # this rank is one of them
        dist.distributed_c10d._world.pg_group_ranks[group] = {rank: i for i, rank in enumerate(freed.ranks)}
        for known in freed.meshes:
            if (mesh := known()) is not None:
                mesh._pg_registry[freed.name] = group

    def job_group(self) -> dist.ProcessGroup:
        """A group for torch's own collectives of all ranks of the job, freed with the others.

        The first call is a collective of them.
        """
        if self._job_group is None:
            try:
                group = dist.new_group(backend="gloo", timeout=self.timeout)
            except RuntimeError as error:
                raise self.failure(str(error)) from error
            assert isinstance(group, dist.ProcessGroup)  # this rank is one of all
            self._job_group = group.group_name
            self.names[self._job_group] = None
        return dist.distributed_c10d._resolve_process_group(self._job_group)

    def adopt(self, mesh: DeviceMesh, groups: list[dist.ProcessGroup]) -> None:
        """A mesh of these ranks, and its groups."""
        if not self.holds(mesh):
            self._roots.append(weakref.ref(mesh._get_root_mesh()))
        self.names |= {group.group_name: None for group in groups}

    def gather(self, value: object, what: str) -> list[Any]:
        """Every rank's value, in the order of ranks; a collective. what: for the others, should this one wait long.

        Values that are alike, which they nearly always are, are compared by their digests alone.
        """
        if self.alone:
            return [value] * len(self.ranks)
        mine = pickle.dumps(value)
        digest = int.from_bytes(hashlib.blake2b(mine, digest_size=7).digest(), "big")
        with self._meeting(what):
            seen = {(int(x[0]), int(x[1])) for x in self._all_gather(torch.tensor([len(mine), digest], device="cpu"))}
            if len(seen) == 1:
                everyone = [mine] * len(self.ranks)
            else:
                longest = max(size for size, _ in seen)
                padded = torch.frombuffer(bytearray(mine.ljust(longest, b"\0")), dtype=torch.uint8)
                everyone = [x.numpy().tobytes() for x in self._all_gather(padded)]
        return [pickle.loads(x) for x in everyone]

    def from_first(self, x: torch.Tensor, what: str) -> torch.Tensor:
        """The first rank's x, in place, on the CPU; all have its shape. A collective; what: as in `gather`."""
        if self.alone:
            return x
        with self._meeting(what):
            assert self.group is not None
            self.group.broadcast(x, root=0).wait()  # type: ignore[attr-defined]  # torch's stub has no collectives
        return x

    @contextlib.contextmanager
    def _meeting(self, what: str) -> Iterator[None]:
        """Around collectives of `group`: the others are told of `what` meanwhile, and who is missed where one fails."""
        self.check_open()
        self.doing = what
        try:
            yield
        except RuntimeError as error:
            raise self.failure(str(error)) from error
        self.doing = ""

    def _all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        found = [torch.empty_like(x, device="cpu") for _ in self.ranks]
        assert self.group is not None
        self.group.allgather([found], [x]).wait()  # type: ignore[attr-defined]
        return found

    def enter_call(self) -> None:
        """Before leave_call. Raises GridError while another thread is in a call, RankFailure once one has failed."""
        if not self._lock.acquire(blocking=False):
            raise GridError(
                "two threads of this process call layers of one mesh at once, so a rank would exchange with another "
                "rank's other thread: call them one after the other, in the same order on every rank"
            )
        if self.closed:
            self._lock.release()
            self.check_open()

    def leave_call(self) -> None:
        self._lock.release()

    @property
    def closed(self) -> bool:
        return self._ended.is_set()

    def check_open(self) -> None:
        """Raises RankFailure once an exchange of the mesh has failed, GridError after `close`."""
        if self.failure_text is not None:
            raise RankFailure(f"the mesh was closed after a failure, reopen it on every rank: {self.failure_text}")
        if self.closed:
            raise GridError("the mesh of this layer was closed: make another by init_mesh, and the layer on it")

    def set_timeout(self, timeout: datetime.timedelta) -> None:
        self.timeout = timeout
        if not self.alone:
            assert self.group is not None
            self.group._set_default_timeout(timeout)

    def failure(self, error: str) -> RankFailure:
        """What to raise for an exchange that failed; the groups are freed, so that nobody waits for this rank."""
        if self.failure_text is None:
            here = self._state()
            self._free()  # first, so that all ranks hear of it at once
            verdict = self.board.verdict(error, here, self.timeout)
            self.failure_text = f"{verdict} (rank {self.rank} was {here.text()}: {first_line(error)})"
            self._ended.set()
        return RankFailure(self.failure_text)

    def tell_of(self, error: BaseException) -> None:
        """Lets the others know of an exception on this rank; one of an exchange gets a note that says who is missed."""
        if isinstance(error, (RankFailure, GridError)) or self.closed:
            return
        if is_of_an_exchange(error):
            failure = self.failure(str(error))
            if hasattr(error, "add_note"):  # Python 3.11
                error.add_note(str(failure))
            return
        self.doing = f"after {type(error).__name__}: {first_line(str(error))}"
        self.board.tell_now(self._state())

    def leave(self, error: BaseException) -> None:
        """This rank will not come to the next exchange: the others are told why, and nobody waits for it."""
        if self.closed:
            return
        what = f"{type(error).__name__}: {first_line(str(error))}"
        self.failure_text = f"rank {self.rank} raised {what}, {self._state().place()}"
        self.leave_word(self.failure_text)
        self.close()

    def leave_word(self, verdict: str) -> None:
        """What the others say, whose next exchange fails because this rank has closed its groups."""
        if not self.alone:
            self.board.leave_word(verdict)

    def close(self) -> None:
        """Frees the groups and ends the thread."""
        self._ended.set()
        self._free()

    def _free(self) -> None:
        groups = {group.group_name: group for group in dist.distributed_c10d._world.pg_map}
        names = [name for name in self.names if name in groups]
        # a group's connections are closed with its last reference, and guards of compiled calls hold copies of meshes
        meshes = [x for x in gc.get_objects() if type(x) is DeviceMesh] if names else []
        for name in names:
            group = groups[name]
            if group is dist.group.WORLD:
                continue
            freed = _Freed(name, dist.get_process_group_ranks(group), dist.get_backend_config(group))
            self._freed.append(freed)
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group(group)
            for mesh in meshes:
                if getattr(mesh, "_pg_registry", {}).pop(name, None) is not None:
                    freed.meshes.append(weakref.ref(mesh))
        self.group = None

    def _state(self) -> State:
        return State(*_C.progress(), self.call, self.doing)

    def _tell(self) -> None:
        self.board.tell(self._state())


def same_in(control: Control, fields: dict[str, object], advice: str, what: str = "") -> None:
    """Compares `fields` over the ranks; raises the same GridError on every rank, naming the ranks and the field.

    A collective. A value may be an exception: then it is what every rank raises. what: what this rank does meanwhile,
    for the others, should they not come.
    """
    everyone = control.gather(fields, what or f"comparing {next(iter(fields))}")
    for value in fields.values():  # this rank's own error keeps its class
        if isinstance(value, Exception):
            raise value
    for rank, other in enumerate(everyone):
        for value in other.values():
            if isinstance(value, Exception):
                raise GridError(f"rank {rank} of the grid: {value}")
        for name in everyone[0] | other:
            value, mine = other.get(name), everyone[0].get(name)
            if value != mine:
                raise GridError(
                    f"{name} differs between ranks of the grid: {mine} on rank 0, {value} on rank {rank}; {advice}"
                )


def _difference(text: str) -> GridError:
    """What C++ raises where ranks differ in a compiled call; others find the name of what differs (agreement.py)."""
    return GridError(f"{text}; without torch.compile the error names it")


def _expect(group: str, layer: str, device: torch.device) -> torch.Tensor | None:
    """Where a call's exchange writes what it found. Raises GridError if the layer's call before its last differed."""
    for control in controls().values():
        if group in control.names:
            control.deferred.look(layer)
            return control.deferred.expect(layer, device)
    return None


def _sent(group: str, device: torch.device) -> None:
    for control in controls().values():
        if group in control.names:
            control.deferred.sent(device)


def _failure_of_group(group: str, error: str) -> RankFailure | None:
    """What C++ raises in place of an exchange's error."""
    for control in list(controls().values()):
        if group in control.names and (control.failure_text is not None or not control.closed):
            return control.failure(error)
    return None
