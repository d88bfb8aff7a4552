"""What a rank sends: a recorder of functional collectives, for tests and for looking at a model of your own.

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
"""

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode

_NAMES = {
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_out": "all_gather",
    "all_gather_into_tensor_coalesced": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "all_to_all_single": "all_to_all",
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "all_reduce_coalesced": "all_reduce",
    "all_reduce_coalesced_": "all_reduce",
    "broadcast": "broadcast",
    "broadcast_": "broadcast",
}


@dataclass(frozen=True)
class Collective:
    """One collective as this rank issued it. `elements` counts its input,
    `sent` the bytes that left this rank.
    """

    name: str
    dtype: torch.dtype
    elements: int
    group: str
    group_size: int
    sent: int
    backward: bool


class CollectiveRecord(TorchDispatchMode):
    """Records the functional collectives issued while it is active, forward and backward apart.

    Under torch.compile they are seen only while compiled code calls them through the dispatcher (backend
    "eager").
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Collective] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "_c10d_functional" and name in _NAMES:
            arguments = dict(zip((a.name for a in func._schema.arguments), args, strict=False), **(kwargs or {}))
            inputs = arguments.get("inputs", arguments.get("input", args[0]))
            for tensor in inputs if isinstance(inputs, (list, tuple)) else [inputs]:
                self.calls.append(_describe(_NAMES[name], tensor, arguments))
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


def record_collectives() -> CollectiveRecord:
    """A context manager that records this rank's functional collectives:
    `with record_collectives() as record`.
    """
    return CollectiveRecord()


def _describe(name: str, tensor: torch.Tensor, arguments: dict) -> Collective:
    group = _resolve_process_group(arguments["group_name"])
    size = dist.get_world_size(group)
    count = tensor.numel()
    splits = arguments.get("input_split_sizes")
    if name == "all_gather":
        elements = Fraction((size - 1) * count)
    elif name == "all_to_all" and splits:
        own = splits[dist.get_rank(group)]
        elements = Fraction(count * (sum(splits) - own), max(sum(splits), 1))
    elif name == "broadcast":
        elements = Fraction(count if dist.get_group_rank(group, dist.get_rank()) == arguments["src"] else 0)
    else:
        elements = Fraction((2 if name == "all_reduce" else 1) * (size - 1) * count, size)
    return Collective(
        name=name,
        dtype=tensor.dtype,
        elements=count,
        group=group.group_name,
        group_size=size,
        sent=int(elements * tensor.element_size()),
        backward=torch._C._current_graph_task_id() != -1,
    )
