"""A process group that goes through the host: every tensor is copied there, Gloo moves it, what it gave is copied back.

It takes tensors of any device, several ranks on one GPU too, which NCCL refuses; Gloo alone dies of some collectives
of CUDA tensors. Each call is done when it returns.
"""

import datetime

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only

# Under the names of torch 2.15 and of 2.11, where they differ. All write to their first argument alone, if to any.
COLLECTIVES = (
    ("allreduce",), ("allreduce_coalesced",), ("broadcast",), ("reduce",), ("allgather",), ("allgather_coalesced",),
    ("all_gather_single", "_allgather_base"), ("gather",), ("scatter",), ("alltoall",),
    ("all_to_all_single", "alltoall_base"), ("reduce_scatter",), ("reduce_scatter_single", "_reduce_scatter_base"),
    ("send",), ("recv",), ("barrier",),
)  # fmt: skip


def staged(names: tuple[str, ...]):
    """The method that does with host copies what a group's method of one of these names does."""

    def method(self, *args, **kwargs) -> dist.Work:
        pairs = []

        def to_host(x: torch.Tensor) -> torch.Tensor:
            pairs.append((x, x.detach().to("cpu", copy=True)))
            return pairs[-1][1]

        with torch.no_grad():
            written = tree_map_only(torch.Tensor, to_host, args[:1])
            outputs = list(pairs)
            read = tree_map_only(torch.Tensor, to_host, (args[1:], kwargs))
            name = next(name for name in names if hasattr(self.gloo, name))
            work = getattr(self.gloo, name)(*written, *read[0], **read[1])
            work.wait()
            for x, copy in outputs:
                x.copy_(copy)
        return work

    return method


class StagedBase(dist.ProcessGroup):
    """What is no collective, and those that Gloo has no form of for lists: one after the other."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: datetime.timedelta) -> None:
        super().__init__(rank, size)
        self.gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    @property
    def group_name(self) -> str:  # torch's own asks a backend
        return dist.distributed_c10d._world.pg_names[self]

    def getBackendName(self) -> str:
        return "staged"

    def set_timeout(self, timeout: datetime.timedelta) -> None:
        self.gloo._set_default_timeout(timeout)

    def allgather_into_tensor_coalesced(self, outputs, inputs, *options) -> dist.Work:
        return [self.all_gather_single(y, x) for y, x in zip(outputs, inputs, strict=True)][-1]

    def reduce_scatter_tensor_coalesced(self, outputs, inputs, *options) -> dist.Work:
        return [self.reduce_scatter_single(y, x, *options) for y, x in zip(outputs, inputs, strict=True)][-1]

    all_gather_single_coalesced = allgather_into_tensor_coalesced
    reduce_scatter_single_coalesced = reduce_scatter_tensor_coalesced


StagedGroup = type("StagedGroup", (StagedBase,), {name: staged(names) for names in COLLECTIVES for name in names})


def register() -> None:
    """Makes "staged" a backend of torch.distributed, in this process."""
    if "STAGED" not in dist.Backend._plugins:
        dist.Backend.register_backend("staged", StagedGroup, devices=["cpu", "cuda"])
