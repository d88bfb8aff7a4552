"""Events of a rank in seconds, from rates: those of a profile, or those of a machine that was calibrated.

    operator     max(FLOPs / rate of its kind, bytes / rate of memory)
    collective   latency + bytes sent / bandwidth of the links that its ranks use

The bandwidth of a ring over nodes is that of the adapters of its ranks in a node, since the ring leaves a node once,
where its neighbours' adapters serve it or the rings of their groups; at most that of a link. Pairwise exchanges send to
other nodes what their ranks there get, each by its own adapter.
"""

from dataclasses import dataclass
from typing import Protocol

from two_level_mha.experiment.recorder import ATTENTION, Start, Work
from two_level_mha.profile import RANGES, Profile

PAIRWISE = ("all_to_all", "send")


@dataclass(frozen=True)
class Cost:
    """Seconds, and which of the rates they come from: "products", "attention", "memory"; "fast links", "slow links",
    "latency". held: of a collective's, those in which its rank cannot compute beside it.
    """

    seconds: float
    bound: str
    held: float = 0.0


class Prices(Protocol):
    """What prices events. cores: processors that ranks share, rank r on r % cores; None: one each."""

    @property
    def cores(self) -> int | None: ...
    def work(self, work: Work) -> Cost: ...
    def start(self, start: Start) -> Cost: ...


class ProfilePrices:
    """Prices from a profile's rates."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.rates = dict(zip(RANGES, profile.numbers, strict=True))
        self.hidden = self.rates["hidden_percent"] / 100
        self.cores: int | None = None

    def work(self, work: Work) -> Cost:
        flops: float = work.flops
        rate = self._rate(work)
        if work.kind == ATTENTION and work.element_size <= 2:
            *_, width, v_width = work.shape
            if max(width, v_width) <= self.rates["padded_head_dim"]:
                flops = flops * 2 * max(width, v_width) / (width + v_width)
        computing = flops / rate if flops else 0.0
        moving = work.bytes / self.rates["memory"]
        if computing >= moving:
            return Cost(computing, "attention" if work.kind == ATTENTION else "products")
        return Cost(moving, "memory")

    def start(self, start: Start) -> Cost:
        latency = self.rates["latency_ns"] * 1e-9
        sending = start.sent / self._bandwidth(start)
        _, slow = link_bytes(start, self.rates["node_ranks"])
        bound = "latency" if sending <= latency else "slow links" if slow else "fast links"
        return Cost(latency + sending, bound, (1 - self.hidden) * (latency + sending))

    def _rate(self, work: Work) -> float:
        single = "_single" if work.element_size > 2 else ""
        if work.kind != ATTENTION:
            return self.rates[f"flops{single}"]
        width = max(work.shape[-2:])
        return self.rates[f"attention{single}_{'128' if width <= 128 else '256' if width <= 256 else 'wide'}"]

    def _bandwidth(self, start: Start) -> float:
        link, network, node = (self.rates[name] for name in ("link", "network", "node_ranks"))
        together = _in_first_node(start, node)
        if together == len(start.ranks):
            return link
        if start.name in PAIRWISE:
            outside = _outside(start, together)
            return 1 / max(outside / network, (1 - outside) / link)
        return min(link, network * together)


def _in_first_node(start: Start, node: int) -> int:
    """Ranks of the group in the node of its first: as many as in its others, where groups are regular."""
    return sum(rank // node == start.ranks[0] // node for rank in start.ranks)


def _outside(start: Start, together: int) -> float:
    """The share of what a rank sends pairwise that leaves its node."""
    return (len(start.ranks) - together) / (len(start.ranks) - 1)


def link_bytes(start: Start, node: int) -> tuple[float, float]:
    """Bytes that a rank sends over links of its node, and to other nodes: of a ring the mean over a node's ranks."""
    together = _in_first_node(start, node)
    if together == len(start.ranks):
        return float(start.sent), 0.0
    slow = start.sent * (_outside(start, together) if start.name in PAIRWISE else 1 / together)
    return start.sent - slow, slow
