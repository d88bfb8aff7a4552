"""Recorded events of several ranks on one clock: what overlaps, who waits for whom, where a pipeline is empty.

Each rank computes one operator at a time, in the order of its events, and sends by one collective at a time beside it.
A collective holds the rank up at once for what cannot be hidden of it, and for the rest where it is waited for. A
message is sent beside what follows, and a receive waits for its end. Collectives of c10d do not say when their results
are needed. They are those of FSDP2 here: an all-gather of weights needs nothing that is computed, so it is begun where
the one before was needed, and needed where it is recorded; what sums gradients is needed at the end.

Ranks that share a processor are priced as if all of them computed; while some wait, the others have their time.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias

from two_level_mha.experiment.pricing import Cost, Prices
from two_level_mha.experiment.recorder import Event, Start, Wait, Work

SEND, RECEIVE = "send", "recv"


@dataclass
class Lane:
    """One rank: seconds by what bound them. now: when it is done; waiting: for messages that had not come."""

    now: float = 0.0
    waiting: float = 0.0
    exposed: float = 0.0  # sending that nothing hid
    busy: dict[str, float] = field(default_factory=dict)  # of operators, by what bounds them
    sending: dict[str, float] = field(default_factory=dict)  # of collectives, hidden or not, by what bounds them

    def extended(self, longer: "Lane", times: float) -> "Lane":
        """This lane, and `times` what a longer one has more."""

        def line(a: Any, b: Any) -> Any:  # of a number, or of each in a dict
            if isinstance(a, dict):
                return {key: line(a.get(key, 0.0), b.get(key, 0.0)) for key in {**a, **b}}
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
        shares = dict(self.busy)
        total = sum(self.sending.values())
        for what, seconds in self.sending.items():
            _add(shares, what, seconds * (self.exposed / total if total else 0.0))
        shares["pipeline bubbles"] = self.waiting
        return max(shares, key=lambda what: shares[what])


def _add(shares: dict[str, float], what: str, seconds: float) -> None:
    shares[what] = shares.get(what, 0.0) + seconds


@dataclass
class _Rank:
    """Where a rank is: it computes until `work` is done, or sleeps until `until`, or waits for a message."""

    lane: Lane
    turns: Iterator[tuple[int, Event, Cost | None]]
    work: float = 0.0
    until: float = 0.0
    waits: int | None = None  # for a message of that rank
    done: bool = False
    free: float = 0.0  # when its links are
    needed: float = 0.0  # when the last all-gather of weights was
    summed: float = 0.0  # when the last sum of gradients is through
    ends: dict[int, float] = field(default_factory=dict)  # event -> when that collective is through


Mail: TypeAlias = dict[tuple[int, int], list[float]]  # (from, to) -> when messages come, in order


def simulate(
    ranks: Mapping[int, Sequence[Event]], prices: Prices, *, repeats: int = 1, hides: bool = True
) -> dict[int, Lane]:
    """The lanes of these ranks, whose events are run `repeats` times, one after the other without a barrier.

    hides: whether computing beside an exchange hides it, as far as its price says. Messages are matched in order
    between each two ranks; what comes from a rank that is not among these is there.
    Raises ValueError where ranks wait for messages that are never sent.
    """
    mail: Mail = defaultdict(list)
    states = {rank: _Rank(Lane(), _turns(events, prices, repeats)) for rank, events in ranks.items()}
    core = {rank: rank if prices.cores is None else rank % prices.cores for rank in ranks}
    shared = Counter(core.values())
    now = 0.0
    while True:
        for rank, state in states.items():
            _advance(rank, state, now, hides, mail, ranks)
        if all(state.done for state in states.values()):
            return {rank: state.lane for rank, state in states.items()}
        computing = {rank: state for rank, state in states.items() if state.work > 0}
        active = Counter(core[rank] for rank in computing)
        speed = {rank: shared[core[rank]] / active[core[rank]] for rank in computing}
        steps = [state.work / speed[rank] for rank, state in computing.items()]
        steps += [state.until - now for state in states.values() if state.until > now]
        steps += [come - now for rank, state in states.items() if (come := _due(state, rank, mail)) is not None]
        if not steps:
            stuck = [rank for rank, state in states.items() if not state.done]
            raise ValueError(f"ranks {stuck} wait for messages that are never sent: record every stage of the pipeline")
        step = min(steps)
        for rank, state in computing.items():
            left = state.work - step * speed[rank]
            state.work = left if left > 1e-12 * state.work else 0.0
        now += step


def _turns(events: Sequence[Event], prices: Prices, repeats: int) -> Iterator[tuple[int, Event, Cost | None]]:
    costs = [_cost(event, prices) for event in events]
    for _ in range(repeats):
        yield from zip(range(len(events)), events, costs, strict=True)


def _cost(event: Event, prices: Prices) -> Cost | None:
    if isinstance(event, Work):
        return prices.work(event)
    return prices.start(event) if isinstance(event, Start) else None


def _due(state: _Rank, rank: int, mail: Mail) -> float | None:
    """When the message comes that the rank waits for, if it was sent."""
    return None if state.waits is None else next(iter(mail[state.waits, rank]), None)


def _advance(rank: int, state: _Rank, now: float, hides: bool, mail: Mail, known: Mapping[int, object]) -> None:
    """Runs a rank's events until it computes, sleeps, waits for a message, or is done."""
    lane = state.lane
    while not state.done and state.work == 0 and state.until <= now:
        if state.waits is not None:
            come = _due(state, rank, mail)
            if come is None or come > now:
                return
            mail[state.waits, rank].pop(0)
            state.waits = None
            lane.waiting += now - lane.now
        lane.now = max(lane.now, now)
        turn = next(state.turns, None)
        if turn is None:
            lane.exposed += max(0.0, state.summed - lane.now)
            lane.now = max(lane.now, state.summed)
            state.done = True
            return
        at, event, cost = turn
        if isinstance(event, Wait):
            _sleep(state, state.ends.pop(event.start))
            continue
        assert cost is not None
        if isinstance(event, Work):
            state.work = cost.seconds
            _add(lane.busy, cost.bound, cost.seconds)
        elif event.name == RECEIVE:
            state.waits = event.peer if event.peer in known else None
        else:
            _begin(rank, state, at, event, cost, hides, mail)


def _sleep(state: _Rank, until: float) -> None:
    state.lane.exposed += max(0.0, until - state.lane.now)
    state.until = max(state.until, until)


def _begin(rank: int, state: _Rank, at: int, event: Start, cost: Cost, hides: bool, mail: Mail) -> None:
    now = state.lane.now
    _add(state.lane.sending, cost.bound, cost.seconds)
    gathers = event.name == "all_gather" and not event.waited
    begin = max(state.needed if gathers else now, state.free)
    end = state.free = begin + cost.seconds
    if event.name == SEND:
        assert event.peer is not None
        mail[rank, event.peer].append(end)
        return
    held = max(now, begin) + (cost.held if hides else cost.seconds)
    if gathers:
        state.needed, held = now, max(held, end)
    elif event.waited:
        state.ends[at] = end
    else:
        state.summed = end
    _sleep(state, held)
