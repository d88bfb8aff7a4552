"""A plan in words: the table of its options, and why one of them was picked."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from two_level_mha.blocks import dealt

if TYPE_CHECKING:
    from two_level_mha.planner import Option, Plan

# Sizes of multi-head latent attention, in the order of csrc/plan/call.h; the last may be None.
LATENT = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "q_lora_rank")


def why_text(options: Sequence["Option"], pick: "Option", decode: bool, chosen: bool, among: str = "") -> str:
    """Of these options; chosen: whether the number of chunks was; among: which they are."""
    seconds = pick.predicted_seconds
    parts = {"computing": "compute", "reading memory": "memory", "sending": "sending", "latency": "latency"}
    busy = seconds["total"] + seconds["hidden"]
    shares = ", ".join(f"{seconds[key] / busy:.0%} {word}" for word, key in parts.items())
    text = f"{pick.name} is predicted fastest{among}: {duration(seconds['total'])} ({shares})."
    if pick.overlap > 1:
        text += f" {pick.overlap} chunks of the batch overlap, which hides {duration(seconds['hidden'])} of sending."
    elif pick.sent_bytes():
        text += " Nothing overlaps: no number of chunks is predicted to be faster." if chosen else " Nothing overlaps."
    others = [option for option in options if option.exact and option is not pick]
    if others:
        second = min(others, key=lambda option: option.predicted_seconds["total"])
        slower = second.predicted_seconds["total"] / seconds["total"] - 1
        text += f" Next is {second.name}, {slower:.1%} slower"
        if pick.sent_bytes():
            text += f", which sends {second.sent_bytes() / pick.sent_bytes():.2f} times the bytes"
        text += "."
    if not pick.auto:
        auto = next(option for option in options if option.auto and option.grid == pick.grid)
        ask = f"a cache of layout {pick.scheme!r}" if decode else f"scheme={pick.scheme!r}"
        otherwise = "the default layout" if decode else "scheme='auto'"
        text += f" Ask for it by {ask}: {otherwise} is {auto.scheme!r} there."
    return text


def slices_text(grid: tuple[int, int], head_dim: int) -> str:
    """What slices of unequal widths have, if they are."""
    m = grid[1]
    if head_dim % m == 0:
        return ""
    widths = [dealt(head_dim, m, slice)[1] for slice in range(m)]
    last, empty = min(width for width in widths if width), widths.count(0)
    text = f" {m} does not divide head_dim {head_dim}: a slice has {widths[0]} columns"
    text += f", the last one {last}" if last < widths[0] else ""
    return text + (f", and {empty} of {m} slices have none." if empty else ".")


UNITS = {"FLOP": {"TFLOP": 1e12, "GFLOP": 1e9, "MFLOP": 1e6}, "B": {"GB": 1e9, "MB": 1e6, "KB": 1e3}}
WIDTH = 90
TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6}


def duration(seconds: float) -> str:
    unit, scale = _unit([seconds], TIMES)
    return f"{number(seconds / scale)} {unit}"


def _unit(values: Sequence[float], units: dict[str, float]) -> tuple[str, float]:
    """The largest unit in which the smallest value that is not zero has a digit before the point."""
    smallest = min((value for value in values if value > 0), default=0.0)
    return next(((unit, scale) for unit, scale in units.items() if smallest >= scale), list(units.items())[-1])


def number(value: float) -> str:
    return "0" if value == 0 else f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f}"


def text(p: "Plan") -> str:
    layer, call = p.layer, p.call
    lines = [
        line
        for text in (
            f"layer    embed_dim {layer['embed_dim']}, {_heads_text(layer)}, {layer['dtype']}, "
            f"combine={layer['combine']!r}",
            f"call     {_call_text(call)} on {call['devices']} {call['device_type']} ranks; figures are of one rank",
            f"profile  {p.profile.name!r}, from which seconds are predicted: {p.profile.source}",
        )
        for line in wrap(text, " " * 9)
    ]
    lines.append("")
    columns: list[tuple[str, Sequence[float], dict[str, float] | None]] = [
        ("work", [option.flops for option in p.options], UNITS["FLOP"]),
        ("sent", [option.sent_bytes() for option in p.options], UNITS["B"]),
        ("calls", [option.collectives() for option in p.options], None),
        ("chunks", [option.overlap for option in p.options], None),
        ("predicted", [option.predicted_seconds["total"] for option in p.options], TIMES),
        ("weights", [option.weight_bytes for option in p.options], UNITS["B"]),
        ("kept", [option.activation_bytes for option in p.options], UNITS["B"]),
        ("cache", [option.cache_bytes for option in p.options], UNITS["B"]),
    ]
    cells, heads = [], []
    for title, values, units in columns:
        unit, scale = _unit(values, units) if units else ("", None)
        heads.append((title, unit))
        cells.append([str(value) if scale is None else number(value / scale) for value in values])
    widths = [max(len(head[0]), len(head[1]), *map(len, column)) for head, column in zip(heads, cells, strict=True)]
    for at, first in enumerate((f"{'grid':10}{'scheme':13}", " " * 23)):
        row = "  ".join(head[at].rjust(width) for head, width in zip(heads, widths, strict=True))
        lines.append(f"  {first}{row}".rstrip())
    for at, option in enumerate(p.options):
        scheme = "any" if option.alone else option.scheme
        marks = ("" if option.exact else " *") + (" auto" if option.auto and not option.alone else "")
        row = "  ".join(column[at].rjust(width) for column, width in zip(cells, widths, strict=True))
        mark = ">" if option is p.pick else " "
        lines.append(f"{mark} {str(option.grid):10}{scheme:13}{row} {marks}".rstrip())
    lines += ["", *wrap("> " + p.why)]
    notes = (
        "Work, sent and calls, of collectives, are of the forward pass; chunks: of the batch, which overlap; kept: "
        f"activations for the backward pass; cache: of {'latents, or of ' if layer['latent'] else ''}keys and values."
    )
    if any(not option.exact for option in p.options):
        notes += " *: another model, never picked."
    if any(option.auto and not option.alone for option in p.options):
        taken = "the default cache layout" if call["decode"] else "what scheme='auto' takes there"
        notes += f" auto: {taken}."
    return "\n".join([*lines, *wrap("  " + notes)])


def _heads_text(layer: dict[str, Any]) -> str:
    latent = layer["latent"]
    if not latent:
        return f"{layer['num_heads']} query heads, {layer['num_kv_heads']} key/value heads of {layer['head_dim']}"
    rank, nope, rope, value, query = (latent[name] for name in LATENT)
    latents = f"a latent of {rank}" + (f", one of {query} for queries" if query else "")
    return f"{layer['num_heads']} heads of {nope} + {rope} and {value} of {latents}"


def _call_text(call: dict[str, Any]) -> str:
    if call["decode"]:
        return f"one new token for each of {call['batch']} sequences of {call['seq']}"
    mask = "causal" if call["causal"] else "not causal"
    return f"forward pass of {call['batch']} x {call['seq']} tokens, {mask},"


def wrap(text: str, indent: str = "  ") -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent)
