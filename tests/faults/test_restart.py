"""A killed job that torchrun starts again repeats the losses of one that was not killed. restarts.py is the job."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness.pool import ENVIRONMENT

pytestmark = pytest.mark.cpu_only("its programs run on Gloo")

PROGRAM = Path(__file__).with_name("restarts.py")


def losses(folder: Path, *arguments: str) -> dict[tuple[int, int], float]:
    """(attempt, step) -> loss."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4", "--max-restarts", "2"]
    # torch 2.15 otherwise hands a restarted job the addresses of the dead one
    environment = {**os.environ, **ENVIRONMENT, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run(
        [*command, str(PROGRAM), str(folder), *arguments], capture_output=True, text=True, timeout=400, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = map(json.loads, (folder / "losses").read_text().splitlines())
    return {(one["attempt"], one["step"]): one["loss"] for one in found}


@pytest.mark.slow
def test_a_restart_repeats_the_losses(tmp_path):
    """Localises: what a checkpoint lacks (a generator, a moment), or a failure that leaves a rank alive.

    Bit for bit, dropout too. Other grids: tests/training/test_saving.py.
    """
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    expected = losses(whole)
    found = losses(killed, "--kill")
    assert {step for attempt, step in found if attempt == 0} == set(range(5))
    again = {step: loss for (attempt, step), loss in found.items() if attempt > 0}
    assert set(again) == {4, 5, 6, 7}
    for step, loss in again.items():
        assert loss == expected[0, step], (step, loss, expected)
