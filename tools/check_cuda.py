"""Compiles the CUDA sources against the torch of this Python: python tools/check_cuda.py [--arch 9.0a] [--std c++20]

Nothing is linked or kept. Kernels are compiled whole, and the assembler's report must say that none spills or keeps
anything in local memory, which is slow and shows in no test; host sources are parsed as a build with CUDA has them.
std: what torch's extensions are compiled as, c++17 before torch 2.15. Exit code 1 names what failed.
"""

import argparse
import os
import re
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils.cpp_extension import CUDA_HOME, include_paths

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
_KERNEL = re.compile(r"Compiling entry function '(\S+)'")
_MEMORY = re.compile(r"(\d+) bytes (stack frame|spill stores|spill loads)")


def in_local_memory(report: str) -> list[str]:
    """Kernels that, by ptxas's report (-v), keep something in local memory, each with what and how much."""
    found, kernel, kernels = [], "", 0
    for line in report.splitlines():
        if named := _KERNEL.search(line):
            kernel, kernels = named[1], kernels + 1
        used = [f"{count} bytes {what}" for count, what in _MEMORY.findall(line) if count != "0"]
        if used:
            found.append(f"{kernel}: {', '.join(used)}")
    if kernels == 0:
        found.append("the report names no kernel")
    return found


def run(command: list[str]) -> tuple[int, str]:
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def errors(report: str) -> list[str]:
    return [line for line in report.splitlines() if "error" in line][:10] or [report[-2000:]]


def kernel_problems(source: Path, arch: str, std: str) -> list[str]:
    number = arch.replace(".", "")
    code, report = run(
        [f"{CUDA_HOME}/bin/nvcc", f"-std={std}", "-O3", f"-gencode=arch=compute_{number},code=sm_{number}",
         *(f"-U__CUDA_NO_{kind}_CONVERSIONS__" for kind in ("HALF", "BFLOAT16")), "-Xptxas", "-v",
         "-cubin", "-o", os.devnull, str(source)]
    )  # fmt: skip
    return in_local_memory(report) if code == 0 else errors(report)


def host_problems(source: Path, std: str) -> list[str]:
    headers = [f"-I{path}" for path in (*include_paths(), sysconfig.get_paths()["include"], f"{CUDA_HOME}/include")]
    names = ["-DTLM_WITH_CUDA", "-DTORCH_API_INCLUDE_EXTENSION_H", "-DAT_PER_OPERATOR_HEADERS", '-DTLM_ARCHS=""']
    code, report = run(["c++", f"-std={std}", "-fsyntax-only", *headers, *names, str(source)])
    return errors(report) if code else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="9.0a")
    parser.add_argument("--std", default="c++20")
    args = parser.parse_args()
    if CUDA_HOME is None:
        sys.exit("no CUDA toolkit found: set CUDA_HOME, or put nvcc on the PATH")
    kernels = sorted(CSRC.rglob("*.cu"))
    hosts = sorted(
        file for file in CSRC.rglob("*.cpp") if file.name.endswith("_cuda.cpp") or "TLM_WITH_CUDA" in file.read_text()
    )
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [(file, pool.submit(kernel_problems, file, args.arch, args.std)) for file in kernels]
        found += [(file, pool.submit(host_problems, file, args.std)) for file in hosts]
    failed = [f"{file.relative_to(ROOT)}: {problem}" for file, problems in found for problem in problems.result()]
    if failed:
        sys.exit("\n".join(failed))
    print(f"{len(kernels)} sources of kernels without local memory on {args.arch}, {len(hosts)} host sources: right")


if __name__ == "__main__":
    main()
