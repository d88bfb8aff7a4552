"""What every benchmark shares: interleaved timing and results on disk with the machine they came from."""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

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


def machine() -> dict:
    """CPU model and flags, the level that the CPU kernels use, torch, python, commit, threads."""
    info = cpu_info()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    return {
        "cpu": info.get("model name", platform.processor()),
        "flags": {flag: flag in info.get("flags", "").split() for flag in CPU_FLAGS},
        "level": _C.Machine().cpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
        "threads": torch.get_num_threads(),
    }


def write_results(name: str, rows: list[dict]) -> Path:
    """Writes results/NAME.json: the machine, then one row for each case."""
    path = ROOT / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
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
