"""What setup.py decides and refuses, without a build, and what import says about another torch.

setup.py runs in this process up to setuptools.setup; nvcc is a script that says what the test wants.
"""

import platform
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import setuptools
import torch
import torch.utils.cpp_extension

import two_level_mha
from two_level_mha import _load

pytestmark = pytest.mark.cpu_only("it builds for the CPU")

ROOT = Path(__file__).resolve().parents[2]
RELEASE = "".join(torch.__version__.split(".")[:2])
NO_TOOLKIT = "no CUDA toolkit found (set CUDA_HOME, or put nvcc on the PATH)"


@pytest.fixture
def configure(monkeypatch, tmp_path):
    """Runs setup.py with a torch of CUDA `torch_cuda` and an nvcc of `nvcc`, and returns its extensions by name."""

    def run(*, torch_cuda: str | None = "13.0", nvcc: str | None = None, **environment: str) -> dict:
        home = None
        if nvcc is not None:
            home = tmp_path / "cuda"
            (home / "bin").mkdir(parents=True)
            script = (
                f"if [ $1 = --version ]; then echo 'release {nvcc}, V{nvcc}.1'; else echo compute_80 compute_90; fi"
            )
            (home / "bin" / "nvcc").write_text(f"#!/bin/sh\n{script}\n")
            (home / "bin" / "nvcc").chmod(0o755)
        for name in ("FORCE_CUDA", "TLM_CUDA", "TLM_LOCAL_VERSION", "TORCH_CUDA_ARCH_LIST"):
            monkeypatch.setenv(name, "")  # so that what setup.py sets goes away again
            monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)
        monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", home and str(home))
        monkeypatch.setattr(setuptools, "setup", lambda **arguments: setattr(run, "arguments", arguments))
        monkeypatch.chdir(tmp_path)
        runpy.run_path(str(ROOT / "setup.py"))
        return {extension.name: extension for extension in run.arguments["ext_modules"]}

    return run


def stopped(configure, **options) -> list[str]:
    """The lines with which setup.py ends."""
    with pytest.raises(SystemExit) as stop:
        configure(**options)
    return str(stop.value).splitlines()


def test_old_setuptools(configure, monkeypatch):
    """Localises: a hundred lines about project.license, in a new environment of Python 3.11."""
    monkeypatch.setattr(setuptools, "__version__", "65.5.0")
    assert stopped(configure) == [
        "setuptools 65.5.0 cannot read the licence in pyproject.toml: pip install 'setuptools>=77', then pip install "
        "--no-build-isolation ."
    ]


def test_no_torch(configure, monkeypatch, tmp_path):
    """Localises: a traceback where torch is missing, or hidden by an environment that pip makes for the build."""
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    (without,) = stopped(configure)
    assert without.startswith(f"torch is not installed in {sys.prefix}, and ")
    assert without.endswith("pip install torch ninja, then pip install --no-build-isolation .")
    (tmp_path / "torch").mkdir()
    (hidden,) = stopped(configure)
    assert hidden.startswith(f"the torch of {sys.prefix} is not seen, since pip builds in an environment of its own")


def test_old_torch(configure, monkeypatch):
    """Localises: errors of a compiler in place of a version."""
    monkeypatch.setattr(torch, "__version__", "2.10.1+cpu")
    assert stopped(configure) == [
        "torch 2.10.1+cpu is too old: pip install 'torch>=2.11', then pip install --no-build-isolation ."
    ]


def test_no_tools(configure, monkeypatch, tmp_path):
    """Localises: what is found out after minutes, or never: ninja's absence is silent and makes a build serial."""
    monkeypatch.setattr(torch.utils.cpp_extension, "is_ninja_available", lambda: False)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    compiler, headers, ninja = stopped(configure, CXX="no-such-compiler -O1")
    assert compiler.startswith("no C++ compiler no-such-compiler: install g++")
    assert headers.startswith(f"no Python.h in {tmp_path}: ")
    assert ninja.startswith("ninja is not installed in ") and ninja.endswith("pip install ninja")
    monkeypatch.setattr(sys, "argv", ["setup.py", "sdist"])
    assert configure(CXX="no-such-compiler")  # archives need no compiler


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, two_level_mha.__version__),
        ({"TLM_LOCAL_VERSION": "1"}, f"{two_level_mha.__version__}+cpu.torch{RELEASE}"),
        ({"TLM_LOCAL_VERSION": "1", "nvcc": "13.1"}, f"{two_level_mha.__version__}+cu130.torch{RELEASE}"),
    ],
)
def test_version(configure, options, expected):
    """Localises: wheels of several torches under one name; a second source of the version."""
    configure(**options)
    assert configure.arguments["version"] == expected


