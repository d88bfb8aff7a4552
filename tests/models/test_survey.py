"""The table of models: what README and docs say is what `make models` found, and is found again."""

import datetime
import json
import random
from pathlib import Path

import pytest
import transformers
from harness import families

pytestmark = pytest.mark.cpu_only("its models run on Gloo")

ROOT = Path(__file__).resolve().parents[2]
MADE = json.loads((ROOT / "docs" / "models.json").read_text())
SAMPLE = 6  # families a day


def test_the_page():
    """Localises: docs/models.md changed by hand, or not made again; a sentence of the README with other numbers."""
    assert families.page(MADE) == (ROOT / "docs" / "models.md").read_text()
    assert families.counts(MADE["families"]) == MADE["counts"]
    assert families.sentence(MADE) in " ".join((ROOT / "README.md").read_text().split())


def how(one: dict) -> tuple:
    return one["verdict"], one.get("attentions", 0) > 0, one.get("gathered", 0) > 0


@pytest.mark.slow
def test_a_sample():
    """Drawn by the date. Localises: a family that is no longer right, or no longer split."""
    if transformers.__version__ != MADE["transformers"]:
        pytest.skip(f"the table is of transformers {MADE['transformers']}")
    built = sorted(family for family, one in MADE["families"].items() if one["verdict"] != "not built")
    names = random.Random(datetime.date.today().toordinal()).sample(built, SAMPLE)
    found = families.survey(names, MADE["ranks"], stock=False)
    assert {name: how(one) for name, one in found.items()} == {name: how(MADE["families"][name]) for name in names}
