"""What the commands `info` and `plan` do; two_level_mha_cli has their options."""

import argparse
import json
import os
import platform
import shutil
import sys

import torch
import torch.distributed as dist

import two_level_mha as tlm
from two_level_mha import _C, _load
from two_level_mha.facts import version_of
from two_level_mha.model_plan import ModelPlan, plan_model
from two_level_mha.plan_plot import plot
from two_level_mha.plan_text import LATENT
from two_level_mha.served import table_of

LAYER = ("embed_dim", "num_heads", "num_kv_heads", "head_dim", *LATENT)  # options of plan
CALL = (
    "ranks",
    "memory",
    "batch",
    "seq",
    "decode",
    "bias",
    "gated",
    "combine",
    "activations",
    "overlap",
    "device_type",
    "profile",
)
H100_CUDNN = 91900  # torch 2.11 comes with 9.19.0, and no rule asks for a newer one


def registered_ops() -> dict[str, list[str]]:
    """Operator name -> dispatch keys that have a kernel of ours."""
    names = sorted(n for n in torch._C._dispatch_get_all_op_names() if n.startswith("two_level_mha::"))
    keys = ("CompositeImplicitAutograd", "CPU", "CUDA", "Meta", "Autograd", "AutocastCPU", "AutocastCUDA")
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return {n: [k for k in keys if has(n, k)] for n in names}


def info(args: argparse.Namespace) -> None:
    """Versions, what the build decided and why, what was compiled in, every operator and every attention kernel."""
    compiled = _C.build_info()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none visible"
    rows = {
        "two_level_mha": tlm.__version__,
        "python": platform.python_version(),
        "system": f"{platform.platform()}, {os.cpu_count()} cores",
        "torch running": torch.__version__,
        "torch built for": f"{compiled['torch']} (headers)",
        "compiler": compiled["compiler"],
        "CUDA kernels": f"{compiled['cuda']} {compiled['archs']}".strip(),
        "CPU kernels": f"{str(_C.Machine()).removeprefix('a ')}, {torch.get_num_threads()} threads",
        "GPU": gpu,
        "backends": backends(),
        "transformers": version_of("transformers"),
        "ninja": version_of("ninja") if shutil.which("ninja") is None else str(shutil.which("ninja")),
        "library": str(_load.ops_library()),
        "CMake prefix": tlm.cmake_prefix_path,
    }
    print_table("versions", rows)
    print_table("build", {k: f"{value} ({why})" for k, (value, why) in _load.build_decisions().items()})
    print_table("operators", {name: ", ".join(keys) for name, keys in registered_ops().items()} or {"none": ""})
    print_table("attention kernels, the preferred ones first", usable_kernels())
    h100 = _C.Machine(cuda=True, arch=90, cudnn=H100_CUDNN)
    print_table("what serves which call on an H100, forward / backward (by rule; no GPU is asked)", table_of(h100))
    print_table("what they support", {row["name"]: ", ".join(row["supports"]) for row in _C.kernels()})


def backends() -> str:
    """What this torch can send tensors by, with the version of NCCL."""
    if not dist.is_available():
        return "none: this torch was built without torch.distributed"
    found = ["Gloo"] if dist.is_gloo_available() else []
    if dist.is_nccl_available():
        found.append(f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
    return ", ".join(found) or "none"


def usable_kernels() -> dict[str, str]:
    """Name of every attention kernel -> what it runs on, and whether that is here."""
    machines = [_C.Machine()]
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        arch = 10 * major + minor if _C.build_info()["cuda"] == "yes" else 0
        machines.append(_C.Machine(cuda=True, arch=arch, cudnn=torch.backends.cudnn.version() or 0))
    rows = {}
    for row in _C.kernels():
        reasons = {str(machine): _C.unusable(machine).get(row["name"], "") for machine in machines}
        here = " and ".join(machine for machine, reason in reasons.items() if not reason)
        rows[row["name"]] = (
            f"{row['runs_on']}: usable on {here}" if here else "not usable: " + "; ".join(reasons.values())
        )
    return rows


def print_table(title: str, rows: dict[str, str]) -> None:
    width = max(map(len, rows))
    print(title)
    for name, value in rows.items():
        print(f"  {name:{width}}  {value}".rstrip())


def plan(args: argparse.Namespace) -> None:
    """Prints what a layer, or a model's, costs on every valid grid with every scheme; exit code 2 if there is none."""
    layer = {name: getattr(args, name) for name in LAYER}
    call = {name: getattr(args, name) for name in CALL} | {"causal": not args.not_causal}
    dtype = args.dtype and getattr(torch, args.dtype)
    found: tlm.Plan | ModelPlan
    try:
        if args.model is not None:
            if given := [f"--{name.replace('_', '-')}" for name, value in layer.items() if value is not None]:
                raise tlm.GridError(f"--model reads a layer's sizes from config.json: leave out {', '.join(given)}")
            found = plan_model(args.model, dtype=dtype, **call)
        elif args.embed_dim is None or args.num_heads is None:
            raise tlm.GridError("plan needs a layer, --embed-dim and --num-heads, or --model FOLDER with a config.json")
        else:
            found = tlm.plan(**layer, dtype=dtype or torch.bfloat16, **call)
        if args.plot:
            plot(found if isinstance(found, tlm.Plan) else found.layer, args.plot)
    except tlm.GridError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(json.dumps(found.to_dict(), indent=1) if args.json else found)
