"""What crosses a slow link between two nodes, and how much of it is hidden: gathers, and every scheme of a layer.

    python benchmarks/links.py [--rate 100mbit] [--delay 0] [--ranks-per-node 2] [--repeats 10] [--json PATH] [--quick]

The nodes are network namespaces joined by a shaped link (nodes.py), which needs root on Linux; without it the program
says so and ends with 2. On the grid (2, m) the slice axis lies inside a node and the head axis across. Four parts:

  short        at --rate, where communication takes longer than computing
  wrong order  the same with the ranks dealt to the nodes in turn, so that the slice axis crosses the link
  duplex       at --rate, two ranks that send each other as much at once: as layers do, by Gloo's all_to_all, and by
               messages of which the receives, or the sends, are posted first
  balanced     one rank a node and the slice axis across, longer sequences, each case at the rate at which its bytes
               take 1 / BALANCE of its computing: what is hidden where a layer computes a chunk while others travel
               (overlap=4), and what the number of chunks takes that is predicted for such a link (overlap=None)

Bytes over the link are what a node sends, by the counters of its interface, headers taken off. Beside them is a
prediction: the bytes that a rank sends by the table of csrc/plan/traffic.h, placed as Gloo does.

  all_gather, all_reduce   a ring in the order of ranks: all that a rank sends goes to the next one
  all_to_all               pairwise: as much to each other rank of the group (a reduce-scatter is one on the CPU)

So gathers of N bytes a rank send from each of n nodes of m ranks, P = n m, in node order: (P - 1) N in a flat ring,
(P - m) N with the head axis first, m (P - m) N with the slice axis first. Taken off what is measured: the barriers
around a call and the sizes that ranks tell each other where activations are split, 1 to 3 kB, which computing alone has
too ("around"). Not predicted, and why a ratio is not 1: Gloo's words before a message; what TCP sends again.

Computing alone is the same layer on groups of torch's fake backend, where an exchange returns at once. It is timed
before and after the others of each run, which take turns; exposed is a run's time less the mean of the two. A run is
disturbed, which keeps it out of the medians of times and not off the list, if one of the two takes more than DISTURBED
times the median of all and TURN_MS. Gathers compute nothing, and none of their runs is left out.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from common import ROOT, machine, verdict, write_results
from link_ranks import Part, run
from nodes import Nodes, bits_per_second, missing

BALANCE = 1.6
DISTURBED = 1.2
TURN_MS = 4.0  # what a rank waits for a core that another has: there are more ranks than cores
COMPUTE = 1.3  # times the exchange that computing takes at least, where overlap is asked to hide half of it
HALVED = 0.9  # of these runs must expose at most half of what they do without overlap
PLANNED = 1.03  # limit of the time with the chunks that are predicted over the time of one
WORDS = 4096  # bytes of a call that are Gloo's words, and no reason for a verdict
BYTES = 1.01  # limit of measured over predicted, or the inverse


def measure(nodes: Nodes, part: Part, ranks_per_node: int) -> list[dict]:
    command = [sys.executable, __file__, "--part", json.dumps(asdict(part))]
    outputs = nodes.run(command, 1 if part.across else ranks_per_node, round_robin=part.round_robin)
    return [judged(row, nodes.rate) for row in json.loads(outputs[0].splitlines()[-1])]


def judged(row: dict, rate: int) -> dict:
    """A row with the medians of its runs, and its verdicts."""
    runs, predicted = row["runs"], row["predicted"]
    alone = [ms for one in runs for ms in one["alone_ms"]]
    for one in runs:
        one["disturbed"] = any(ms > DISTURBED * statistics.median(alone) + TURN_MS for ms in one["alone_ms"])
        if alone:
            one["exposed_ms"] = {
                name: round(ms - statistics.mean(one["alone_ms"]), 2) for name, ms in one["ms"].items()
            }
    kept = [one for one in runs if not one["disturbed"]]
    predicted["link_ms"] = {name: round(size * 8e3 / rate, 2) for name, size in predicted["link_bytes"].items()}
    found = {"runs_kept": len(kept), "alone_ms": median(ms for one in kept for ms in one["alone_ms"])}
    found["around_link_bytes"] = median(size for one in runs for size in one["around_link_bytes"])
    for field in ("ms", "exposed_ms"):
        found[field] = {name: median(one[field][name] for one in kept) for name in runs[0].get(field, ())}
    found["link_bytes"] = {name: median(one["link_bytes"][name] for one in runs) for name in runs[0]["link_bytes"]}
    around = found["around_link_bytes"] or 0
    expected = predicted["link_bytes"]
    ratios = [(size - around) / expected[name] for name, size in found["link_bytes"].items()]
    if ratios:
        row |= {"ratio": round(max(max(ratio, 1 / ratio) for ratio in ratios), 4)}
        if any(abs(size - around - expected[name]) > WORDS for name, size in found["link_bytes"].items()):
            row |= {"limit": BYTES}
    if "4" in found["exposed_ms"] and kept:
        exchange = found["exposed_ms"]["1"]
        row["halved"] = sum(one["exposed_ms"]["4"] <= one["exposed_ms"]["1"] / 2 for one in kept)
        row["compute_over_exchange"] = round(found["alone_ms"] / exchange, 2) if exchange > 0 else 0.0
    if "planned" in found["ms"] and kept:
        row["planned_ratio"] = round(found["ms"]["planned"] / found["ms"]["1"], 3)
    return row | {"rate": rate, "measured": found, "runs": runs}


def median(values: Iterable[float]) -> float | None:
    values = list(values)
    return round(statistics.median(values), 2) if values else None


def missed(row: dict) -> str:
    """ " ABOVE" where the bytes are not those predicted, " EXPOSED" where overlap does not hide what it must, " SLOWER"
    where the chunks that were predicted to be the fastest are not.
    """
    asked = row.get("compute_over_exchange", 0) >= COMPUTE
    slower = row.get("planned_ratio", 0) > PLANNED
    exposed = asked and row["halved"] < HALVED * row["measured"]["runs_kept"]
    return verdict(row) + " SLOWER" * slower + " EXPOSED" * exposed


def line(row: dict) -> str:
    """Measured, but for what is in brackets: predicted."""
    found, predicted = row["measured"], row["predicted"]
    text = f"{row['part']:<12}{row['case']:<25}"
    for name, size in found["link_bytes"].items():
        text += f" overlap {name}:" if len(found["link_bytes"]) > 1 else ""
        text += f" {size / 1e6:6.3f} MB ({predicted['link_bytes'][name] / 1e6:6.3f})"
        text += f" {shown(found['ms'][name])} ms ({predicted['link_ms'][name]:6.1f})"
        if name in found["exposed_ms"]:
            text += f" exposed {shown(found['exposed_ms'][name])}"
    if found["alone_ms"] is not None:
        text += f"  alone {shown(found['alone_ms'])}  kept {found['runs_kept']}/{len(row['runs'])}"
    if row.get("compute_over_exchange", 0) >= COMPUTE:
        text += f"  compute {row['compute_over_exchange']:.2f} of the exchange, halved in {row['halved']}"
    if "planned_ratio" in row:
        text += f"  as planned {row['planned_ratio']:.2f} of the time"
    return text + missed(row)


def shown(ms: float | None) -> str:
    return "     -" if ms is None else f"{ms:6.1f}"


def balanced_rate(row: dict) -> int:
    """Bits a second at which a case's bytes take 1 / BALANCE of its computing alone."""
    return round(row["predicted"]["link_bytes"]["alone"] * 8e3 / (row["measured"]["alone_ms"] / BALANCE))


