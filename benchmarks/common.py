"""What every benchmark shares: timing, on the CPU and on a GPU, and results on disk with the machine they came from."""

import argparse
import itertools
import json
import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from gpu.facts import gpu_facts

from two_level_mha import _C

ROOT = Path(__file__).resolve().parent
CPU_FLAGS = ("avx512f", "avx512_bf16", "amx_bf16")


def interleaved_ms(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each function; they take turns, so that a busy machine slows all alike."""
    times = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if repeat:  # the first round warms up
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(of_one) for name, of_one in times.items()}


def device_ms(functions: dict[str, Callable[..., object]], inputs: list[tuple], repeats: int) -> dict[str, float]:
    """Median milliseconds of each function of one of `inputs`, by events of the GPU, or by a clock for CPU tensors.

    The functions take turns, and so do the inputs: give enough of them (`past_the_cache`) that none is found in the L2
    cache. Nothing waits for the GPU between calls: what is launched slower than it runs is timed by its launches.
    """
    if not any(isinstance(x, torch.Tensor) and x.is_cuda for x in inputs[0]):
        turns = {name: _in_turns(function, inputs) for name, function in functions.items()}
        return interleaved_ms(turns, repeats)
    for function in functions.values():
        for given in inputs[:2]:
            function(*given)
    torch.cuda.synchronize()
    events = {name: [] for name in functions}
    for repeat in range(repeats):
        for at, (name, function) in enumerate(functions.items()):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function(*inputs[(repeat * len(functions) + at) % len(inputs)])
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: statistics.median(a.elapsed_time(b) for a, b in pairs) for name, pairs in events.items()}


def _in_turns(function: Callable[..., object], inputs: list[tuple]) -> Callable[[], object]:
    turn = itertools.cycle(inputs)
    return lambda: function(*next(turn))


def graph_ms(function: Callable[..., object], inputs: list[tuple], repeats: int) -> float:
    """Median milliseconds on the GPU of one call, of a CUDA graph with a call of each of `inputs`: no launch is waited
    for.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for given in inputs[:2]:
            function(*given)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for given in inputs:
            function(*given)
    ms = device_ms({"graph": lambda _: graph.replay()}, [(torch.empty(0, device="cuda"),)], repeats)["graph"]
    return ms / len(inputs)


def past_the_cache(make: Callable[[], tuple], device: torch.device | str, at_most: int = 16) -> list[tuple]:
    """As many draws of a call's inputs as hold three times the L2 cache of the GPU; one on the CPU."""
    found = [make()]
    if torch.device(device).type == "cuda":
        size = sum(x.numel() * x.element_size() for x in found[0] if isinstance(x, torch.Tensor))
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        found += [make() for _ in range(min(at_most, math.ceil(3 * cache / max(1, size))) - 1)]
    return found


# Dense FLOP/s of the data sheets of the SXM parts, by bytes of an element; 4: tensor cores at tf32.
PEAKS = {"h100": {2: 989e12, 4: 495e12}, "h200": {2: 989e12, 4: 495e12}}


def gpu_name() -> str:
    """What results of this GPU are named by, as "h100"."""
    name = torch.cuda.get_device_name().lower()
    found = next((known for known in PEAKS if known in name), None)
    if found is None:
        raise SystemExit(f"no peak is known of {name!r}: add its data sheet's to PEAKS of benchmarks/common.py")
    return found


def tflops(flops: float, ms: float, dtype: torch.dtype, device: torch.device | str) -> float:
    """TFLOP/s that were reached. Raises SystemExit for more than the GPU can: then nothing that was timed counts."""
    reached = flops / ms * 1e3
    if torch.device(device).type == "cuda" and not reached < PEAKS[gpu_name()][dtype.itemsize]:
        raise SystemExit(f"{reached / 1e12:.0f} TFLOP/s in {dtype} is more than the GPU can: the run is void")
    return reached / 1e12


def peak_mib(function: Callable[[], object]) -> float:
    """How far the resident memory of this process rises above its present size while the function runs (Linux)."""

    def status(field: str) -> float:
        return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    function()
    return status("VmHWM") - before


def cpu_info() -> dict[str, str]:
    """The fields of the first processor in /proc/cpuinfo, empty where there is none."""
    file = Path("/proc/cpuinfo")
    if not file.exists():
        return {}
    first = file.read_text().split("\n\n")[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def commit() -> str:
    """Of the checkout; where that has no history, what TLM_COMMIT says, or "unknown"."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("TLM_COMMIT", "unknown")


def machine(device: str = "cpu") -> dict:
    """CPU model and flags, the level that the CPU kernels use, torch, python, commit, threads; for "cuda" the GPU."""
    info = cpu_info()
    of_gpu = {"gpu": gpu_facts() | {"archs": _C.build_info()["archs"]}} if device == "cuda" else {}
    return {
        "cpu": info.get("model name", platform.processor()),
        "flags": {flag: flag in info.get("flags", "").split() for flag in CPU_FLAGS},
        "level": _C.Machine().cpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "threads": torch.get_num_threads(),
        **of_gpu,
    }


def write_results(
    name: str, rows: list[dict], device: str = "cpu", folder: Path | None = None, of: dict | None = None
) -> Path:
    """Writes results/NAME.json, on a GPU NAME_h100.json or what it is: the machine, then one row for each case.

    of: the machine, where it was asked for before.
    """
    folder = folder or ROOT / "results"
    path = folder / (f"{name}_{gpu_name()}.json" if device == "cuda" else f"{name}.json")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": of or machine(device), "rows": rows}, indent=1) + "\n")
    return path


def verdict(row: dict) -> str:
    """ " BELOW" or " ABOVE" where a row misses the floor or limit that it names, as NaN does; "" where it does not."""
    if "floor" in row and not row["ratio"] >= row["floor"]:
        return " BELOW"
    figure, limit = ("mib", "limit_mib") if "mib" in row else ("ratio", "limit")
    return " ABOVE" if limit in row and not row[figure] <= row[limit] else ""


def run_cases(
    name: str,
    description: str,
    cases: dict[str, object],
    run: Callable[[object, int], dict],
    line: Callable[[dict], str],
    repeats: int,
) -> None:
    """A benchmark's command line: runs the cases it asks for and prints a line for each. results/NAME.json is written
    by a whole run only, so that it comes from one machine, one commit and one run; NAME_LEVEL where
    ATEN_CPU_CAPABILITY holds the CPU to less than it has. Exits with 1 where a row misses its
    floor or limit, after all cases have run.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--case", default="", help="run only the cases whose name contains this, write nothing")
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = []
    for case_name, case in cases.items():
        if args.case in case_name:
            rows.append(run(case, args.repeats))
            print(line(rows[-1]), flush=True)
    if not args.case:
        held = os.environ.get("ATEN_CPU_CAPABILITY")
        print(write_results(f"{name}_{held}" if held else name, rows))
    missed = [row["case"] for row in rows if verdict(row)]
    if missed:
        raise SystemExit(f"{len(missed)} of {len(rows)} cases miss their floor or limit: {', '.join(missed)}")
