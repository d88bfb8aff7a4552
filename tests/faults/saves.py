"""Kills ranks at random moments of a save, and looks at what is left: python tests/faults/saves.py --kills 100

Every round forks the ranks of a grid, which load the newest checkpoint and every other one, compare them bit for bit
with what was saved under that step, and save step after step; one rank, or all, get SIGKILL at a random moment of a
save. Weights and moments are a function of the step, so what was saved is known without having been kept.

Exit status 0 and one line of JSON: kills; how many came before the checkpoint was whole, after it had its name, and
after save had returned on a rank; unfinished folders left; saves that returned. A round that finds anything wrong ends
the program with what it found.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

import two_level_mha as tlm

PATIENCE = 60.0  # seconds until a rank counts as hung
KEPT = 2  # checkpoints between rounds


class Trained:
    """A tiny model and its AdamW, whose every number follows from the step."""

    def __init__(self, grid: tuple[int, int] | None) -> None:
        torch.manual_seed(0)
        mesh = None if grid is None else tlm.init_mesh("cpu", grid)
        self.model = nn.ModuleList([tlm.TwoLevelAttention(32, 4, 4, 8, mesh=mesh, bias=True), nn.Linear(32, 64)])
        self.optimizer = torch.optim.AdamW(tlm.param_groups(self.model))
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p)
        self.optimizer.step()

    def tensors(self) -> list[Tensor]:
        moments = [x for p in self.model.parameters() for x in self.optimizer.state[p].values()]
        return [*(p.detach() for p in self.model.parameters()), *moments]

    def values(self, step: int) -> list[Tensor]:
        """What tensors() are at a step: this rank's part, and its random state."""
        generator = torch.Generator().manual_seed(step)
        found = []
        for x in self.tensors():
            whole = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            if isinstance(x, DTensor):
                whole = distribute_tensor(whole, x.device_mesh, x.placements, src_data_rank=None)._local_tensor
            found.append(whole)
        return [*found, torch.Generator().manual_seed(step * 100 + dist.get_rank()).get_state()]

    def held(self) -> list[Tensor]:
        local = [x._local_tensor if isinstance(x, DTensor) else x for x in self.tensors()]
        return [*local, torch.get_rng_state()]

    def become(self, step: int) -> None:
        *values, state = self.values(step)
        for x, value in zip(self.held(), values, strict=False):
            x.copy_(value)
        torch.set_rng_state(state)

    def check(self, run: Path, step: int | None) -> int:
        """Loads a step, or the newest; raises AssertionError unless it is what was saved."""
        loaded = tlm.load(run, self.model, self.optimizer, step=step)
        assert loaded.extra == {"squared": loaded.step**2}, loaded
        for found, value in zip(self.held(), self.values(loaded.step), strict=True):
            assert torch.equal(found, value), f"step {loaded.step} is not what was saved"
        return loaded.step


def rank_main(rank: int, grid: tuple[int, int], run: Path, store: str, channel: Connection) -> None:
    """Sends ("newest", step), then ("begin", step), ("end", step) around every save; ("error", text) for a finding."""
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, grid[0] * grid[1]), rank=rank, world_size=grid[0] * grid[1],
        timeout=timedelta(seconds=PATIENCE),
    )  # fmt: skip
    trained = Trained(grid)
    newest = -1
    try:
        if (run / "latest").exists():
            newest = trained.check(run, None)
            for folder in sorted(run.glob("step-*")):
                trained.check(run, int(folder.name.removeprefix("step-")))
    except Exception:
        channel.send(("error", traceback.format_exc()))
        return
    channel.send(("newest", newest))
    with contextlib.suppress(Exception):  # of a peer that died
        for step in range(newest + 1, newest + 1000):
            trained.become(step)
            channel.send(("begin", step))
            tlm.save(run, trained.model, trained.optimizer, step=step, extra={"squared": step**2})
            channel.send(("end", step))


