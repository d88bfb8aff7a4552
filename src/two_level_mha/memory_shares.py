"""Shares of a KV cache for ranks of unequal memory: weights are equal, so the cache's tokens make up for the rest."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from two_level_mha import _C
from two_level_mha.errors import GridError

IN_PROPORTION = 0.02  # of what a rank should hold


@dataclass(frozen=True)
class MemoryShares:
    """What init_mesh takes as cache_shares, and what the ranks then hold."""

    memory: tuple[float, ...]  # of each rank, as it was given
    cache_shares: tuple[int, ...]
    rank_bytes: tuple[int, ...]  # weights, and the tokens of the cache
    off: float  # the most that a rank holds more or less than in proportion to its memory, of what it should

    def of_groups(self, head_groups: int) -> list[list[int]]:
        """Those of each head group's ranks."""
        slices = len(self.cache_shares) // head_groups
        return [list(self.cache_shares[i * slices : (i + 1) * slices]) for i in range(head_groups)]

    @property
    def in_proportion(self) -> bool:
        return self.off <= IN_PROPORTION


def checked_memory(memory: Sequence[float] | None, ranks: int | None, decode: bool) -> int | None:
    """The number of ranks. Raises GridError for what is no memory of so many, and for a call that keeps no cache."""
    if memory is None:
        return ranks
    if not isinstance(memory, (list, tuple)) or not memory or not all(_is_size(size) for size in memory):
        raise GridError(f"memory must be a positive number for each rank, all in one unit, got {memory!r}")
    if ranks is not None and ranks != len(memory):
        raise GridError(
            f"memory is that of {len(memory)} ranks, got ranks={ranks}: leave ranks out, or name each rank's"
        )
    if not decode:
        raise GridError("memory is shared out by the tokens of a KV cache: plan a call with decode=True (--decode)")
    return len(memory)


def _is_size(size: object) -> bool:
    return isinstance(size, (int, float)) and not isinstance(size, bool) and math.isfinite(size) and size > 0


def share_memory(memory: Sequence[float], head_groups: int, weights: int, cache: int) -> MemoryShares:
    """Shares for ranks that each have `weights` bytes, and each head group `cache` bytes of all tokens.

    In the shortest cycle with which every rank holds what is best for it within a quarter of IN_PROPORTION.
    """
    if cache == 0:
        raise GridError("memory is shared out by the tokens of a KV cache, and nothing keeps one here")
    ranks, slices = len(memory), len(memory) // head_groups
    groups = [memory[i * slices : (i + 1) * slices] for i in range(head_groups)]
    wanted = [_fractions(group, weights, cache) for group in groups]
    best = [weights + cache * fraction for fractions in wanted for fraction in fractions]
    should = [size / sum(memory) * (ranks * weights + head_groups * cache) for size in memory]

    missed, shares, held = math.inf, [0], [0]
    for cycle in range(1, _C.most_shares // head_groups + 1):
        tried = [share for fractions in wanted for share in _rounded(fractions, cycle)]
        have = [weights + round(cache * share / cycle) for share in tried]
        most = max(abs(size - goal) / goal for size, goal in zip(have, best, strict=True))
        if most < missed:
            missed, shares, held = most, tried, have
        if missed <= IN_PROPORTION / 4:
            break
    off = max(abs(size / goal - 1) for size, goal in zip(held, should, strict=True))
    return MemoryShares(tuple(memory), tuple(shares), tuple(held), off)


def _fractions(memory: Sequence[float], weights: int, cache: int) -> list[float]:
    """Of a cache: what fills each rank's weights up to the same part of its memory, nothing where they are more."""
    fills = set(range(len(memory)))
    while True:
        level = (cache + len(fills) * weights) / sum(memory[rank] for rank in fills)
        if full := {rank for rank in fills if memory[rank] * level < weights}:
            fills -= full
            continue
        return [max(size * level - weights, 0.0) / cache if rank in fills else 0.0 for rank, size in enumerate(memory)]


def _rounded(fractions: Sequence[float], cycle: int) -> list[int]:
    """Integers that add up to cycle, in those proportions as far as they can be."""
    shares = [int(fraction * cycle) for fraction in fractions]
    short = sorted(range(len(shares)), key=lambda rank: shares[rank] - fractions[rank] * cycle)
    for rank in short[: cycle - sum(shares)]:
        shares[rank] += 1
    return shares
