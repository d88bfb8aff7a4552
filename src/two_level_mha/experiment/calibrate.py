"""`python -m two_level_mha calibrate`: measures this machine's CPU with a number of Gloo ranks, for predictions of it.

Every rank is held to the processor rank % processors and has one thread. Pieces, operators and collectives, and whole
runs of the model at sizes of CASES are timed from a barrier to the end of the slowest rank; the median counts.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F

from two_level_mha.errors import GridError
from two_level_mha.experiment.calibration import COEFFICIENTS, OTHER, Calibration, Table, fit
from two_level_mha.experiment.hardware import hardware
from two_level_mha.experiment.model import Layout, Sizes, build, mesh_of
from two_level_mha.experiment.runs import Call, record_layout
from two_level_mha.names import Args
from two_level_mha.operators import ops as own_ops

Found = TypeVar("Found")

ROWS, INNER, COLUMNS = [128, 512, 2048], [64, 256, 1024], [64, 256, 1024]
KEYS, WIDTHS = [64, 128, 256, 512], [32, 64, 128]
BYTES = [1 << 14, 1 << 17, 1 << 20, 1 << 22, 1 << 24]
SENT = [1 << 10, 1 << 14, 1 << 17, 1 << 20, 1 << 22]
PASSES = 3  # what disturbs the machine in one of them is not in the median of all
DISTURBED = 1.25  # spread of a calibration that is not to be relied on
LONG = 0.006  # seconds that a piece is repeated for, so that ranks on one processor take turns


@dataclass(frozen=True)
class Case:
    """A forward pass of the model in a layout."""

    sizes: Sizes
    layout: Layout
    causal: bool = False

    @property
    def name(self) -> str:
        s = self.sizes
        mask = ", causal" if self.causal else ""
        return f"{self.layout.name}, D={s.embed_dim} h={s.heads} B={s.batch} L={s.length}{mask}"


def sizes_of(width: int, heads: int, batch: int, length: int) -> Sizes:
    """Two layers of an MLP four times as wide."""
    return Sizes(2, heads, heads, width // heads, 4 * width, batch, length)


def cases(ranks: int) -> list[Case]:
    """Whole runs that the coefficients are fitted to. Pipelines are not among them."""
    heads = max(4, ranks)
    sizes = [sizes_of(128, heads, 8, 128), sizes_of(192, heads, 8, 96), sizes_of(320, heads, 8, 128)]
    layouts = [
        Layout(tp=ranks),
        Layout(tp=ranks, rows=True),
        Layout(dp=ranks),
        Layout(dp=ranks, sharded=True),
        Layout(grid=(1, ranks), scheme="batch"),
        Layout(grid=(ranks // 2, 2), scheme="slices"),
        Layout(grid=(1, ranks), scheme="weights", activations="batch", mlp="gathered"),
    ]
    return [Case(one, layout) for one in sizes for layout in layouts]


class Timer:
    """Times on all ranks of the job at once, each call a collective."""

    def median(self, function: Callable[[], object], repeats: int) -> float:
        return statistics.median(self.times(function, repeats))

    def times(self, function: Callable[[], object], repeats: int) -> list[float]:
        """Seconds from a barrier to the end of the slowest rank; the first call is not among them."""
        function()
        return [self.once(function) for _ in range(repeats)]

    def once(self, function: Callable[[], object]) -> float:
        dist.barrier()
        start = time.perf_counter()
        function()
        taken = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
        dist.all_reduce(taken, dist.ReduceOp.MAX)
        return taken.item()

    def piece(self, function: Callable[[], object], repeats: int = 3) -> float:
        """Seconds of one call among as many as take LONG."""
        first = self.median(function, 2)
        count = max(1, min(1000, int(LONG / max(first, 1e-6))))

        def many() -> None:
            for _ in range(count):
                function()

        return self.median(many, repeats) / count


def _products(timer: Timer) -> Table:
    def rate(rows: int, inner: int, columns: int) -> float:
        a, b = torch.randn(rows, inner), torch.randn(columns, inner).t()
        return 2 * rows * inner * columns / timer.piece(lambda: a @ b)

    return Table([ROWS, INNER, COLUMNS], [[[rate(r, i, c) for c in COLUMNS] for i in INNER] for r in ROWS])


def _attention(timer: Timer, causal: bool) -> Table:
    def rate(keys: int, width: int) -> float:
        q = torch.randn(2, 2, keys, width)
        pairs = keys * (keys + 1) // 2 if causal else keys**2
        op = own_ops.partial_attention
        return 4 * pairs * 4 * width / timer.piece(lambda: op(q, q, q, causal=0 if causal else None))

    return Table([KEYS, WIDTHS], [[rate(keys, width) for width in WIDTHS] for keys in KEYS])


def _memory(timer: Timer) -> dict[str, Table]:
    """Seconds by bytes read and written, which is what the recorder counts."""

    def moved(elements: int) -> dict[str, tuple[int, Callable[[], object]]]:
        """Operator -> tensors of that many elements that it reads and writes, and a call."""
        x, y = torch.randn(max(1, elements // 256), 256), torch.randn(max(1, elements // 256), 256)
        weight = torch.ones(256)
        return {
            "aten.gelu": (2, lambda: F.gelu(x)),
            "aten.native_layer_norm": (2, lambda: F.layer_norm(x, (256,), weight, weight)),
            "aten.add": (3, lambda: x + y),
            OTHER: (2, lambda: x.clone()),
            "aten.cat": (4, lambda: torch.cat([x, y])),
            "aten.sum": (1, lambda: x.view(2, -1).sum(0) if x.shape[0] > 1 else x.sum(0)),
        }

    known = moved(512)
    found = {}
    for name in known:
        seconds = []
        for size in BYTES:
            tensors, function = moved(max(512, size // (4 * known[name][0])))[name]
            seconds.append(timer.piece(function))
        found[name] = Table([BYTES], seconds)
    return found


def _groups() -> dict[int, str]:
    """Of neighbours, by size: the name of this rank's."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    found: dict[int, str] = {}
    for size in [size for size in range(2, ranks + 1) if ranks % size == 0]:
        for first in range(0, ranks, size):
            group = dist.new_group(list(range(first, first + size)))
            if first <= rank < first + size:
                assert isinstance(group, dist.ProcessGroup)
                found[size] = group.group_name
    return found