REFUSED = {
    "no toolkit": ({}, NO_TOOLKIT),
    "no toolkit, TLM_CUDA=0 too": ({"TLM_CUDA": "0"}, NO_TOOLKIT),
    "torch without CUDA": ({"torch_cuda": None, "nvcc": "13.0"}, f"torch {torch.__version__} was built without CUDA"),
    "other toolkit": ({"nvcc": "12.4"}, "nvcc 12.4 and torch's CUDA 13.0 differ in the major version"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_force_cuda_says_what_is_missing(configure, case):
    """Localises: FORCE_CUDA=1 that builds without CUDA in silence."""
    options, reason = REFUSED[case]
    with pytest.raises(SystemExit) as stopped:
        configure(FORCE_CUDA="1", **options)
    assert str(stopped.value) == f"FORCE_CUDA=1, but {reason}"


WITHOUT = {
    "no toolkit": ({}, NO_TOOLKIT),
    "left out": ({"TLM_CUDA": "0", "nvcc": "13.1"}, "TLM_CUDA=0"),
    "other toolkit": ({"nvcc": "12.4"}, "nvcc 12.4 and torch's CUDA 13.0 differ in the major version"),
}


@pytest.mark.parametrize("case", WITHOUT)
def test_without_cuda(configure, capsys, case):
    """The reason is printed, and no CUDA source is compiled."""
    options, reason = WITHOUT[case]
    sources = configure(**options)["two_level_mha._ops"].sources
    assert f"CUDA           no               ({reason})" in capsys.readouterr().out
    assert sources and not [f for f in sources if f.endswith((".cu", "_cuda.cpp"))]


def test_with_cuda(configure, capsys):
    """Every source but the Python module's, for the default architectures that this nvcc knows."""
    extensions = configure(nvcc="13.1")
    out = capsys.readouterr().out
    assert "CUDA           yes              (torch has CUDA 13.0, nvcc 13.1 in" in out
    assert "architectures  8.0;9.0a         (default, as far as nvcc 13.1 goes)" in out
    on_disk = {str(f.relative_to(ROOT)) for f in (ROOT / "csrc").rglob("*") if f.suffix in (".cpp", ".cu")}
    assert set(extensions["two_level_mha._ops"].sources) == on_disk - {"csrc/python.cpp"}
    assert extensions["two_level_mha._C"].sources == ["csrc/python.cpp"]


def test_given_architectures(configure, capsys):
    """Localises: TORCH_CUDA_ARCH_LIST that is printed or taken otherwise than given."""
    configure(nvcc="13.0", FORCE_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0a")
    out = capsys.readouterr().out
    assert "(FORCE_CUDA=1, nvcc 13.0" in out
    assert "architectures  9.0a             (TORCH_CUDA_ARCH_LIST)" in out


def test_another_torch():
    """Import stops before the library is loaded, and says what to do."""
    program = "import torch; torch.__version__ = '9.9.0'; import two_level_mha"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    assert (
        f"ImportError: two_level_mha was built for torch {torch.__version__}, but torch 9.9.0 is running. "
        "Build it again with the running one: `pip install --no-build-isolation --force-reinstall --no-deps .` in its "
        f"source folder, or install torch {torch.__version__}"
    ) in result.stderr


def test_not_built(monkeypatch, tmp_path):
    """Localises: the sentence for a checkout that was not built, in place of one about a missing file."""
    monkeypatch.setattr(_load, "PACKAGE", tmp_path)
    with pytest.raises(ImportError, match=f"two_level_mha is not built in {tmp_path}: run `pip install"):
        _load.load()


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_vector_instructions(compiler, tmp_path):
    """Localises: a compiler that builds the kernels, in silence, for the oldest CPU alone."""
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} here")
    if platform.machine() != "x86_64":
        pytest.skip("instructions of x86-64")
    includes = [f"-I{path}" for path in torch.utils.cpp_extension.include_paths()]
    flags = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-S"]
    source, target = ROOT / "csrc" / "attend" / "cpu" / "vectors.cpp", tmp_path / "vectors.s"
    subprocess.run([compiler, *flags, *includes, str(source), "-o", str(target)], check=True, timeout=300)
    text = target.read_text()
    assert "%zmm" in text and "%ymm" in text and "%xmm" in text
