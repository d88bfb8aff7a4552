"""How long torch.compile with inductor takes to compile a split layer or model, and the unsplit one.

    python benchmarks/compiling.py [--case TEXT] [--repeats N] [--threads N]

On 2 Gloo ranks, each of which compiles either the split module or the whole one, in turns, so that both are compiled by
as many processes at once. Nothing is found in a cache: each is compiled into an empty folder. Counted is the first call
of a fresh compilation, forward and, where a case trains, backward, less a second call.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import transformers
from common import run_cases, verdict
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache
from torch.distributed.device_mesh import DeviceMesh

import two_level_mha as tlm

GRID = (1, 2)
D, H, B, L = 64, 4, 2, 32


class Case(NamedTuple):
    name: str
    scheme: str
    training: bool
    limit: float = 1.5


CASES = (
    *(
        Case("layer", scheme, training)
        for scheme in ("slices", "sequence", "heads", "weights")
        for training in (False, True)
    ),
    Case("llama", "auto", False),
    Case("llama", "auto", True),
)


def layers(case: Case, mesh: DeviceMesh) -> dict[str, Callable[[], Tensor]]:
    x_BLD = torch.randn(B, L, D)
    split = tlm.TwoLevelMultiheadAttention(D, H, batch_first=True, mesh=mesh, scheme=case.scheme)
    whole = nn.MultiheadAttention(D, H, batch_first=True)
    return {
        name: torch.compile(lambda of=of: of(x_BLD, x_BLD, x_BLD, need_weights=False)[0].sum())
        for name, of in {"split": split, "stock": whole}.items()
    }


def models(case: Case, mesh: DeviceMesh) -> dict[str, Callable[[], Tensor]]:
    config = transformers.LlamaConfig(
        hidden_size=D, intermediate_size=2 * D, num_hidden_layers=2, num_attention_heads=H, num_key_value_heads=2,
        vocab_size=128, tie_word_embeddings=False,
    )  # fmt: skip
    ids_BL = torch.randint(128, (B, L))
    whole = transformers.LlamaForCausalLM(config)
    split = tlm.parallelize(transformers.LlamaForCausalLM(config), mesh, scheme=case.scheme)
    return {
        name: torch.compile(lambda of=of: of(ids_BL, labels=ids_BL, use_cache=False).loss)
        for name, of in {"split": split, "stock": whole}.items()
    }


def rank_main(rank: int, case: Case, repeats: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=GRID[0] * GRID[1])
    torch.manual_seed(0)
    steps = (layers if case.name == "layer" else models)(case, tlm.init_mesh("cpu", GRID))

    def seconds(step: Callable[[], Tensor]) -> float:
        dist.barrier()
        start = time.perf_counter()
        with torch.set_grad_enabled(case.training):
            result = step()
        if case.training:
            result.backward()
        return time.perf_counter() - start

    with fresh_cache():
        seconds(torch.compile(lambda: torch.ones(3, requires_grad=True).exp().sum()))  # the compiler's own first time
    found: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats):
        for name in list(steps)[:: -1 if repeat % 2 else 1]:
            torch._dynamo.reset()
            with fresh_cache():
                first = seconds(steps[name])
                found[name].append(first - seconds(steps[name]))
    torch.save(found, f"{directory}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run(case: Case, repeats: int) -> dict:
    with tempfile.TemporaryDirectory() as directory:
        multiprocessing.spawn(rank_main, (case, repeats, directory), nprocs=GRID[0] * GRID[1])
        found = torch.load(f"{directory}/0.pt")
    ours, stock = statistics.median(found["split"]), statistics.median(found["stock"])
    return {
        "case": f"{case.name} {case.scheme}, {'training' if case.training else 'inference'}",
        "grid": list(GRID),
        "split_s": round(ours, 2),
        "stock_s": round(stock, 2),
        "ratio": round(ours / stock, 3),
        "limit": case.limit,
    }


def line(row: dict) -> str:
    return (
        f"{row['case']:<28} {row['split_s']:7.2f} s  stock {row['stock_s']:7.2f} s  ratio {row['ratio']:6.3f}  "
        f"limit {row['limit']:4.2f}{verdict(row)}"
    )


def main() -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    cases = {f"{case.name} {case.scheme} {'training' if case.training else 'inference'}": case for case in CASES}
    run_cases("compiling", __doc__.splitlines()[0], cases, run, line, repeats=3)


if __name__ == "__main__":
    main()
