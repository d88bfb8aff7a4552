"""A decode step with the KV cache on a grid: the memory of each rank, and the bytes it sends after 1k to 64k tokens.

    python benchmarks/decode.py [--case TEXT] [--repeats N] [--threads N]

Each case starts its ranks (Gloo, by fork). The bytes are those of the collectives that one step issued, recorded, and
`whole` is the memory of the cache without a grid. Nothing is timed.

Letters: B batch, h heads, k KV heads, d head_dim, D embed_dim.
"""

import multiprocessing
import os
import tempfile
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from common import run_cases

import two_level_mha as tlm
from two_level_mha.layer import GridAttention
from two_level_mha.testing import record_collectives

CONTEXTS = tuple(1024 * 2**i for i in range(7))


class Case(NamedTuple):
    grid: tuple[int, int]
    layout: str
    B: int
    h: int
    k: int
    d: int
    D: int


CASES = [
    Case(grid, layout, B, h, k, d, D)
    for layout, B in (("position", 1), ("batch", 8))
    for grid, h, k, d, D in (((2, 4), 14, 2, 64, 896), ((4, 2), 28, 4, 128, 3584), ((1, 8), 8, 1, 128, 1024))
]


class Layer(GridAttention):
    """A layer with weights of zeros: bytes do not depend on numbers."""

    def __init__(self, case: Case, mesh) -> None:
        super().__init__(
            num_heads=case.h, num_kv_heads=case.k, head_dim=case.d, mesh=mesh,
            scheme="auto", combine="reduce", debug=None,
        )  # fmt: skip
        query, key = (case.h, case.d, case.D), (case.k, case.d, case.D)
        shapes = {"q_weight": query, "k_weight": key, "v_weight": key, "out_weight": (case.D, case.h, case.d)}
        self.store({name: torch.zeros(shape) for name, shape in shapes.items()})

    def forward(self, x_BLD: torch.Tensor, layer) -> torch.Tensor:
        B, L, _ = x_BLD.shape
        return self.attend(x_BLD, x_BLD, x_BLD, cache=layer, call=layer.begin(B, L))[0]


def steps(case: Case, mesh) -> list[dict]:
    """Memory and bytes of this rank after each context."""
    module = Layer(case, mesh)
    sizes = {"num_layers": 1, "num_kv_heads": case.k, "head_dim": case.d}
    found = []
    for context in CONTEXTS:
        cache = tlm.KVCache(sizes, mesh, layout=case.layout, max_length=context)
        layer = cache.layers[0]
        x_B1D = torch.zeros(case.B, 1, case.D)
        with torch.no_grad():
            fill(layer, case, context - 1)
            with record_collectives() as record:
                module(x_B1D, layer)
        calls = record.counts()
        found.append({"context": context, "kv_bytes": cache.nbytes, "sent": record.sent(), "calls": calls})
    return found


def fill(layer, case: Case, tokens: int) -> None:
    """Tokens as a prefill of `tokens` would leave them on this rank, without its attention."""
    grid, j = layer.place.grid, layer.place.slice
    layer.begin(case.B, tokens)
    own = len(range(j, tokens, grid.slices)) if case.layout == "position" else tokens
    batch = case.B if case.layout == "position" else -(-case.B // grid.slices)
    k_BKSd = torch.zeros(batch, case.k // grid.head_groups, own, case.d)
    layer.append(k_BKSd, k_BKSd, tokens)


def rank_main(rank: int, case: Case, store: str, results) -> None:
    torch.set_num_threads(1)
    ranks = case.grid[0] * case.grid[1]
    options = {"init_method": f"file://{store}", "rank": rank, "world_size": ranks}
    dist.init_process_group("gloo", timeout=timedelta(minutes=2), **options)
    results.put((rank, steps(case, tlm.init_mesh("cpu", case.grid))))
    dist.barrier()
    dist.destroy_process_group()


def run(case: Case, repeats: int) -> dict:
    """Starts the ranks; every number must be the same on all of them."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as directory:
        results = context.SimpleQueue()
        ranks = range(case.grid[0] * case.grid[1])
        arguments = (case, os.path.join(directory, "store"), results)
        processes = [context.Process(target=rank_main, args=(rank, *arguments)) for rank in ranks]
        for process in processes:
            process.start()
        found = dict(results.get() for _ in ranks)
        for process in processes:
            process.join()
    if any(one != found[0] for one in found.values()):
        raise SystemExit(f"{case}: ranks differ")
    whole = [2 * 4 * case.B * case.k * case.d * context for context in CONTEXTS]
    shares = [one["kv_bytes"] / size for one, size in zip(found[0], whole, strict=True)]
    return {
        "case": f"{case.layout} grid={case.grid[0]}x{case.grid[1]} B={case.B} h={case.h} k={case.k} d={case.d} "
        f"D={case.D} fp32",
        "steps": [one | {"kv_bytes_whole": size} for one, size in zip(found[0], whole, strict=True)],
        "ranks": len(ranks),
        "kv_share": max(shares) if max(shares) == min(shares) else shares,
        "sent_flat": len({(one["sent"], tuple(one["calls"].items())) for one in found[0]}) == 1,
    }


def line(row: dict) -> str:
    first, last = row["steps"][0], row["steps"][-1]
    return (
        f"{row['case']:<60} KV on a rank {row['kv_share']} of the whole; a step sends {first['sent']:,} bytes after "
        f"{first['context']:,} tokens, {last['sent']:,} after {last['context']:,}"
    )


if __name__ == "__main__":
    named = {f"{case.layout} {case.grid[0]}x{case.grid[1]}": case for case in CASES}
    run_cases("decode", __doc__, named, run, line, repeats=1)
