"""The attention op on the CPU: against scaled_dot_product_attention, and what features and memory cost.

    python benchmarks/partial_attention.py [--case TEXT] [--repeats N] [--threads N]
    python benchmarks/partial_attention.py --device cuda          on a GPU: gpu/attention.py

A ratio with a floor is how many times faster ours is than the fastest of stock's calls: for d_v < d_qk also with V
padded by zeros, for one token with grouped heads also with the group folded into rows; for latents, whose first columns
are the values, the latter or two products around a softmax, as models write them. A ratio with a limit is what a
feature costs, our time with it over that without. Where a floor or limit is missed the exit status is 1.
Floors are those of the CPU's level; ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
holds torch, oneDNN, MKL and so us to AVX2.
Letters: L queries, S keys, h query heads, k KV heads.
"""

import math
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from common import interleaved_ms, peak_mib, run_cases, verdict
from gpu import attention
from gpu.driver import run_program

from two_level_mha import _C

attend = torch.ops.two_level_mha.partial_attention
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
KIND = {torch.float32: "fp32", torch.bfloat16: "bf16"}
PASSES = {False: "forward", True: "forward+backward"}


class Case(NamedTuple):
    """Sizes of a call against stock, and how many times faster it must be."""

    dtype: torch.dtype
    d_qk: int
    d_v: int
    causal: bool
    backward: bool
    floor: float
    length: int = 2048
    keys: int | None = None
    heads: int = 8
    kv_heads: int | None = None
    folds: bool = True  # stock may fold the query heads of a KV head into rows; else it gets the grouped call alone
    latent: bool = False  # values are the first columns of keys

    def name(self) -> str:
        kind, mask = KIND[self.dtype], "causal" if self.causal else "full"
        sizes = f"({self.d_qk},{self.d_v}) L={self.length} h={self.heads}"
        if self.keys:
            what = "decode latents" if self.latent else "decode"
            return f"{what} {kind} {sizes} S={self.keys} k={self.kv_heads}" + ("" if self.folds else " grouped call")
        return f"{kind} {sizes} {mask} {PASSES[self.backward]}"


# (d_qk, d_v): fp32 floors of forward full, causal, forward+backward full, causal; bf16 of forward and of both
WIDTHS = ((512, 256), (512, 128), (128, 32), (64, 64), (128, 128), (512, 512))
NEVER_SLOWER = dict.fromkeys(WIDTHS, (1.0,) * 6)
FLOORS = {
    "AVX512-BF16": {
        (512, 256): (1.35, 1.5, 1.08, 1.5, 2.3, 1.9),
        (512, 128): (1.6, 1.75, 1.12, 1.7, 2.3, 1.9),
        (128, 32): (1.55, 1.6, 1.5, 1.75, 2.3, 1.9),
        (64, 64): (1.0, 1.0, 1.0, 1.0, 1.5, 1.4),
        (128, 128): (1.0, 1.0, 1.0, 1.0, 1.5, 1.4),
        (512, 512): (1.0, 1.0, 1.0, 1.0, 1.5, 1.4),
    },
    "AVX2": NEVER_SLOWER
    | {
        (512, 256): (1.3, 1.45, 1.08, 1.3, 1.3, 1.0),
        (512, 128): (1.55, 1.7, 1.12, 1.7, 1.5, 1.1),
        (128, 32): (1.45, 1.6, 1.45, 1.7, 1.45, 1.7),
    },
}

# One token of one sequence: query heads, KV heads, whether stock folds; of multi-head latent attention: query heads,
# latents. Floors in fp32 and bf16. With AMX stock's grouped call is faster, and two products of 128 heads in fp32 run
# at the CPU's peak.
DECODE = {
    (8, 1, False): (3.0, 8.0),
    (8, 1, True): (1.2, 1.2),
    (1, 1, True): (1.2, 1.2),
    (8, 8, True): (1.0, 1.0),
}
LATENTS = {(16, 32768): (1.7, 1.3), (128, 8192): (1.1, 1.1)}
DECODE_WITH_AMX = DECODE | {(8, 1, False): (3.0, 2.5)}
LATENTS_WITH_AMX = LATENTS | {(128, 8192): (1.0, 1.5)}


