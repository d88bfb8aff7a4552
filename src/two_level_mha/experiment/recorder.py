"""What one rank does in a call of a model: every operator's work, every collective, the memory that is held.

    dist.init_process_group("fake", rank=0, world_size=16, store=FakeStore())
    mesh = ...                                          # meshes are made of real tensors
    with FakeTensorMode():
        model, x = ...
        model(x)                                        # DTensor's propagation of shapes runs in the first call
        with record() as record:
            model(x)

Nothing is computed or sent on fake tensors, so full sizes and thousands of ranks are recorded in milliseconds. The
operators are those that run: of DTensors the local ones, backward ones, those inside this package's operators. Real
tensors and real ranks are recorded as well.

FLOPs are 2 for a multiply-add, of matrix products and of attention; elsewhere a rank is held up by memory. Attention is
counted where a row sees a key, so that a causal square is half of a full one and half of its diagonal.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch._ops import OpOverload
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from two_level_mha.names import Args, Kwargs
from two_level_mha.testing import Collective, collectives_of

PRODUCT, ATTENTION, MEMORY = "product", "attention", "memory"
_WAITS = ("_c10d_functional.wait_tensor", "_c10d_functional.wait_tensors")


@dataclass(frozen=True)
class Work:
    """An operator that computes or moves data in memory.

    kind: PRODUCT, ATTENTION or MEMORY; shape: of a product its (rows, inner, columns); of attention (B * H, L, S, width
    of keys, width of values).
    """

    name: str
    kind: str
    flops: int
    bytes: int  # read and written
    element_size: int
    shape: tuple[int, ...]
    backward: bool


@dataclass(frozen=True)
class Start:
    """A collective, or a message, as it is begun. ranks: those it is between, as the job numbers them; bytes: of the
    inputs; sent: what leaves the rank.
    """

    name: str
    ranks: tuple[int, ...]
    peer: int | None
    bytes: int
    sent: int
    backward: bool
    waited: bool  # a Wait says when its result is needed; else at once, or for a message never


@dataclass(frozen=True)
class Wait:
    """Results of the collective that was begun by event `start` are needed."""

    start: int


Event: TypeAlias = Work | Start | Wait
Flops: TypeAlias = tuple[int, str, tuple[int, ...]]  # how many, the kind and the shape of the work


class Record(TorchDispatchMode):
    """Events of this rank while it is active, in order, and the bytes of what it allocated and still holds.

    held: bytes of tensors that are counted from the beginning, as parameters and inputs: those given to `record`.
    peak: the most that was held at a time.
    """

    def __init__(self, holds: Sequence[Tensor] = ()) -> None:
        TorchDispatchMode.__init__(self)
        self.events: list[Event] = []
        self.held = self.peak = 0
        self._begun: dict[int, int] = {}  # address of a storage -> the event that fills it
        self._known: weakref.WeakValueDictionary[int, torch.UntypedStorage] = weakref.WeakValueDictionary()
        for tensor in holds:
            self._hold(tensor)

    def __torch_dispatch__(
        self, func: "OpOverload[..., Any]", types: Sequence[type], args: Args = (), kwargs: Kwargs | None = None
    ) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its own dispatch comes back here with local tensors
        kwargs = kwargs or {}
        if func.namespace not in ("c10d", "prim"):
            with self:  # what is made of other operators, where autograd has not taken it apart
                if (out := func.decompose(*args, **kwargs)) is not NotImplemented:
                    return out
        out = func(*args, **kwargs)
        collectives = collectives_of(func, args, kwargs)
        if collectives:
            self._start(func, collectives, out)
        elif str(func.overloadpacket) in _WAITS:
            for tensor in _tensors(args):
                if (begun := self._begun.pop(_address(tensor), None)) is not None:
                    self.events.append(Wait(begun))
        elif func.namespace not in ("prim", "c10d"):
            self._work(func, args, kwargs, out)
        for tensor in _tensors(out):
            self._hold(tensor)
        return out

    @property
    def work(self) -> list[Work]:
        return [event for event in self.events if isinstance(event, Work)]

    @property
    def starts(self) -> list[Start]:
        return [event for event in self.events if isinstance(event, Start)]

    def flops(self, kind: str | None = None) -> int:
        """Of work of this kind, or of all."""
        return sum(event.flops for event in self.work if kind in (None, event.kind))

    def sent(self) -> int:
        """Bytes that leave this rank."""
        return sum(event.sent for event in self.starts)

    def _start(self, func: "OpOverload[..., Any]", collectives: list[Collective], out: object) -> None:
        functional = func.namespace == "_c10d_functional"
        first = collectives[0]
        message = first.name in ("send", "recv")
        if functional:
            for tensor in _tensors(out):
                self._begun[_address(tensor)] = len(self.events)
        self.events.append(
            Start(
                name=first.name,
                ranks=tuple(sorted((dist.get_rank(), first.peer)))
                if message and first.peer is not None
                else first.ranks,
                peer=first.peer,
                bytes=sum(one.elements * one.dtype.itemsize for one in collectives),
                sent=sum(one.sent for one in collectives),
                backward=first.backward,
                waited=functional,
            )
        )

    def _work(self, func: "OpOverload[..., Any]", args: Args, kwargs: Kwargs, out: object) -> None:
        inputs, outputs = _tensors((args, kwargs)), _tensors(out)
        flops, kind, shape = _flops(func, args, kwargs, out)
        given = {_address(x) for x in inputs}
        moved = [x for x in outputs if _address(x) not in given]  # a view moves nothing
        written = [args[i] for i, a in enumerate(func._schema.arguments[: len(args)]) if _writes(a)]
        if not (flops or moved or written) or _only_allocates(inputs, func):
            return
        distinct = {id(x): x for x in (*inputs, *moved)}.values()
        # of what it works on: attention of half precision gives a logsumexp in float32
        size = next((x.element_size() for x in (*inputs, *moved) if x.is_floating_point()), 1)
        self.events.append(
            Work(
                name=str(func.overloadpacket),
                kind=kind,
                flops=flops,
                bytes=sum(_bytes(x) for x in distinct),
                element_size=size,
                shape=shape,
                backward=torch._C._current_graph_task_id() != -1,
            )
        )

    def _hold(self, tensor: Tensor) -> None:
        storage = (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).untyped_storage()
        if self._known.get(storage._cdata) is storage:
            return
        self._known[storage._cdata] = storage
        size = storage.nbytes()
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._free, size).atexit = False

    def _free(self, size: int) -> None:
        self.held -= size


def record(holds: Sequence[Tensor] = ()) -> Record:
    """A context manager that records this rank: `with record(model.parameters()) as record`.

    holds: tensors that are in memory already, and count.
    """
    return Record(list(holds))


def _tensors(value: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _address(x: Tensor) -> int:
    address: int = x.untyped_storage()._cdata
    return address


def _bytes(x: Tensor) -> int:
    """What reading x takes from memory: of an expanded tensor its elements once."""
    return prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride) * x.element_size()


def _writes(argument: torch._C.Argument) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _only_allocates(inputs: list[Tensor], func: "OpOverload[..., Any]") -> bool:
    return func._schema.name.removeprefix("aten::").startswith(("empty", "new_empty", "detach", "record_stream"))


def causal_pairs(L: int, S: int, causal: int | None, window: int | None = None, key_stride: int = 1) -> int:
    """Pairs of a row and a key that it sees: key s, at s * key_stride, is seen by row l up to l + causal, and with
    window from l + causal - window + 1 on.
    """
    if causal is None:
        return L * S

    def until(position: int) -> int:
        return 0 if position < 0 else min(S, position // key_stride + 1)

    return sum(until(row + causal) - (0 if window is None else until(row + causal - window)) for row in range(L))


def _flops(func: "OpOverload[..., Any]", args: Args, kwargs: Kwargs, out: object) -> Flops:
    packet = func.overloadpacket
    if packet in _attention():
        return _attention()[packet](_named(func, args, kwargs))
    if packet in flop_registry:
        shapes = _product_shape(_tensors(args), out)
        return int(flop_registry[packet](*args, **kwargs, out_val=out)), PRODUCT, shapes
    return 0, MEMORY, ()


def _product_shape(inputs: list[Tensor], out: object) -> tuple[int, ...]:
    left, y = inputs[-2], _tensors(out)[0]
    return prod(y.shape[:-1]), left.shape[-1], y.shape[-1]


def _named(func: "OpOverload[..., Any]", args: Args, kwargs: Kwargs) -> dict[str, Any]:
    found = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
    return found | dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs


def _of_attention(q: Tensor, k: Tensor, v: Tensor, pairs: int, backward: bool) -> Flops:
    """q k^T and p v; backward q k^T again, and dv = p^T do, dp = do v^T, dq = ds k, dk = ds^T q."""
    B, H, L, width = q.shape
    S, v_width = v.shape[-2:]
    per_pair = 3 * width + 2 * v_width if backward else width + v_width
    return 2 * B * H * pairs * per_pair, ATTENTION, (B * H, L, S, width, v_width)


def _ours(backward: bool) -> Callable[[dict[str, Any]], Flops]:
    def count(a: dict[str, Any]) -> Flops:
        q, k, v = a["q"], a["k"], a["v"]
        pairs = causal_pairs(q.shape[2], k.shape[2], a["causal"], a["window"], a["key_stride"])
        return _of_attention(q, k, v, pairs, backward)

    return count


def _stock(backward: bool) -> Callable[[dict[str, Any]], Flops]:
    def count(a: dict[str, Any]) -> Flops:
        q, k, v = a["query"], a["key"], a["value"]
        pairs = causal_pairs(q.shape[2], k.shape[2], 0 if a["is_causal"] else None)
        return _of_attention(q, k, v, pairs, backward)

    return count


def _attention() -> dict[object, Callable[[dict[str, Any]], Flops]]:
    """Operator -> the FLOPs of a call of it: torch's own counter takes a causal one for a full one."""
    ours, aten = torch.ops.two_level_mha, torch.ops.aten
    return {
        ours.partial_attention: _ours(backward=False),
        ours.partial_attention_backward: _ours(backward=True),
        aten._scaled_dot_product_flash_attention_for_cpu: _stock(backward=False),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _stock(backward=True),
    }
