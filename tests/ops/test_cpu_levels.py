"""The CPU kernels held to less than this CPU has, as torch and oneDNN can be."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import two_level_mha as tlm

pytestmark = pytest.mark.cpu_only("instructions of the CPU")

# from the least on
HELD = {
    "portable": {"ATEN_CPU_CAPABILITY": "default"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "AVX512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "AVX512-BF16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
}
LEVELS = [*HELD, "AMX", "AMX-FP16"]


def needs(level: str) -> None:
    if LEVELS.index(tlm._C.Machine().cpu) < LEVELS.index(level):
        pytest.skip(f"needs a CPU with {level}")


def run(level: str, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], env=os.environ | HELD[level], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("level", HELD)
def test_level(level):
    """Localises: who decides: not the CPU, but what torch and oneDNN may use of it. AVX512 without bfloat16 is
    where torch lets a product through that oneDNN has no kernel for."""
    needs(level)
    assert run(level, "-c", "import two_level_mha as tlm; print(tlm._C.Machine().cpu)").strip() == level


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="needs AVX2")
def test_this_cpu():
    """Localises: a CPU that is found to have less than it has."""
    assert tlm._C.Machine().cpu != "portable"


@pytest.mark.parametrize("file", ["test_cpu_blocked.py", "test_cpu_decode.py"])
@pytest.mark.parametrize("level", ["AVX2", "AVX512"])
def test_kernels_with_less(level, file):
    """R. Localises: narrow panels and packed operands, widened bfloat16, loops of 8 floats (AVX2)."""
    needs(level)
    if LEVELS.index(tlm._C.Machine().cpu) == LEVELS.index(level):
        pytest.skip("tested as it is")
    out = run(level, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).with_name(file)))
    assert " passed" in out and "failed" not in out
