"""A machine that was calibrated: tables, the fit, files; the cases that predictions are judged by."""

import json
from dataclasses import replace
from pathlib import Path

import prediction_error
import pytest
import torch

import two_level_mha as tlm
from two_level_mha.experiment import calibrate
from two_level_mha.experiment.calibration import COEFFICIENTS, OTHER, Calibration, Table, fit
from two_level_mha.experiment.hardware import hardware
from two_level_mha.experiment.recorder import Start, Work
from two_level_mha.experiment.runs import Call, record_layout

ROOT = Path(__file__).resolve().parents[2]
FLAT = Table([[64, 1024]], [1e-3, 1e-3])


def made_up(**changes) -> Calibration:
    """2 ranks: products at 1 GFLOP/s, attention at 2, causal at 3; everything else a millisecond."""

    def rate(r, axes):
        return Table([[1, 10]] * axes, [[[r] * 2] * 2] * 2 if axes == 3 else [[r] * 2] * 2)

    found = Calibration(
        ranks=2, cores=2, source="made up", products=rate(1e9, 3), attention=rate(2e9, 2),
        attention_causal=rate(3e9, 2), memory={OTHER: FLAT}, collectives={"all_reduce 2": FLAT, "all_gather 2": FLAT},
        coefficients=dict.fromkeys(COEFFICIENTS, 1.0),
    )  # fmt: skip
    return replace(found, **changes)


def test_tables():
    """T. Localises: an axis that is taken for another; values beyond the ends."""
    table = Table([[1, 4], [1, 100]], [[1, 10], [4, 40]])
    assert [table.at(1, 1), table.at(4, 1), table.at(1, 100), table.at(4, 100)] == pytest.approx([1, 4, 10, 40])
    assert table.at(2, 10) == pytest.approx(2 * 10**0.5)
    assert table.at(0, 10**6) == pytest.approx(10)


def test_the_fit_finds_what_it_was_given():
    """T. Localises: a coefficient that lands on another's feature; one below zero."""
    generator = torch.Generator().manual_seed(0)
    features = (torch.rand(12, 4, generator=generator, dtype=torch.float64) + 0.1).tolist()
    true = [1.2, 0.5, 0.0, 0.3]
    seconds = [sum(c * x for c, x in zip(true, row, strict=True)) for row in features]
    assert list(fit(features, seconds).values()) == pytest.approx(true, abs=1e-9)
    worse = [s - 0.05 * row[2] for s, row in zip(seconds, features, strict=True)]
    assert min(fit(features, worse).values()) >= 0


