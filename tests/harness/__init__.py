"""Real Gloo ranks for tests: `pool.run(fn, world_size, *args)` (see pool.py)."""

from .pool import Pool, RankFailure

__all__ = ["Pool", "RankFailure"]
