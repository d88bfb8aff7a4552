"""What a rank sends: a recorder of collectives, for tests and for looking at a model of your own.

    with record_collectives() as record:
        model(x).sum().backward()
    print(record.sent(backward=False), record.sent(backward=True))

Bytes sent by one rank of a group of g, for an input of N bytes (what a ring, or a pairwise exchange, puts on
the wire):

    all_gather        (g - 1) * N            N is the local piece
    reduce_scatter    (g - 1) / g * N
    all_to_all        (g - 1) / g * N        with uneven splits: what goes to others
    all_reduce        2 * (g - 1) / g * N
    broadcast         N at the source, nothing elsewhere
    send              N
    recv              nothing                N is what comes

Recorded are functional collectives, which DTensor issues too, and this package's own. FSDP2, DDP and torch's pipelining
call the process group instead, as do the ranks of a grid that compare their arguments:
`record_collectives(c10d=True)` has those too.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
import torch.distributed as dist
from torch._ops import OpOverload
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode

from two_level_mha.names import Args, Kwargs

# Operator -> what it is, and the arguments that hold its input and, of what has one peer, that peer.
_FUNCTIONAL = {
    "all_gather_into_tensor": ("all_gather", "input"),
    "all_gather_into_tensor_out": ("all_gather", "input"),
    "all_gather_into_tensor_coalesced": ("all_gather", "inputs"),
    "reduce_scatter_tensor": ("reduce_scatter", "input"),
    "reduce_scatter_tensor_out": ("reduce_scatter", "input"),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", "inputs"),
    "all_to_all_single": ("all_to_all", "input"),
    "all_reduce": ("all_reduce", "input"),
    "all_reduce_": ("all_reduce", "input"),
    "all_reduce_coalesced": ("all_reduce", "inputs"),
    "all_reduce_coalesced_": ("all_reduce", "inputs"),
    "broadcast": ("broadcast", "input", "src"),
    "broadcast_": ("broadcast", "input", "src"),
}
_C10D = {
    "_allgather_base_": ("all_gather", "input_tensor"),
    "allgather_": ("all_gather", "input_tensors"),
    "allgather_into_tensor_coalesced_": ("all_gather", "inputs"),
    "_reduce_scatter_base_": ("reduce_scatter", "input_tensor"),
    "reduce_scatter_": ("reduce_scatter", "input_tensors"),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", "inputs"),
    "alltoall_base_": ("all_to_all", "input"),
    "alltoall_": ("all_to_all", "input_tensors"),
    "allreduce_": ("all_reduce", "tensors"),
    "allreduce_coalesced_": ("all_reduce", "tensors"),
    "broadcast_": ("broadcast", "tensors", "root_rank"),
    "send": ("send", "tensors", "dst"),
    "recv_": ("recv", "tensors", "src"),
}
# What this package sends by messages of Gloo's.
_PAIRS: dict[str, tuple[str, ...]] = {
    "_all_to_all_pairs": ("all_to_all", "input"),
    "_all_gather_pairs": ("all_gather", "input"),
}
_TABLES: dict[str, dict[str, tuple[str, ...]]] = {
    "_c10d_functional": _FUNCTIONAL,
    "c10d": _C10D,
    "two_level_mha": _PAIRS,
}


@dataclass(frozen=True)
class Collective:
    """One collective as this rank issued it. `elements` counts its input, `sent` the bytes that left this rank.

    ranks: those of the group, as the job numbers them; peer: the one of them that a message is for or from.
    """

    name: str
    dtype: torch.dtype
    elements: int
    group: str
    group_size: int
    sent: int
    backward: bool
    ranks: tuple[int, ...] = ()
    peer: int | None = None


class CollectiveRecord(TorchDispatchMode):
    """Records the collectives issued while it is active, forward and backward apart.

    Under torch.compile they are seen only while compiled code calls them through the dispatcher (backend
    "eager").
    """

    def __init__(self, c10d: bool = False) -> None:
        TorchDispatchMode.__init__(self)
        self.calls: list[Collective] = []
        self._c10d = c10d

    def __torch_dispatch__(
        self, func: "OpOverload[..., Any]", types: Sequence[type], args: Args = (), kwargs: Kwargs | None = None
    ) -> Any:
        if self._c10d or func.namespace != "c10d":
            self.calls += collectives_of(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def sent(self, *, backward: bool | None = None, name: str | None = None) -> int:
        """Bytes this rank sent in forward (False), backward (True) or both (None),
        in collectives of that name.
        """
        return sum(call.sent for call in self._select(backward, name))

    def counts(self, *, backward: bool | None = None) -> dict[str, int]:
        """Number of collectives of each name."""
        return dict(Counter(call.name for call in self._select(backward, None)))

    def _select(self, backward: bool | None, name: str | None) -> list[Collective]:
        return [
            call
            for call in self.calls
            if (backward is None or call.backward == backward) and (name is None or call.name == name)
        ]


def record_collectives(*, c10d: bool = False) -> CollectiveRecord:
    """A context manager that records this rank's collectives: `with record_collectives() as record`.

    c10d: also what is issued past the functional collectives.
    """
    return CollectiveRecord(c10d)


def collectives_of(func: "OpOverload[..., Any]", args: Args, kwargs: Kwargs) -> list[Collective]:
    """What an operator's call sends, one for each tensor; empty for an operator that is no collective."""
    namespace, _, name = func._schema.name.partition("::")
    if name not in _TABLES.get(namespace, {}):
        return []
    kind, source, *peer = _TABLES[namespace][name]
    arguments = dict(zip((a.name for a in func._schema.arguments), args, strict=False), **kwargs)
    if namespace == "c10d":
        group = dist.ProcessGroup.unbox(arguments["process_group"])
    else:
        group = _resolve_process_group(arguments["group_name"])
    ranks = tuple(dist.get_process_group_ranks(group))
    at = ranks[arguments[peer[0]]] if peer else None
    splits = arguments.get("input_split_sizes")
    return [
        Collective(
            name=kind,
            dtype=tensor.dtype,
            elements=tensor.numel(),
            group=group.group_name,
            group_size=len(ranks),
            sent=int(_sent_elements(kind, tensor.numel(), ranks, splits, at) * tensor.element_size()),
            backward=torch._C._current_graph_task_id() != -1,
            ranks=ranks,
            peer=at,
        )
        for tensor in _tensors(arguments[source])
    ]


def _tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    assert isinstance(value, (list, tuple))
    return [tensor for one in value for tensor in _tensors(one)]


def _sent_elements(
    kind: str, count: int, ranks: tuple[int, ...], splits: list[int] | None, peer: int | None
) -> Fraction:
    """Of an input of `count` elements, as a fraction."""
    size, rank = len(ranks), dist.get_rank()
    if kind == "all_gather":
        return Fraction((size - 1) * count)
    if kind == "all_to_all" and splits:
        own = splits[ranks.index(rank)]
        return Fraction(count * (sum(splits) - own), max(sum(splits), 1))
    if kind in ("send", "recv", "broadcast"):
        return Fraction(count if kind == "send" or (kind == "broadcast" and rank == peer) else 0)
    return Fraction((2 if kind == "all_reduce" else 1) * (size - 1) * count, size)
