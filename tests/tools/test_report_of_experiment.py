"""docs/experiment.md and its pictures: made by benchmarks/report.py of the committed results, and of nothing else."""

import copy
import re
from pathlib import Path

import matplotlib
import pictures
import pytest
import report
import report_pictures
from report_data import Results, one

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def results():
    return Results.read(ROOT / "benchmarks/results")


def test_the_page_is_made_of_the_results(results):
    """E. Localises: results, or words of the report, that changed without `make report`."""
    assert report.document(results) == (ROOT / "docs/experiment.md").read_text()


def test_the_pictures_are_made_of_the_results(results, tmp_path):
    """E. Localises: a picture that `make report` did not draw again, or that two runs draw differently."""
    committed = {path.name: path.read_text() for path in (ROOT / "docs/pictures").glob("*.svg")}
    assert set(committed) == {f"{name}.svg" for name in [*report_pictures.PICTURES, *pictures.PICTURES]}
    by = f"Matplotlib v{matplotlib.__version__},"
    if not all(by in text for text in committed.values()):
        pytest.skip(f"drawn with another version than {by} whose bytes may differ")
    report_pictures.draw(results, tmp_path)
    pictures.main(tmp_path)
    for name, text in committed.items():
        assert numbered((tmp_path / name).read_text()) == numbered(text), name


def numbered(svg: str) -> str:
    """With the names of its parts by their order: Matplotlib makes them of coordinates to the last bit, which a CPU may
    round in another way.
    """
    names: dict[str, str] = {}
    return re.sub(r"\b[a-z][0-9a-f]{10}\b", lambda found: names.setdefault(found[0], f"part {len(names)}"), svg)


def changed(results, **factors):
    """The results with rows of the prediction made slower by factors: layout=factor."""
    files = copy.deepcopy(results.files)
    for row in files["predicted_seed"]["predictions"]:
        for key in ("seconds", "low", "high"):
            row[key] *= factors.get(row["layout"], 1.0)
    return Results(files)


def test_numbers_follow_the_results(results):
    """Localises: a number of the page that is typed, not read."""
    row = one(results.predicted("predicted_seed", causal=False), layout="TP8 x PP2 GPipe 8")
    before, after = (f"{row['tokens'] / row['seconds'] / factor / 1e3:,.0f} K [" for factor in (1, 1.02))
    page = report.document(results), report.document(changed(results, **{"TP8 x PP2 GPipe 8": 1.02}))
    assert page[0].count(before) > page[1].count(before) and page[1].count(after) > page[0].count(after)


def test_words_that_results_do_not_bear_out_are_refused(results):
    """Localises: a verdict that stays when its ground is gone."""
    with pytest.raises(ValueError, match="no longer bear out that our fastest is close to DP16"):
        report.document(changed(results, DP16=2.0))


def test_a_missing_result_is_named():
    """Localises: a traceback where a file of results is missing."""
    with pytest.raises(ValueError, match="benchmarks/results has no predicted_seed.json"):
        report.document(Results({}))
