"""Fixtures: `pool`, real ranks that live as long as the session (harness/pool.py); every test draws alike; the device
that all of them run on (harness/device.py).
"""

import time
import zlib

import pytest
import torch
from harness import Pool
from harness.device import DEVICE, problem, use_device

BEGUN = pytest.StashKey[float]()
FOLDERS = ("ops", "grid", "modules", "training", "faults", "tools", "models")  # what stands on others later


def pytest_addoption(parser):
    parser.addoption("--part", metavar="K/N", help="only the K-th of N parts of the tests, by their names; K from 0")
    parser.addoption("--seconds", type=float, help="tests that would begin later are skipped")


def pytest_configure(config):
    config.stash[BEGUN] = time.monotonic()
    if text := problem():
        raise pytest.UsageError(text)
    use_device()


def pytest_collection_modifyitems(config, items):
    """Orders folders; leaves out other parts, and on another device what can only be told of the CPU."""
    items.sort(key=lambda item: FOLDERS.index(item.path.parent.name))
    if part := config.getoption("--part"):
        number, count = map(int, part.split("/"))
        chosen = {item for item in items if zlib.crc32(item.nodeid.encode()) % count == number}
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = [item for item in items if item in chosen]
    for item in items if DEVICE != "cpu" else ():
        if mark := item.get_closest_marker("cpu_only"):
            item.add_marker(pytest.mark.skip(reason=f"of the CPU alone: {mark.args[0]}"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    seconds = item.config.getoption("--seconds")
    if seconds is not None and time.monotonic() - item.config.stash[BEGUN] > seconds:
        pytest.skip("there was no time for it")


@pytest.fixture(autouse=True)
def seeded():
    """The same numbers whenever and after whatever a test runs: one that fails fails again."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def pool():
    ranks = Pool()
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def staged_pool():
    """Ranks whose tensors go through the host, as those that share a GPU (harness/staged.py)."""
    ranks = Pool(alive=1, backend="staged")
    yield ranks
    ranks.close()
