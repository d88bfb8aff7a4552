"""What it costs that the ranks compare every call: a step with it over the same step without, on 4 Gloo ranks.

    python benchmarks/agreement.py [--case TEXT] [--repeats N] [--threads N]

A small Llama on a (2, 2) grid, and a copy of it whose layers compare nothing and which does not look at its inputs.
Steps of the two take turns; the ratio is that of the medians on rank 0. Collectives are counted in both.
"""

import copy
import os
import statistics
import tempfile
import time
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import transformers
from common import run_cases, verdict
from torch import nn

import two_level_mha as tlm
from two_level_mha.layer import GridAttention
from two_level_mha.testing import record_collectives

GRID = (2, 2)
THREADS = 1  # of a rank


class Case(NamedTuple):
    name: str
    training: bool
    B: int
    L: int
    hidden: int
    limit: float = 1.01


CASES = (Case("training", True, 4, 128, 256), Case("training", True, 4, 256, 512), Case("prefill", False, 4, 256, 512))


def without_agreement(model: nn.Module) -> nn.Module:
    bare = copy.deepcopy(model)
    bare._forward_pre_hooks.clear()
    bare._forward_hooks.clear()
    for module in bare.modules():
        if isinstance(module, GridAttention):
            module.calls = None
    return bare


def rank_main(rank: int, case: Case, repeats: int, threads: int, directory: str) -> None:
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=GRID[0] * GRID[1])
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=case.hidden, intermediate_size=2 * case.hidden, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=2048, tie_word_embeddings=False,
    )  # fmt: skip
    model = tlm.parallelize(transformers.LlamaForCausalLM(config), tlm.init_mesh("cpu", GRID)).train(case.training)
    models = {"with": model, "without": without_agreement(model)}
    optimizers = {name: torch.optim.AdamW(tlm.param_groups(model)) for name, model in models.items()}
    ids_BL = torch.randint(2048, (case.B, case.L))

    def step(name: str) -> None:
        with torch.set_grad_enabled(case.training):
            loss = models[name](ids_BL, labels=ids_BL, use_cache=False).loss
        if case.training:
            loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()

    ms: dict[str, list[float]] = {name: [] for name in models}
    collectives = {}
    for name in models:
        step(name)
        with record_collectives() as record:
            step(name)
        collectives[name] = len(record.calls)
    for number in range(repeats):
        for name in list(models)[:: 1 if number % 2 else -1]:
            dist.barrier()
            start = time.perf_counter()
            step(name)
            ms[name].append((time.perf_counter() - start) * 1e3)
    torch.save((ms, collectives), f"{directory}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run(case: Case, repeats: int) -> dict:
    with tempfile.TemporaryDirectory() as directory:
        multiprocessing.spawn(rank_main, (case, repeats, THREADS, directory), nprocs=GRID[0] * GRID[1])
        ms, collectives = torch.load(f"{directory}/0.pt")
    ratios = [a / b for a, b in zip(ms["with"], ms["without"], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "case": f"{case.name} B={case.B} L={case.L} D={case.hidden} fp32",
        "grid": list(GRID),
        "threads_per_rank": THREADS,
        "with_ms": round(statistics.median(ms["with"]), 3),
        "without_ms": round(statistics.median(ms["without"]), 3),
        "ratio": round(statistics.median(ms["with"]) / statistics.median(ms["without"]), 4),
        "ratio_quartiles": [round(low, 4), round(high, 4)],
        "collectives_more": collectives["with"] - collectives["without"],
        "limit": case.limit,
    }


def line(row: dict) -> str:
    return (
        f"{row['case']:<34} with {row['with_ms']:8.2f} ms  without {row['without_ms']:8.2f} ms  ratio "
        f"{row['ratio']:6.4f}  collectives +{row['collectives_more']}  limit {row['limit']:4.2f}{verdict(row)}"
    )


def main() -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    cases = {f"{case.name} {case.L} {case.hidden}": case for case in CASES}
    run_cases("agreement", __doc__.splitlines()[0], cases, run, line, repeats=60)


if __name__ == "__main__":
    main()
