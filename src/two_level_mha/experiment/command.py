"""`python -m two_level_mha predict`: a table of layouts with what they would do on hardware that is not here."""

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import fields, replace

import torch

from two_level_mha.errors import GridError
from two_level_mha.experiment.calibration import Calibration
from two_level_mha.experiment.hardware import Hardware, hardware
from two_level_mha.experiment.model import SEED, SMALL, Layout, Sizes, baselines, ours
from two_level_mha.experiment.predict import Prediction, dtype_of, model_flops, predict
from two_level_mha.experiment.pricing import Prices
from two_level_mha.experiment.runs import MODES, Call
from two_level_mha.profile import resolve_profile

PRESETS = {"seed": SEED, "small": SMALL}
DTYPES = ("float16", "bfloat16", "float32")
MASKS = {"causal": (True,), "full": (False,), "both": (False, True)}
WIDTH = 120


def add_predict(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Predicted, not measured: one rank of each layout runs at full size on fake tensors, and what it does is "
        "priced by the rates of the hardware."
    )
    parser.add_argument("--preset", default="seed", choices=PRESETS)
    for field in fields(Sizes):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, help="in place of the preset's")
    parser.add_argument("--hardware", default="h100-16", metavar="KIND-RANKS", help="h100, h100-nvl, h200 or cpu")
    parser.add_argument("--layout", action="append", default=[], metavar="WORDS", help="those whose name has WORDS")
    parser.add_argument("--mode", default="prefill", choices=MODES)
    parser.add_argument("--mask", default="both", choices=MASKS, help="of prefill and training")
    parser.add_argument("--cache", default="position", choices=("position", "batch"), help="of ours in decode")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float16, on a CPU float32")
    parser.add_argument("--micro-batches", type=int, default=8, help="of pipelines, beside the one of GPipe 1")
    parser.add_argument("--overlap", type=int, default=4, help="chunks of ours that overlap, beside none")
    parser.add_argument("--profile", metavar="NAME|FILE", help="rates in place of the hardware's")
    parser.add_argument("--calibration", metavar="FILE", help="what `calibrate` measured, for a cpu of as many ranks")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=command)


def command(args: argparse.Namespace) -> None:
    """Prints the predictions; exit code 2 for arguments that do not fit."""
    try:
        machine, prices, error = _machine(args)
        sizes = _sizes(args)
        chosen = _chosen(args, sizes, machine)
    except ValueError as refusal:
        print(refusal, file=sys.stderr)
        sys.exit(2)
    dtype = getattr(torch, args.dtype) if args.dtype else dtype_of(machine)
    masks = (True,) if args.mode == "decode" else MASKS[args.mask]
    report = _Progress(len(chosen) * len(masks))
    found = {
        causal: predict(
            sizes, chosen, machine, Call(args.mode, causal, dtype, args.cache), prices=prices, error=error,
            progress=report,
        )
        for causal in masks
    }  # fmt: skip
    report.end()
    if args.json:
        print(json.dumps(_as_dict(sizes, machine, args.mode, dtype, found), indent=1))
    else:
        print(_text(sizes, machine, args, dtype, found))


def _machine(args: argparse.Namespace) -> tuple[Hardware, Prices | None, float]:
    profile = None if args.profile is None else resolve_profile(args.profile, "cuda")
    machine = hardware(args.hardware, profile)
    if args.calibration is None:
        return machine, None, 0.0
    calibration = Calibration.from_file(args.calibration)
    if machine.device != "cpu" or machine.ranks != calibration.ranks:
        raise GridError(
            f"the calibration in {args.calibration} is of {calibration.ranks} ranks on a CPU: give --hardware "
            f"cpu-{calibration.ranks}, got {args.hardware}"
        )
    sources = {**machine.sources, "rates": calibration.source}
    return replace(machine, sources=sources), calibration, calibration.error


def _sizes(args: argparse.Namespace) -> Sizes:
    given = {field.name: getattr(args, field.name) for field in fields(Sizes)}
    for name, value in given.items():
        if value is not None and value < 1:
            raise GridError(f"--{name.replace('_', '-')} must be positive, got {value}")
    return replace(PRESETS[args.preset], **{name: value for name, value in given.items() if value is not None})


def _chosen(args: argparse.Namespace, sizes: Sizes, machine: Hardware) -> list[Layout]:
    training = args.mode == "training"
    known = [  # those that the batch does not fit are rows of the table too
        *ours(sizes, machine.ranks, args.overlap),
        *baselines(sizes, machine.ranks, args.micro_batches, training),
    ]
    if args.mode == "decode":  # one token is not split, and its scheme is the cache's
        known = [one for one in known if not one.rows and not one.sharded and one.schedule in ("", "GPipe")]
        grids = dict.fromkeys(one.grid for one in known if one.grid)
        known = [Layout(grid=grid) for grid in grids] + [one for one in known if not one.grid]
    found = [one for one in known if not args.layout or any(words in one.name for words in args.layout)]
    if not found:
        raise GridError(f"--layout must be words of one of these: {'; '.join(one.name for one in known)}")
    return found


