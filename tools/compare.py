"""This tree against another one, built beside it: cases of benchmarks/module.py, whose processes take turns.

    python tools/compare.py OTHER [--case TEXT] [--rounds N] [--repeats N]

OTHER is the folder of the other tree, say an older commit in a git worktree, built in place. For each case the median
over rounds of both trees' ratios to nn.MultiheadAttention, and of the quotient of neighbours: above 1 this tree is
slower. Each round runs both trees, one after the other, so that a busy machine slows both.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINE = re.compile(r"^(?P<case>.*?)\s+ours\s+(?P<ours>[\d.]+) ms\s+stock\s+(?P<stock>[\d.]+) ms", re.MULTILINE)


def ratios(tree: Path, case: str, repeats: int) -> dict[str, float]:
    """Case -> our time over stock's, in one run of that tree's module benchmark."""
    command = [sys.executable, "benchmarks/module.py", "--case", case, "--repeats", str(repeats)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tree / "src"), str(tree)])
    }  # where older trees have it
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    found = {match["case"]: float(match["ours"]) / float(match["stock"]) for match in LINE.finditer(done.stdout)}
    if not found:
        raise SystemExit(f"no case of {tree} matches {case!r}\n{done.stdout}{done.stderr}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path)
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    rounds = [
        [ratios(tree.resolve(), args.case, args.repeats) for tree in (ROOT, args.other)] for _ in range(args.rounds)
    ]
    for case in rounds[0][0]:
        this, other = ([of_round[tree][case] for of_round in rounds] for tree in (0, 1))
        quotient = statistics.median(a / b for a, b in zip(this, other, strict=True))
        print(
            f"{case:<62} this tree {statistics.median(this):6.3f}  other {statistics.median(other):6.3f}  "
            f"this over other {quotient:6.3f}  of {len(rounds)} rounds"
        )


if __name__ == "__main__":
    main()
