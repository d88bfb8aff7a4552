"""The example of generation, short: in ranks of the pool, and as a user starts it."""

import contextlib
import importlib.util
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from harness.device import DEVICE
from harness.programs import environment

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "generate.py"


def check(output: str, ranks: int) -> None:
    assert "equal to the unsplit model's: yes" in output, output
    assert f"bytes on each of {ranks} ranks" in output
    assert "own tensor parallelism on 8 ranks fails: RuntimeError: shape" in output


def example(words):
    spec = importlib.util.spec_from_file_location("generate_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        equal = module.run(module.parse_args(words), DEVICE)
    return equal, out.getvalue() if dist.get_rank() == 0 else ""


def test_short(pool):
    """Localises: the script itself, when the tests of generate() pass."""
    results = pool.run(example, 8, ["--tokens", "6"], timeout=240)
    assert all(equal for equal, _ in results)
    check(results[0][1], 8)


@pytest.mark.slow
def test_under_torchrun():
    """Localises: how a user starts it."""
    ours = environment(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "8", str(SCRIPT), "--tokens", "6"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500, env=ours)
    assert result.returncode == 0, result.stdout + result.stderr
    check(result.stdout, 8)


@pytest.mark.slow
def test_without_torchrun():
    """Localises: the message in place of a hang."""
    result = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=120, env=environment()
    )
    assert result.returncode == 2 and "torchrun" in result.stderr
