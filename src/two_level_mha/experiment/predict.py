"""Tokens per second, memory and bytes of layouts on hardware that is not here, from recorded runs and rates."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from two_level_mha.experiment.hardware import Hardware
from two_level_mha.experiment.model import Layout, Sizes
from two_level_mha.experiment.pricing import Prices, ProfilePrices, link_bytes
from two_level_mha.experiment.recorder import Event, Start, Work
from two_level_mha.experiment.runs import Call, Run, record_layout, stages_of
from two_level_mha.experiment.timeline import Lane, simulate

MOST_REPEATS = 8  # of a piece in the timeline; from there on each takes as long as the ones before


@dataclass(frozen=True)
class Prediction:
    """Of one layout for one call of the whole batch. Bytes, FLOPs and seconds are of the rank that has the most.

    seconds: of the batch; low, high: at the fast and the slow end of the rates; alone: with no exchange hidden.
    computing, exposed, bubbles: of seconds, operators, exchanges that nothing hides, waiting for another stage.
    peak, weights: bytes of memory. refused: why there are no numbers.
    """

    layout: str
    exact: bool
    mode: str
    causal: bool
    refused: str = ""
    pieces: int = 0
    seconds: float = 0.0
    low: float = 0.0
    high: float = 0.0
    alone: float = 0.0
    computing: float = 0.0
    exposed: float = 0.0
    bubbles: float = 0.0
    bound: str = ""
    peak: int = 0
    weights: int = 0
    flops: int = 0
    fast_bytes: float = 0.0
    slow_bytes: float = 0.0
    tokens: int = 0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, object]:
        numbers = {"tokens_per_second": self.tokens_per_second} if self.seconds else {}
        return asdict(self) | numbers


def model_flops(sizes: Sizes, *, causal: bool, training: bool) -> int:
    """FLOPs of the unsplit model for the whole batch: what no layout can do without.

    A layer has products of 2 (2 D h d + 2 D k d + 2 D F) a token, and attention of 4 h d a pair of tokens; backward
    takes 2 and 2.5 times as much.
    """
    projections = 2 * sizes.embed_dim * (2 * sizes.head_dim * (sizes.heads + sizes.kv_heads) + 2 * sizes.mlp_hidden)
    pairs = sizes.length * (sizes.length + 1) // 2 if causal else sizes.length**2
    attention = 4 * sizes.heads * sizes.head_dim * pairs * sizes.batch
    products = projections * sizes.tokens
    return sizes.layers * (products * (3 if training else 1) + (attention * 7 // 2 if training else attention))


def predict(
    sizes: Sizes,
    layouts: Sequence[Layout],
    machine: Hardware,
    call: Call,
    *,
    prices: Prices | None = None,
    error: float = 0.0,
    progress: Callable[[Layout], None] = lambda layout: None,
) -> list[Prediction]:
    """Predicts each layout. prices: in place of the profile's rates, with their relative `error`."""
    found = []
    for layout in layouts:
        progress(layout)
        run = record_layout(sizes, layout, machine, call)
        found.append(priced(sizes, run, machine, call, prices=prices, error=error))
    return found


def priced(
    sizes: Sizes, run: Run, machine: Hardware, call: Call, *, prices: Prices | None = None, error: float = 0.0
) -> Prediction:
    """The prediction for a recorded run."""
    head: dict[str, Any] = {
        "layout": run.layout.name,
        "exact": run.layout.exact,
        "mode": call.mode,
        "causal": call.causal,
    }
    if run.refused:
        return Prediction(**head, refused=run.refused, peak=run.peak, weights=run.weights)
    pieces = sizes.batch // run.batch
    used = prices or ProfilePrices(machine.profile)
    lane = run_seconds(run, used, pieces)
    if prices is not None:
        ends = (lane.now * (1 - error), lane.now * (1 + error))
    else:
        slow, fast = (run_seconds(run, ProfilePrices(machine.end(which).profile), pieces).now for which in (0, 1))
        ends = (fast, slow)
    node = machine.profile.node_ranks
    sent = [_sent(events, node, pieces) for events in run.events.values()]
    return Prediction(
        **head,
        pieces=pieces,
        seconds=lane.now,
        low=ends[0],
        high=ends[1],
        alone=run_seconds(run, used, pieces, hides=False).now,
        computing=lane.computing,
        exposed=lane.exposed,
        bubbles=lane.waiting,
        bound=lane.bound,
        peak=run.peak,
        weights=run.weights,
        flops=pieces * max(sum(e.flops for e in events if isinstance(e, Work)) for events in run.events.values()),
        fast_bytes=max(fast for fast, _ in sent),
        slow_bytes=max(slow for _, slow in sent),
        tokens=sizes.batch if call.mode == "decode" else sizes.tokens,
    )


def run_seconds(run: Run, prices: Prices, pieces: int, hides: bool = True) -> Lane:
    """The lane of the rank that is done last, for all pieces. hides: as in timeline.simulate.

    Pieces follow each other without a gap, but for those of one micro-batch, which is how a pipeline runs that is
    called once for each.
    """
    drains = run.layout.pp > 1 and run.layout.micro_batches == 1
    repeats = 1 if drains else min(pieces, MOST_REPEATS)
    lane = _last(run, prices, repeats, hides)
    if repeats == pieces:
        return lane
    if drains or run.layout.pp == 1:
        return lane.scaled(pieces / repeats)
    half = _last(run, prices, repeats // 2, hides)
    return half.extended(lane, (pieces - repeats // 2) / (repeats - repeats // 2))


def _last(run: Run, prices: Prices, repeats: int, hides: bool) -> Lane:
    lanes = simulate(run.events, prices, repeats=repeats, hides=hides)
    return lanes[max(stages_of(run.layout), key=lambda rank: lanes[rank].now)]


def _sent(events: list[Event], node: int, pieces: int) -> tuple[float, float]:
    """Bytes over fast and over slow links."""
    each = [link_bytes(event, node) for event in events if isinstance(event, Start) and event.sent]
    return pieces * sum(fast for fast, _ in each), pieces * sum(slow for _, slow in each)


def dtype_of(machine: Hardware) -> torch.dtype:
    """float16 on GPUs, as the seed has it, and float32 on CPUs."""
    return torch.float32 if machine.device == "cpu" else torch.float16