def balanced(nodes: Nodes, part: Part) -> list[dict]:
    """Every case of a part, each at a rate of its own."""
    rows = []
    for alone in measure(nodes, replace(part, only_alone=True, repeats=3), 1):
        nodes.shape(balanced_rate(alone))
        print(f"{part.name}: the link at {nodes.rate / 1e6:.0f} Mbit/s")
        rows += report(measure(nodes, replace(part, rate=nodes.rate, case=alone["case"]), 1))
    return rows


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rate", default="100mbit", help="of the link, each way, as tc writes it")
    parser.add_argument("--delay", type=float, default=0.0, help="of the link, each way, in ms")
    parser.add_argument("--ranks-per-node", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/links.json, of a run that is not quick")
    parser.add_argument("--quick", action="store_true", help="two repeats, without the balanced part")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # what the ranks are started with
    args = parser.parse_args()
    try:
        bits_per_second(args.rate)
    except ValueError as error:
        parser.error(str(error))
    return args


def main() -> None:
    args = arguments()
    if args.part:
        run(Part(**json.loads(args.part)))
        return
    if reason := missing():
        print(reason, file=sys.stderr)
        raise SystemExit(2)
    torch.set_num_threads(1)  # as the ranks have
    short = Part("short", args.repeats, length=32, embed_dim=512, block=1 << 19)
    long = Part("balanced", args.repeats, length=12288, embed_dim=32, batch=4, across=True)
    if args.quick:
        short = replace(short, repeats=2)
    wrong = replace(short, name="wrong order", repeats=max(1, short.repeats // 3), round_robin=True)
    duplex = Part("duplex", short.repeats, length=0, embed_dim=0, block=1 << 21, across=True, duplex=True)
    parts, rows = [short, wrong, duplex] if args.ranks_per_node > 1 else [short, duplex], []
    with Nodes(args.rate, args.delay) as nodes:
        for part in parts:
            rows += report(measure(nodes, part, args.ranks_per_node))
        if not args.quick:
            parts.append(long)
            rows += balanced(nodes, long)
        link = {"kind": nodes.kind, "delay_ms": args.delay}
    of = machine() | {
        "kernel": platform.release(),
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python benchmarks/links.py", *sys.argv[1:]]),
        "link": link,
        "load_average": os.getloadavg(),
        "grid": [2, args.ranks_per_node],
        "parts": [asdict(part) for part in parts],
    }
    path = args.json or (None if args.quick else ROOT / "results/links.json")
    if path:
        print(write_results(path.stem, rows, folder=path.parent, of=of))
    wrong_rows = [f"{row['part']}: {row['case']}" for row in rows if missed(row)]
    if wrong_rows:
        raise SystemExit(f"{len(wrong_rows)} of {len(rows)} cases miss a limit: {'; '.join(wrong_rows)}")


def report(rows: list[dict]) -> list[dict]:
    for row in rows:
        print(line(row), flush=True)
    return rows


if __name__ == "__main__":
    main()