def against_stock() -> list[Case]:
    found = []
    table = FLOORS.get(_C.Machine().cpu, NEVER_SLOWER)
    for widths, (full, causal, both_full, both_causal, half, half_both) in table.items():
        floors = {(False, False): full, (True, False): causal, (False, True): both_full, (True, True): both_causal}
        for (is_causal, backward), floor in floors.items():
            found.append(Case(torch.float32, *widths, is_causal, backward, floor))
            found.append(Case(torch.bfloat16, *widths, is_causal, backward, half_both if backward else half))
    for backward in (False, True):
        found.append(Case(torch.float32, 64, 64, False, backward, 1.0, length=128, heads=4))
    amx = _C.Machine().cpu.startswith("AMX")
    for (heads, kv_heads, folds), floors in (DECODE_WITH_AMX if amx else DECODE).items():
        for dtype, floor in zip(KIND, floors, strict=True):
            sizes = {"length": 1, "keys": 32768, "heads": heads, "kv_heads": kv_heads, "folds": folds}
            found.append(Case(dtype, 128, 128, False, False, floor, **sizes))
    for (heads, keys), floors in (LATENTS_WITH_AMX if amx else LATENTS).items():
        for dtype, floor in zip(KIND, floors, strict=True):
            sizes = {"length": 1, "keys": keys, "heads": heads, "kv_heads": 1, "latent": True}
            found.append(Case(dtype, 576, 512, False, False, floor, **sizes))
    return found


def ours(case, q, k, v):
    return attend(q, k, v, causal=0 if case.causal else None)[0]


def stock(case, q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=q.shape[1] != k.shape[1])


def padded(case, q, k, v):
    wide = F.pad(v, (0, case.d_qk - case.d_v))
    return F.scaled_dot_product_attention(q, k, wide, is_causal=case.causal)[..., : case.d_v]


def folded(case, q, k, v):
    """The query heads that share a KV head as rows of one head: (1, h, 1, d) as (1, k, h/k, d)."""
    rows, wide = q.unflatten(1, (k.shape[1], -1)).squeeze(3), k if case.latent else v
    return F.scaled_dot_product_attention(rows, k, wide)[..., : case.d_v].flatten(1, 2).unsqueeze(2)


def products(case, q, k, v):
    weights = (q.transpose(1, 2) @ k.transpose(2, 3) / math.sqrt(case.d_qk)).softmax(-1, dtype=torch.float32)
    return (weights.to(q.dtype) @ v).transpose(1, 2)


def stocks(case: Case) -> list[Callable]:
    """What ours is compared with: stock's call, and what a user would write where that one is slow."""
    if case.latent:  # stock's other calls take a hundred times as long
        return [folded, products]
    found = [stock]
    if case.d_v != case.d_qk:
        found.append(padded)
    if case.folds and case.length == 1 and case.kv_heads != case.heads:
        found.append(folded)
    return found


def relative(x, y):
    return ((x.double() - y.double()).norm() / y.double().norm()).item()