class _Progress:
    """Says on a terminal which layout is recorded."""

    def __init__(self, count: int) -> None:
        self.count, self.done, self.shown = count, 0, sys.stderr.isatty()

    def __call__(self, layout: Layout) -> None:
        self.done += 1
        if self.shown:
            print(f"\r\033[Krecording {self.done} of {self.count}: {layout.name}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _ceiling(sizes: Sizes, machine: Hardware, mode: str, causal: bool) -> float | None:
    """Tokens/s that no layout exceeds: the model's FLOPs at every rank's peak."""
    if machine.ceiling is None or mode == "decode":
        return None
    return sizes.tokens * machine.ceiling / model_flops(sizes, causal=causal, training=mode == "training")


def _as_dict(
    sizes: Sizes, machine: Hardware, mode: str, dtype: torch.dtype, found: dict[bool, list[Prediction]]
) -> dict[str, object]:
    return {
        "command": " ".join(["python -m two_level_mha", *sys.argv[1:]]),
        "sizes": {field.name: getattr(sizes, field.name) for field in fields(Sizes)},
        "mode": mode,
        "dtype": str(dtype).removeprefix("torch."),
        "hardware": {
            "name": machine.name,
            "ranks": machine.ranks,
            "memory": machine.memory,
            "peak_flops": machine.peak,
            "profile": {field.name: getattr(machine.profile, field.name) for field in fields(machine.profile)},
            "ranges": machine.ranges,
            "sources": machine.sources,
        },
        "ceiling_tokens_per_second": {
            "causal" if causal else "full": _ceiling(sizes, machine, mode, causal) for causal in found
        },
        "how": "predicted from recorded operators and collectives; nothing was timed on this hardware"
        if machine.device == "cuda"
        else "predicted from recorded operators and collectives",
        "predictions": [one.to_dict() for rows in found.values() for one in rows],
    }


def _text(
    sizes: Sizes, machine: Hardware, args: argparse.Namespace, dtype: torch.dtype, found: dict[bool, list[Prediction]]
) -> str:
    decode = args.mode == "decode"
    name = str(dtype).removeprefix("torch.")
    what = (
        f"one token for each of {sizes.batch} sequences of {sizes.length}"
        if decode
        else (f"{args.mode} of {sizes.batch} x {sizes.length} tokens")
    )
    head = [
        f"PREDICTED: {what}, {sizes.layers} layers, {sizes.heads} heads of {sizes.head_dim}, {sizes.kv_heads} KV "
        f"heads, MLP {sizes.mlp_hidden}, {name}, on {machine.name}",
        *(f"{key}: {source}" for key, source in machine.sources.items()),
        *([] if args.calibration else [f"rates: {_rates(machine, dtype)}"]),
    ]
    lines = [line for text in head for line in textwrap.wrap(text, WIDTH, subsequent_indent="    ")]
    for causal, rows in found.items():
        mask = "" if decode else (", causal" if causal else ", not causal")
        ceiling = _ceiling(sizes, machine, args.mode, causal)
        limit = "" if ceiling is None else f"; {ceiling / 1e6:.2f} M tokens/s is all ranks at their peak"
        lines += ["", f"{args.mode}{mask}{limit}", *_table(rows, decode)]
    notes = (
        "[..]: with all rates at the slow and at the fast end of their ranges; of a calibration, the largest error of "
        "what it was fitted to. alone: with no exchange hidden. GB: the most that a rank holds. sent: by a rank for "
        "the whole batch, inside its node and to others. pieces: of the batch, run in turn, as many as memory asks "
        "for. *: another model."
    )
    return "\n".join([*lines, "", *textwrap.wrap(notes, WIDTH)])


def _rates(machine: Hardware, dtype: torch.dtype) -> str:
    p = machine.profile
    single = "single_" if dtype.itemsize > 2 else ""
    rates = {
        "products": p.flops_single if single else p.flops,
        **{f"attention {w}": getattr(p, f"attention_{single}{w}") for w in ("128", "256", "wide")},
    }
    text = ", ".join(f"{key} {value / 1e12:.4g} TFLOP/s" for key, value in rates.items() if value)
    return (
        f"{text}, memory {p.memory / 1e9:.0f} GB/s, links {p.link / 1e9:.0f} and {p.network / 1e9:.0f} GB/s, "
        f"{p.latency_ns / 1e3:.0f} us a collective"
    )


def _table(rows: Sequence[Prediction], decode: bool) -> list[str]:
    unit = "ms a token" if decode else "K tokens/s"
    width = max(len(row.layout) for row in rows) + 2
    lines = [f"{'':{width}}{unit:>11}{'[..]':>18}{'alone':>9}{'GB':>7}{'sent GB':>19}{'pieces':>8}  bound by"]
    for row in rows:
        name = row.layout + ("" if row.exact else " *")
        if row.refused:
            lines.append(f"{name:{width}}{row.refused}")
            continue
        figure, alone, *ends = [
            seconds * 1e3 if decode else row.tokens / seconds / 1e3
            for seconds in (row.seconds, row.alone, row.low, row.high)
        ]
        lines.append(
            f"{name:{width}}{figure:11.1f}{f'[{min(ends):.1f}, {max(ends):.1f}]':>18}{alone:9.1f}"
            f"{row.peak / 1e9:7.1f}{_sent(row):>19}{row.pieces:8}  {row.bound}"
        )
    return lines


def _sent(row: Prediction) -> str:
    return f"{row.fast_bytes / 1e9:.2f} + {row.slow_bytes / 1e9:.2f}"
