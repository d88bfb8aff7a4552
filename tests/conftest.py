"""Fixtures: `pool`, real Gloo ranks that live as long as the session (harness/pool.py); and every test draws alike."""

import pytest
import torch
from harness import Pool


@pytest.fixture(autouse=True)
def seeded():
    """The same numbers whenever and after whatever a test runs: one that fails fails again."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def pool():
    ranks = Pool()
    yield ranks
    ranks.close()
