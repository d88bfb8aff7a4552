"""What the exchanges of calls on a GPU say of the ranks' agreement, looked at when nobody has to wait for it.

A call on the CPU raises as soon as its exchange is done. On a GPU that would let the device run dry at every layer, so
the exchange writes its verdict to memory of the host, and the layer looks at it in its call after the next: every rank
in the same call, so all of them raise together.
"""

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from two_level_mha.errors import GridError

COMPILED = "a compiled call"  # which has no number
DELAY = 2  # calls of a layer: the GPU has one to go on with while the host waits for the one before


@dataclass
class Verdict:
    """Of one call: `said` is (whether ranks differ, this rank's hash), and holds once `event` has happened."""

    layer: str
    call: str
    said: Tensor
    event: "torch.cuda.Event | None" = None


class Deferred:
    """The verdicts that no rank has looked at, of all layers on a mesh, in the order of the calls."""

    def __init__(self, ranks: tuple[int, ...], gather: Callable[[int, str], list[int]]) -> None:
        self.devices = ("cuda",)
        self.call = COMPILED  # the one that is under way
        self._ranks, self._gather = ranks, gather
        self._open: deque[Verdict] = deque()
        self._calls: Counter[str] = Counter()  # of a layer among the open ones

    def expect(self, layer: str, device: torch.device) -> Tensor | None:
        """Where the exchange of this call writes what it found; None: the call itself raises.

        None also while a CUDA graph is captured: when it runs nobody looks.
        """
        if device.type not in self.devices or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return None
        said = torch.zeros(2, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
        self._open.append(Verdict(layer, self.call, said))
        self._calls[layer] += 1
        return said

    def sent(self, device: torch.device) -> None:
        """After the operators of the call that was expected last."""
        if device.type == "cuda" and self._open and self._open[-1].event is None:
            self._open[-1].event = torch.cuda.current_stream(device).record_event()

    def look(self, layer: str | None = None) -> None:
        """At the verdicts of all calls up to the layer's one before its last, or at all of them.

        Raises GridError on every rank if one differed, so every rank calls it at the same place.
        """
        while self._open and (layer is None or self._calls[layer] >= DELAY):
            verdict = self._open.popleft()
            self._calls[verdict.layer] -= 1
            if verdict.event is not None:
                verdict.event.synchronize()
            differs, mine = verdict.said.tolist()
            if differs:
                self.forget()
                self._raise(verdict, mine)

    def forget(self) -> None:
        self._open.clear()
        self._calls.clear()

    def _raise(self, verdict: Verdict, mine: int) -> None:
        where = f"{verdict.call} of {verdict.layer}"
        hashes = self._gather(mine, f"comparing {where}, in which ranks differed")
        usual = max(hashes, key=hashes.count)
        odd = [str(rank) for rank, found in zip(self._ranks, hashes, strict=True) if found != usual]
        raise GridError(
            f"ranks of the grid differed in {where}: rank {', '.join(odd)} had not the inputs, mask, options or writes "
            "to the weights that the others had, so what was computed from it is wrong; with TLM_DEBUG=1 the call "
            "itself stops and names what differs, with TLM_DEBUG=0 nothing is compared, if a last bit is all that does"
        )
