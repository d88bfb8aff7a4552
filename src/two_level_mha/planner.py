"""What a layer costs on every valid grid with every scheme, predicted, and which to take.

The numbers and the choice are C++ (csrc/plan/), the same that decides scheme="auto"; here they are asked for and
printed.
"""

import math
import os
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from two_level_mha import _C
from two_level_mha.activations import check_activations
from two_level_mha.blocks import COMBINES, dealt
from two_level_mha.context import ACTIVATIONS
from two_level_mha.errors import GridError
from two_level_mha.layer import check_overlap
from two_level_mha.names import Activations, CacheLayout, Combine, Scheme
from two_level_mha.profile import Profile, resolve_profile


@dataclass(frozen=True)
class Sent:
    """One exchange of a call, as one rank sees it."""

    what: str
    axis: str  # "slice", "head" or "grid"
    bytes: int
    bias_bytes: int
    collectives: int


@dataclass(frozen=True)
class Option:
    """One grid with one scheme. Sizes are of one rank, FLOPs and seconds of its forward pass."""

    grid: tuple[int, int]
    scheme: Scheme | CacheLayout
    whole_heads: bool  # how the query side is stored
    exact: bool
    auto: bool  # scheme="auto" takes it on this grid; with a cache: the default layout
    attention_flops: int
    projection_flops: int
    forward: tuple[Sent, ...]
    backward: tuple[Sent, ...]
    weight_bytes: int
    overlap: int  # chunks of the batch
    activation_bytes: int  # what a forward pass keeps for the backward pass
    cache_bytes: int  # keys and values of all seq positions
    predicted_seconds: dict[str, float]  # compute, memory, sending, latency; hidden, of sending; total
    alone: bool  # on its grid: all schemes are the same there

    @property
    def flops(self) -> int:
        return self.attention_flops + self.projection_flops

    def sent_bytes(self, *, backward: bool = False) -> int:
        """Bytes that one rank sends in a forward pass, or in a backward pass."""
        return sum(row.bytes + row.bias_bytes for row in (self.backward if backward else self.forward))

    def collectives(self, *, backward: bool = False) -> int:
        """Number of collectives of a forward pass, or of a backward pass."""
        return sum(row.collectives for row in (self.backward if backward else self.forward))

    @property
    def name(self) -> str:
        return f"grid {self.grid}" if self.alone else f"grid {self.grid} with {self.scheme!r}"


@dataclass(frozen=True)
class Plan:
    """Every valid grid with every scheme, most head groups first. str(plan) is a table of 90 columns."""

    layer: dict[str, object]
    call: dict[str, object]
    profile: Profile  # the rates behind the predictions
    options: tuple[Option, ...]
    pick: Option
    why: str

    def to_dict(self) -> dict[str, object]:
        """All of it as numbers, strings, lists and dicts, for JSON."""
        options = [
            {
                **asdict(option),
                "sent_bytes": {"forward": option.sent_bytes(), "backward": option.sent_bytes(backward=True)},
                "collectives": {"forward": option.collectives(), "backward": option.collectives(backward=True)},
                "pick": option is self.pick,
            }
            for option in self.options
        ]
        return {
            "layer": self.layer,
            "call": self.call,
            "profile": asdict(self.profile),
            "options": options,
            "pick": {"grid": self.pick.grid, "scheme": self.pick.scheme},
            "why": self.why,
        }

    def __str__(self) -> str:
        return _text(self)


