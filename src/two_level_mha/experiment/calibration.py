"""What was measured of one machine with a number of ranks on it, and prices made of that.

    seconds of an operator    = compute * (as it took alone, on all ranks at once) + operator
    seconds of a collective   = exchange * (as it took alone) + collective

Over loopback the cores that compute also carry what is sent, so that the first part of a collective hides behind no
computing; the second is waiting, beside which a rank computes if it has begun the collective before it needs it. The
pieces are interpolated in tables; the four coefficients, none negative, are fitted to whole runs of the model: they
hold what no piece shows, as ranks that wait for the slower one, and the time between operators.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from math import log
from pathlib import Path
from typing import Any

import numpy as np

from two_level_mha.errors import GridError
from two_level_mha.experiment.pricing import Cost
from two_level_mha.experiment.recorder import ATTENTION, PRODUCT, Event, Start, Work
from two_level_mha.experiment.timeline import RECEIVE

COEFFICIENTS = ("compute", "exchange", "collective", "operator")
OTHER = "aten.clone"  # stands for operators that only move memory and were not measured


@dataclass(frozen=True)
class Table:
    """Values on a grid: interpolated linearly in logarithms, and beyond the ends like the ends."""

    axes: Sequence[Sequence[float]]
    values: list[Any]  # nested, one level for each axis

    def at(self, *point: float) -> float:
        values = np.log(np.array(self.values, dtype=np.float64))
        for axis, x in zip(self.axes, point, strict=True):
            places = np.log(axis)
            where = float(np.clip(np.interp(log(max(x, 1e-9)), places, np.arange(len(axis))), 0, len(axis) - 1))
            low = min(int(where), len(axis) - 2) if len(axis) > 1 else 0
            share = where - low
            values = values[low] if len(axis) == 1 else (1 - share) * values[low] + share * values[low + 1]
        return float(np.exp(values))


@dataclass(frozen=True)
class Calibration:
    """Prices of a machine. Rates in FLOP/s, times in seconds, of ranks that all do the same at once.

    products: rate by (rows, inner, columns). attention, attention_causal: by (S, width). memory: operator -> seconds by
    bytes. collectives: "all_reduce 4", of a group of 4 -> seconds by bytes of the input. error: of whole runs that were
    fitted, the largest; it is the interval of predictions. spread: how far passes of the pieces were apart.
    """

    ranks: int
    cores: int
    source: str
    products: Table
    attention: Table
    attention_causal: Table
    memory: dict[str, Table]
    collectives: dict[str, Table]
    coefficients: dict[str, float]
    error: float = 0.0
    spread: float = 1.0

    def alone(self, event: Work | Start) -> float:
        """Seconds of a piece by the tables."""
        if isinstance(event, Start):
            if event.name == RECEIVE or len(event.ranks) == 1:
                return 0.0
            return self.collectives[self._group(event)].at(event.bytes)
        if event.kind == PRODUCT:
            return event.flops / self.products.at(*event.shape)
        if event.kind == ATTENTION:
            heads, L, S, width, v_width = event.shape
            causal = event.flops < 0.9 * 2 * heads * L * S * (width + v_width) and not event.backward
            table = self.attention_causal if causal else self.attention
            return event.flops / table.at(S, max(width, v_width))
        return self.memory.get(event.name, self.memory[OTHER]).at(event.bytes)

    def work(self, work: Work) -> Cost:
        c = self.coefficients
        kinds = {PRODUCT: "products", ATTENTION: "attention"}
        return Cost(c["compute"] * self.alone(work) + c["operator"], kinds.get(work.kind, "memory"))

    def start(self, start: Start) -> Cost:
        c = self.coefficients
        sending = c["exchange"] * self.alone(start)
        return Cost(sending + c["collective"], "fast links", held=sending)

    def features(self, events: list[Event]) -> list[float]:
        """What the coefficients multiply, for a run whose ranks do alike."""
        works = [event for event in events if isinstance(event, Work)]
        starts = [event for event in events if isinstance(event, Start)]
        return [sum(map(self.alone, works)), sum(map(self.alone, starts)), len(starts), len(works)]

    def _group(self, event: Start) -> str:
        """The table of the nearest group size that was measured."""
        known = [int(key.split()[1]) for key in self.collectives if key.split()[0] == event.name]
        if not known:
            raise GridError(f"the calibration has no times of {event.name}: measure it again by `calibrate`")
        return f"{event.name} {min(known, key=lambda size: abs(size - len(event.ranks)))}"

    def to_file(self, path: str | os.PathLike[str]) -> None:
        """Writes what from_file reads."""
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def from_file(path: str | os.PathLike[str]) -> "Calibration":
        """Raises GridError, naming the file, where it is none."""
        try:
            found = json.loads(Path(path).read_text())
            for key in ("products", "attention", "attention_causal"):
                found[key] = Table(**found[key])
            for key in ("memory", "collectives"):
                found[key] = {name: Table(**table) for name, table in found[key].items()}
            return Calibration(**found)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise GridError(
                f"{os.fspath(path)!r} is no calibration, as `python -m two_level_mha calibrate` writes one: {error!r}"
            ) from error


def fit(features: list[list[float]], seconds: list[float]) -> dict[str, float]:
    """The coefficients, none negative, with the least squares of relative errors."""
    rows = np.array(features) / np.array(seconds)[:, None]
    best, least = np.zeros(len(COEFFICIENTS)), float("inf")
    for count in range(1, len(COEFFICIENTS) + 1):
        for chosen in combinations(range(len(COEFFICIENTS)), count):
            part = rows[:, chosen]
            found = np.linalg.lstsq(part, np.ones(len(rows)), rcond=None)[0]
            error = float(np.sum((part @ found - 1) ** 2))
            if (found >= 0).all() and error < least:
                best, least = np.zeros(len(COEFFICIENTS)), error
                best[list(chosen)] = found
    return dict(zip(COEFFICIENTS, best.tolist(), strict=True))
