"""The demo as a user runs it: real model, real sentences, 16 ranks. A failure here with all other tests
green is in the script, in `parallelize` on BERT, or in starting the ranks.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from harness.programs import environment

pytestmark = pytest.mark.cpu_only("its programs run on Gloo")

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "semantic_search.py"
QUERY = "Which animals navigate in the dark?"
NEAREST = "Bats find insects in the dark by listening to the echoes of their own calls."


def run(command: list[str], timeout: float) -> subprocess.CompletedProcess:
    ours = environment(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=timeout, env=ours)


def difference(output: str) -> float:
    return float(re.search(r"difference from the unmodified model: (\S+)", output)[1])


def check_success(result: subprocess.CompletedProcess) -> None:
    assert result.returncode == 0, result.stdout + result.stderr
    assert difference(result.stdout) <= 1e-5
    assert "bit for bit: yes" in result.stdout
    first = result.stdout.split("nearest to:")[1].splitlines()[1]
    assert NEAREST in first


def test_sixteen_ranks():
    """The main job: more ranks than heads, a sixteenth of the attention on each, the same embeddings."""
    result = run([str(SCRIPT), "--grid", "4x4", "--query", QUERY], timeout=240)
    check_success(result)
    whole, held = re.search(r"attention +([\d,]+) +([\d,]+)", result.stdout).groups()
    whole, held = (int(text.replace(",", "")) for text in (whole, held))
    output_biases = 6 * 384  # not split: they are added once, after the sum
    assert 16 * (held - output_biases) == whole - output_biases
    assert float(re.search(r"each rank sent (\S+) MB", result.stdout)[1]) > 0


@pytest.mark.slow
def test_another_model_is_refused():
    """Softmax on slices is another model, so the comparison has to fail: it would catch a wrong split too."""
    result = run([str(SCRIPT), "--grid", "1x2", "--scheme", "independent"], timeout=120)
    assert result.returncode == 1, result.stdout + result.stderr
    assert difference(result.stdout) > 1e-5


def test_grid_that_does_not_fit():
    """5 does not divide 12 heads: one message with the nearest grids, no traceback."""
    result = run([str(SCRIPT), "--grid", "5x1"], timeout=120)
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stderr.count("error: ") == 1
    assert "Traceback" not in result.stderr
    assert "head_groups=5 must divide num_kv_heads=12; valid grids for 5 ranks: (1, 5); for 4: (4, 1)" in result.stderr


@pytest.mark.parametrize("text", ["banana", "4x4x1", "4x"])
def test_no_grid(text):
    """Localises: Python's own words for a number, in place of what a grid is."""
    result = run([str(SCRIPT), "--grid", text], timeout=120)
    assert result.returncode == 2, result.stdout + result.stderr
    assert f"a grid is written as head groups x slices, such as 2x4, got {text!r}" in result.stderr


@pytest.mark.slow
def test_under_torchrun():
    """torchrun starts the ranks instead of the script."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "4"]
    check_success(run([*launcher, str(SCRIPT), "--grid", "2x2", "--query", QUERY], timeout=300))


@pytest.mark.slow
def test_wrong_world_size_under_torchrun():
    """2 ranks for a (2, 2) grid: the message names both numbers."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    result = run([*launcher, str(SCRIPT), "--grid", "2x2"], timeout=300)
    assert result.returncode != 0
    assert "error: grid 2 x 2 needs 4 ranks, but the world size is 2" in result.stderr
