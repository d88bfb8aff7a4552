"""The training example, on ranks of the pool and as a user runs it. A failure here with test_training_decoder.py green
is in the script.
"""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness.programs import environment

pytestmark = pytest.mark.cpu_only("its programs run on Gloo")

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "train.py"


def load():
    spec = importlib.util.spec_from_file_location("train_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def losses(steps: int) -> tuple[list[float], list[float]]:
    """Of the split and of the unsplit model, in float64."""
    from harness.calls import mesh

    train = load()
    job = (train.README.read_bytes(), steps, torch.device("cpu"), torch.float64, None)
    whole = train.train(None, *job) if torch.distributed.get_rank() == 0 else []
    return train.train(mesh((2, 4)), *job), whole


def test_eight_ranks(pool, tmp_path):
    """More ranks than key/value heads: every rank has the unsplit model's loss at every step; it falls; the picture."""
    found = pool.run(losses, 8, 8, timeout=180)
    whole = found[0][1]
    assert whole[-1] < whole[0] - 1.0
    for split, _ in found:
        assert max(abs(x - y) for x, y in zip(split, whole, strict=True)) <= 1e-10
    pytest.importorskip("matplotlib")
    load().draw(tmp_path / "curves.png", found[0][0], whole, "2x4")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def run(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(SCRIPT), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=400, env=environment(CUDA_VISIBLE_DEVICES=""), cwd=tmp_path
    )


@pytest.mark.slow
def test_under_torchrun(tmp_path):
    """As in the README, shorter: exit code, table, picture."""
    pytest.importorskip("matplotlib")
    result = run(tmp_path, "--grid", "1x2", "--steps", "5")
    assert result.returncode == 0, result.stdout + result.stderr
    assert float(re.search(r"largest difference of the loss: (\S+)", result.stdout)[1]) <= 1e-4
    assert (tmp_path / "train.png").exists()


@pytest.mark.slow
def test_grid_that_does_not_fit(tmp_path):
    """One message with the grids that would do, no traceback of ours."""
    result = run(tmp_path, "--grid", "2x4", "--steps", "5")
    assert result.returncode != 0
    assert "error: grid 2 x 4 needs 8 ranks, but the world size is 2" in result.stderr
    assert "error: a grid is written as head groups x slices" in run(tmp_path, "--grid", "banana").stderr


def test_without_torchrun():
    """Localises: the sentence for who starts the example without ranks."""
    result = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=200, env=environment()
    )
    assert result.returncode == 2 and "start it under torchrun" in result.stderr
