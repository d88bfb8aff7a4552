"""Command line: `python -m two_level_mha info`."""

import argparse
import platform

import torch

import two_level_mha as tlm
from two_level_mha import _C, _load


def registered_ops() -> dict[str, list[str]]:
    """Operator name -> dispatch keys that have a kernel of ours."""
    names = sorted(n for n in torch._C._dispatch_get_all_op_names() if n.startswith("two_level_mha::"))
    keys = ("CompositeImplicitAutograd", "CPU", "CUDA", "Meta", "Autograd", "AutocastCPU", "AutocastCUDA")
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return {n: [k for k in keys if has(n, k)] for n in names}


def info(args: argparse.Namespace) -> None:
    """Versions, what the build decided and why, what was compiled in, and every operator with its kernels."""
    compiled = _C.build_info()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none visible"
    rows = {
        "two_level_mha": tlm.__version__,
        "python": platform.python_version(),
        "torch running": torch.__version__,
        "torch built for": f"{compiled['torch']} (headers)",
        "compiler": compiled["compiler"],
        "CUDA kernels": f"{compiled['cuda']} {compiled['archs']}".strip(),
        "GPU": gpu,
        "library": str(_load.ops_library()),
        "CMake prefix": tlm.cmake_prefix_path,
    }
    print_table("versions", rows)
    print_table("build", {k: f"{value} ({why})" for k, (value, why) in _load.build_decisions().items()})
    print_table("operators", {name: ", ".join(keys) for name, keys in registered_ops().items()} or {"none": ""})


def print_table(title: str, rows: dict[str, str]) -> None:
    width = max(map(len, rows))
    print(title)
    for name, value in rows.items():
        print(f"  {name:{width}}  {value}".rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m two_level_mha", description=tlm.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, build, arch list, operators available").set_defaults(run=info)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
