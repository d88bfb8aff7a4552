"""A KV cache of which two ranks keep unequal shares, beside one of equal ones: time, and bytes on each rank.

    python benchmarks/cache_shares.py [--case TEXT] [--repeats N] [--threads N]

One layer of 16 query and 2 KV heads of 64 on a grid (1, 2), on two processes of one thread each (Gloo, by fork); the
caches take turns. Prefill: 1,024 tokens into an empty cache. Decode: 32 steps of one token behind them.

Letters: B batch, h heads, k KV heads, d head_dim, D embed_dim.
"""

import multiprocessing
import os
import tempfile
from datetime import timedelta

import torch
import torch.distributed as dist
from common import interleaved_ms, run_cases

import two_level_mha as tlm
from two_level_mha.layer import GridAttention

B, h, k, d, D = 1, 16, 2, 64, 1024
TOKENS, STEPS = 1024, 32
SHARES = ((1, 1), (2, 1), (9, 4), (29, 10))  # a run of that many tokens in a cycle
CASES = {"prefill": TOKENS, "decode": STEPS}


class Layer(GridAttention):
    """Random weights, the same on every rank."""

    def __init__(self, mesh) -> None:
        super().__init__(
            num_heads=h, num_kv_heads=k, head_dim=d, mesh=mesh, scheme="auto", combine="reduce", debug=None
        )
        draw = torch.Generator().manual_seed(0)
        shapes = {"q_weight": (h, d, D), "k_weight": (k, d, D), "v_weight": (k, d, D), "out_weight": (D, h, d)}
        self.store({name: torch.randn(shape, generator=draw) / 32 for name, shape in shapes.items()})

    def forward(self, x_BLD: torch.Tensor, layer) -> torch.Tensor:
        call = layer.begin(*x_BLD.shape[:2])
        return self.attend(x_BLD, x_BLD, x_BLD, causal=call.position, cache=layer, call=call)[0]


def rank_main(rank: int, case: str, repeats: int, store: str, results) -> None:
    torch.set_num_threads(1)
    options = {"init_method": f"file://{store}", "rank": rank, "world_size": 2}
    dist.init_process_group("gloo", timeout=timedelta(minutes=5), **options)
    x_BLD = torch.randn(B, TOKENS, D, generator=torch.Generator().manual_seed(1))
    runs, bytes_of = {}, {}
    for shares in SHARES:
        mesh = tlm.init_mesh("cpu", (1, 2), cache_shares=shares)
        sizes = {"num_layers": 1, "num_kv_heads": k, "head_dim": d}
        module, cache = Layer(mesh), tlm.KVCache(sizes, mesh, max_length=TOKENS + STEPS)

        def run(module=module, cache=cache) -> None:
            with torch.no_grad():
                if case == "prefill":
                    cache.reset()
                    module(x_BLD, cache.layers[0])
                else:
                    cache.rewind(cache.length - TOKENS)
                    for at in range(STEPS):
                        module(x_BLD[:, at : at + 1], cache.layers[0])

        with torch.no_grad():
            module(x_BLD, cache.layers[0])
        runs[str(shares)], bytes_of[str(shares)] = run, cache.nbytes
    results.put((rank, interleaved_ms(runs, repeats), bytes_of))
    dist.barrier()
    dist.destroy_process_group()


def run(case: str, repeats: int) -> dict:
    """Starts the ranks; times are the first's."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as directory:
        results = context.SimpleQueue()
        arguments = (case, repeats, os.path.join(directory, "store"), results)
        processes = [context.Process(target=rank_main, args=(rank, *arguments)) for rank in range(2)]
        for process in processes:
            process.start()
        found = {rank: rest for rank, *rest in (results.get() for _ in processes)}
        for process in processes:
            process.join()
    times = found[0][0]
    equal = times[str(SHARES[0])]
    rows = [
        {
            "shares": list(shares),
            "ms": times[str(shares)],
            "over_equal": times[str(shares)] / equal,
            "cache_bytes": [found[rank][1][str(shares)] for rank in range(2)],
        }
        for shares in SHARES
    ]
    return {"case": case, "tokens": CASES[case], "rows": rows}


def line(row: dict) -> str:
    told = ", ".join(f"{one['shares']} {one['ms']:.1f} ms ({one['over_equal']:.2f})" for one in row["rows"])
    return f"{row['case']:<8} {told}"


if __name__ == "__main__":
    run_cases("cache_shares", __doc__, {name: name for name in CASES}, run, line, repeats=9)
