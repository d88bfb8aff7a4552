"""Overlap: a layer whose batch goes in chunks, against the same layer in one; a trace of both, and a picture of it.

    python benchmarks/overlap.py [--ranks 2] [--rate 1gbit] [--repeats 11] [--case TEXT]
    torchrun --nproc-per-node 8 benchmarks/overlap.py --device cuda

Alone it starts Gloo ranks of one thread each. --rate, for root: every rank in a network namespace of its own, on a link
of that rate; without it they share the loopback, whose transfers take the very cores that compute. Under torchrun the
ranks are those it started. Layers of 1, 2, .. chunks take turns; ratio = median time in chunks / median time in one,
below 1 is faster, and hidden is the share of the exchanges' time in which rank 0 computed, by the trace. Writes
results/overlap.json, on a GPU overlap_h100.json or what it is, and beside it under the same name a Chrome trace of each
variant of the first case, and a picture (PNG).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from common import ROOT, gpu_name, write_results
from matplotlib.figure import Figure
from report_pictures import timeline

import two_level_mha as tlm

PORT = 29477
SPANS = ("computing", "exchanging", "both")  # of a traced step, in the rows of the first case


class Case(NamedTuple):
    name: str
    scheme: str
    B: int
    L: int
    D: int
    h: int
    training: bool
    activations: str = "replicated"
    chunks: tuple[int, ...] = (1, 2, 4)


CASES = (
    Case("training", "sequence", 8, 256, 512, 8, True),
    Case("training, by batch", "batch", 8, 256, 512, 8, True),
    Case("training, split activations", "sequence", 8, 256, 512, 8, True, "sequence"),
    Case("forward", "slices", 8, 256, 512, 8, False),
)


class Step:
    """One step of a layer in `chunks`, on this rank."""

    def __init__(self, case: Case, chunks: int, mesh, device: str) -> None:
        torch.manual_seed(0)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        options = {"scheme": case.scheme, "activations": case.activations, "overlap": chunks, "dtype": dtype}
        self.layer = tlm.TwoLevelAttention(case.D, case.h, mesh=mesh, device=device, **options)
        x = torch.randn(case.B, case.L, case.D, device=device, dtype=dtype)
        self.x = tlm.shard_activations(x, case.activations, mesh).requires_grad_(case.training)
        self.training = case.training

    def __call__(self) -> None:
        if self.training:
            self.layer(self.x).sum().backward()
        else:
            with torch.no_grad():
                self.layer(self.x)
        if self.x.is_cuda:
            torch.cuda.synchronize()


def timed(steps: dict[int, Step], repeats: int) -> dict[int, float]:
    """Median milliseconds of a step, by its chunks; they take turns, and begin together on all ranks."""
    times = {chunks: [] for chunks in steps}
    for repeat in range(repeats + 1):
        for chunks, step in steps.items():
            dist.barrier()
            start = time.perf_counter()
            step()
            if repeat:  # the first round warms up
                times[chunks].append((time.perf_counter() - start) * 1e3)
    return {chunks: statistics.median(of_one) for chunks, of_one in times.items()}


def traced(step: Step, path: Path) -> None:
    """Writes the Chrome trace of one step."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if step.x.is_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    dist.barrier()
    with torch.profiler.profile(activities=activities) as profiler, torch.profiler.record_function("step"):
        step()
    if dist.get_rank() == 0:
        profiler.export_chrome_trace(str(path))


Spans = list[tuple[float, float]]  # milliseconds since the step began, disjoint, in order


def joined(spans: Spans) -> Spans:
    found: Spans = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def common(a: Spans, b: Spans) -> Spans:
    both = [(max(p[0], q[0]), min(p[1], q[1])) for p in a for q in b]
    return joined([(start, end) for start, end in both if start < end])


def length(spans: Spans) -> float:
    return sum(end - start for start, end in spans)


def read(path: Path) -> tuple[Spans, Spans]:
    """When rank 0 computed and when it exchanged, by a trace: on a GPU by its kernels; else it computes but for the
    time in which it waits, and Gloo's thread exchanges.
    """
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("ph") == "X"]
    step = next(e for e in events if e["name"] == "step" and e["cat"] == "user_annotation")
    begin, end = step["ts"], step["ts"] + step["dur"]

    def spans(of: list[dict]) -> Spans:
        return joined([((e["ts"] - begin) / 1e3, (e["ts"] + e["dur"] - begin) / 1e3) for e in of])

    kernels = [e for e in events if e["cat"] == "kernel"]
    if kernels:
        sending = [e for e in kernels if e["name"].startswith("nccl")]
        return spans([e for e in kernels if e not in sending]), spans(sending)
    waits = spans([e for e in events if e["name"] == "_c10d_functional::wait_tensor"])
    edges = [0.0, *(t for wait in waits for t in wait), (end - begin) / 1e3]
    exchanges = [e for e in events if e["name"].startswith("gloo:") and begin <= e["ts"] < end]
    return joined(list(zip(edges[::2], edges[1::2], strict=True))), spans(exchanges)


def traced_spans(path: Path) -> dict[str, object]:
    """What a row says of its trace: spans in ms, the share of the exchanges' time in which something was computed."""
    computing, sending = read(path)
    both = common(computing, sending)
    found = {"hidden": round(length(both) / max(length(sending), 1e-9), 3)}
    for name, spans in zip(SPANS, (computing, sending, both), strict=True):
        found[name] = [(round(start, 2), round(end, 2)) for start, end in spans]
    return found


