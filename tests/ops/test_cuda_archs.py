"""Which architectures setup.py compiles a CUDA source for, without a compiler."""

import runpy
from pathlib import Path

import pytest
import setuptools
from torch.utils.cpp_extension import BuildExtension

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def setup(monkeypatch, tmp_path):
    """The names of setup.py."""
    monkeypatch.setenv("TLM_CUDA", "0")
    monkeypatch.delenv("FORCE_CUDA", raising=False)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.chdir(tmp_path)
    return runpy.run_path(str(ROOT / "setup.py"))


def test_the_name_says_the_architecture(setup):
    """Localises: what setup.py reads from a source's name."""
    names = {
        "forward_sm90a.cu": "9.0a",
        "decode_sm80.cu": "8.0",
        "forward_sm100f.cu": "10.0f",
        "merge_kernel.cu": None,
        "sm90a.cu": None,
        "forward_sm90a.cuh": None,
        "forward_sm90a.cpp": None,
    }
    assert {name: setup["own_arch"](f"csrc/attend/{name}") for name in names} == names


def test_each_source_is_compiled_for_its_own(setup, monkeypatch):
    """Localises: a source that is compiled for an architecture that it is not written for, or twice, or not linked."""
    compiled, linked = [], []

    class Compiler:
        def compile(self, sources, extra_postargs, **_):
            compiled.append((sources, extra_postargs["nvcc"]))
            return [f"{source}.o" for source in sources]

    monkeypatch.setattr(BuildExtension, "build_extension", lambda self, ext: linked.append(ext))
    build = setup["Build"].__new__(setup["Build"])
    build.compiler, build.build_temp, build.debug = Compiler(), "temp", None
    sources = ["a.cpp", "b_sm90a.cu", "c.cu", "d_sm100a.cu", "e_sm90a.cu"]
    build.build_extension(setuptools.Extension("x", sources, extra_compile_args={"cxx": [], "nvcc": ["-O3"]}))
    assert compiled == [
        (["d_sm100a.cu"], ["-O3", "-gencode=arch=compute_100a,code=sm_100a"]),
        (["b_sm90a.cu", "e_sm90a.cu"], ["-O3", "-gencode=arch=compute_90a,code=sm_90a"]),
    ]
    assert [ext.sources for ext in linked] == [["a.cpp", "c.cu"]]
    assert linked[0].extra_objects == ["d_sm100a.cu.o", "b_sm90a.cu.o", "e_sm90a.cu.o"]
    assert linked[0].extra_compile_args["nvcc"] == ["-O3"]
