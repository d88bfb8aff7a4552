"""The table of models: what README and docs say is what `make models` found, and is found again."""

import datetime
import json
import random
from pathlib import Path

import pytest
import transformers
from harness import encoder_families, families

pytestmark = pytest.mark.cpu_only("its models run on Gloo")

ROOT = Path(__file__).resolve().parents[2]
SURVEYS = [json.loads((ROOT / "docs" / name).read_text()) for name in families.PAGE_OF]
SAMPLES = (6, 2)  # families a day of each survey


def test_the_page():
    """Localises: docs/models.md changed by hand, or not made again; a sentence of the README with other numbers; a
    survey that lacks families of the other.
    """
    assert families.page(*SURVEYS) == (ROOT / "docs" / "models.md").read_text()
    for made in SURVEYS:
        assert families.counts(made["families"]) == made["counts"]
    assert families.sentence(*SURVEYS) in " ".join((ROOT / "README.md").read_text().split())
    first, past = (families.built(made).keys() for made in SURVEYS)
    assert first == past


def how(one: dict) -> tuple:
    return one["verdict"], one.get("attentions", 0) > 0, one.get("gathered", 0) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("made", "count"), list(zip(SURVEYS, SAMPLES, strict=True)), ids=families.PAGE_OF)
def test_a_sample(made, count):
    """Drawn by the date. Localises: a family that is no longer right, or no longer split; of models_8.json alone, past
    the key/value heads.
    """
    if transformers.__version__ != made["transformers"]:
        pytest.skip(f"the table is of transformers {made['transformers']}")
    names = random.Random(datetime.date.today().toordinal()).sample(sorted(families.built(made)), count)
    found = families.survey(names, made["ranks"], stock=False, kv_heads=made["kv_heads"])
    assert {name: how(one) for name, one in found} == {name: how(made["families"][name]) for name in names}


ENCODERS = json.loads((ROOT / "docs" / "encoders.json").read_text())


def test_the_page_of_encoders():
    """Localises: docs/encoders.md changed by hand, or not made again; one that is wrong, refused, or dies."""
    assert encoder_families.page(ENCODERS) == (ROOT / "docs" / "encoders.md").read_text()
    verdicts = {one["verdict"] for found in ENCODERS["kinds"].values() for one in found.values()}
    assert verdicts == {"right", "has none", "not built"}
    assert encoder_families.summary(ENCODERS) in " ".join((ROOT / "README.md").read_text().split())


@pytest.mark.slow
def test_a_sample_of_encoders():
    """Drawn by the date. Localises: a family that is no longer right, or no longer split."""
    if transformers.__version__ != ENCODERS["transformers"]:
        pytest.skip(f"the table is of transformers {ENCODERS['transformers']}")
    draw = random.Random(datetime.date.today().toordinal())
    for kind, known in ENCODERS["kinds"].items():
        names = draw.sample(sorted(name for name, one in known.items() if one["verdict"] == "right"), 2)
        found = encoder_families.survey(kind, names, ENCODERS["ranks"])
        assert {name: how(one) for name, one in found.items()} == {name: how(known[name]) for name in names}