def test_prices():
    """T. Localises: the table that prices an event; what holds a rank up in a collective."""
    c = made_up(coefficients={"compute": 2.0, "exchange": 3.0, "collective": 0.25, "operator": 0.5})
    product = Work("aten.mm", "product", 10**9, 0, 4, (2, 2, 2), False)
    full = Work("x", "attention", 2 * 4 * 8 * 8 * 16, 0, 4, (4, 8, 8, 8, 8), False)
    causal = replace(full, flops=full.flops // 2)
    assert c.work(product).seconds == pytest.approx(2.5)
    assert c.work(full).seconds - 0.5 == pytest.approx(2 * full.flops / 2e9)
    assert c.work(causal).seconds - 0.5 == pytest.approx(2 * causal.flops / 3e9)
    assert c.work(Work("aten.other", "memory", 0, 100, 4, (), False)).seconds == pytest.approx(0.502)
    price = c.start(Start("all_reduce", (0, 1), None, 100, 100, False, True))
    assert (price.seconds, price.held) == (pytest.approx(0.253), pytest.approx(0.003))
    with pytest.raises(tlm.GridError, match="no times of all_to_all"):
        c.start(Start("all_to_all", (0, 1), None, 100, 100, False, True))


def test_files(tmp_path):
    """E. Localises: a field that a file loses; a file that is none and ends in a traceback."""
    path = tmp_path / "machine.json"
    made_up().to_file(path)
    assert Calibration.from_file(path) == made_up()
    path.write_text("{}")
    with pytest.raises(tlm.GridError, match="machine.json"):
        Calibration.from_file(path)


def test_fitted_to_what_it_predicts():
    """T. Localises: features that are not those of the runs: seconds made of known coefficients give them back."""
    kinds = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
    rising = Table([[64, 10**8]], [1e-6, 1e-1])
    plain = made_up(collectives={f"{kind} 2": rising for kind in kinds}, memory={OTHER: rising})
    true = dict(zip(COEFFICIENTS, (1.5, 2.0, 1e-4, 1e-5), strict=True))
    machine, seconds = hardware("cpu-2"), []
    for case in calibrate.cases(2):
        run = record_layout(case.sizes, case.layout, machine, Call("prefill", case.causal, torch.float32))
        parts = plain.features(run.events[0])
        seconds.append(sum(c * x for c, x in zip(true.values(), parts, strict=True)))
    names = ("products", "attention", "attention_causal")
    tables = {name: getattr(plain, name) for name in names}
    tables |= {f"collectives {name}": table for name, table in plain.collectives.items()}
    tables |= {f"memory {name}": table for name, table in plain.memory.items()}
    slower = {name: replace(one, values=(torch.tensor(one.values) * 3).tolist()) for name, one in tables.items()}
    together, spread = calibrate.together([tables, slower, tables])
    assert spread == pytest.approx(3)  # and the pass that was disturbed is in no table
    found = calibrate.fitted(together, seconds, 2, "made up")
    assert found.coefficients == pytest.approx(true, rel=1e-4)
    assert found.error < 1e-6


def test_what_is_held_out():
    """E. Localises: a case that is among those that are fitted, or fewer of them than were promised."""
    fitted = {ranks: {case.sizes.embed_dim for case in calibrate.cases(ranks)} for ranks in (2, 4, 8)}
    for ranks in (2, 4, 8):
        cases = prediction_error.held_out(ranks)
        assert len(cases) >= 12 and len({case.name for case in cases}) == len(cases)
        assert all(case.layout.ranks == ranks for case in cases)
        assert not fitted[ranks] & {case.sizes.embed_dim for case in cases}
        assert sum(case.layout.grid is not None for case in cases) >= 6
        assert any(case.layout.pp > 1 for case in cases)


def test_the_summary():
    """E. Localises: a rejected case in a median; one that is left out for its error."""
    row = {"ranks": 2, "repeat_error": 0.01}
    rows = [row | {"error": e, "rejected": r} for e, r in ((0.1, False), (0.3, False), (0.2, False), (9.0, True))]
    found = prediction_error.summary([{"ranks": 2, "fitted_error": 0.1}, *rows], 2)
    assert (found["cases"], found["rejected"], found["error_median"], found["error_worst"]) == (3, 1, 0.2, 0.3)
    assert (found["limit_median"], found["limit_worst"]) == (0.15, 0.35)


def test_the_results_in_the_repository():
    """Localises: results that are not of the cases in held_out.json, or a case that is not listed."""
    for ranks in (2, 4, 8):
        file = ROOT / "benchmarks" / "results" / f"prediction_error_{ranks}.json"
        rows = json.loads(file.read_text())["rows"]
        assert [row["case"] for row in rows if "error" in row] == [c.name for c in prediction_error.held_out(ranks)]


@pytest.mark.slow
def test_calibrate_a_machine(tmp_path):
    """Localises: the measuring program itself, on two ranks, and a prediction from its file."""
    found = calibrate.calibrate(2, repeats=3)
    found.to_file(tmp_path / "machine.json")
    again = Calibration.from_file(tmp_path / "machine.json")
    assert again == found and again.ranks == 2
    assert all(value >= 0 for value in found.coefficients.values()) and found.coefficients["compute"] > 0
