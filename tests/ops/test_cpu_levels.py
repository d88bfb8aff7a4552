"""The CPU kernels held to less than this CPU has, as torch and oneDNN can be."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import two_level_mha as tlm

pytestmark = pytest.mark.cpu_only("instructions of the CPU")

HELD = {
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "portable": {"ATEN_CPU_CAPABILITY": "default"},
}
CAPABLE = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def run(level: str, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], env=os.environ | HELD[level], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(not CAPABLE, reason="needs a CPU with AVX2")
@pytest.mark.parametrize("level", HELD)
def test_level(level):
    """Localises: who decides: not the CPU, but what torch and oneDNN may use of it."""
    assert run(level, "-c", "import two_level_mha as tlm; print(tlm._C.Machine().cpu)").strip() == level
    assert tlm._C.Machine().cpu != "portable"


@pytest.mark.skipif(tlm._C.Machine().cpu in ("portable", "AVX2"), reason="needs a CPU with more than AVX2")
@pytest.mark.parametrize("file", ["test_cpu_blocked.py", "test_cpu_decode.py"])
def test_kernels_with_avx2(file):
    """R. Localises: narrow panels and packed operands, widened bfloat16, loops of 8 floats."""
    out = run("AVX2", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).with_name(file)))
    assert " passed" in out and "failed" not in out
