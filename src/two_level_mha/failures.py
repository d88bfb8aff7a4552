"""What ranks tell each other about where they are, and the sentence that is made of it once an exchange has failed.

State    where a rank is; a thread of every rank writes it to the job's store each second
verdict  the first sentence about a failure, written once; every rank's RankFailure begins with it
"""

import contextlib
import datetime
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

BEAT = 1.0  # seconds between two states
JUDGED = 2.5  # seconds in which a rank that lives has told a new state
# Seconds after a failure in which all is said, so that no rank is there 5 s after the limit.
LINGER, PATIENCE = 3.8, 4.6

_OF_AN_EXCHANGE = re.compile("gloo|nccl|Timed out|timed out|closed by peer|reset by peer", re.IGNORECASE)
_OUTLASTED = re.compile("timed out|timeout", re.IGNORECASE)

Answer = TypeVar("Answer")


@dataclass
class State:
    """Where a rank is."""

    layer: str = ""
    exchange: str = ""
    backward: bool = False
    waiting: bool = False
    call: int = 0  # of whole models
    doing: str = ""  # what it compares with the others, or the exception that left its model
    beat: int = 0  # counts the seconds, so that a rank that stands still shows

    def text(self) -> str:
        return self.doing or self.place()

    def place(self) -> str:
        if not self.layer:
            return "before its first exchange"
        direction = "backward" if self.backward else "forward"
        where = f"{'in' if self.waiting else 'past'} the {direction} {self.exchange} of {self.layer}"
        return f"{where}, call {self.call} of the model" if self.call else where


def is_of_an_exchange(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and _OF_AN_EXCHANGE.search(str(error)) is not None


class Board:
    """The ranks' states and the verdict on a failure, in a store that they share."""

    def __init__(self, store: dist.Store, ranks: tuple[int, ...], rank: int) -> None:
        self._store = store.clone() if hasattr(store, "clone") else store  # the thread has a connection of its own
        self._ranks, self._rank, self._beat = ranks, rank, 0

    def tell(self, state: State) -> None:
        state.beat, self._beat = self._beat, self._beat + 1
        self._store.set(str(self._rank), json.dumps(vars(state)))

    def tell_now(self, state: State) -> None:
        """By a process that may end before the thread's next turn; without an answer it goes on."""
        with contextlib.suppress(RuntimeError):
            _answered(lambda: self.tell(state))

    def wait(self, limit: datetime.timedelta) -> list[int]:
        """Waits until every rank has told a state; those that have not within the limit."""
        with contextlib.suppress(RuntimeError):
            self._store.wait([str(rank) for rank in self._ranks], limit)
        return [rank for rank in self._ranks if not self._store.check([str(rank)])]

    def leave_word(self, text: str) -> None:
        """The verdict of a rank that leaves and will not read another's."""
        with contextlib.suppress(RuntimeError):  # of the store: it is for the others
            _answered(lambda: self._propose(text, [self._rank]))

    def verdict(self, error: str, here: State, limit: datetime.timedelta | None) -> str:
        """The sentence about an exchange that failed on this rank, alike on all that ask."""
        try:
            return _answered(lambda: self._verdict(error, here, limit))
        except RuntimeError as lost:
            keeper = f"rank {self._ranks[0]}, or the launcher that keeps it, is gone or stands still"
            return f"the job's store does not answer, so {keeper}: {first_line(str(lost))}"

    def _verdict(self, error: str, here: State, limit: datetime.timedelta | None) -> str:
        start = time.monotonic()
        self._store.set_timeout(datetime.timedelta(seconds=PATIENCE))
        if not self._store.check(["verdict"]):
            self.tell(here)
            if _OUTLASTED.search(error):
                self._store.set("outlasted", "")  # others' connections are closed because of that
            before = self._read()
            time.sleep(JUDGED)
            now = self._read()
            still = [rank for rank in self._ranks if rank != self._rank and now[rank].beat == before[rank].beat]
            closed = not self._store.check(["outlasted"])
            self._propose(_judged(closed, self._rank, here, now, still, limit), still)
        text: str
        absent: list[int]
        text, absent = json.loads(self._store.get("verdict"))
        self._store.set(f"read {self._rank}", "")
        readers = [f"read {rank}" for rank in self._ranks if rank not in absent]
        # rank 0 may keep the store: it stays until the others have read
        while self._rank == 0 and not self._store.check(readers) and time.monotonic() < start + LINGER:
            time.sleep(0.05)
        return text

    def _propose(self, text: str, absent: list[int]) -> None:
        self._store.compare_set("verdict", "", json.dumps([text, absent]))

    def _read(self) -> dict[int, State]:
        return {rank: State(**json.loads(self._store.get(str(rank)))) for rank in self._ranks}


def _answered(question: Callable[[], Answer]) -> Answer:
    """The answer to a question to the store. One whose keeper stands still answers never, whatever its time-out is."""
    answers: list[Answer | RuntimeError] = []

    def ask() -> None:
        try:
            answers.append(question())
        except RuntimeError as error:
            answers.append(error)

    thread = threading.Thread(target=ask, name="two_level_mha question", daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if not answers:
        raise RuntimeError(f"nothing for {PATIENCE:g} s")
    answer = answers[0]
    if isinstance(answer, RuntimeError):
        raise answer
    return answer


def _judged(
    closed: bool, rank: int, here: State, now: dict[int, State], still: list[int], limit: datetime.timedelta | None
) -> str:
    """The sentence about an exchange that failed on `rank`. now: every rank's state; still: whose beat stands still."""
    if still:
        gone = "gone" if closed else f"without an answer for {seconds(limit)}"
        return f"{are(still)} {gone}; last seen {now[still[0]].text()}"
    apart = {other: state for other, state in now.items() if other != rank and _place(state) != _place(here)}
    if not apart:
        return f"an exchange failed on rank {rank}, {here.text()}"
    texts: dict[str, list[int]] = {}
    for other, state in apart.items():
        texts.setdefault(state.text(), []).append(other)
    others = "; ".join(f"{are(ranks)} {text}" for text, ranks in texts.items())
    return f"{others}, while rank {rank} is {here.text()}"


def _place(state: State) -> tuple[str, str, bool, int, str]:
    return state.layer, state.exchange, state.backward, state.call, state.doing


def are(ranks: list[int]) -> str:
    return f"rank {ranks[0]} is" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} are"


def seconds(timeout: datetime.timedelta | None) -> str:
    return "the limit" if timeout is None else f"{timeout.total_seconds():g} s"


def first_line(text: str) -> str:
    """The first line of an error, without places in C++ and without Gloo's advice."""
    line = re.sub(r"\[[^\]]*:\d+\] ", "", text.strip().split("\n")[0])
    return line.split(". This is typically")[0][:200]
