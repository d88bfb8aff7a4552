"""What threads of the CUDA kernels do, and how ATen's take a causal call, run on the host without torch."""

import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

CPP = Path(__file__).resolve().parents[1] / "cpp"

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


def output_of(name: str, folder: Path) -> str:
    program = str(folder / name)
    headers = [f"-I{path}" for path in include_paths()]  # the half types; nothing of torch is linked
    subprocess.run(["c++", "-std=c++20", "-O1", "-Wall", "-Werror", *headers, str(CPP / f"{name}.cpp"), "-o", program],
                   check=True, timeout=300)  # fmt: skip
    done = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_units_of_the_merge_and_dropout_kernels(tmp_path):
    """Localises: their index arithmetic, unit widths and writes beyond the result, in every dtype."""
    assert "12000 merges and 3000 dropout masks right" in output_of("attend_units_test", tmp_path)


def test_units_of_the_pack_kernels(tmp_path):
    """E. Localises: their index arithmetic, strides, unit widths, and sums that round more than once."""
    assert "20000 cases right" in output_of("pack_units_test", tmp_path)


def test_units_of_norms_and_rotary_embedding(tmp_path):
    """E. Localises: strides, which columns a lane has, pairs, the norm, or a write beyond a head's vector."""
    assert "18000 norms and turns right" in output_of("head_units_test", tmp_path)


def test_corners(tmp_path):
    """E. Localises: keys that a row of a causal call loses or gains on its way to ATen's CUDA kernels."""
    assert "19584 causal calls right, 1812 windows past the last key refused" in output_of("corner_test", tmp_path)


def test_units_of_what_ranks_compare(tmp_path):
    """E. Localises: a byte that a call's hash does not see, its digits, or a verdict on their sums, on CUDA."""
    assert "3000 hashes and 12000 verdicts right" in output_of("seal_units_test", tmp_path)
