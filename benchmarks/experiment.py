"""The experiment of the method's paper at any size: a dense transformer in every layout, checked, then timed.

    torchrun --nproc-per-node 4 benchmarks/experiment.py [--preset small] [--mode prefill training decode] [--mask ..]
    python benchmarks/experiment.py                 # the same, starts the ranks of the preset itself
    python benchmarks/experiment.py --nodes 1gbit   # as root: on two nodes joined by such a link (nodes.py)
    python benchmarks/experiment.py --preset gpu1 --device cuda    # one rank of 16 without the others: its computing

The layouts are those of two_level_mha.experiment.model: ours for every grid, exact scheme and layout of activations, in
one piece and in chunks (overlap); tensor, data (copies and FSDP2) and pipeline parallelism of torch's own parts, and
combinations. "independent" is the paper's literal reading: another model, of narrower heads, and checked against that.

What counts as a run: "prefill", the forward pass without gradients; "training", forward, backward and the reduction of
gradients, without an optimizer; "decode", one token a step with a KV cache (experiment_decode.py). The mask is
"causal", or "full", that is none (decode has the first). Inputs lie on the ranks as the layout wants them before the
clock starts, and outputs stay as it leaves them: on the last stage, as parts, or whole on every rank. More ranks than
cores favour pipelines, whose idle stages leave their core to the others: --ranks 2 on two cores does not.

Before it is timed each layout's output, in training its gradients, is compared with the unsplit model's, which runs by
torch's scaled_dot_product_attention; one that differs is reported, and not timed. All layouts take turns, a barrier
before each run; the slowest rank counts, and of the runs the median. By default all attend with this package's kernels,
so that times differ by layout alone; --kernel stock gives torch's own to the layouts that are not ours.

Recorded of one run: bytes that a rank sends, by the formulas of two_level_mha.testing, and the peak of what lives at
once beside the weights: activations, in training gradients too. Bytes over a link are measured: what its node sent, by
its interface's counters without headers; the prediction beside them places the recorded bytes as Gloo does (links.py).
"""

import argparse
import logging
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from common import ROOT, machine, write_results
from experiment_decode import decode_cases
from experiment_ranks import Case, Reference, Setting, finish, gather_rows, measure, prepared
from nodes import NODES, Nodes, bits_per_second, missing, places
from torch.testing._internal.distributed.fake_pg import FakeStore
from tqdm import tqdm

import two_level_mha as tlm
from two_level_mha.experiment.model import SEED, SMALL, Sizes, layouts

TIMEOUT = timedelta(seconds=120)  # of a collective
MODES, MASKS = ("prefill", "training", "decode"), ("causal", "full")
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Preset:
    sizes: Sizes
    ranks: int
    dtype: str = "float16"
    without_wire: bool = False


PRESETS = {
    "seed": Preset(SEED, 16),
    "small": Preset(SMALL, 4, "float32"),
    "gpu1": Preset(replace(SEED, batch=16), 16, without_wire=True),  # as many of the sequences as one GPU can hold
}


def table(rows: list[dict]) -> Iterator[str]:
    """A line for each row, the fastest of its kind first; then the fastest of each family."""
    kinds: dict[tuple, list[dict]] = {}
    for row in rows:
        case = ("B", "T") if row["mode"] == "decode" else ()
        kinds.setdefault((row["mode"], row["mask"], *(f"{key}={row[key]}" for key in case)), []).append(row)
    for kind, of_kind in kinds.items():
        yield ", ".join(part for part in kind if part)
        for row in sorted(of_kind, key=lambda row: row.get("ms", float("inf"))):
            yield "  " + line(row)
        best: dict[str, dict] = {}
        for row in sorted((row for row in of_kind if "ms" in row and "of" in row), key=lambda row: row["ms"]):
            best.setdefault(family(row), row)
        if best:
            yield "  fastest: " + "; ".join(f"{name} {row['ms']:.1f} ms" for name, row in best.items())


