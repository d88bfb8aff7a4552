"""A persistent pool of Gloo ranks, driven from pytest.

    pytest -- socket --> launcher (imports torch once) -- fork --> ranks, each with a channel back to pytest

Ranks of one world size stay alive between calls; at most two world sizes at a time, because of memory. A call
that fails in any way takes its ranks down with it, and the next call starts new ones.
"""

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch

from .device import BACKEND, DEVICE

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}
GPUS = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
OF_GPUS = {  # the launcher, which forks, must not start CUDA when it asks whether there is one
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    **({} if BACKEND == "nccl" else {"CUDA_VISIBLE_DEVICES": "" if DEVICE == "cpu" else GPUS.split(",")[0]}),
}
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")  # a DeviceMesh would take LOCAL_RANK for a GPU
START_TIMEOUT = 120.0  # seconds, for imports or for a rendezvous on a busy machine
GRACE = 0.3  # seconds in which other ranks may report the same failure
LOG_TAIL = 4000  # characters


class RankFailure(Exception):
    """A call did not come back whole: some rank raised, died or hung.
    `__cause__` is what the first one raised.
    """


class Ranks:
    """W live ranks: a channel to each, and the directory with their logs."""

    def __init__(self, name: str, directory: Path, connections: list[Connection], pids: list[int]):
        self.name, self.directory, self.connections, self.pids = name, directory, connections, pids

    def log(self, rank: int, start: int = 0) -> str:
        path = self.directory / f"rank{rank}.log"
        return path.read_text(errors="replace")[start:] if path.exists() else ""

    def stacks(self) -> str:
        """Asks every rank for the Python stacks of its threads (faulthandler,
        so a blocked rank answers too).
        """
        sizes = [len(self.log(rank)) for rank in range(len(self.pids))]
        for pid in self.pids:
            os.kill(pid, signal.SIGUSR1)
        time.sleep(0.5)
        return "\n".join(f"--- rank {rank}\n{self.log(rank, size)}" for rank, size in enumerate(sizes))


