"""The planner's CPU profile against this machine: its rates measured again, and whole layers predicted and measured.

    python benchmarks/predictions.py [--ranks 2] [--repeats 60]

Ranks are Gloo processes with one thread each. Every row has ratio = measured / predicted, of a duration: above 1 the
machine is slower than the profile says. Durations are the shortest of many repeats; on a busy machine those of long
layers are disturbed all the same, so the load average is written down with them.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict

import torch
import torch.distributed as dist
from common import write_results

import two_level_mha as tlm
from two_level_mha.mesh import place_on

PROFILE = tlm.Profile.named("cpu")
MOVED = 1 << 19  # float32 elements of the exchange that measures the link
LAYERS = [  # embed_dim, heads, batch, seq
    (256, 4, 1, 64),
    (256, 4, 2, 128),
    (512, 8, 1, 256),
    (512, 8, 4, 128),
    (1024, 16, 1, 256),
]


def shortest_seconds(function: Callable[[], object], repeats: int) -> float:
    """The shortest time until the slowest rank was done, the same on every rank: what the machine can do when nothing
    else takes the processors.
    """
    shortest = float("inf")
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        function()
        taken = torch.tensor(time.perf_counter() - start)
        dist.all_reduce(taken, dist.ReduceOp.MAX)
        shortest = min(shortest, taken.item())
    return shortest


def rates(mesh: dist.DeviceMesh, repeats: int) -> list[dict]:
    """Each number of the profile: the seconds it predicts for one piece of work, and those measured."""
    ops, ranks, group = torch.ops.two_level_mha, mesh.size(), place_on(mesh).groups[2]
    a, b = torch.randn(384, 384), torch.randn(384, 384)
    q = torch.randn(1, 4, 384, 64)
    one, keys = torch.randn(1, 8, 1, 128), torch.randn(1, 1, 16384, 128)
    moved, small = torch.randn(ranks, MOVED // ranks), torch.zeros(1)
    pieces = {
        "flops, a matrix product": (2 * 384**3 / PROFILE.flops, lambda: a @ b),
        "flops, attention": (4 * 4 * 384**2 * 64 / PROFILE.flops, lambda: ops.partial_attention(q, q, q)),
        "memory, one query on many keys": (
            2 * keys.numel() * 4 / PROFILE.memory,
            lambda: ops.partial_attention(one, keys, keys),
        ),
        "link, all_to_all": (
            MOVED * 4 * (ranks - 1) / ranks / PROFILE.link,
            lambda: ops.all_to_all(moved, 0, 0, ranks, group),
        ),
        "latency, all_reduce of one number": (
            PROFILE.latency_ns * 1e-9,
            lambda: ops.all_reduce(small, ranks, group),
        ),
    }
    return [row(name, predicted, shortest_seconds(work, repeats)) for name, (predicted, work) in pieces.items()]


def layers(mesh: dist.DeviceMesh, repeats: int) -> list[dict]:
    """The forward pass of a whole module with scheme="auto", on this mesh."""
    rows, grid = [], tuple(mesh.shape)
    for embed_dim, heads, batch, seq in LAYERS:
        layer = tlm.TwoLevelMultiheadAttention(embed_dim, heads, batch_first=True, mesh=mesh).eval()
        plan = tlm.plan(
            embed_dim=embed_dim, num_heads=heads, devices=mesh.size(), batch=batch, seq=seq, causal=False, bias=True,
            dtype=torch.float32, device_type="cpu",
        )  # fmt: skip
        option = next(option for option in plan.options if option.grid == grid and option.auto)
        x = torch.randn(batch, seq, embed_dim)
        with torch.no_grad():
            measured = shortest_seconds(lambda layer=layer, x=x: layer(x, x, x, need_weights=False), repeats)
        name = f"layer on {grid}, {option.scheme}: B={batch} L={seq} D={embed_dim} h={heads} fp32"
        rows.append(row(name, option.predicted_seconds["total"], measured))
    return rows


def row(case: str, predicted: float, measured: float) -> dict:
    return {
        "case": case,
        "predicted_ms": round(predicted * 1e3, 4),
        "measured_ms": round(measured * 1e3, 4),
        "ratio": round(measured / predicted, 3),
    }


def run(rank: int, ranks: int, repeats: int, store: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    rows = rates(tlm.init_mesh("cpu", (1, ranks)), repeats)
    for grid in ((ranks, 1), (1, ranks)):
        rows += layers(tlm.init_mesh("cpu", grid), repeats)
    if rank == 0:
        for found in rows:
            print(
                f"{found['case']:62} predicted {found['predicted_ms']:9.3f} ms  measured {found['measured_ms']:9.3f} ms"
                f"  ratio {found['ratio']:.2f}"
            )
        profile = {"case": "profile", "ranks": ranks, "load_average": os.getloadavg(), **asdict(PROFILE)}
        print(write_results("predictions", [profile, *rows]))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=60)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run, (args.ranks, args.repeats, f"{folder}/store"), nprocs=args.ranks)


if __name__ == "__main__":
    main()
