"""A hardware profile of this node, measured: what `profile=` and `plan --profile` take.

    torchrun --nproc-per-node GPUS -m gpu.rates [--device cuda|cpu] [--out FOLDER]        in benchmarks/

Rates of one rank come from the slowest; those of links from collectives over all of them. What one node cannot tell,
bytes/s between nodes, is the known profile's, and the profile's source says so. Of one rank, so are the links.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from common import commit, device_ms, gpu_name, past_the_cache, tflops
from gpu.ceilings import square_product
from gpu.driver import Options

from two_level_mha.profile import Profile

HALF, SINGLE = torch.bfloat16, torch.float32
WIDTHS = {"128": 128, "256": 256, "wide": 512}


def flops(options: Options, dtype: torch.dtype) -> float:
    """FLOP/s of a square product."""
    return square_product(options, dtype, 512 if options.tiny else 8192)[1] * 1e12


def attention(options: Options, dtype: torch.dtype, width: int) -> float:
    """FLOP/s of attention without a mask, keys and values as wide."""
    length = 256 if options.tiny else 4096
    op = torch.ops.two_level_mha.partial_attention

    def draw() -> tuple:
        return tuple(torch.randn(1, 8, length, width, device=options.device).to(dtype) for _ in range(3))

    ms = device_ms({"": op}, past_the_cache(draw, options.device), options.repeats)[""]
    return tflops(4 * 8 * length**2 * width, ms, dtype, options.device) * 1e12


def memory(options: Options) -> float:
    """Bytes/s that a reduction reads."""
    x = torch.randn(1 << (20 if options.tiny else 30), device=options.device)
    return x.numel() * 4 / device_ms({"": torch.sum}, [(x,)], options.repeats)[""] * 1e3


def link(options: Options) -> float:
    """Bytes/s that a rank sends to the others."""
    ranks = dist.get_world_size()
    x = torch.randn(ranks, 1 << (8 if options.tiny else 24), device=options.device)
    y = torch.empty_like(x)
    ms = device_ms({"": lambda x: dist.all_to_all_single(y, x)}, [(x,)], options.repeats)[""]
    return x.numel() * 4 * (ranks - 1) / ranks / ms * 1e3


def latency(options: Options) -> float:
    """Nanoseconds of an all-reduce of one number."""
    return device_ms({"": dist.all_reduce}, [(torch.zeros(1, device=options.device),)], options.repeats)[""] * 1e6


def measured(options: Options) -> Profile:
    """This node's profile, the same on every rank."""
    ranks, known = dist.get_world_size(), Profile.for_device(options.device)
    of_one: dict[str, Callable[[], float]] = {
        "flops": lambda: flops(options, HALF),
        "flops_single": lambda: flops(options, SINGLE),
        "memory": lambda: memory(options),
    }
    for kind, dtype in (("attention", HALF), ("attention_single", SINGLE)):
        for name, width in WIDTHS.items():
            of_one[f"{kind}_{name}"] = lambda dtype=dtype, width=width: attention(options, dtype, width)
    found = torch.tensor([function() for function in of_one.values()], dtype=torch.float64, device=options.device)
    dist.all_reduce(found, dist.ReduceOp.MIN)
    numbers = {name: int(value) for name, value in zip(of_one, found.tolist(), strict=True)}
    assumed = "network"
    if ranks > 1:
        times = torch.tensor([1 / link(options), latency(options)], device=options.device)
        dist.all_reduce(times, dist.ReduceOp.MAX)
        numbers |= {"link": int(1 / times[0].item()), "latency_ns": int(times[1].item()), "node_ranks": ranks}
    else:
        assumed = "network, link, latency_ns and node_ranks"
    # Prices count whole FLOPs for each byte, and a CPU's bfloat16 may be slower than its caches.
    for name in ("memory", "link", "network"):
        numbers[name] = min(numbers.get(name, getattr(known, name)), numbers["flops"])
    of = f"{ranks} x {gpu_name() if options.device == 'cuda' else 'CPU'}, commit {commit()}"
    source = f"measured by benchmarks/gpu/rates.py: {of}; {assumed} of profile {known.name}"
    return replace(known, name=f"{known.name}-measured", source=source, **numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: tiny sizes, tries the program")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True, help="folder of profile.json")
    args = parser.parse_args()
    rank, tiny = int(os.environ["LOCAL_RANK"]), args.device == "cpu"
    if not tiny:
        torch.cuda.set_device(rank)
    torch.manual_seed(rank)
    dist.init_process_group("gloo" if tiny else "nccl", device_id=None if tiny else torch.device("cuda", rank))
    profile = measured(Options(args.device, tiny, 2 if tiny else args.repeats))
    if rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        profile.to_file(args.out / "profile.json")
        print(profile)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
