"""What a GPU machine is, before anything is built on it: the GPU and its clocks, drivers, compilers, versions.

    python -m gpu.facts [--device cuda|cpu] [--out FOLDER]        in benchmarks/

Exits with 1 where this machine cannot build or run the rest, and says why. Needs no built package.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

SETUPTOOLS = 77  # the oldest that takes the licence's text in pyproject.toml
PACKAGES = ("setuptools", "ninja", "numpy", "safetensors", "pytest", "pytest-xdist", "hypothesis", "transformers")
NVIDIA_SMI = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "memory.total")


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def gpu_facts() -> dict:
    """The first GPU, its driver and its clocks as they are now, and the libraries that compute on it."""
    query = output("nvidia-smi", f"--query-gpu={','.join(NVIDIA_SMI)}", "--format=csv,noheader", "-i", "0")
    device = torch.cuda.get_device_properties(0)
    return {
        **dict(zip(NVIDIA_SMI, query.split(", "), strict=True)),
        "count": torch.cuda.device_count(),
        "capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count,
        "l2_bytes": device.L2_cache_size,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def facts(device: str) -> dict:
    nvcc, compiler = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc", shutil.which("c++")
    return {
        "gpu": gpu_facts() if device == "cuda" and torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "nvcc": output(nvcc, "--version").splitlines()[-1] if Path(nvcc).exists() else None,
        "c++": output(compiler, "--version").splitlines()[0] if compiler else None,
        "compute-sanitizer": shutil.which("compute-sanitizer"),
        "cores": len(os.sched_getaffinity(0)),
        "packages": {package: version(package) for package in PACKAGES},
    }


def problems(found: dict, device: str) -> list[str]:
    """Why the rest cannot be built, or run, on such a machine."""
    packages = found["packages"]
    wrong = [f"{name} is not installed" for name in ("setuptools", "ninja", "pytest") if packages[name] is None]
    if packages["setuptools"] and int(packages["setuptools"].split(".")[0]) < SETUPTOOLS:
        wrong.append(f"setuptools {packages['setuptools']} is too old: {SETUPTOOLS} or newer")
    wrong += [f"there is no {tool}" for tool in ("c++", "nvcc") if found[tool] is None and device == "cuda"]
    if device == "cuda" and found["gpu"] is None:
        wrong.append("torch sees no GPU")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, default=Path("."))
    args = parser.parse_args()
    found = facts(args.device)
    (args.out / "facts.json").write_text(json.dumps(found, indent=1) + "\n")
    for name, value in found.items():
        print(f"{name:18} {value if value is not None else 'none'}")
    if wrong := problems(found, args.device):
        raise SystemExit("; ".join(wrong))


if __name__ == "__main__":
    main()
