"""What all that ranks found says: which rank is wrong, in which tensor, and what can be copied from whom.

Nothing is sent here: every rank has the findings of all, and comes to the same sentences.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from two_level_mha.held import Placed

LINES = 8  # of an error's text


@dataclass
class Findings:
    """Of one rank."""

    checksums: dict[str, tuple[Placed, int]] = field(default_factory=dict)  # of what it holds, by name
    changed: dict[str, str] = field(default_factory=dict)  # what changed without a write
    not_finite: dict[str, str] = field(default_factory=dict)  # parameters and moments with NaN or Inf
    gradients: dict[str, str] = field(default_factory=dict)  # gradients with NaN or Inf
    layers: list[str] = field(default_factory=list)  # outputs in forward order; "" for a finite one
    inputs: dict[str, tuple[str, int]] = field(default_factory=dict)  # shape, dtype and checksum, by name
    random: int = 0

    @property
    def faults(self) -> bool:
        """Whether this rank found anything by itself."""
        return bool(self.changed or self.not_finite or self.gradients or any(self.layers))


@dataclass
class Copy:
    """One rank's tensor that others are to take."""

    name: str
    source: int
    targets: list[int]


@dataclass
class Mending:
    """What repair copies, and a sentence for all that it cannot."""

    copies: list[Copy] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


Same = dict[Placed, dict[int, tuple[int, ...]]]  # ranks that hold the same as a rank does, by placement and rank


def holders(found: dict[int, Findings], same: Same) -> list[tuple[str, tuple[int, ...]]]:
    """Every tensor with the ranks that hold the same of it, in the order in which they hold them."""
    return list(
        dict.fromkeys(
            (name, same[placed][rank])
            for rank, one in found.items()
            for name, (placed, _) in one.checksums.items()
        )
    )  # fmt: skip


def mending(found: dict[int, Findings], same: Same) -> Mending:
    """By majority of the ranks whose own memory is sound."""
    plan = Mending()
    for name, ranks in holders(found, same):
        if missing := [rank for rank in ranks if name not in found[rank].checksums]:
            plan.lost.append(f"{name} is missing on {_ranks(missing)}")
            continue
        values = {rank: found[rank].checksums[name][1] for rank in ranks}
        bad = {rank for rank in values if name in found[rank].changed or name in found[rank].not_finite}
        sound = [rank for rank in values if rank not in bad]
        if not bad and len(set(values.values())) == 1:
            continue
        if not sound:
            alone = "exists once" if len(ranks) == 1 else "is wrong on every rank that holds it"
            plan.lost.append(f"{name} on {_ranks(bad)} {alone}")
            continue
        value = _majority([values[rank] for rank in sound])
        if value is None:
            plan.lost.append(f"{name} has no majority among {_ranks(ranks)}")
            continue
        source = next(rank for rank in sound if values[rank] == value)
        plan.copies.append(Copy(name, source, [rank for rank in values if rank in bad or values[rank] != value]))
    return plan


def verdict(found: dict[int, Findings], same: Same) -> str:
    """What is wrong, and the way out."""
    causes: list[str] = []
    lines: list[str] = []
    ways: list[str] = []
    for ranks in dict.fromkeys(same[()].values()):
        wrong: list[str] = []
        for name in dict.fromkeys(name for rank in ranks for name in found[rank].inputs):
            wrong += _difference(name, {rank: found[rank].inputs.get(name) for rank in ranks})
        if wrong:
            ways.append("give every rank of a grid the same batch")
        causes += wrong
        if wrong := _difference("the state of torch's random generator", {rank: found[rank].random for rank in ranks}):
            ways.append("seed every rank of a grid alike")
        causes += wrong
    for what, list_of in (("changed", causes), ("not_finite", lines)):
        list_of += [
            f"rank {rank}: {name} {text}" for rank in found for name, text in getattr(found[rank], what).items()
        ]
    known = {(rank, name) for rank, one in found.items() for name in one.changed | one.not_finite}
    for name, ranks in holders(found, same):
        values = {rank: found[rank].checksums.get(name) for rank in ranks if (rank, name) not in known}
        lines += _difference(name, values)
    plan = mending(found, same)
    if plan.copies:
        ways.append(
            "handle.repair() copies from other ranks what they hold too, after which the batch is run again from "
            "zero_grad()"
        )
    if plan.lost:
        ways.append(f"load the last checkpoint, since repair() cannot mend all: {_shortened(plan.lost, 2)}")
    lines = causes + lines
    if not lines:
        lines = _origin(found)
        ways = ["leave this batch out (zero_grad()), or go back to the last checkpoint with a smaller step"]
    return f"{_shortened(lines)}. The way out: {'; '.join(dict.fromkeys(ways))}"


def _origin(found: dict[int, Findings]) -> list[str]:
    """The first output that is not finite, on the ranks where it comes first, and the first gradient."""
    first = {rank: next((i for i, text in enumerate(one.layers) if text), None) for rank, one in found.items()}
    at = min((i for i in first.values() if i is not None), default=None)
    lines = [f"rank {rank}: {found[rank].layers[at]}" for rank, i in first.items() if at is not None and i == at]
    for rank, one in found.items():
        lines += [f"rank {rank}: the gradient of {name} {text}" for name, text in list(one.gradients.items())[:1]]
    return lines


def _difference(name: str, values: Mapping[int, object]) -> list[str]:
    """A sentence for a tensor that ranks should hold alike and do not."""
    by_value: dict[object, list[int]] = {}
    for rank, value in values.items():
        by_value.setdefault(value, []).append(rank)
    if len(by_value) < 2:
        return []
    usual = _majority(list(values.values()))
    if not any(value == usual and len(ranks) > 1 for value, ranks in by_value.items()):
        return [f"{name} differs between {' and '.join(_ranks(ranks) for ranks in by_value.values())}, no majority"]
    odd = sorted(rank for rank, value in values.items() if value != usual)
    return [f"{_ranks(odd)}: {name} differs from that of {_ranks(by_value[usual])}"]


def _majority(values: list[object]) -> object:
    """The value that most have, or None if two are as frequent."""
    (value, most), *others = Counter(values).most_common(2)
    return None if others and others[0][1] == most else value


def _ranks(ranks: Iterable[int]) -> str:
    ranks = sorted(ranks)
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _shortened(lines: list[str], most: int = LINES) -> str:
    more = f"; and {len(lines) - most} more" if len(lines) > most else ""
    return "; ".join(lines[:most]) + more
