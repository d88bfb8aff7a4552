"""Builds two libraries: `_ops` (kernels and operators, no Python) and `_C` (a small pybind11 module).

Environment: TLM_CUDA=0 leaves the CUDA sources out, FORCE_CUDA=1 makes their absence an error,
TORCH_CUDA_ARCH_LIST picks the GPU architectures of the sources that are not written for one of their own (own_arch),
TLM_SANITIZE builds with gcc's sanitizers of these names, as in "address,bounds" (`make asan`, `make tsan`),
TLM_LOCAL_VERSION=1 adds what was built to the version, as in 0.1.0+cpu.torch215 (`make wheel`),
MAX_JOBS limits the compilers run at once.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import setuptools

OLDEST_TORCH, OLDEST_SETUPTOOLS = (2, 11), 77
INSTALL = "pip install --no-build-isolation ."


def release(version: str) -> tuple[int, ...]:
    """2.15.0+cu132 -> (2, 15)."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def missing_packages() -> list[str]:
    """What is missing to read this file and pyproject.toml: a sentence each."""
    found = []
    if release(setuptools.__version__)[0] < OLDEST_SETUPTOOLS:
        found.append(
            f"setuptools {setuptools.__version__} cannot read the licence in pyproject.toml: "
            f"pip install 'setuptools>={OLDEST_SETUPTOOLS}', then {INSTALL}"
        )
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        if Path(sysconfig.get_path("platlib"), "torch").exists():
            found.append(
                f"the torch of {sys.prefix} is not seen, since pip builds in an environment of its own, where another "
                f"torch would be built for: {INSTALL}"
            )
        else:
            found.append(
                f"torch is not installed in {sys.prefix}, and the libraries are built for the torch that runs them: "
                f"pip install torch ninja, then {INSTALL}"
            )
    else:
        if release(torch.__version__) < OLDEST_TORCH:
            oldest = ".".join(map(str, OLDEST_TORCH))
            found.append(f"torch {torch.__version__} is too old: pip install 'torch>={oldest}', then {INSTALL}")
    return found


if problems := missing_packages():
    raise SystemExit("\n".join(problems))

import torch  # noqa: E402
from setuptools import Extension, setup  # noqa: E402
from torch.utils.cpp_extension import (  # noqa: E402
    CUDA_HOME,
    BuildExtension,
    CppExtension,
    CUDAExtension,
    get_cxx_compiler,
    is_ninja_available,
)

ROOT = Path(__file__).resolve().parent
PACKAGE = "two_level_mha"
DEFAULT_ARCHS = ("8.0", "9.0a", "10.0+PTX")  # PTX: for what is newer


class Decision(NamedTuple):
    value: str
    why: str


def missing_tools() -> list[str]:
    """What is missing to compile: a sentence each."""
    found = []
    linker = os.environ.get("CXX") or sysconfig.get_config_var("LDCXXSHARED") or "c++"
    programs = dict.fromkeys(command.split()[0] for command in (get_cxx_compiler(), linker))
    if absent := [program for program in programs if shutil.which(program) is None]:
        found.append(
            f"no C++ compiler {' and no '.join(absent)}: install g++ (on Debian and Ubuntu apt-get install g++) or "
            "clang, or set CXX to one that is there"
        )
    headers = sysconfig.get_path("include")
    if not Path(headers, "Python.h").exists():
        found.append(f"no Python.h in {headers}: install Python's headers (apt-get install python3-dev)")
    if not is_ninja_available():
        found.append(
            f"ninja is not installed in {sys.prefix}, and without it one file after the other is compiled: pip install "
            "ninja"
        )
    return found


def local_version(decisions: dict[str, Decision]) -> str:
    """What tells a wheel from others of its version: "+cpu.torch215", "+cu130.torch215"."""
    if os.environ.get("TLM_LOCAL_VERSION") != "1":
        return ""
    cuda = f"cu{torch.version.cuda.replace('.', '')}" if decisions["CUDA"].value == "yes" else "cpu"
    return f"+{cuda}.torch{''.join(map(str, release(torch.__version__)))}"


