"""The facts of a rank: what a job needs alike on all of its ranks, as texts that can be compared and printed."""

import functools
import importlib.metadata
import os
import platform
from fnmatch import fnmatch
from pathlib import Path

import torch

import two_level_mha
from two_level_mha import _C, _load
from two_level_mha.manifest import file_hashes

# Environment variables that change what a rank computes, sends or waits for.
VARIABLES = (
    *("TLM_*", "NCCL_*", "GLOO_*", "TORCH_*", "OMP_NUM_THREADS", "MKL_NUM_THREADS"),
    *("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE"),
)

# Facts that cost time at most, or that hosts have reasons to differ in.
MAY_DIFFER = (
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "threads", "*_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_DEBUG*"),
    *("TLM_CUDA", "TORCH_HOME", "TORCH_EXTENSIONS_DIR", "TORCH_LOGS*", "TORCH_SHOW_*", "TORCH_CPP_LOG_LEVEL"),
)


def facts_of_rank(device_type: str = "cpu") -> dict[str, str]:
    """Versions, digests of the compiled libraries, rates, what the CPU (and the GPU) can do, and the environment.

    A variable that is not set is no fact. Takes milliseconds; the libraries are read once in a process.
    device_type: "cuda" adds the current GPU, which initialises CUDA.
    """
    compiled = _C.build_info()
    facts = {
        "torch": torch.__version__,
        "two_level_mha": two_level_mha.__version__,
        "Python": platform.python_version(),
        "transformers": version_of("transformers"),
        "operator library": _digest(_load.ops_library()),
        "library _C": _digest(Path(_C.__file__)),
        "CUDA kernels": f"{compiled['cuda']} {compiled['archs']}".strip(),
        **{f"rates of {name}": " ".join(map(str, numbers)) for name, _, numbers, _ in _C.profiles()},
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
        "CPU": str(_C.Machine()).removeprefix("a "),
        "threads": str(torch.get_num_threads()),
    }
    if device_type == "cuda":
        major, minor = torch.cuda.get_device_capability()
        facts["GPU"] = f"{torch.cuda.get_device_name()}, sm_{major}{minor}"
        facts["CUDA"] = f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    variables = {name: value for name, value in sorted(os.environ.items()) if _matches(name, VARIABLES)}
    return facts | variables


def facts_alike() -> dict[str, str]:
    """Those without which ranks do not compute the same: all but what may differ, and how backends are tuned."""
    tuned = ("NCCL_*", "GLOO_*", "TORCH_*")
    return {name: fact for name, fact in facts_of_rank().items() if not may_differ(name) and not _matches(name, tuned)}


def may_differ(fact: str) -> bool:
    """Whether a job is right, if perhaps slower, on ranks that differ in this fact."""
    return _matches(fact, MAY_DIFFER)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def version_of(package: str) -> str:
    """Of an installed package, or that it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@functools.cache
def _digest(library: Path) -> str:
    digest: str = file_hashes(library)["sha256"]
    return digest[:16]
