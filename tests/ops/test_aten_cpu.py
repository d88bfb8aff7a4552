"""In C++, what no call here reaches: ATen's CPU kernel, which only CPUs with AMX choose, and the GPU's corners."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

import two_level_mha as tlm

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_calls_it_takes_and_their_values(tmp_path):
    """R. Localises: a call handed to ATen that it answers otherwise than attention.h says; keys that a row loses."""
    ops = Path(tlm.__file__).parent / "_ops.abi3.so"
    program = tmp_path / "aten_cpu"
    command = ["c++", "-std=c++20", "-O0", str(ROOT / "tests" / "cpp" / "aten_cpu_test.cpp"), str(ops)]
    command += [f"-I{path}" for path in include_paths()]
    cuda = torch._C._dispatch_has_kernel_for_dispatch_key("two_level_mha::pack", "CUDA")  # then it needs CUDA's
    for path in (*library_paths("cuda" if cuda else "cpu"), str(ops.parent)):
        command += [f"-L{path}", f"-Wl,-rpath,{path}"]
    # the old tags: the paths count for what the library needs too; what torch needs beyond, it finds itself
    command += ["-Wl,--disable-new-dtags,--allow-shlib-undefined", "-ltorch_cpu", "-lc10"]
    subprocess.run([*command, "-o", str(program)], check=True, timeout=300)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=60)
    assert done.stdout == "all right\n", done.stdout + done.stderr
