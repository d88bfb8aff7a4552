"""The attention op on the CPU against stock: scaled_dot_product_attention, and the same with V padded by
zeros to the width of Q and K. The ratio is that of the faster of the two to ours; the floor is what it must
reach.

    python benchmarks/partial_attention.py [--case TEXT] [--repeats N] [--threads N]
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from common import interleaved_ms, run_cases

import two_level_mha  # noqa: F401 (registers the ops)

attend = torch.ops.two_level_mha.partial_attention
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


class Case(NamedTuple):
    dtype: torch.dtype
    d_qk: int
    d_v: int
    causal: bool
    backward: bool
    floor: float
    length: int = 2048
    heads: int = 8

    def name(self) -> str:
        kind = "bf16" if self.dtype == torch.bfloat16 else "fp32"
        mask = "causal" if self.causal else "full"
        passes = "forward+backward" if self.backward else "forward"
        return f"{kind} ({self.d_qk},{self.d_v}) L={self.length} h={self.heads} {mask} {passes}"


# (d_qk, d_v): fp32 floors of forward full, causal, forward+backward full, causal; bf16 of forward and of both
FLOORS = {
    (512, 256): (1.35, 1.5, 1.08, 1.5, 2.3, 1.9),
    (512, 128): (1.6, 1.75, 1.12, 1.7, 2.3, 1.9),
    (128, 32): (1.55, 1.6, 1.5, 1.75, 2.3, 1.9),
    (64, 64): (1.0, 1.0, 1.0, 1.0, 1.5, 1.4),
    (128, 128): (1.0, 1.0, 1.0, 1.0, 1.5, 1.4),
    (512, 512): (1.0, 1.0, 1.0, 1.0, 1.5, 1.4),
}


def cases() -> list[Case]:
    found = []
    for (d_qk, d_v), (full, causal, both_full, both_causal, half, half_both) in FLOORS.items():
        fp32 = {
            (False, False): full,
            (True, False): causal,
            (False, True): both_full,
            (True, True): both_causal,
        }
        for (is_causal, backward), floor in fp32.items():
            found.append(Case(torch.float32, d_qk, d_v, is_causal, backward, floor))
            found.append(Case(torch.bfloat16, d_qk, d_v, is_causal, backward, half_both if backward else half))
    found.append(Case(torch.float32, 64, 64, False, False, 1.0, length=128, heads=4))
    found.append(Case(torch.float32, 64, 64, False, True, 1.0, length=128, heads=4))
    return found


def ours(case, q, k, v):
    return attend(q, k, v, causal=0 if case.causal else None)[0]


def stock(case, q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=case.causal)


def padded(case, q, k, v):
    wide = F.pad(v, (0, max(case.d_qk - case.d_v, 0)))
    return F.scaled_dot_product_attention(q, k, wide, is_causal=case.causal)[..., : case.d_v]


def relative(x, y):
    return ((x.double() - y.double()).norm() / y.double().norm()).item()


def run(case: Case, repeats: int) -> dict:
    """Verifies ours against stock, then times all three."""
    q, k, v, g = (
        torch.randn(1, case.heads, case.length, d).to(case.dtype) for d in (case.d_qk, case.d_qk, case.d_v, case.d_v)
    )
    inputs = [x.requires_grad_(case.backward) for x in (q, k, v)]

    def call(function):
        out = function(case, *inputs)
        return torch.autograd.grad(out, inputs, g) if case.backward else (out,)

    for ours_one, stock_one in zip(call(ours), call(stock), strict=True):
        error = relative(ours_one, stock_one)
        # NaN fails too
        if not error < 2 * TOLERANCE[case.dtype]:
            raise SystemExit(f"{case.name()}: relative error {error:.1e}")
    if case.length < 1024:  # short ones vary more and cost less
        repeats *= max(1, math.isqrt(2048 // case.length) * 5)
    functions = {f.__name__: lambda f=f: call(f) for f in (ours, stock, padded)}
    ms = interleaved_ms(functions, repeats)
    ratio = min(ms["stock"], ms["padded"]) / ms["ours"]
    return {
        "case": case.name(),
        **{f"{k}_ms": round(x, 3) for k, x in ms.items()},
        "ratio": round(ratio, 3),
        "floor": case.floor,
    }


def line(row: dict) -> str:
    mark = "" if row["ratio"] >= row["floor"] else "  BELOW"
    return (
        f"{row['case']:<48} ours {row['ours_ms']:9.3f} ms  sdpa {row['stock_ms']:9.3f} ms"
        f"  padded {row['padded_ms']:9.3f} ms  ratio {row['ratio']:5.2f}  floor {row['floor']:4.2f}{mark}"
    )


def main() -> None:
    named = {case.name(): case for case in cases()}
    run_cases("partial_attention", __doc__.splitlines()[0], named, run, line, repeats=5)


if __name__ == "__main__":
    main()
