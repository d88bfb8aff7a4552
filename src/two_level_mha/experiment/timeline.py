"""Recorded events of several ranks on one clock: what overlaps, who waits for whom, where a pipeline is empty.

Each rank computes one operator at a time, in the order of its events, and sends by one collective at a time beside it.
A collective holds the rank up at once for the share that cannot be hidden, and for the rest where it is waited for. A
message is sent beside what follows, and a receive waits for its end. Collectives of c10d do not say when their results
are needed. They are those of FSDP2 here: an all-gather of weights needs nothing that is computed, so it is begun where
the one before was needed, and needed where it is recorded; what sums gradients is needed at the end.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from two_level_mha.experiment.pricing import Cost, Prices
from two_level_mha.experiment.recorder import Event, Start, Wait, Work


@dataclass
class Lane:
    """One rank: seconds by what bound them. now: when it is done; waiting: for messages that had not been sent."""

    now: float = 0.0
    waiting: float = 0.0
    exposed: float = 0.0  # sending that nothing hid
    busy: Counter = field(default_factory=Counter)  # of operators, by what bounds them
    sending: Counter = field(default_factory=Counter)  # of collectives, hidden or not, by what bounds them

    def extended(self, longer: "Lane", times: float) -> "Lane":
        """This lane, and `times` what a longer one has more."""

        def line(a, b):
            if isinstance(a, Counter):
                return Counter({key: line(a[key], b[key]) for key in {**a, **b}})
            return a + times * (b - a)

        return Lane(*(line(getattr(self, f.name), getattr(longer, f.name)) for f in fields(Lane)))

    def scaled(self, times: float) -> "Lane":
        return Lane().extended(self, times)

    @property
    def computing(self) -> float:
        return sum(self.busy.values())

    @property
    def bound(self) -> str:
        """What took the most of this rank's time."""
        shares = Counter(self.busy)
        total = sum(self.sending.values())
        for what, seconds in self.sending.items():
            shares[what] += seconds * (self.exposed / total if total else 0.0)
        shares["pipeline bubbles"] = self.waiting
        return max(shares, key=shares.get)


@dataclass
class _Progress:
    at: int = 0
    free: float = 0.0  # when its links are
    needed: float = 0.0  # when the last all-gather of weights was
    summed: float = 0.0  # when the last sum of gradients is through
    ends: dict[int, float] = field(default_factory=dict)  # event -> when that collective is through


def simulate(
    ranks: dict[int, Sequence[Event]], prices: Prices, *, repeats: int = 1, hidden: float | None = None
) -> dict[int, Lane]:
    """The lanes of these ranks, whose events are run `repeats` times, one after the other without a barrier.

    hidden: the share of an exchange that is hidden beside computing, in place of that of the prices.

    Messages are matched in order, between each two ranks; a rank that a message is from or for must be among them, or
    the receive finds its message sent. Raises ValueError where ranks wait for each other in a circle.
    """
    hidden = prices.hidden if hidden is None else hidden
    costs = {rank: [_cost(event, prices) for event in events] for rank, events in ranks.items()}
    lanes = {rank: Lane() for rank in ranks}
    progress = {rank: _Progress() for rank in ranks}
    mail: dict[tuple[int, int], list[float]] = defaultdict(list)
    moved = True
    while moved:
        moved = False
        for rank, events in ranks.items():
            before = progress[rank].at
            _run(rank, events, costs[rank], lanes[rank], progress[rank], mail, hidden, repeats, set(ranks))
            moved |= progress[rank].at > before
    stuck = [rank for rank, events in ranks.items() if progress[rank].at < repeats * len(events)]
    if stuck:
        raise ValueError(f"ranks {stuck} wait for messages that are never sent: record every stage of the pipeline")
    return lanes


def _cost(event: Event, prices: Prices) -> Cost | None:
    if isinstance(event, Work):
        return prices.work(event)
    return prices.start(event) if isinstance(event, Start) else None


def _run(rank, events, costs, lane: Lane, progress: _Progress, mail, hidden: float, repeats: int, known: set) -> None:
    """Runs a rank until it is done, or waits for a message that has not been sent yet."""
    while progress.at < repeats * len(events):
        turn = progress.at % len(events)
        event, cost = events[turn], costs[turn]
        if isinstance(event, Work):
            lane.now += cost.seconds
            lane.busy[cost.bound] += cost.seconds
        elif isinstance(event, Wait):
            end = progress.ends.pop(event.start)
            lane.exposed += max(0.0, end - lane.now)
            lane.now = max(lane.now, end)
        elif event.name == "recv":
            if event.peer in known:
                if not (box := mail[event.peer, rank]):
                    return
                end = box.pop(0)
                lane.waiting += max(0.0, end - lane.now)
                lane.now = max(lane.now, end)
        else:
            gathers = event.name == "all_gather" and not event.waited
            begin = max(progress.needed if gathers else lane.now, progress.free)
            end = progress.free = begin + cost.seconds
            lane.sending[cost.bound] += cost.seconds
            held = lane.now if event.name == "send" else max(lane.now, begin) + (1 - hidden) * cost.seconds
            if gathers:
                progress.needed, held = lane.now, max(held, end)
            elif event.name == "send":
                mail[rank, event.peer].append(end)
            elif event.waited:
                progress.ends[turn] = end
            else:
                progress.summed = end
            lane.exposed += held - lane.now
            lane.now = held
        progress.at += 1
    lane.exposed += max(0.0, progress.summed - lane.now)
    lane.now = max(lane.now, progress.summed)
