"""Fixtures: `pool`, real Gloo ranks that live as long as the session (harness/pool.py)."""

import pytest
from harness import Pool


@pytest.fixture(scope="session")
def pool():
    ranks = Pool()
    yield ranks
    ranks.close()
