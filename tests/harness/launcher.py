"""The process that imports once and forks ranks.

Started by pool.py as a program of its own, never forked from pytest: it has run no tensor op, so its children
start with no half-copied thread pool. It serves one request at a time over a socket, as JSON:

    {"start": name, "directory": path, "ranks": W}, with W file descriptors   ->  {"pids": [...]}
    {"stop": name}                                                            ->  {"statuses": [...]}

`statuses` are exit codes, negative for a signal. End of file means that pytest is gone: kill every rank and
leave.
"""

import json
import os
import signal
import socket
import sys

# What ranks would otherwise import one by one, each for itself.
PRELOAD = (
    "numpy",
    "pytest",
    "torch",
    "torch.distributed.tensor",
    "torch.distributed.checkpoint",
    "torch.distributed._functional_collectives",
    "torch._dynamo",
    "torch.utils.checkpoint",
    "two_level_mha",
    "two_level_mha.reference",
    "two_level_mha.testing",
    "transformers",
    "transformers.models.bert.modeling_bert",
)


def preload() -> None:
    for name in PRELOAD:
        try:
            __import__(name)
        except ImportError as error:  # the rank that needs it raises it again, where it can be reported
            print(f"not preloaded: {name}: {error}", file=sys.stderr)


def start(directory: str, channels: list[int], control: socket.socket) -> list[int]:
    pids = []
    for rank, channel in enumerate(channels):
        pid = os.fork()
        if pid == 0:
            control.close()
            for other in channels:
                if other != channel:
                    os.close(other)
            rank_main(rank, len(channels), directory, channel)
        pids.append(pid)
    for channel in channels:
        os.close(channel)
    return pids


def rank_main(rank: int, world_size: int, directory: str, channel: int) -> None:
    from rank import serve

    status = 1
    try:
        serve(rank, world_size, directory, channel)
        status = 0
    finally:
        os._exit(status)  # no exit handlers of the launcher's


def stop(pids: list[int]) -> list[int]:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)  # not yet waited for, so the pid is still ours
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    sys.path[:] = [sys.path[0], *json.loads(sys.argv[2])]
    preload()
    control.sendall(b"{}")
    ranks: dict[str, list[int]] = {}
    while True:
        message, channels, _, _ = socket.recv_fds(control, 1 << 16, 64)
        if not message:
            break
        request = json.loads(message)
        if "start" in request:
            pids = ranks[request["start"]] = start(request["directory"], channels, control)
            control.sendall(json.dumps({"pids": pids}).encode())
        else:
            control.sendall(json.dumps({"statuses": stop(ranks.pop(request["stop"]))}).encode())
    for pids in ranks.values():
        stop(pids)


if __name__ == "__main__":
    main()