def plan(
    *,
    embed_dim: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    kv_lora_rank: int | None = None,
    q_lora_rank: int | None = None,
    qk_nope_head_dim: int | None = None,
    qk_rope_head_dim: int | None = None,
    v_head_dim: int | None = None,
    ranks: int | None = None,
    devices: int | None = None,
    batch: int,
    seq: int,
    decode: bool = False,
    causal: bool = True,
    bias: bool = False,
    gated: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    combine: Combine = "reduce",
    activations: Activations = "replicated",
    overlap: int | None = None,
    device_type: str = "cuda",
    profile: Profile | str | os.PathLike[str] | None = None,
) -> Plan:
    """Prices one call of an attention layer on every valid grid of `ranks` ranks with every scheme.

    The call is a forward pass of `batch` sequences of `seq` tokens, or with decode of one new token each, the last of
    `seq`, whose predecessors lie in a KV cache. Seconds are predicted from the rates of one hardware profile, not
    measured; bytes and numbers of collectives are exact. Needs no process group and no GPU.
    devices: an older name of ranks.
    num_kv_heads: num_heads if None; head_dim: embed_dim / num_heads if None; bias: q, k, v and output have one.
    gated: every query head has a gate of its output, projected as one more head of queries is.
    kv_lora_rank: the width of the latent of multi-head latent attention, which also has qk_nope_head_dim,
    qk_rope_head_dim, v_head_dim and, where queries have a latent too, q_lora_rank; and neither of the two above. With
    decode the scheme "position" is a cache of latents, "batch" one of every head's keys and values.
    activations: how X and Y lie over the ranks, as TwoLevelMultiheadAttention has it.
    overlap: chunks of the batch, as it has it; None: for each grid and scheme the number that is predicted fastest.
    profile: the hardware to predict for, a Profile, its name or its JSON file; None: that of device_type.
    Where ranks shares no factor with the key/value heads, so that all are slices of one head group, `why` says what the
    nearest numbers of ranks that do would take.
    Raises GridError if an argument does not fit.
    """
    asked = dict(locals())
    if (ranks is None) == (devices is None):
        raise GridError("plan needs the number of ranks, once: ranks=16")
    devices = devices if ranks is None else ranks
    assert devices is not None
    sizes = {
        "embed_dim": embed_dim,
        "num_heads": num_heads,
        "ranks" if ranks is not None else "devices": devices,
        "batch": batch,
        "seq": seq,
    }
    optional = {name: asked[name] for name in ("num_kv_heads", "head_dim", *LATENT)}
    for name, value in {**sizes, **{k: v for k, v in optional.items() if v is not None}}.items():
        if not isinstance(value, int) or value < 1:
            raise GridError(f"{name} must be a positive integer, got {value!r}")
        if value >= 2**63:
            raise GridError(f"{name}={value} is too large to price: numbers must stay below 2**63")
    latent = _latent(asked)
    if latent:
        assert qk_nope_head_dim is not None and qk_rope_head_dim is not None and v_head_dim is not None
        widest = max(qk_nope_head_dim + qk_rope_head_dim, v_head_dim)
        head_dim = min(widest, 2**63 - 1)  # beyond it the price says so
    if head_dim is None and embed_dim % num_heads:
        raise GridError(f"num_heads={num_heads} does not divide embed_dim={embed_dim}: give head_dim")
    kv_heads, head_dim = num_kv_heads or num_heads, head_dim or embed_dim // num_heads
    if num_heads % kv_heads:
        raise GridError(f"num_kv_heads={kv_heads} must divide num_heads={num_heads}")
    if combine not in COMBINES:
        raise GridError(f"combine must be one of {', '.join(COMBINES)}, got {combine!r}")
    check_activations(activations)
    if latent and activations != "replicated":
        raise GridError(f"latent attention is priced with activations='replicated' alone, got {activations!r}")
    check_overlap(overlap)
    hardware = resolve_profile(profile, device_type)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise GridError(f"dtype must be a floating point torch.dtype, got {dtype!r}")
    if not _C.has_grid(devices, num_heads, kv_heads, head_dim):
        raise GridError(_C.grid_choices(devices, num_heads, kv_heads, head_dim))
    try:
        rows, picked = _C.plan(
            ranks=devices, heads=num_heads, kv_heads=kv_heads, head_dim=head_dim, embed_dim=embed_dim, B=batch,
            L=1 if decode else seq, S=seq, element_size=dtype.itemsize, cached=decode, causal=causal and not decode,
            concat=combine == "concat", bias=bias, gated=gated, activations=ACTIVATIONS.index(activations),
            overlap=0 if overlap is None else overlap, latent=[latent.get(name) or 0 for name in LATENT],
            profile=hardware.numbers,
        )  # fmt: skip
    except OverflowError:
        raise GridError(
            f"batch={batch} with seq={seq} is too large to price: for this layer on {devices} devices the numbers "
            "reach 2**63, below which they must stay; plan a part of the batch, or a shorter seq"
        ) from None
    grids = [row["grid"] for row in rows]
    for row in rows:
        row["alone"] = grids.count(row["grid"]) == 1
        for direction in ("forward", "backward"):
            row[direction] = tuple(Sent(**sent) for sent in row[direction])
    options = tuple(Option(**row) for row in rows)
    return Plan(
        layer={
            "embed_dim": embed_dim,
            "num_heads": num_heads,
            "num_kv_heads": kv_heads,
            "head_dim": head_dim,
            "latent": latent,
            "bias": bias,
            "gated": gated,
            "dtype": str(dtype).removeprefix("torch."),
            "combine": combine,
            "activations": activations,
            "overlap": overlap,
        },
        call={
            "devices": devices,
            "device_type": device_type,
            "batch": batch,
            "seq": seq,
            "decode": decode,
            "causal": causal,
        },
        profile=hardware,
        options=options,
        pick=options[picked],
        why=_why(options, options[picked], decode, overlap is None)
        + ("" if latent else _slices_text(options[picked].grid, head_dim))
        + _nearby_text(asked, devices, kv_heads),
    )


# Sizes of multi-head latent attention, in the order of csrc/plan/call.h; the last may be None.
LATENT = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "q_lora_rank")


def _latent(asked: dict[str, Any]) -> dict[str, int | None]:
    """The sizes of latent attention, if a layer is that. Raises GridError for some of them, or others beside them."""
    given = {name: asked[name] for name in LATENT}
    if all(size is None for size in given.values()):
        return {}
    if missing := [name for name in LATENT[:-1] if given[name] is None]:
        raise GridError(f"latent attention has {', '.join(LATENT[:-1])}: give {', '.join(missing)} too")
    if others := [name for name in ("num_kv_heads", "head_dim") if asked[name] is not None]:
        raise GridError(f"latent attention has its heads' widths apart: leave out {', '.join(others)}")
    return given


