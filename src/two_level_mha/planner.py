"""What a layer costs on every valid grid with every scheme, predicted, and which to take.

The numbers and the choice are C++ (csrc/plan/), the same that decides scheme="auto"; here they are asked for and
printed.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from two_level_mha import _C
from two_level_mha.activations import check_activations
from two_level_mha.blocks import COMBINES
from two_level_mha.context import ACTIVATIONS
from two_level_mha.errors import GridError
from two_level_mha.layer import check_overlap
from two_level_mha.memory_shares import MemoryShares, checked_memory, share_memory
from two_level_mha.names import Activations, CacheLayout, Combine, Scheme
from two_level_mha.plan_text import LATENT, UNITS, duration, number, slices_text, text, why_text
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

    layer: dict[str, Any]
    call: dict[str, Any]
    profile: Profile  # the rates behind the predictions
    options: tuple[Option, ...]
    pick: Option
    why: str
    shares: MemoryShares | None = None  # of a cache, for ranks of unequal memory; bytes are those of the most

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
            "shares": None if self.shares is None else asdict(self.shares),
        }

    def kept(self) -> list[Option]:
        """The options that have a cache by position."""
        return [option for option in self.options if option.scheme == "position"]

    def shared(self, memory: Sequence[float], option: Option, weights: int, cache: int) -> MemoryShares:
        """Shares of such a cache, of which each rank would have `cache` bytes if they were equal, beside weights."""
        n, m = (1, len(memory)) if self.layer["latent"] else option.grid
        return share_memory(memory, n, weights, cache * m)

    def __str__(self) -> str:
        return text(self)


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
    memory: Sequence[float] | None = None,
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
    memory: what each rank has of it, in one unit, in the order of ranks, whose number it says too; where they differ.
    With decode it finds the shares of a KV cache by position with which the ranks hold weights and cache in proportion
    to it: init_mesh takes them as cache_shares. Bytes and seconds are then those of the rank that keeps the most.
    Where ranks shares no factor with the key/value heads, so that all are slices of one head group, `why` says what the
    nearest numbers of ranks that do would take.
    Raises GridError if an argument does not fit.
    """
    asked = dict(locals())
    if devices is None:
        ranks = checked_memory(memory, ranks, decode)
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
    layer: dict[str, Any] = {
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
    }
    call: dict[str, Any] = {
        "devices": devices,
        "device_type": device_type,
        "batch": batch,
        "seq": seq,
        "decode": decode,
        "causal": causal,
    }
    options, pick = _priced(layer, call, hardware, {})
    why = why_text(options, pick, decode, overlap is None) + ("" if latent else slices_text(pick.grid, head_dim))
    found = Plan(layer, call, hardware, options, pick, why + _nearby_text(asked, devices, kv_heads))
    if memory is None:
        return found
    return with_memory(found, {o.grid: found.shared(memory, o, o.weight_bytes, o.cache_bytes) for o in found.kept()})


def _priced(
    layer: dict[str, Any], call: dict[str, Any], hardware: Profile, cycles: dict[tuple[int, int], list[int]]
) -> tuple[tuple[Option, ...], Option]:
    """The options of a layer's call, and the pick. cycles: shares of a cache, by the grid, where they are not equal."""
    devices, batch, seq, decode, overlap = (*(call[k] for k in ("devices", "batch", "seq", "decode")), layer["overlap"])
    try:
        rows, picked = _C.plan(
            ranks=devices, heads=layer["num_heads"], kv_heads=layer["num_kv_heads"], head_dim=layer["head_dim"],
            embed_dim=layer["embed_dim"], B=batch, L=1 if decode else seq, S=seq,
            element_size=getattr(torch, layer["dtype"]).itemsize, cached=decode, causal=call["causal"] and not decode,
            concat=layer["combine"] == "concat", bias=layer["bias"], gated=layer["gated"],
            activations=ACTIVATIONS.index(layer["activations"]), overlap=0 if overlap is None else overlap,
            latent=[layer["latent"].get(name) or 0 for name in LATENT], shares=cycles, profile=hardware.numbers,
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
    return options, options[picked]


def with_memory(p: Plan, shares: dict[tuple[int, int], MemoryShares]) -> Plan:
    """The plan with a cache by position dealt in these shares: of the grids on which ranks then hold in proportion to
    their memory the fastest, else the one that comes nearest to it.
    """
    groups = {grid: found.of_groups(1 if p.layer["latent"] else grid[0]) for grid, found in shares.items()}
    options, _ = _priced(p.layer, p.call, p.profile, {grid: max(each, key=max) for grid, each in groups.items()})
    kept = [option for option in options if option.scheme == "position"]
    near = [option for option in kept if shares[option.grid].in_proportion]
    near = near or [min(kept, key=lambda option: shares[option.grid].off)]
    pick = min(near, key=lambda option: option.predicted_seconds["total"])
    found = shares[pick.grid]
    why = why_text(near, pick, True, p.layer["overlap"] is None, " of those with a cache by position")
    why += f" cache_shares={list(found.cache_shares)} deals its tokens so that the ranks hold "
    why += f"{', '.join(number(size / UNITS['B']['GB']) for size in found.rank_bytes)} GB of weights and cache, "
    if found.in_proportion:
        why += f"within {found.off:.1%} of the proportion of their memory."
        why += " Other grids are further from it." if len(near) < len(kept) else ""
    else:
        why += (
            f"up to {found.off:.1%} off the proportion of their memory, the nearest that there is: weights are equal, "
        )
        why += "and a head group's ranks alone keep its heads."
    return replace(p, options=options, pick=pick, why=why, shares=found)


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


def _nearby_text(asked: dict[str, Any], ranks: int, kv_heads: int) -> str:
    """Where there is but one head group, what the nearest numbers of ranks with more would take."""
    if ranks == 1 or kv_heads == 1 or math.gcd(ranks, kv_heads) > 1:
        return ""
    below = next((p for p in range(ranks, 1, -1) if math.gcd(p, kv_heads) > 1), None)
    above = next(p for p in range(ranks, ranks + kv_heads + 1) if math.gcd(p, kv_heads) > 1)
    found = []
    for p in filter(None, (below, above)):
        try:
            pick = plan(**asked | {"ranks": p, "devices": None, "memory": None}).pick
        except GridError:  # on that many the numbers are too large to price
            continue
        found.append(f"{p} would take {pick.name}, predicted {duration(pick.predicted_seconds['total'])}")
    return (
        f" {ranks} ranks share no factor with {kv_heads} key/value heads, and so are one head group; "
        + "; ".join(found)
    ) + "."
