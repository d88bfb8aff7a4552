"""What a forked rank does: join the process group, then answer calls until its channel closes."""

import datetime
import faulthandler
import importlib
import os
import pickle
import signal
import sys
import traceback
from multiprocessing.connection import Connection

# Longer than any call's own time-out, so that a hang is seen by the pool, which collects every rank's stack.
COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=600)


def serve(rank: int, world_size: int, directory: str, channel: int) -> None:
    log = os.open(f"{directory}/rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable(file=2)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    connection = Connection(channel)

    import torch
    import torch.distributed as dist

    from harness.device import use_device
    from harness.staged import register

    torch.set_num_threads(1)
    use_device(rank)
    register()
    backend = os.environ["TLM_TEST_BACKEND"]
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if backend == "nccl" else backend,
        init_method=f"file://{directory}/store",
        rank=rank,
        world_size=world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )
    connection.send_bytes(pickle.dumps("ready"))
    while True:
        try:
            request = connection.recv_bytes()
        except EOFError:
            return
        torch.manual_seed(0)
        connection.send_bytes(answer(request))


def answer(request: bytes) -> bytes:
    try:
        sys.path[:], module, name, args = pickle.loads(request)
        result = getattr(importlib.import_module(module), name)(*pickle.loads(args))
        return pickle.dumps(("ok", to_cpu(result)))
    except BaseException as error:  # SystemExit and pytest's outcomes too: a rank lives until its channel closes
        return pickle.dumps(("error", traceback.format_exc(), picklable(error)))
    finally:
        sys.stdout.flush()


def to_cpu(result):
    import torch
    from torch.utils._pytree import tree_map_only

    return tree_map_only(torch.Tensor, lambda tensor: tensor.detach().cpu(), result)


def picklable(error: BaseException) -> BaseException | None:
    """The error, if it survives the way to pytest, or None: its traceback travels as text anyway."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return None