def nvcc_release() -> str:
    """Release of the toolkit's compiler, as "13.0"."""
    out = subprocess.run([f"{CUDA_HOME}/bin/nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", out)[1]


def decide_cuda() -> Decision:
    """Whether the CUDA sources are compiled. No GPU is asked for: building needs none."""
    forced = os.environ.get("FORCE_CUDA") == "1"
    if os.environ.get("TLM_CUDA") == "0" and not forced:
        return Decision("no", "TLM_CUDA=0")
    if torch.version.cuda is None:
        missing = f"torch {torch.__version__} was built without CUDA"
    elif CUDA_HOME is None:
        missing = "no CUDA toolkit found (set CUDA_HOME, or put nvcc on the PATH)"
    elif nvcc_release().split(".")[0] != torch.version.cuda.split(".")[0]:
        missing = f"nvcc {nvcc_release()} and torch's CUDA {torch.version.cuda} differ in the major version"
    else:
        why = "FORCE_CUDA=1" if forced else f"torch has CUDA {torch.version.cuda}"
        return Decision("yes", f"{why}, nvcc {nvcc_release()} in {CUDA_HOME}")
    if forced:
        raise SystemExit(f"FORCE_CUDA=1, but {missing}")
    return Decision("no", missing)


def decide_archs() -> Decision:
    """GPU architectures: TORCH_CUDA_ARCH_LIST, else those of DEFAULT_ARCHS that this nvcc can compile for."""
    if archs := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return Decision(archs, "TORCH_CUDA_ARCH_LIST")
    out = subprocess.run(
        [f"{CUDA_HOME}/bin/nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True
    ).stdout
    known = set(out.split())
    archs = [arch for arch in DEFAULT_ARCHS if "compute_" + re.sub(r"\D", "", arch) in known]
    return Decision(";".join(archs), f"default, as far as nvcc {nvcc_release()} goes")


def own_arch(source: str) -> str | None:
    """The one architecture that a CUDA source is written for, by its name, 9.0a for *_sm90a.cu; None: those of the
    list. A source with one is compiled for that alone, whatever the list says: its instructions exist nowhere else, and
    at run time the GPU decides whether it is called."""
    named = re.search(r"_sm(\d+)(\d)([af]?)\.cu$", source)
    return f"{named[1]}.{named[2]}{named[3]}" if named else None


def arch_flags(arch: str) -> list[str]:
    """nvcc's flags for one architecture and no other."""
    number = arch.replace(".", "")
    return [f"-gencode=arch=compute_{number},code=sm_{number}"]


def decide() -> dict[str, Decision]:
    """Everything that is decided here, in the order in which it is printed."""
    decisions = {
        "torch": Decision(torch.__version__, "installed; the package works with exactly this one"),
        "compiler": Decision(get_cxx_compiler(), "CXX" if "CXX" in os.environ else "default"),
        "CUDA": decide_cuda(),
    }
    if decisions["CUDA"].value == "yes":
        decisions["architectures"] = decide_archs()
        os.environ["TORCH_CUDA_ARCH_LIST"] = decisions["architectures"].value
        for source in sources(cuda=True)[0]:
            if arch := own_arch(source):
                decisions[Path(source).name] = Decision(arch, "by its name")
    if sanitizers := os.environ.get("TLM_SANITIZE"):
        decisions["sanitizers"] = Decision(sanitizers, "TLM_SANITIZE")
    return decisions


def sanitizer_flags(decisions: dict[str, Decision]) -> list[str]:
    """For the compiler and the linker. What is found ends the process."""
    if "sanitizers" not in decisions:
        return []
    return [f"-fsanitize={decisions['sanitizers'].value}", "-fno-sanitize-recover=all"]


def sources(cuda: bool) -> tuple[list[str], list[str]]:
    """Sources of `_ops` and of `_C`, relative to the root, sorted. CUDA's own are *.cu and *_cuda.cpp."""
    suffixes = (".cpp", ".cu") if cuda else (".cpp",)
    found = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in suffixes)
    python = str(Path("csrc", "python.cpp"))
    return [f for f in found if f != python and (cuda or not f.endswith("_cuda.cpp"))], [python]


def extensions(decisions: dict[str, Decision]) -> list:
    cuda = decisions["CUDA"].value == "yes"
    macros = [("TLM_WITH_CUDA", None)] if cuda else []
    # <ATen/ops/sum.h> in place of all operators: parsing those costs more than compiling a source of ours.
    ops_macros = [*macros, ("AT_PER_OPERATOR_HEADERS", None)]
    archs = decisions["architectures"].value if cuda else ""
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    sanitize = sanitizer_flags(decisions)
    debug = ["-O1", "-g1", "-fno-omit-frame-pointer", *sanitize] if sanitize else ["-O3", "-g0"]
    cxx = [*debug, "-fno-math-errno", "-fno-trapping-math", *openmp]
    # torch switches the conversions of half types off; our kernels use them.
    nvcc = ["-O3", *(f"-U__CUDA_NO_{kind}_CONVERSIONS__" for kind in ("HALF", "BFLOAT16"))]
    ops, python = sources(cuda)
    return [
        (CUDAExtension if cuda else CppExtension)(
            f"{PACKAGE}._ops",
            ops,
            define_macros=ops_macros,
            extra_compile_args={"cxx": cxx, "nvcc": nvcc} if cuda else {"cxx": cxx},
            # The soname lets a C++ program link to a library whose name does not begin with "lib".
            extra_link_args=[*sanitize, *openmp, *(["-Wl,-soname,_ops.abi3.so"] if openmp else [])],
            py_limited_api=True,
        ),
        CppExtension(
            f"{PACKAGE}._C",
            python,
            define_macros=[*macros, ("TLM_ARCHS", f'"{archs}"')],
            extra_compile_args={"cxx": [*(sanitize or ["-O2"]), "-g0"]},
            extra_link_args=sanitize,
        ),
    ]


class Build(BuildExtension):
    """Compiles, then puts beside the libraries what belongs to them: headers, CMake config, decisions."""

    def build_extension(self, extension: Extension) -> None:
        """Sources with an architecture of their own first, each kind by itself, since torch's flags are those of a
        whole extension; their objects are linked with the others."""
        archs = {source: own_arch(source) for source in extension.sources}
        for arch in sorted({arch for arch in archs.values() if arch}):
            flags = extension.extra_compile_args
            extension.extra_objects += self.compiler.compile(
                [source for source in extension.sources if archs[source] == arch],
                output_dir=str(Path(self.build_temp, f"sm_{arch}")),
                macros=extension.define_macros,
                include_dirs=extension.include_dirs,
                debug=self.debug,
                extra_postargs=flags | {"nvcc": [*flags["nvcc"], *arch_flags(arch)]},
                depends=extension.depends,
            )
        extension.sources = [source for source in extension.sources if not archs[source]]
        if extension.name == f"{PACKAGE}._C":  # calls `_ops`, built before it
            extension.extra_link_args += [self.get_ext_fullpath(f"{PACKAGE}._ops"), "-Wl,-rpath,$ORIGIN"]
        super().build_extension(extension)

    def run(self) -> None:
        super().run()
        base = ROOT / "src" if self.inplace else Path(self.build_lib).resolve()
        package = base / PACKAGE
        copy_tree(ROOT / "csrc", package / "include" / PACKAGE, "*.h")
        copy_tree(ROOT / "cmake", package / "share" / "cmake" / PACKAGE, "*.cmake")
        facts = {name: list(decision) for name, decision in DECISIONS.items()}
        (package / "_build.json").write_text(json.dumps(facts, indent=2) + "\n")


def copy_tree(source: Path, target: Path, pattern: str) -> None:
    """Makes `target` hold the files of `source` that match, and nothing else, in the same folders."""
    shutil.rmtree(target, ignore_errors=True)
    for file in source.rglob(pattern):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)


os.chdir(ROOT)
if "sdist" not in sys.argv and (problems := missing_tools()):
    raise SystemExit("\n".join(problems))
DECISIONS = decide()
print(f"{PACKAGE}: configuration")
for name, (value, why) in DECISIONS.items():
    print(f"  {name:14} {value:16} ({why})")
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "src" / PACKAGE / "__init__.py").read_text(), re.MULTILINE)[1]
setup(version=VERSION + local_version(DECISIONS), ext_modules=extensions(DECISIONS), cmdclass={"build_ext": Build})