def family(row: dict) -> str:
    if row["ours"]:
        return "ours" if row["exact"] else "independent (another model)"
    of = row["of"]
    parts = ("tp", "TP"), ("dp", "DP"), ("pp", "PP")
    return " x ".join(text for key, text in parts if of[key] > 1) + (
        " of one piece" if of["pp"] > 1 == of["micro_batches"] else ""
    )


def line(row: dict) -> str:
    text = f"{row['layout']:<58}"
    if "failed" in row:
        return f"{text} NOT TIMED: {row['failed']}"
    text += f" {row['ms']:9.2f} ms" + (f" = {row['tpot_ms']:7.2f} ms a token" if "tpot_ms" in row else "")
    if "tokens_per_s" in row:
        text += f" {row['tokens_per_s']:>10,} tokens/s {row['sent_bytes'] / 1e6:9.3f} MB sent"
        text += f" {row['weight_bytes'] / 1e6:8.2f} + {row['peak_bytes'] / 1e6:8.2f} MB held"
        if "difference" in row:
            text += f"  differs by {row['difference']:.0e}" + " (another model)" * (not row["exact"])
    if "link_bytes" in row:
        text += f"  link {row['link_bytes'] / 1e6:8.3f} MB ({row['predicted_link_bytes'] / 1e6:8.3f} predicted)"
    return text


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="small")
    for name in asdict(SEED):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help="in place of the preset's")
    parser.add_argument(
        "--ranks", type=int, help="that are started, in place of the preset's; torchrun's have their own"
    )
    parser.add_argument("--mode", nargs="+", choices=MODES, default=["prefill"])
    parser.add_argument("--mask", nargs="+", choices=MASKS, default=["causal"])
    parser.add_argument("--layout", nargs="+", default=[""], help="only the layouts whose names contain one of these")
    parser.add_argument("--micro-batches", type=int, default=4, help="of the pipeline, which runs with 1 too")
    parser.add_argument("--overlap", type=int, default=2, help="chunks; 1: only in one piece")
    parser.add_argument("--kernel", choices=("ours", "stock"), default="ours", help="of attention that is not ours")
    parser.add_argument("--dtype", choices=DTYPES, help="default: the preset's")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--decode-batch", type=int, nargs="+", default=[1, 13, 64])
    parser.add_argument("--context", type=int, default=1024, help="T: tokens in the KV cache before the first step")
    parser.add_argument("--steps", type=int, default=8, help="tokens that a run decodes, one a step")
    parser.add_argument("--nodes", metavar="RATE", help="on two nodes, whose link has this rate, as tc writes it")
    parser.add_argument("--delay", type=float, default=0.0, help="of that link, each way, in ms")
    parser.add_argument("--round-robin", action="store_true", help="with --nodes: the ranks dealt to the nodes in turn")
    parser.add_argument(
        "--json",
        type=Path,
        help="of the results; default: benchmarks/results/experiment.json, of a run without arguments",
    )
    args = parser.parse_args(argv)
    preset = PRESETS[args.preset]
    own = {name: value for name in asdict(SEED) if (value := getattr(args, name)) is not None}
    args.sizes = replace(preset.sizes, **own)
    args.ranks, args.without_wire = args.ranks or preset.ranks, preset.without_wire
    args.dtype = DTYPES[args.dtype or preset.dtype]
    try:
        if args.nodes:
            bits_per_second(args.nodes)
            if args.ranks % NODES:
                raise ValueError(f"--nodes shares the ranks between {NODES} nodes, which do not divide {args.ranks}")
        for mode in {"prefill", "training"} & set(args.mode):
            layouts(args.sizes, int(os.environ.get("WORLD_SIZE", args.ranks)), **options_of(args, mode))
    except ValueError as error:
        parser.error(str(error))
    return args


def options_of(asked: argparse.Namespace | Setting, mode: str) -> dict:
    return {"micro_batches": asked.micro_batches, "overlap": asked.overlap, "training": mode == "training"}