def _collectives(timer: Timer, groups: dict[int, str]) -> dict[str, Table]:
    ops, wait = torch.ops._c10d_functional, torch.ops._c10d_functional.wait_tensor
    found: dict[str, Table] = {}
    for size, name in groups.items():

        def calls(x: torch.Tensor, size: int = size, name: str = name) -> dict[str, Callable[[], object]]:
            return {
                "all_reduce": lambda: wait(ops.all_reduce(x, "sum", name)),
                "all_gather": lambda: wait(ops.all_gather_into_tensor(x, size, name)),
                "reduce_scatter": lambda: wait(ops.reduce_scatter_tensor(x, "sum", size, name)),
                "all_to_all": lambda: own_ops.all_to_all(x, 0, 0, size, name),  # as layers send it
            }

        for kind in calls(torch.zeros(size)):
            seconds = [timer.median(calls(torch.randn(bytes_ // 4))[kind], 9) for bytes_ in SENT]
            found[f"{kind} {size}"] = Table([SENT], seconds)
    found["send 2"] = Table([SENT], [timer.median(_message(torch.randn(bytes_ // 4)), 9) for bytes_ in SENT])
    return found


def _message(x: torch.Tensor) -> Callable[[], object]:
    """From each even rank to the next."""
    rank = dist.get_rank()
    if rank % 2 == 0:
        return lambda: dist.send(x, rank + 1)
    return lambda: dist.recv(x, rank - 1)


def whole_run(case: Case) -> Callable[[], object]:
    """A call of the model in a layout on these ranks."""
    torch.manual_seed(0)
    built = build(case.sizes, case.layout, mesh_of(case.layout), causal=case.causal)
    part = built.part(torch.randn(case.sizes.batch, case.sizes.length, case.sizes.embed_dim))
    return lambda: built.forward(part)


def on_ranks(ranks: int, function: Callable[..., Found], *args: Any) -> Found:
    """What function(*args) returns on rank 0 of Gloo ranks of this machine, rank r on processor r % processors."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, f"{folder}/store", f"{folder}/found", function, args)
        torch.multiprocessing.spawn(_on_rank, arguments, nprocs=ranks)
        found: Found = torch.load(f"{folder}/found", weights_only=False)
    return found


def _on_rank(rank: int, ranks: int, store: str, found: str, function: Callable[..., Any], args: Args) -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    result = function(*args)
    if rank == 0:
        torch.save(result, found)
    dist.barrier()
    dist.destroy_process_group()


def _measure(repeats: int) -> tuple[list[dict[str, Any]], list[float]]:
    """The tables of each pass, and the seconds of the cases, whose runs are spread over the passes."""
    timer = Timer()
    groups = _groups()
    runs = [whole_run(case) for case in cases(dist.get_world_size())]
    times: list[list[float]] = [[] for _ in runs]
    tables = []
    for _ in range(PASSES):
        tables.append(
            {
                "products": _products(timer),
                "attention": _attention(timer, causal=False),
                "attention_causal": _attention(timer, causal=True),
                **{f"memory {name}": table for name, table in _memory(timer).items()},
                **{f"collectives {name}": table for name, table in _collectives(timer, groups).items()},
            }
        )
        for repeat in range(1 + -(-repeats // PASSES)):
            for run, of_one in zip(runs, times, strict=True):
                taken = timer.once(run)
                if repeat:  # the first warms up
                    of_one.append(taken)
    return tables, [statistics.median(of_one) for of_one in times]


def together(passes: list[dict[str, Table]]) -> tuple[dict[str, Any], float]:
    """The fields of a Calibration from tables of several passes, by their median; and how far the passes are apart: the
    median over all entries of the slowest over the fastest.
    """
    found: dict[str, Any] = {"memory": {}, "collectives": {}}
    apart: list[float] = []
    for name in passes[0]:
        values = np.array([one[name].values for one in passes])
        apart += (values.max(0) / values.min(0)).flatten().tolist()
        table = Table(passes[0][name].axes, np.median(values, 0).tolist())
        kind, _, of = name.partition(" ")
        if of:
            found[kind][of] = table
        else:
            found[kind] = table
    return found, statistics.median(apart)


def fitted(tables: dict[str, Any], seconds: list[float], ranks: int, source: str, spread: float = 1.0) -> Calibration:
    """A calibration from what was measured of cases(ranks)."""
    one = dict.fromkeys(COEFFICIENTS, 1.0)
    plain = Calibration(
        ranks=ranks, cores=os.cpu_count() or 1, source=source, coefficients=one, spread=spread, **tables
    )
    machine = hardware(f"cpu-{ranks}")
    features = []
    for case in cases(ranks):
        run = record_layout(case.sizes, case.layout, machine, Call("prefill", case.causal, torch.float32))
        features.append(plain.features(run.events[0]))
    found = fit(features, seconds)
    predicted = [sum(found[name] * x for name, x in zip(COEFFICIENTS, row, strict=True)) for row in features]
    errors = [abs(p / s - 1) for p, s in zip(predicted, seconds, strict=True)]
    return replace(plain, coefficients=found, error=max(errors))


def calibrate(ranks: int, repeats: int = 11) -> Calibration:
    """Measures this machine with `ranks` Gloo ranks; half a minute for 2, minutes for more than it has processors."""
    if ranks < 2 or ranks % 2:
        raise GridError(f"--ranks must be an even number, got {ranks}")
    passes, seconds = on_ranks(ranks, _measure, repeats)
    tables, spread = together(passes)
    source = f"measured on this machine with {ranks} Gloo ranks on {os.cpu_count()} processors, float32"
    return fitted(tables, seconds, ranks, source, spread)


def add_calibrate(parser: argparse.ArgumentParser) -> None:
    parser.description = "Measures this machine's CPU with Gloo ranks, for `predict --calibration FILE`."
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.set_defaults(run=command)


def command(args: argparse.Namespace) -> None:
    """Writes the file; exit code 2 for arguments that do not fit."""
    try:
        found = calibrate(args.ranks, args.repeats)
    except GridError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    found.to_file(args.out)
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in found.coefficients.items())
    print(f"{args.out}: coefficients {numbers}; whole runs that were fitted differ by up to {found.error:.0%}")
    if found.spread > DISTURBED:
        print(f"passes were {found.spread:.2f} times apart: something else ran, measure again", file=sys.stderr)
