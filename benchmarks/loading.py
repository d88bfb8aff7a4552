"""Peak host memory of tlm.load_pretrained per rank, over the rank's own share of the model.

    python benchmarks/loading.py [--case TEXT] [--repeats N] [--threads N]

A random bf16 decoder is written as safetensors of at most 400 MB, built on meta, split on a (2, 2) grid of Gloo ranks
and filled. The peak is the largest RssAnon (memory that no file backs) seen every millisecond during the call, minus
its value before the call, after freed memory was given back. Each repeat starts new ranks; the figures are the worst
of all ranks and repeats.
"""

import ctypes
import gc
import multiprocessing
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import transformers
from common import run_cases, verdict
from torch.distributed.tensor import DTensor

import two_level_mha as tlm

GRID = (2, 2)
LIMIT = 1.15
SIZES = {
    "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 32000,
    "tie_word_embeddings": False,
}  # fmt: skip


class Case(NamedTuple):
    name: str
    kind: str
    sizes: dict


CASES = (
    Case("Llama", "Llama", {"num_hidden_layers": 10, "intermediate_size": 5632}),
    Case("Mixtral", "Mixtral", {"num_hidden_layers": 8, "intermediate_size": 1408, "num_local_experts": 8}),
)


def config_of(case: Case):
    return getattr(transformers, f"{case.kind}Config")(**SIZES, **case.sizes, dtype="bfloat16")


def write(case: Case, directory: str) -> int:
    """Writes the model; its size in bytes."""
    torch.manual_seed(0)
    model = getattr(transformers, f"{case.kind}ForCausalLM")._from_config(config_of(case), dtype=torch.bfloat16)
    model.save_pretrained(directory, max_shard_size="400MB")
    return sum(p.numel() * p.element_size() for p in model.parameters())


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon")


class Peak:
    """The largest RssAnon during a with block, minus that before it."""

    def __enter__(self) -> "Peak":
        self.before = self.largest = anonymous_bytes()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.done.wait(1e-3):
            self.largest = max(self.largest, anonymous_bytes())

    def __exit__(self, *error) -> None:
        self.done.set()
        self.thread.join()
        self.largest = max(self.largest, anonymous_bytes())

    @property
    def bytes(self) -> int:
        return self.largest - self.before


def measure(case: Case, directory: str) -> dict[str, float]:
    """On one of four ranks: bytes that it keeps, peak bytes and seconds of the call."""
    with torch.device("meta"):
        model = getattr(transformers, f"{case.kind}ForCausalLM")._from_config(config_of(case), dtype=torch.bfloat16)
    tlm.parallelize(model, tlm.init_mesh("cpu", GRID))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or what the trial run of parallelize has freed would be used again, unseen
    dist.barrier()
    start = time.perf_counter()
    with Peak() as peak:
        tlm.load_pretrained(model, directory)
    seconds = time.perf_counter() - start
    local = [p._local_tensor if isinstance(p, DTensor) else p for p in model.parameters()]
    return {"share": sum(x.numel() * x.element_size() for x in local), "peak": peak.bytes, "seconds": seconds}


def rank_main(rank: int, case: Case, directory: str, store: str, found) -> None:
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=GRID[0] * GRID[1])
    found.put(measure(case, directory))
    dist.destroy_process_group()


def run(case: Case, repeats: int) -> dict:
    start = multiprocessing.get_context("spawn")
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        writer = start.Process(target=write, args=(case, directory))
        writer.start()
        writer.join()
        if writer.exitcode:
            raise SystemExit(f"{case.name}: the model was not written (exit status {writer.exitcode})")
        size = sum(file.stat().st_size for file in Path(directory).glob("*.safetensors"))
        for repeat in range(repeats):
            found = start.Queue()
            args = (case, directory, f"{directory}/store{repeat}", found)
            ranks = [start.Process(target=rank_main, args=(rank, *args)) for rank in range(GRID[0] * GRID[1])]
            for one in ranks:
                one.start()
            rows += [found.get(timeout=600) for _ in ranks]
            for one in ranks:
                one.join()
    ratios = [row["peak"] / row["share"] for row in rows]
    return {
        "case": f"{case.name}, bf16, {size / 1e9:.2f} GB, grid {GRID[0]}x{GRID[1]}",
        "share_mb": round(max(row["share"] for row in rows) / 1e6, 1),
        "peak_mb": round(max(row["peak"] for row in rows) / 1e6, 1),
        "ratio": round(max(ratios), 3),
        "limit": LIMIT,
        "seconds": round(max(row["seconds"] for row in rows), 2),
    }


def line(row: dict) -> str:
    return (
        f"{row['case']:44s} share {row['share_mb']:7.1f} MB, peak {row['peak_mb']:7.1f} MB "
        f"({row['ratio']:.2f}, limit {row['limit']}{verdict(row)}), {row['seconds']:.1f} s"
    )


if __name__ == "__main__":
    run_cases("loading", __doc__.splitlines()[0], {case.name: case for case in CASES}, run, line, repeats=2)