def run_against_stock(case: Case, repeats: int) -> dict:
    """Verifies stock's calls against ours, then times all of them; the ratio is that of the fastest of stock's."""
    kv_heads, keys = case.kv_heads or case.heads, case.keys or case.length
    q = torch.randn(1, case.heads, case.length, case.d_qk).to(case.dtype)
    k, v = (torch.randn(1, kv_heads, keys, d).to(case.dtype) for d in (case.d_qk, case.d_v))
    v = k[..., : case.d_v] if case.latent else v
    g = torch.randn(1, case.heads, case.length, case.d_v).to(case.dtype)
    inputs = [x.requires_grad_(case.backward) for x in (q, k, v)]

    def call(function):
        out = function(case, *inputs)
        return torch.autograd.grad(out, inputs, g) if case.backward else (out,)

    for other in stocks(case):
        for ours_one, stock_one in zip(call(ours), call(other), strict=True):
            error = relative(ours_one, stock_one)
            # NaN fails too
            if not error < 2 * TOLERANCE[case.dtype]:
                raise SystemExit(f"{case.name()}: {other.__name__} differs by a relative error of {error:.1e}")
    if case.length < 1024:  # short ones vary more and cost less
        repeats *= max(1, math.isqrt(2048 // case.length) * 5 if not case.keys else 4)
    ms = interleaved_ms({f.__name__: partial(call, f) for f in (ours, *stocks(case))}, repeats)
    fastest = min(ms[name] for name in ms if name != "ours")
    return {
        "case": case.name(),
        **{f"{name}_ms": round(x, 3) for name, x in ms.items()},
        "ratio": round(fastest / ms["ours"], 3),
        "floor": case.floor,
    }


# Feature: KV heads of 8, the op's options
FEATURES: dict[str, tuple[int, Callable[[int, torch.dtype], dict]]] = {
    "bool mask (1,1,L,S)": (8, lambda L, dtype: {"attn_mask": torch.rand(1, 1, L, L) < 0.7}),
    "additive mask (1,1,L,S)": (8, lambda L, dtype: {"attn_mask": torch.randn(1, 1, L, L).to(dtype)}),
    "additive mask (1,h,L,S)": (8, lambda L, dtype: {"attn_mask": torch.randn(1, 8, L, L).to(dtype)}),
    "padding mask (1,1,1,S)": (8, lambda L, dtype: {"attn_mask": torch.rand(1, 1, 1, L) < 0.9}),
    "GQA 8 on 2": (2, lambda L, dtype: {}),
    "dropout": (8, lambda L, dtype: {"dropout_p": 0.1, "seed": torch.tensor([3])}),
}


# What a feature may cost by the CPU's level, times the call without it. The bytes of a mask are the same on all.
COSTS = {"AVX2": 1.25}


class Cost(NamedTuple):
    """A feature whose call may take `limit` times that without it."""

    dtype: torch.dtype
    feature: str
    backward: bool
    width: int = 128
    length: int = 2048
    limit: float = COSTS.get(_C.Machine().cpu, 1.2)

    def name(self) -> str:
        sizes = f"({self.width},{self.width}) L={self.length} h=8"
        return f"cost of {self.feature}, {KIND[self.dtype]} {sizes} {PASSES[self.backward]}"


def run_cost(case: Cost, repeats: int) -> dict:
    kv_heads, options = FEATURES[case.feature]
    given = options(case.length, case.dtype)
    q, g = (torch.randn(1, 8, case.length, case.width).to(case.dtype) for _ in range(2))
    k, v = (torch.randn(1, 8, case.length, case.width).to(case.dtype) for _ in range(2))

    def call(heads, **options):
        inputs = [x.detach().requires_grad_(case.backward) for x in (q, k[:, :heads], v[:, :heads])]
        out = attend(*inputs, **options)[0]
        if case.backward:
            torch.autograd.grad(out, inputs, g)

    ms = interleaved_ms({"ours": partial(call, kv_heads, **given), "without": partial(call, 8)}, repeats)
    return {
        "case": case.name(),
        **{f"{name}_ms": round(x, 3) for name, x in ms.items()},
        "ratio": round(ms["ours"] / ms["without"], 3),
        "limit": case.limit,
    }


class Memory(NamedTuple):
    """Peak memory of forward+backward above the inputs; outputs and gradients count."""

    length: int = 16384
    width: int = 64
    limit_mib: float = 48.0

    def name(self) -> str:
        return f"memory fp32 ({self.width},{self.width}) L={self.length} h=1 {PASSES[True]}"


def run_memory(case: Memory, repeats: int) -> dict:
    def call(length):
        inputs = [torch.randn(1, 1, length, case.width, requires_grad=True) for _ in range(3)]
        g = torch.randn(1, 1, length, case.width)

        def both():
            out = attend(*inputs)[0]
            return out, torch.autograd.grad(out, inputs, g)

        return both

    call(256)()  # threads and compiled kernels are no part of it
    results = 4 * case.length * case.width * 4 / 2**20
    return {
        "case": case.name(),
        "mib": round(peak_mib(call(case.length)), 1),
        "of_it_results_mib": results,
        "limit_mib": case.limit_mib,
    }


def line(row: dict) -> str:
    if "mib" in row:
        return (
            f"{row['case']:<72} peak {row['mib']:6.1f} MiB, results {row['of_it_results_mib']:5.1f}"
            f"  limit {row['limit_mib']:5.1f}{verdict(row)}"
        )
    times = "".join(f"  {name[:-3]} {ms:9.3f} ms" for name, ms in row.items() if name.endswith("_ms"))
    kind = "floor" if "floor" in row else "limit"
    return f"{row['case']:<72}{times}  ratio {row['ratio']:5.2f}  {kind} {row[kind]:4.2f}{verdict(row)}"


RUN = {Memory: run_memory, Case: run_against_stock, Cost: run_cost}


def main() -> None:
    if any(argument.startswith("--device") for argument in sys.argv):
        return run_program("partial_attention", attention.__doc__, attention.cases)
    costs = [
        Cost(dtype, feature, backward, width)
        for width in (128, 64)
        for feature in FEATURES
        for dtype in KIND
        for backward in PASSES
    ]
    named = {case.name(): case for case in (Memory(), *against_stock(), *costs)}
    run_cases("partial_attention", __doc__.splitlines()[0], named, lambda c, n: RUN[type(c)](c, n), line, repeats=5)


if __name__ == "__main__":
    main()
