"""One rank of a job that is not there: fake tensors, a fake process group, in a process of its own.

A process of its own since torch keeps what it found out about the groups of a mesh, past the end of the job.
"""

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves

Found = TypeVar("Found")


class FakeTensors(FakeTensorMode):
    """Makes fake tensors; what acts on real tensors alone, as on the ranks of a mesh, is computed."""

    def __torch_dispatch__(
        self,
        func: "OpOverload[..., Any]",
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if tensors and all(type(x) is Tensor for x in tensors):
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs or {})


def on_fake_rank(rank: int, ranks: int, function: Callable[[], Found]) -> Found:
    """What function() returns, or raises, as rank `rank` of a fake process group of `ranks`, in a forked process.

    The result travels back, so it is plain data. Nothing is sent, and collectives return at once. This process may
    have a process group of its own, which the other does not see.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_as_rank, args=(rank, ranks, function, sender))
    process.start()
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the process of fake rank {rank} ended with code {process.exitcode}") from None
    finally:
        receiver.close()
    process.join()
    if isinstance(found, BaseException):
        raise found
    result: Found = found
    return result


def _as_rank(rank: int, ranks: int, function: Callable[[], object], sender: Connection) -> None:
    torch.set_num_threads(1)  # those of the process that was forked are not here
    if dist.is_initialized():
        dist.destroy_process_group()
    try:
        dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
        found = function()
    except Exception as error:
        error.add_note(f"on rank {rank} of a fake group of {ranks}") if hasattr(error, "add_note") else None
        found = error
    sender.send(found)
    sender.close()