def launched(args: argparse.Namespace) -> int:
    """Starts the ranks of the preset, on this machine or on two nodes, and gives the exit code."""
    if not args.nodes:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}"]
        return subprocess.run([*launch, __file__, *sys.argv[1:]]).returncode
    if reason := missing():
        print(reason, file=sys.stderr)
        return 2
    with Nodes(args.nodes, args.delay) as nodes:
        command = [sys.executable, __file__, *sys.argv[1:]]
        print(nodes.run(command, args.ranks // NODES, round_robin=args.round_robin, timeout=1800)[0], end="")
    return 0


def run(setting: Setting, modes: list[str], masks: list[str], meshes: dict) -> list[dict]:
    """The rows of all that was asked for, on every rank, and in `meshes` those that were made for them."""
    rows = []
    for mode in modes:
        for mask in masks if mode != "decode" else ["causal"]:
            cases = list(progress(cases_of(setting, mode, mask, meshes), f"{mode}, {mask}: checking"))
            sound = [case for case in cases if "failed" not in case.row]
            rounds = progress([case for _ in range(setting.repeats) for case in sound], f"{mode}, {mask}: timing")
            measure(rounds, setting)
            finish(sound, setting)
            rows += [case.row for case in cases]
    return rows + (gather_rows(setting) if setting.node_of else [])


def cases_of(setting: Setting, mode: str, mask: str, meshes: dict) -> Iterator[Case]:
    if mode == "decode":
        yield from decode_cases(setting, meshes)
        return
    reference = None
    for layout in layouts(setting.sizes, dist.get_world_size(), **options_of(setting, mode)):
        if setting.asked(layout.name):
            reference = reference or Reference(setting, mode == "training", mask == "causal")
            yield prepared(setting, reference, layout, meshes)


def progress(what: Iterable[Case], title: str) -> Iterable[Case]:
    """A bar on rank 0, where there is a terminal."""
    return tqdm(what, title, disable=True if dist.get_rank() else None, leave=False)


def start(args: argparse.Namespace) -> None:
    """The process group: NCCL or Gloo; or without the other ranks one whose exchanges return at once."""
    if args.without_wire:
        dist.init_process_group("fake", rank=0, world_size=args.ranks, store=FakeStore())
    else:
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo", timeout=TIMEOUT)


def main() -> None:
    args = arguments()
    if "RANK" not in os.environ and not args.without_wire:
        raise SystemExit(launched(args))
    torch.set_num_threads(1)
    # it warns of how gradients of FSDP2 beside tensor parallelism become whole, which is only done to compare them
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    start(args)
    node_of = tuple(places(dist.get_world_size(), args.round_robin)) if args.nodes else ()
    setting = Setting(
        args.sizes, args.dtype, args.device, args.kernel == "stock", args.micro_batches, args.overlap, args.repeats,
        tuple(args.layout), node_of, args.without_wire, tuple(args.decode_batch), args.context, args.steps,
    )  # fmt: skip
    meshes: dict = {}
    rows = run(setting, args.mode, args.mask, meshes)
    if dist.get_rank() == 0:
        print("\n".join(table(rows)), flush=True)
        path = args.json or (ROOT / "results/experiment.json" if len(sys.argv) == 1 else None)
        if path:
            link = {"rate": args.nodes, "delay_ms": args.delay, "round_robin": args.round_robin} if args.nodes else None
            of = machine(args.device) | {"command": " ".join(["benchmarks/experiment.py", *sys.argv[1:]])}
            of |= {"load_average": os.getloadavg(), "link": link, "without_wire": args.without_wire}
            print(write_results(path.stem, rows, folder=path.parent, of=of))
    if not args.without_wire:
        dist.barrier()
    for mesh in (mesh for shape, mesh in meshes.items() if shape[0] == "grid"):
        tlm.close(mesh)  # ends its thread before the interpreter ends
    dist.destroy_process_group()
    failed = [row for row in rows if "failed" in row]
    if failed:
        raise SystemExit(f"{len(failed)} of {len(rows)} layouts were not timed")


if __name__ == "__main__":
    main()