class Round:
    """The ranks of one round, and what they have said."""

    def __init__(self, grid: tuple[int, int], run: Path, number: int) -> None:
        context = multiprocessing.get_context("fork")
        store = str(run.parent / f"store-{number}")
        self.channels, self.processes = [], []
        for rank in range(grid[0] * grid[1]):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=rank_main, args=(rank, grid, run, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self.channels.append(ours)
            self.processes.append(process)
        self.ended = -1  # the last step whose save has returned on any rank

    def next(self, wanted: str) -> int:
        """The step of the next message of that kind, from any rank; ends the program for what must not be."""
        deadline = time.monotonic() + PATIENCE
        while True:
            ready = wait(self.channels, max(0.0, deadline - time.monotonic()))
            assert ready, f"no {wanted!r} within {PATIENCE} s"
            for channel in ready:
                kind, value = channel.recv()
                assert kind != "error", value
                self.ended = max(self.ended, value) if kind == "end" else self.ended
                if kind == wanted:
                    return value

    def begun(self) -> int:
        """The step of a save that some rank begins now; not of one that is over for another."""
        while (step := self.next("begin")) <= self.ended:
            pass
        return step

    def kill(self, victims: list[int]) -> None:
        """SIGKILL to some, and to those whom the deaths leave waiting; then hears what was said until then."""
        for rank in victims:
            os.kill(self.processes[rank].pid, signal.SIGKILL)
        for process in self.processes:
            process.join(2.0)
            if process.is_alive():
                process.kill()
                process.join()
        for channel in self.channels:
            with contextlib.suppress(EOFError):
                while True:
                    kind, value = channel.recv()
                    assert kind != "error", value
                    self.ended = max(self.ended, value) if kind == "end" else self.ended
            channel.close()


def campaign(kills: int, grid: tuple[int, int], seed: int, directory: Path) -> dict[str, object]:
    torch.set_num_threads(1)  # before the forks
    Trained(None)  # imports what an optimizer imports, once for all ranks
    draw = random.Random(seed)
    run = directory / "run"
    counts = {"kills": 0, "not whole": 0, "renamed": 0, "returned": 0, "leftovers": 0, "saves": 0, "ranks killed": 0}
    left: list[Path] = []  # unfinished folders of the round before
    least = -1  # the newest checkpoint that must be there
    for number in range(kills + 1):
        ranks = Round(grid, run, number)
        newest = ranks.next("newest")
        assert newest >= least, f"step {least} was saved, and the newest is {newest}"
        for _ in range(draw.randrange(1, 3)):  # one or two saves pass first
            step, begun = ranks.begun(), time.monotonic()
            while ranks.ended < step:
                ranks.next("end")
            took = time.monotonic() - begun
        assert not any(path.exists() for path in left), "a save left the folder of another, dead one"
        if number == kills:
            ranks.kill([])
            break
        step = ranks.begun()
        time.sleep(draw.uniform(0, 1.1 * took))
        victims = [draw.randrange(len(ranks.processes))] if draw.random() < 0.8 else range(len(ranks.processes))
        ranks.kill(list(victims))
        least = ranks.ended
        steps = sorted(run.glob("step-*"))
        there = int(steps[-1].name.removeprefix("step-")) >= step
        counts["kills"] += 1
        counts["returned" if least >= step else "renamed" if there else "not whole"] += 1
        counts["ranks killed"] += len(victims)
        left = list(run.glob(".step-*.tmp-*"))
        counts["leftovers"] += len(left)
        counts["saves"] += least - newest
        for folder in steps[:-KEPT]:
            shutil.rmtree(folder)
        if sys.stderr.isatty() and counts["kills"] % 10 == 0:
            print(counts, file=sys.stderr)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--grid", default="2x2", help="head groups x slices")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    n, m = map(int, arguments.grid.split("x"))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory(prefix="two_level_mha_saves_") as directory:
        print(json.dumps(campaign(arguments.kills, (n, m), arguments.seed, Path(directory))))


if __name__ == "__main__":
    main()
