"""What it costs that the ranks compare every call, of a step on 2 Gloo ranks.

    python benchmarks/agreement.py [--case TEXT] [--repeats N] [--threads N]

A small Llama on a (1, 2) grid, and another whose layers compare nothing and which does not look at its inputs; steps of
the two take turns, and collectives are counted in both. On a shared machine their times differ by several percent from
step to step, more than what is asked for: the wall ratio is given with its quartiles, and has no limit. So all that a
call does to be compared is also timed alone, on both ranks at once, as often as a step does it: the ratio that has a
limit is (the step without + that time) / the step without, of medians.
"""

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
from torch import Tensor, nn

import two_level_mha as tlm
from two_level_mha.agreement import ModelInputs
from two_level_mha.layer import GridAttention
from two_level_mha.testing import record_collectives

GRID = (1, 2)  # a core for each rank: with more ranks than cores the scheduler is all that is seen
THREADS = 1  # of a rank
ops = torch.ops.two_level_mha


class Case(NamedTuple):
    name: str
    training: bool
    B: int
    L: int
    hidden: int
    limit: float = 1.01


CASES = (Case("training", True, 4, 128, 256), Case("training", True, 4, 256, 512), Case("prefill", False, 4, 256, 512))


def split_model(case: Case, compares: bool) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=case.hidden, intermediate_size=2 * case.hidden, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=2048, tie_word_embeddings=False,
    )  # fmt: skip
    model = tlm.parallelize(transformers.LlamaForCausalLM(config), tlm.init_mesh("cpu", GRID)).train(case.training)
    if not compares:
        model._forward_pre_hooks.clear()
        model._forward_hooks.clear()
        for module in model.modules():
            if isinstance(module, GridAttention):
                module.calls = None
    return model


def compare_once(layer: GridAttention, x_BLD: Tensor, y_BLD: Tensor, rows: list[Tensor]) -> None:
    """What a call of a layer does to be compared.

    Not the exchange, nor the copy of y into its buffer: without a comparison the sum makes one too.
    """
    B, L, _ = x_BLD.shape
    how = (layer.scheme, True, 4, False, True)
    number = layer._begin(how, [B, L, L, 0, 0], False, False, x_BLD)
    name, ranks = layer.calls.name, layer.place.grid.size
    seal = ops.seal([x_BLD, *rows], [number, *range(20)], name)
    seal = ops.seal([], [*range(20)], "", seal)
    digits = ops.seal_digits(seal, y_BLD.dtype, ranks)
    buffer = torch.cat([y_BLD.view(-1)[:1], digits])
    ops.opened(buffer[:1], buffer[-len(digits) :] * ranks, seal, ranks, layer.place.groups[2], name)
    layer.calls.end()


def added_ms(model: nn.Module, ids_BL: Tensor, hidden: int, repeats: int) -> float:
    layers = [module for module in model.modules() if isinstance(module, GridAttention)]
    inputs = next(hook for hook in model._forward_pre_hooks.values() if isinstance(hook, ModelInputs))
    B, L = ids_BL.shape
    xs = [torch.randn(B, L, hidden) for _ in layers]
    ys = [torch.randn(B, L, hidden) for _ in layers]
    rows = [torch.randn(1, 1, L, layers[0].head_dim) for _ in range(2)]
    ms = []
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        inputs(model, (ids_BL,), {"labels": ids_BL})
        for layer, x_BLD, y_BLD in zip(layers, xs, ys, strict=True):
            compare_once(layer, x_BLD, y_BLD, rows)
        ms.append((time.perf_counter() - start) * 1e3)
    return statistics.median(ms)


def rank_main(rank: int, case: Case, repeats: int, threads: int, directory: str) -> None:
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=GRID[0] * GRID[1])
    models = {"with": split_model(case, True), "without": split_model(case, False)}
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
    with torch.set_grad_enabled(case.training):
        added = added_ms(models["with"], ids_BL, case.hidden, repeats)
    torch.save((ms, added, collectives), f"{directory}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run(case: Case, repeats: int) -> dict:
    with tempfile.TemporaryDirectory() as directory:
        multiprocessing.spawn(rank_main, (case, repeats, THREADS, directory), nprocs=GRID[0] * GRID[1])
        ms, added, collectives = torch.load(f"{directory}/0.pt")
    ratios = [a / b for a, b in zip(ms["with"], ms["without"], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    without = statistics.median(ms["without"])
    return {
        "case": f"{case.name} B={case.B} L={case.L} D={case.hidden} fp32",
        "grid": list(GRID),
        "threads_per_rank": THREADS,
        "added_ms": round(added, 3),
        "without_ms": round(without, 3),
        "ratio": round((without + added) / without, 4),
        "wall_ratio": round(statistics.median(ms["with"]) / without, 4),
        "wall_ratio_quartiles": [round(low, 4), round(high, 4)],
        "collectives_more": collectives["with"] - collectives["without"],
        "limit": case.limit,
    }


def line(row: dict) -> str:
    low, high = row["wall_ratio_quartiles"]
    return (
        f"{row['case']:<34} added {row['added_ms']:6.3f} ms to {row['without_ms']:8.2f} ms  ratio {row['ratio']:6.4f}  "
        f"limit {row['limit']:4.2f}  wall {row['wall_ratio']:6.4f} [{low:6.4f}, {high:6.4f}]  "
        f"collectives +{row['collectives_more']}{verdict(row)}"
    )


def main() -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    cases = {f"{case.name} {case.L} {case.hidden}": case for case in CASES}
    run_cases("agreement", __doc__.splitlines()[0], cases, run, line, repeats=60)


if __name__ == "__main__":
    main()
