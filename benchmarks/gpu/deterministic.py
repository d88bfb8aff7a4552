"""A plugin of pytest: `-p gpu.deterministic` runs every test under torch.use_deterministic_algorithms(True)."""

import pytest
import torch


@pytest.fixture(autouse=True)
def deterministic():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
