"""What one rank does of the seed's model as the ranks grow from 1 to 1024, recorded on a fake process group.

    python benchmarks/scale.py

FLOPs, bytes sent and memory are those of fake tensors of the full size (1024 x 10000 tokens, float16, full attention):
exact, and no time is measured of them. Overhead is: the time to make the mesh and the model, the memory that Python
holds of them, and the time of a call of a small model of real tensors whose collectives return at once, the shortest
of many. All are of rank P // 2. Exits with 1 where a rank of 16 does more than 1.15 times 1/16 of the FLOPs, or where
making or calling a model, or what it holds, grows by more than half from 64 to 1024 ranks, both grids of two axes.
"""

import argparse
import gc
import time
import tracemalloc
from pathlib import Path

import torch
from common import write_results

from two_level_mha.experiment.fake import FakeTensors, on_fake_rank
from two_level_mha.experiment.hardware import hardware
from two_level_mha.experiment.model import SEED, Layout, Sizes, build, mesh_of
from two_level_mha.experiment.predict import model_flops
from two_level_mha.experiment.recorder import record

RANKS = {1: (1, 1), 4: (4, 1), 16: (16, 1), 64: (16, 4), 256: (16, 16), 1024: (16, 64)}
WAYS = {
    "batch": {"scheme": "batch"},
    "sequence": {"scheme": "sequence"},
    "weights, split by batch, MLP gathered": {"scheme": "weights", "activations": "batch", "mlp": "gathered"},
}
SMALL = Sizes(layers=2, heads=16, kv_heads=16, head_dim=64, mlp_hidden=4096, batch=1, length=8)
REPEATS = 100
FLOPS_LIMIT, GROWTH_LIMIT = 1.15, 1.5


def layout_of(ranks: int, way: dict) -> Layout:
    return Layout(grid=RANKS[ranks], **(way if RANKS[ranks][1] > 1 or "activations" in way else {}))


def recorded(layout: Layout) -> dict:
    """FLOPs, bytes and memory of this rank at the seed's sizes."""
    torch.set_default_dtype(torch.float16)
    mesh = mesh_of(layout)
    with FakeTensors():
        built = build(SEED, layout, mesh, causal=False, dtype=torch.float16, profile=hardware("h100-16").profile)
        x = built.part(torch.empty(SEED.batch, SEED.length, SEED.embed_dim))
        built.forward(x)
        held = [] if layout.activations == "batch" else [x]
        with record([*built.model.parameters(), *held]) as found:
            built.forward(x)
    return {
        "flops": found.flops(),
        "sent_bytes": found.sent(),
        "collectives": len(found.starts),
        "peak_bytes": found.peak,
    }


def overhead(layout: Layout) -> dict:
    """Milliseconds to make the mesh, to make the small model and to call it; bytes that Python holds of both."""
    torch.manual_seed(0)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    start = time.perf_counter()
    mesh = mesh_of(layout)
    of_mesh = time.perf_counter() - start
    held_mesh = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    build(SMALL, layout, mesh)  # imports, caches
    making = []
    for _ in range(9):
        start = time.perf_counter()
        built = build(SMALL, layout, mesh)
        making.append(time.perf_counter() - start)
    gc.collect()
    tracemalloc.start()
    built = build(SMALL, layout, mesh)
    gc.collect()
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    x = torch.randn(SMALL.batch, SMALL.length, SMALL.embed_dim)
    calls = []
    for repeat in range(REPEATS + 3):
        start = time.perf_counter()
        built.forward(x)
        if repeat >= 3:
            calls.append(time.perf_counter() - start)
    return {
        "mesh_ms": round(of_mesh * 1e3, 3),
        "mesh_python_bytes": held_mesh,
        "make_ms": round(min(making) * 1e3, 3),
        "model_python_bytes": held,
        "call_ms": round(min(calls) * 1e3, 3),
    }


def rows() -> list[dict]:
    found = []
    whole = model_flops(SEED, causal=False, training=False)
    for name, way in WAYS.items():
        for ranks in RANKS:
            layout = layout_of(ranks, way)
            one = on_fake_rank(ranks // 2, ranks, lambda layout=layout: recorded(layout))
            row = {"case": f"{name}, {ranks} ranks", "way": name, "ranks": ranks, "grid": RANKS[ranks], **one}
            found.append(row | {"flops_over_share": round(one["flops"] * ranks / whole, 4)})
    for ranks in RANKS:
        layout = layout_of(ranks, WAYS["sequence"])
        one = on_fake_rank(ranks // 2, ranks, lambda layout=layout: overhead(layout))
        found.append(
            {"case": f"overhead, {ranks} ranks", "way": "overhead", "ranks": ranks, "grid": RANKS[ranks], **one}
        )
    return found


def problems(found: list[dict]) -> list[str]:
    """Limits that are missed, in words."""
    at = {(row["way"], row["ranks"]): row for row in found}
    missed = [
        f"{row['case']}: {row['flops_over_share']} of a share of the FLOPs"
        for row in found
        if row["ranks"] == 16 and row.get("flops_over_share", 0) > FLOPS_LIMIT
    ]
    for name in ("make_ms", "model_python_bytes", "call_ms"):
        small, large = at["overhead", 64][name], at["overhead", 1024][name]
        if large > GROWTH_LIMIT * small:
            missed.append(f"{name} grows from {small} at 64 ranks to {large} at 1024")
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the results; default: benchmarks/results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = rows()
    for row in found:
        print("  ".join(f"{key}={value}" for key, value in row.items() if key not in ("way", "grid")))
    print(write_results("scale", found, folder=args.out))
    if missed := problems(found):
        raise SystemExit("; ".join(missed))


if __name__ == "__main__":
    main()