class Pool:
    """`run` calls a function on every rank of a group; `close` leaves no process behind.

    alive: world sizes at a time; backend: "gloo", "staged" through the host (staged.py), or "nccl", a GPU a rank.
    """

    def __init__(self, alive: int = 2, backend: str = BACKEND):
        self.alive, self.backend = alive, backend
        self.ranks: OrderedDict[int, Ranks] = OrderedDict()
        self.launcher: subprocess.Popen | None = None
        self.started = 0

    def run(self, fn: Callable, world_size: int, *args: Any, timeout: float = 60.0) -> list[Any]:
        """Calls `fn(*args)` on every rank of an initialised group and returns the results in rank order.

        `fn` is a function at the top of an importable module; ranks import it by name. Every rank starts a
        call with torch.manual_seed(0). Tensors come back detached and on the CPU.

        Raises RankFailure with the rank and its traceback if one raises, with the log's tail if one dies, and
        with the stack of every rank if any has not answered after `timeout` seconds.
        """
        if self.backend == "nccl" and world_size > torch.cuda.device_count():
            pytest.skip(f"{world_size} ranks over NCCL need as many GPUs, there are {torch.cuda.device_count()}")
        deadline = time.monotonic() + START_TIMEOUT
        if world_size not in self.ranks:
            self._start(world_size, deadline)
        self.ranks.move_to_end(world_size)
        connections = self.ranks[world_size].connections
        request = pickle.dumps((sys.path, fn.__module__, fn.__qualname__, pickle.dumps(args)))
        for rank, connection in enumerate(connections):
            try:
                connection.send_bytes(request)
            except OSError:
                self._fail(world_size, f"rank {rank} of {world_size} is gone", dead=[rank])
        return self._collect(world_size, time.monotonic() + timeout, f"{fn.__module__}.{fn.__qualname__}")

    def close(self) -> None:
        for world_size in list(self.ranks):
            self._stop(world_size)
        if self.launcher is not None:
            self.control.close()
            try:
                self.launcher.wait(10)
            except subprocess.TimeoutExpired:
                self.launcher.kill()
                self.launcher.wait()
            self.launcher = None
            self.directory.cleanup()

    def _collect(self, world_size: int, deadline: float, what: str) -> list[Any]:
        connections = self.ranks[world_size].connections
        results: dict[int, Any] = {}
        errors: dict[int, tuple[str, BaseException | None]] = {}
        dead: list[int] = []
        while len(results) + len(errors) + len(dead) < world_size:
            answered = {*results, *errors, *dead}
            pending = [c for rank, c in enumerate(connections) if rank not in answered]
            ready = wait(pending, max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            failed_before = bool(errors or dead)
            for connection in ready:
                rank = connections.index(connection)
                try:
                    kind, *answer = pickle.loads(connection.recv_bytes())
                except (EOFError, OSError):
                    dead.append(rank)
                else:
                    if kind == "ok":
                        results[rank] = answer[0]
                    else:
                        errors[rank] = tuple(answer)
            if (errors or dead) and not failed_before:
                deadline = min(deadline, time.monotonic() + GRACE)
        if errors:
            rank, (text, cause) = next(iter(errors.items()))
            message = f"{what}: rank {rank} of {world_size} raised\n{text}"
            if len(errors) > 1:
                message += f"ranks that raised, in order: {list(errors)}\n"
            self._fail(world_size, message, cause, dead)
        if dead:
            self._fail(world_size, f"{what}: a rank of {world_size} died", dead=dead)
        if len(results) < world_size:
            missing = sorted(set(range(world_size)) - set(results))
            stacks = self.ranks[world_size].stacks()
            self._fail(world_size, f"{what}: time-out, ranks {missing} of {world_size} did not answer\n{stacks}")
        return [results[rank] for rank in range(world_size)]

    def _fail(
        self, world_size: int, message: str, cause: BaseException | None = None, dead: list[int] | tuple = ()
    ) -> None:
        ranks = self.ranks[world_size]
        logs = {rank: ranks.log(rank)[-LOG_TAIL:] for rank in dead}
        statuses = self._stop(world_size)
        for rank, log in logs.items():
            message += f"\n--- rank {rank} left with status {statuses[rank]}; the end of its log:\n{log}"
        raise RankFailure(message) from cause

    def _start(self, world_size: int, deadline: float) -> None:
        if self.launcher is None:
            self._launch(deadline)
        while len(self.ranks) >= self.alive:
            self._stop(next(iter(self.ranks)))
        self.started += 1
        name = f"{self.started}-{world_size}"
        directory = Path(self.directory.name) / name
        directory.mkdir()
        pairs = [socket.socketpair() for _ in range(world_size)]
        request = json.dumps({"start": name, "directory": str(directory)}).encode()
        socket.send_fds(self.control, [request], [theirs.fileno() for _, theirs in pairs])
        pids = self._reply(deadline)["pids"]
        for _, theirs in pairs:
            theirs.close()
        connections = [Connection(ours.detach()) for ours, _ in pairs]
        self.ranks[world_size] = Ranks(name, directory, connections, pids)
        for rank, connection in enumerate(connections):
            try:
                ready = connection.poll(max(0.0, deadline - time.monotonic())) and connection.recv_bytes()
            except (EOFError, OSError):
                self._fail(world_size, f"rank {rank} of {world_size} died at its start", dead=[rank])
            if not ready:
                self._fail(world_size, f"no rendezvous of {world_size} ranks\n{self.ranks[world_size].stacks()}")

    def _stop(self, world_size: int) -> list[int]:
        ranks = self.ranks.pop(world_size)
        self.control.sendall(json.dumps({"stop": ranks.name}).encode())
        statuses = self._reply(time.monotonic() + START_TIMEOUT)["statuses"]
        for connection in ranks.connections:
            connection.close()
        return statuses

    def _launch(self, deadline: float) -> None:
        self.directory = tempfile.TemporaryDirectory(prefix="two_level_mha_ranks_")
        self.control, theirs = socket.socketpair()
        program = Path(__file__).with_name("launcher.py")
        self.launcher = subprocess.Popen(
            [sys.executable, str(program), str(theirs.fileno()), json.dumps(sys.path)],
            pass_fds=[theirs.fileno()],
            env={name: value for name, value in os.environ.items() if name not in LAUNCHED}
            | ENVIRONMENT
            | OF_GPUS
            | {"TLM_TEST_BACKEND": self.backend},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(Path(self.directory.name) / "launcher.log").open("w"),
        )
        theirs.close()
        try:
            self._reply(deadline)
        except RankFailure:  # or its late answer would be taken for the next one's
            self.launcher.kill()
            self.launcher.wait()
            self.launcher = None
            self.control.close()
            raise

    def _reply(self, deadline: float) -> dict:
        self.control.settimeout(max(0.1, deadline - time.monotonic()))
        try:
            message = self.control.recv(1 << 16)
        except TimeoutError:
            message = b""
        if not message:
            log = (Path(self.directory.name) / "launcher.log").read_text()
            raise RankFailure(f"the launcher does not answer\n{log[-LOG_TAIL:]}")
        return json.loads(message)
