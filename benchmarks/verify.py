"""What tlm.verify costs: a step with it over the same step without, on 4 Gloo ranks that train a small Llama.

    python benchmarks/verify.py [--case TEXT] [--repeats N] [--threads N]

Forward, backward, clipping and AdamW of one model on a (2, 2) grid. Pairs of steps without a look and pairs with one
(checksums are kept after the first step, and compared before the second) take turns; the ratio is that of 49 of the
one and one of the other to 50 of the one. Times are of rank 0; the cost of a look is the median of the differences of
pairs that follow each other, and its quartiles say how far the machine's noise reaches.
"""

import os
import statistics
import tempfile
import time
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
import transformers
from common import run_cases, verdict

import two_level_mha as tlm

GRID = (2, 2)
EVERY = 100
THREADS = 1  # of a rank


class Case(NamedTuple):
    name: str
    rest: bool
    B: int
    L: int
    limit: float = 1.01


CASES = (Case("all of it split", True, 4, 128), Case("attention split", False, 4, 128))
SIZES = {
    "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 2048, "tie_word_embeddings": False,
}  # fmt: skip


def rank_main(rank: int, case: Case, repeats: int, threads: int, directory: str) -> None:
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=GRID[0] * GRID[1])
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    model = tlm.parallelize(model, tlm.init_mesh("cpu", GRID), rest=case.rest).train()
    optimizer = torch.optim.AdamW(tlm.param_groups(model))
    ids_BL = torch.randint(SIZES["vocab_size"], (case.B, case.L))

    def steps(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            logits_BLC = model(ids_BL, use_cache=False).logits
            F.cross_entropy(logits_BLC[:, :-1].flatten(0, 1), ids_BL[:, 1:].flatten()).backward()
            tlm.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    steps(1)
    handle = tlm.verify(model, optimizer, every=EVERY)

    def at(step: int) -> float:
        handle.step = step
        start = time.perf_counter()
        steps(2)
        return (time.perf_counter() - start) * 1e3

    # step 100 is kept, step 101 compares; steps 50 and 51 do neither
    ms = [(at(EVERY // 2 - 1), at(EVERY - 1)) for _ in range(repeats + 1)][1:]  # the first round warms up
    torch.save(ms, f"{directory}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run(case: Case, repeats: int) -> dict:
    with tempfile.TemporaryDirectory() as directory:
        multiprocessing.spawn(rank_main, (case, repeats, THREADS, directory), nprocs=GRID[0] * GRID[1])
        ms = torch.load(f"{directory}/0.pt")
    step = statistics.median(without for without, _ in ms) / 2
    low, look, high = statistics.quantiles((looked - without for without, looked in ms), n=4)
    return {
        "case": f"{case.name} B={case.B} L={case.L} fp32",
        "grid": list(GRID),
        "threads_per_rank": THREADS,
        "every": EVERY,
        "step_ms": round(step, 3),
        "look_ms": round(look, 3),
        "look_ms_quartiles": [round(low, 3), round(high, 3)],
        "ratio": round(1 + look / (EVERY * step), 5),
        "limit": case.limit,
    }


def line(row: dict) -> str:
    return (
        f"{row['case']:<36} step {row['step_ms']:8.2f} ms  look {row['look_ms']:7.2f} ms  ratio at every={EVERY} "
        f"{row['ratio']:7.5f}  limit {row['limit']:4.2f}{verdict(row)}"
    )


def main() -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    run_cases("verify", __doc__.splitlines()[0], {case.name: case for case in CASES}, run, line, repeats=15)


if __name__ == "__main__":
    main()