def picture(rows: list[dict], to: Path, title: str) -> None:
    """Two lines for each variant: computing above, exchanging below, dark where it is hidden."""
    figure = Figure(figsize=(10, 1.6 * len(rows) + 0.8), layout="constrained")
    axes = figure.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0]
    for axis, row in zip(axes, rows, strict=True):
        chunks = row["case"].rpartition(", ")[2]
        timeline(axis, row, f"{chunks}: {row['hidden']:.0%} of the exchanges hidden (dark)")
    axes[-1].set_xlabel("ms")
    figure.suptitle(title, fontsize=10)
    figure.savefig(to, dpi=110)


def rows_of(case: Case, mesh, args: argparse.Namespace, paths: dict[int, Path]) -> list[dict]:
    """Times and traces one case; on the first rank its rows, with the spans of its traces."""
    steps = {chunks: Step(case, chunks, mesh, args.device) for chunks in case.chunks}
    ms = timed(steps, args.repeats)
    for chunks, step in steps.items():
        traced(step, paths[chunks])
    if dist.get_rank() != 0:
        return []
    return [
        {
            "case": f"{title(case)}, {chunks} chunks",
            "ranks": mesh.size(),
            "rate": args.rate or "loopback",
            "ms": round(ms[chunks], 3),
            "ratio": round(ms[chunks] / ms[1], 3),
            **traced_spans(paths[chunks]),
        }
        for chunks in case.chunks
    ]


def title(case: Case) -> str:
    return f"{case.name}: {case.scheme}, {case.activations} B={case.B} L={case.L} D={case.D} h={case.h}"


def run(args: argparse.Namespace) -> None:
    """On every rank."""
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    mesh = tlm.init_mesh(args.device, (1, dist.get_world_size()))
    name = f"overlap_{gpu_name()}" if args.device == "cuda" else "overlap"
    Path(args.out).mkdir(parents=True, exist_ok=True)
    rows, cases = [], [case for case in CASES if args.case in case.name]
    with tempfile.TemporaryDirectory() as scratch:
        for case in cases:
            folder = Path(args.out if case is cases[0] else scratch)
            paths = {chunks: folder / f"{name}_{chunks}.trace.json" for chunks in case.chunks}
            found = rows_of(case, mesh, args, paths)
            for row in found:
                print(f"{row['case']:85} {row['ms']:9.3f} ms  ratio {row['ratio']:.3f}  hidden {row['hidden']:.0%}")
            if found and case is cases[0]:
                picture(found, folder / f"{name}.png", f"{title(case)}; {mesh.size()} ranks, {args.rate or 'loopback'}")
            rows += found if case is cases[0] else [{k: x for k, x in row.items() if k not in SPANS} for row in found]
    if rows and not args.case:
        print(write_results("overlap", rows, args.device, folder=Path(args.out)))
    dist.destroy_process_group()


@contextmanager
def places(ranks: int, rate: str | None):
    """For each rank what a command begins with to run there, and its address and network interface."""
    if rate is None:
        yield [([], "127.0.0.1", "lo")] * ranks
        return

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    pid, made = os.getpid(), []
    bridge = f"b{pid}"
    try:
        ip("link", "add", bridge, "type", "bridge")
        ip("link", "set", bridge, "up")
        for rank in range(ranks):
            space, inside, outside = f"tlm{pid}_{rank}", f"v{pid}_{rank}", f"w{pid}_{rank}"
            ip("netns", "add", space)
            made.append(space)
            ip("link", "add", outside, "type", "veth", "peer", "name", inside, "netns", space)
            ip("link", "set", outside, "master", bridge, "up")
            ip("-n", space, "addr", "add", f"10.77.0.{rank + 1}/24", "dev", inside)
            for device in ("lo", inside):
                ip("-n", space, "link", "set", device, "up")
            shape = f"tc qdisc replace dev {inside} root tbf rate {rate} burst 256kb latency 400ms".split()
            subprocess.run(["ip", "netns", "exec", space, *shape], check=True)
        yield [
            (["ip", "netns", "exec", space], f"10.77.0.{rank + 1}", f"v{pid}_{rank}") for rank, space in enumerate(made)
        ]
    finally:
        for space in made:
            ip("netns", "del", space)
        subprocess.run(["ip", "link", "del", bridge], check=False)


def launch(args: argparse.Namespace) -> None:
    """Starts the ranks of this machine, each by this script."""
    with places(args.ranks, args.rate) as where:
        ranks = []
        for rank, (prefix, _, interface) in enumerate(where):
            env = os.environ | {"RANK": str(rank), "WORLD_SIZE": str(args.ranks), "MASTER_ADDR": where[0][1]}
            env |= {"MASTER_PORT": str(PORT), "GLOO_SOCKET_IFNAME": interface, "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen([*prefix, sys.executable, *sys.argv], env=env))
        codes = [rank.wait() for rank in ranks]
    if any(codes):
        raise SystemExit(f"ranks ended with {codes}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rate", help="of each rank's link, as tc takes it (1gbit); needs root")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--case", default="", help="run only the cases whose name contains this, write no results")
    parser.add_argument("--out", default=str(ROOT / "results"))
    parser.add_argument("--threads", type=int, default=1, help="of a rank; other numbers are not measured")
    args = parser.parse_args()
    run(args) if "RANK" in os.environ else launch(args)


if __name__ == "__main__":
    main()
