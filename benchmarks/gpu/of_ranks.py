"""A plugin of pytest: `-p gpu.of_ranks --of-ranks no` leaves out the tests that run on ranks, `only` all others."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--of-ranks", choices=("no", "only"), required=True, help="tests that use the pool of ranks")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--of-ranks") == "only"
    chosen = [item for item in items if ("pool" in getattr(item, "fixturenames", ())) == wanted]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen
