"""TwoLevelMultiheadAttention on one process against nn.MultiheadAttention: the ratio is our time over stock's, and the
limit is what it must not exceed.

    python benchmarks/module.py [--case TEXT] [--repeats N] [--threads N]

Letters: B batch, L length, D embed_dim, h heads.
"""

from typing import NamedTuple

import torch
from common import interleaved_ms, run_cases, verdict
from torch import nn

import two_level_mha as tlm


class Case(NamedTuple):
    name: str
    B: int
    L: int
    D: int
    h: int
    train: bool  # forward+backward, else forward in eval mode without grad (stock's fast path)
    limit: float
    repeats: int  # times --repeats


CASES = (
    Case("large, forward+backward", 8, 512, 1024, 16, True, 0.95, 1),
    Case("large, eval", 8, 512, 1024, 16, False, 1.05, 1),
    Case("small, forward+backward", 1, 128, 256, 4, True, 1.05, 20),
    Case("one wide head, forward+backward", 2, 2048, 512, 1, True, 1.05, 1),
    Case("overhead, forward+backward", 1, 1, 4, 1, True, 1.5, 100),
)


def run(case: Case, repeats: int) -> dict:
    """Verifies ours against stock, then times both."""
    stock = nn.MultiheadAttention(case.D, case.h, batch_first=True).train(case.train)
    ours = tlm.TwoLevelMultiheadAttention.from_torch(stock)
    x_BLD = torch.randn(case.B, case.L, case.D, requires_grad=case.train)
    g_BLD = torch.randn(case.B, case.L, case.D)

    def call(module):
        if case.train:
            module.zero_grad()
            x_BLD.grad = None
            y_BLD = module(x_BLD, x_BLD, x_BLD, need_weights=False)[0]
            y_BLD.backward(g_BLD)
            return y_BLD, x_BLD.grad
        with torch.no_grad():
            return (module(x_BLD, x_BLD, x_BLD, need_weights=False)[0],)

    for mine, theirs in zip(call(ours), call(stock), strict=True):
        if not torch.allclose(mine, theirs, rtol=1e-4, atol=1e-4):
            raise SystemExit(f"{case.name}: the results differ by {(mine - theirs).abs().max():.1e}")
    ms = interleaved_ms({"ours": lambda: call(ours), "stock": lambda: call(stock)}, repeats * case.repeats)
    return {
        "case": f"{case.name} B={case.B} L={case.L} D={case.D} h={case.h} fp32",
        "ours_ms": round(ms["ours"], 4),
        "stock_ms": round(ms["stock"], 4),
        "ratio": round(ms["ours"] / ms["stock"], 3),
        "limit": case.limit,
    }


def line(row: dict) -> str:
    return (
        f"{row['case']:<62} ours {row['ours_ms']:9.3f} ms  stock {row['stock_ms']:9.3f} ms"
        f"  ratio {row['ratio']:5.2f}  limit {row['limit']:4.2f}{verdict(row)}"
    )


def main() -> None:
    cases = {case.name: case for case in CASES}
    run_cases("module", __doc__.splitlines()[0], cases, run, line, repeats=9)


if __name__ == "__main__":
    main()
