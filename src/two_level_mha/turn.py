"""Whose the positions of a KV cache are, where ranks keep unequal shares of it: csrc/plan/turn.h in Python.

They are dealt in cycles as long as the shares add up to; rank j keeps a run of shares[j] of each.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from two_level_mha import _C
from two_level_mha.errors import GridError

Int = TypeVar("Int", int, Tensor)


class Turn(NamedTuple):
    """Positions first, ..., first + run - 1 of every cycle."""

    cycle: int
    first: int
    run: int

    def before(self, end: int) -> int:
        """How many of the positions 0, ..., end - 1 are this rank's."""
        if self.run == 1:
            return (end + self.cycle - 1 - self.first) // self.cycle
        place = end % self.cycle - self.first
        begun, ended = (place + self.cycle) // self.cycle, (place + self.cycle - self.run) // self.cycle  # 0 or 1
        return end // self.cycle * self.run + begun * place - ended * (place - self.run)

    def position(self, number: Int) -> Int:
        """Of this rank's number-th token; for a run that is not empty."""
        return number // self.run * self.cycle + self.first + number % self.run

    def of(self, x: Tensor, dim: int, begin: int) -> Tensor:
        """Of x, whose `dim` has positions from `begin` on, those that are this rank's."""
        if self.run == 0:
            return x.narrow(dim, 0, 0)
        first, count = self.before(begin), self.before(begin + x.shape[dim]) - self.before(begin)
        if self.run == 1:
            index = [slice(None)] * x.dim()
            index[dim] = slice(self.position(first) - begin, None, self.cycle)
            return x[tuple(index)]
        numbers = torch.arange(count, device=x.device) + first
        return x.index_select(dim, self.position(numbers) - begin)


def turn_of(shares: Sequence[int], ranks: int, rank: int) -> Turn:
    """shares: of every rank; none: they are equal."""
    return Turn(sum(shares), sum(shares[:rank]), shares[rank]) if shares else Turn(ranks, rank, 1)


def checked_shares(shares: object, ranks: int) -> tuple[int, ...]:
    """In their smallest numbers; empty where they are equal, or None was given. Raises GridError for what are no shares
    of so many ranks.
    """
    if shares is None:
        return ()
    most: int = _C.most_shares
    integers = isinstance(shares, (list, tuple)) and all(type(x) is int and x >= 0 for x in shares)
    if not isinstance(shares, (list, tuple)) or not integers or len(shares) != ranks or not sum(shares):
        raise GridError(
            f"cache_shares must be {ranks} integers, one for each rank in order, none of them negative nor all zero, "
            f"got {shares!r}"
        )
    smallest = tuple(x // math.gcd(*shares) for x in shares)
    if sum(smallest) > most:
        raise GridError(f"cache_shares must add up to at most {most} in their smallest numbers, got {shares!r}")
    return () if len(set(smallest)) == 1 else smallest


def check_groups(shares: tuple[int, ...], head_groups: int, slices: int) -> None:
    """Raises GridError where a head group's are all zero: nobody could keep its heads."""
    for head_group in range(head_groups if shares else 0):
        if not any(shares[head_group * slices : (head_group + 1) * slices]):
            raise GridError(
                f"cache_shares={list(shares)} gives the {slices} ranks of head group {head_group} nothing: only they "
                "can keep its heads' keys and values"
            )


def of_group(shares: tuple[int, ...], slices: int, head_group: int) -> tuple[int, ...]:
    """Those of one head group's ranks, in their smallest numbers; empty where they are equal."""
    own = shares[head_group * slices : (head_group + 1) * slices]
    return checked_shares(own, slices) if any(own) else ()
