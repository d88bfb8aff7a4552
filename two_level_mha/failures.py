"""What ranks tell each other about where they are, and the sentence that is made of it once an exchange has failed."""

import datetime
import re
from dataclasses import dataclass

_OF_AN_EXCHANGE = re.compile("gloo|nccl|Timed out|timed out|closed by peer|reset by peer", re.IGNORECASE)
_CLOSED = re.compile("closed by peer|reset by peer|Broken pipe|refused", re.IGNORECASE)


@dataclass
class State:
    """Where a rank is. beat counts the seconds, so that one that stands still shows."""

    beat: int = 0
    layer: str = ""
    exchange: str = ""
    backward: bool = False
    waiting: bool = False
    call: int = 0  # of whole models
    doing: str = ""  # what it compares with the others, or the exception that left its model

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


def judged(
    error: str, rank: int, here: State, now: dict[int, State], still: list[int], limit: datetime.timedelta | None
) -> str:
    """The sentence about an exchange that failed on `rank`. now: every rank's state; still: whose beat stands still."""
    if still:
        gone = "gone" if _CLOSED.search(error) else f"without an answer for {seconds(limit)}"
        return f"{are(still)} {gone}; last seen {now[still[0]].text()}"
    apart = {other: state for other, state in now.items() if other != rank and _place(state) != _place(here)}
    if not apart:
        return f"an exchange failed on rank {rank}, {here.text()}"
    texts: dict[str, list[int]] = {}
    for other, state in apart.items():
        texts.setdefault(state.text(), []).append(other)
    others = "; ".join(f"{are(ranks)} {text}" for text, ranks in texts.items())
    return f"{others}, while rank {rank} is {here.text()}"


def _place(state: State) -> tuple:
    return state.layer, state.exchange, state.backward, state.call, state.doing


def are(ranks: list[int]) -> str:
    return f"rank {ranks[0]} is" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} are"


def seconds(timeout: datetime.timedelta | None) -> str:
    return "the limit" if timeout is None else f"{timeout.total_seconds():g} s"


def first_line(text: str) -> str:
    """The first line of an error, without places in C++ and without Gloo's advice."""
    line = re.sub(r"\[[^\]]*:\d+\] ", "", text.strip().split("\n")[0])
    return line.split(". This is typically")[0][:200]
