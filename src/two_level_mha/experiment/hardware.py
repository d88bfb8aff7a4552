"""The machines that predictions are made for: the planner's profiles, how many ranks, what one holds, and how sure.

A rate that nobody measured has a range, as factors of the profile's; the slow and the fast end of all of them are the
interval of a prediction.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from two_level_mha.errors import GridError
from two_level_mha.profile import RANGES, Profile

GB = 10**9
ASSUMED = {  # of CUDA's profiles; what is reached of a data sheet's numbers, nothing was measured
    "flops": (0.875, 1.75),  # 350 to 700 TFLOP/s of 989
    "attention_128": (0.75, 1.75),
    "attention_256": (0.75, 1.85),
    "attention_wide": (0.7, 2.3),  # 91 to 300 TFLOP/s
    "memory": (0.9, 1.2),
    "link": (0.8, 1.15),
    "network": (0.8, 0.98),
    "latency_ns": (2.0, 0.5),
    "hidden_percent": (0.5, 1.1),
}


@dataclass(frozen=True)
class Hardware:
    """ranks: in all; memory: bytes that one holds; peak: FLOP/s in half precision that none exceeds, None: not known.

    ranges: field of the profile -> factors of the slow and the fast end. sources: what -> where it is from.
    """

    name: str
    profile: Profile
    ranks: int
    memory: int
    peak: float | None
    device: str  # "cuda" or "cpu": whose collectives and kernels are meant
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    def end(self, which: int) -> "Hardware":
        """The slow (0) or the fast (1) end of every range."""
        numbers: dict[str, Any] = dict(zip(RANGES, self.profile.numbers, strict=True))
        for name, factors in self.ranges.items():
            least, most = RANGES[name]
            numbers[name] = min(max(int(numbers[name] * factors[which]), least), most)
        return replace(self, profile=replace(self.profile, **numbers))

    @property
    def ceiling(self) -> float | None:
        """FLOP/s of all ranks."""
        return None if self.peak is None else self.ranks * self.peak


def hardware(name: str, profile: Profile | None = None) -> Hardware:
    """KIND-RANKS: h100-16, of nodes of 8; h100-nvl-16, all in one NVLink domain; h200-16; cpu-4.

    profile: rates in place of the known ones, as a file of `calibrate` or of `plan --profile` has them. Raises
    GridError, with the kinds, for another name.
    """
    kind, _, ranks = name.rpartition("-")
    if kind not in _KINDS or not ranks.isdigit() or int(ranks) < 1:
        raise GridError(f"hardware must be one of {', '.join(_KINDS)}, and a number of ranks, as h100-16; got {name!r}")
    found = _KINDS[kind](int(ranks))
    if profile is None:
        return replace(found, name=name)
    sources = {**found.sources, "rates": f"profile {profile.name!r}: {profile.source}"}
    return replace(found, name=name, profile=profile, ranges={}, sources=sources)


def _gpu(ranks: int, *, holds: int, sheet: str, **changes: Any) -> Hardware:
    known = Profile.named("h100")
    return Hardware(
        name="",
        profile=replace(known, **changes),
        ranks=ranks,
        memory=holds,
        peak=989e12,
        device="cuda",
        ranges=ASSUMED,
        sources={
            "memory of a GPU, peak FLOP/s": sheet,
            "rates": f"profile 'h100': {known.source}",
            "intervals": "assumed ranges of these rates: no kernel was timed on this GPU",
        },
    )


_KINDS: dict[str, Callable[[int], Hardware]] = {
    "h100": lambda ranks: _gpu(ranks, holds=80 * GB, sheet="H100 SXM data sheet: 80 GB, 989 TFLOP/s dense in fp16"),
    "h100-nvl": lambda ranks: _gpu(
        ranks,
        holds=80 * GB,
        sheet="H100 SXM data sheet: 80 GB, 989 TFLOP/s dense in fp16; one NVLink domain for all: assumed",
        node_ranks=ranks,
    ),
    "h200": lambda ranks: _gpu(
        ranks,
        holds=141 * GB,
        sheet="H200 SXM data sheet: 141 GB at 4.8 TB/s, 989 TFLOP/s dense in fp16; 3.6 TB/s reached: assumed",
        memory=3_600 * GB,
    ),
    "cpu": lambda ranks: Hardware(
        name="",
        profile=Profile.named("cpu"),
        ranks=ranks,
        memory=4 * GB,
        peak=None,
        device="cpu",
        ranges={"flops": (0.7, 1.2), "link": (0.4, 1.2), "latency_ns": (3.0, 1.0)},
        sources={
            "rates": Profile.named("cpu").source,
            "memory of a rank": "assumed",
        },
    ),
}
