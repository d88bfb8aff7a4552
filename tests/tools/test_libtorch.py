"""The package as a C++ program uses it: installed headers, the CMake config, the ops without Python."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import CUDA_HOME

import two_level_mha as tlm

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
@pytest.mark.skipif(
    torch.version.cuda is not None and CUDA_HOME is None,
    reason="this torch has CUDA and its CMake config needs the CUDA toolkit, which is not installed",
)
@pytest.mark.slow
def test_attention_by_blocks(tmp_path):
    """examples/libtorch builds and agrees with the unsplit layer. Localises headers, CMake, autograd."""
    prefix = f"{torch.utils.cmake_prefix_path};{tlm.cmake_prefix_path}"
    run(
        "cmake",
        "-S",
        str(ROOT / "examples" / "libtorch"),
        "-B",
        str(tmp_path),
        f"-DCMAKE_PREFIX_PATH={prefix}",
        "-DCMAKE_BUILD_TYPE=Release",
    )
    run("cmake", "--build", str(tmp_path))
    assert "equal to the unsplit layer" in run(str(tmp_path / "attention_by_blocks"))


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_units_of_the_pack_kernels(tmp_path):
    """What a thread of the CUDA pack kernels does, run on the host. Localises their index arithmetic."""
    program = str(tmp_path / "pack_units")
    run("c++", "-std=c++17", "-O1", str(ROOT / "tests" / "cpp" / "pack_units_test.cpp"), "-o", program)
    assert "20000 cases right" in run(program)
