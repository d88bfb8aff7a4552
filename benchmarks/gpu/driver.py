"""What the programs of this folder share: a command line, cases that fail alone, results kept after each of them."""

import argparse
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from common import machine, write_results


class Options(NamedTuple):
    """device: of the tensors. tiny: sizes that a CPU has done at once, to try the program itself. repeats: timed."""

    device: str
    tiny: bool
    repeats: int


Cases = dict[str, Callable[[], dict]]


def run_program(name: str, description: str, cases: Callable[[Options], Cases], repeats: int = 20) -> None:
    """Runs the cases that the command line asks for, prints each one's row and keeps them in NAME_GPU.json, NAME.json
    for the CPU. A case that raises has an "error" in its row, stops no other, and makes the exit status 1. On a GPU the
    file goes to benchmarks/results unless --out or --case is given.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: tiny sizes, tries the program")
    parser.add_argument("--case", default="", help="run only the cases whose name contains this, write nothing")
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--out", type=Path, help="folder of the results")
    args = parser.parse_args()
    tiny = args.device == "cpu"
    if tiny and args.out is None and not args.case:
        parser.error("results of tiny sizes go to no folder but --out")
    torch.manual_seed(0)
    of, rows = machine(args.device), []
    for case, run in cases(Options(args.device, tiny, 1 if tiny else args.repeats)).items():
        if args.case not in case:
            continue
        rows.append(one_row(case, run))
        print("  ".join(f"{key}={value}" for key, value in rows[-1].items() if not isinstance(value, dict)), flush=True)
        if not args.case:
            write_results(name, rows, args.device, args.out, of)
    failed = [row["case"] for row in rows if "error" in row]
    if failed:
        raise SystemExit(f"{len(failed)} of {len(rows)} cases failed: {'; '.join(failed)}")


def one_row(case: str, run: Callable[[], dict]) -> dict:
    start = time.perf_counter()
    try:
        return {"case": case, **run()}
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        return {"case": case, "error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    finally:
        if time.perf_counter() - start > 10:
            print(f"{case} took {time.perf_counter() - start:.0f} s", flush=True)