def _why(options: tuple[Option, ...], pick: Option, decode: bool, chosen: bool) -> str:
    seconds = pick.predicted_seconds
    parts = {"computing": "compute", "reading memory": "memory", "sending": "sending", "latency": "latency"}
    busy = seconds["total"] + seconds["hidden"]
    shares = ", ".join(f"{seconds[key] / busy:.0%} {word}" for word, key in parts.items())
    text = f"{pick.name} is predicted fastest: {_duration(seconds['total'])} ({shares})."
    if pick.overlap > 1:
        text += f" {pick.overlap} chunks of the batch overlap, which hides {_duration(seconds['hidden'])} of sending."
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


def _slices_text(grid: tuple[int, int], head_dim: int) -> str:
    """What slices of unequal widths have, if they are."""
    m = grid[1]
    if head_dim % m == 0:
        return ""
    widths = [dealt(head_dim, m, slice)[1] for slice in range(m)]
    last, empty = min(width for width in widths if width), widths.count(0)
    text = f" {m} does not divide head_dim {head_dim}: a slice has {widths[0]} columns"
    text += f", the last one {last}" if last < widths[0] else ""
    return text + (f", and {empty} of {m} slices have none." if empty else ".")


def _nearby_text(asked: dict[str, Any], ranks: int, kv_heads: int) -> str:
    """Where there is but one head group, what the nearest numbers of ranks with more would take."""
    if ranks == 1 or kv_heads == 1 or math.gcd(ranks, kv_heads) > 1:
        return ""
    below = next((p for p in range(ranks, 1, -1) if math.gcd(p, kv_heads) > 1), None)
    above = next(p for p in range(ranks, ranks + kv_heads + 1) if math.gcd(p, kv_heads) > 1)
    found = []
    for p in filter(None, (below, above)):
        try:
            pick = plan(**asked | {"ranks": p, "devices": None}).pick
        except GridError:  # on that many the numbers are too large to price
            continue
        found.append(f"{p} would take {pick.name}, predicted {_duration(pick.predicted_seconds['total'])}")
    return (
        f" {ranks} ranks share no factor with {kv_heads} key/value heads, and so are one head group; "
        + "; ".join(found)
    ) + "."


UNITS = {"FLOP": {"TFLOP": 1e12, "GFLOP": 1e9, "MFLOP": 1e6}, "B": {"GB": 1e9, "MB": 1e6, "KB": 1e3}}
WIDTH = 90
TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6}


def _duration(seconds: float) -> str:
    unit, scale = _unit([seconds], TIMES)
    return f"{_number(seconds / scale)} {unit}"


def _unit(values: Sequence[float], units: dict[str, float]) -> tuple[str, float]:
    """The largest unit in which the smallest value that is not zero has a digit before the point."""
    smallest = min((value for value in values if value > 0), default=0.0)
    return next(((unit, scale) for unit, scale in units.items() if smallest >= scale), list(units.items())[-1])


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f}"


def _text(p: Plan) -> str:
    layer, call = p.layer, p.call
    lines = [
        line
        for text in (
            f"layer    embed_dim {layer['embed_dim']}, {_heads_text(layer)}, {layer['dtype']}, "
            f"combine={layer['combine']!r}",
            f"call     {_call_text(call)} on {call['devices']} {call['device_type']} ranks; figures are of one rank",
            f"profile  {p.profile.name!r}, from which seconds are predicted: {p.profile.source}",
        )
        for line in _wrap(text, " " * 9)
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
        cells.append([str(value) if scale is None else _number(value / scale) for value in values])
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
    lines += ["", *_wrap("> " + p.why)]
    notes = (
        "Work, sent and calls, of collectives, are of the forward pass; chunks: of the batch, which overlap; kept: "
        f"activations for the backward pass; cache: of {'latents, or of ' if layer['latent'] else ''}keys and values."
    )
    if any(not option.exact for option in p.options):
        notes += " *: another model, never picked."
    if any(option.auto and not option.alone for option in p.options):
        taken = "the default cache layout" if call["decode"] else "what scheme='auto' takes there"
        notes += f" auto: {taken}."
    return "\n".join([*lines, *_wrap("  " + notes)])


def _heads_text(layer: dict[str, object]) -> str:
    latent = layer["latent"]
    if not latent:
        return f"{layer['num_heads']} query heads, {layer['num_kv_heads']} key/value heads of {layer['head_dim']}"
    assert isinstance(latent, dict)
    rank, nope, rope, value, query = (latent[name] for name in LATENT)
    latents = f"a latent of {rank}" + (f", one of {query} for queries" if query else "")
    return f"{layer['num_heads']} heads of {nope} + {rope} and {value} of {latents}"


def _call_text(call: dict[str, object]) -> str:
    if call["decode"]:
        return f"one new token for each of {call['batch']} sequences of {call['seq']}"
    mask = "causal" if call["causal"] else "not causal"
    return f"forward pass of {call['batch']} x {call['seq']} tokens, {mask},"


def _wrap(text: str, indent: str = "  ") -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent)
