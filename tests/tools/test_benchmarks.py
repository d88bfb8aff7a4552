"""What every benchmark shares, benchmarks/common.py, without timing anything."""

import json
import subprocess
import sys
from pathlib import Path

import common
import module
import partial_attention
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
MET = [
    {"case": "no bound", "ratio": 9.0},
    {"case": "floor", "ratio": 1.0, "floor": 1.0},
    {"case": "limit", "ratio": 1.0, "limit": 1.0},
    {"case": "memory", "mib": 48.0, "limit_mib": 48.0},
]
MISSED = [
    ({"case": "floor", "ratio": 0.999, "floor": 1.0}, " BELOW"),
    ({"case": "limit", "ratio": 1.001, "limit": 1.0}, " ABOVE"),
    ({"case": "memory", "mib": 48.1, "limit_mib": 48.0}, " ABOVE"),
    ({"case": "NaN over a floor", "ratio": float("nan"), "floor": 1.0}, " BELOW"),
    ({"case": "NaN under a limit", "ratio": float("nan"), "limit": 1.0}, " ABOVE"),
]


@pytest.fixture
def benchmark(monkeypatch):
    """Runs a benchmark of given rows, all of them, and returns what it wrote."""

    def run(rows):
        written = []
        monkeypatch.setattr("sys.argv", ["benchmark", "--threads", str(torch.get_num_threads())])
        monkeypatch.setattr(common, "write_results", lambda name, rows: written.extend(rows))
        try:
            common.run_cases("name", "", {row["case"]: row for row in rows}, lambda row, repeats: row, str, repeats=1)
        finally:
            assert written == rows
        return written

    return run


def test_floors_and_limits_that_are_met(benchmark):
    """Localises: a bound that is met exactly, or a row without one, taken for a miss."""
    assert benchmark(MET) == MET


@pytest.mark.parametrize("row, verdict", MISSED, ids=[row["case"] for row, _ in MISSED])
def test_a_missed_bound_fails_the_run(benchmark, row, verdict):
    """Localises: a run that prints BELOW or ABOVE and exits with 0; the other cases still run and are written."""
    assert common.verdict(row) == verdict
    with pytest.raises(SystemExit) as stopped:
        benchmark([row, *({**one, "case": f"met {one['case']}"} for one in MET)])
    assert stopped.value.code == f"1 of 5 cases miss their floor or limit: {row['case']}"  # a text exits with 1


def test_lines_say_what_was_missed():
    """Localises: a benchmark whose own line disagrees with its exit status."""
    row = {"case": "", "ours_ms": 1.0, "stock_ms": 2.0, "ratio": 2.0}
    assert module.line(row | {"limit": 1.9}).endswith("limit 1.90 ABOVE")
    assert module.line(row | {"limit": 2.0}).endswith("limit 2.00")
    assert partial_attention.line(row | {"floor": 2.1}).endswith("floor 2.10 BELOW")
    assert partial_attention.line(row | {"floor": 2.0}).endswith("floor 2.00")
    memory = {"case": "", "mib": 2.0, "of_it_results_mib": 1.0}
    assert partial_attention.line(memory | {"limit_mib": 1.0}).endswith(" ABOVE")


@pytest.mark.parametrize("kv_heads, names", [(1, ["stock", "folded"]), (2, ["stock", "folded"]), (8, ["stock"])])
def test_baselines_of_one_token(kv_heads, names):
    """T. Localises: the group folded into rows: heads that land at another head's place; where it is a baseline."""
    case = partial_attention.Case(torch.float32, 16, 16, False, False, 1.0, 1, 40, 8, kv_heads)
    assert [function.__name__ for function in partial_attention.stocks(case)] == names
    q, k, v = torch.randn(1, 8, 1, 16), torch.randn(1, kv_heads, 40, 16), torch.randn(1, kv_heads, 40, 16)
    expected = partial_attention.stock(case, q, k, v)
    for function in (partial_attention.folded, partial_attention.ours):
        torch.testing.assert_close(function(case, q, k, v), expected, rtol=1e-5, atol=1e-5)


def test_bytes_of_a_layer(tmp_path):
    """Localises: benchmarks/traffic.py, whose operators are called as modules call them, or the plan it is held to."""
    command = [sys.executable, "benchmarks/traffic.py", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    found, recorded = (
        json.loads((path / "traffic.json").read_text())["rows"] for path in (tmp_path, ROOT / "benchmarks/results")
    )
    assert found == recorded
