"""Slices of heads that m does not divide: ceil(d / m) columns each, the last ones narrower or empty.

Every exact scheme against the unsplit layer, float64 on real Gloo ranks (level T), values and gradients, and the bytes
of each against the table of csrc/plan/traffic.h (level E).
"""

from dataclasses import replace

import pytest
from harness.layer import Case, errors, place

GRIDS = [(1, 3), (2, 3), (1, 7)]
WIDTHS = (8, 16, 64)  # on 3 ranks 3 3 2, 6 6 4, 22 22 20; on 7 ranks 2 2 2 2 0 0 0, 3 3 3 3 3 1 0, 10 .. 4
SCHEMES = ["auto", "slices", "sequence", "batch", "heads", "weights"]
FEATURES = {
    "none": {},
    "causal": {"causal": 0, "length": 7},
    "causal and bias, concat": {"causal": 0, "mask": "bias", "length": 9, "combine": "concat"},
    "cross, extra keys": {"length": 5, "keys": 7, "extra_keys": True},
    "dropout, softcap": {"dropout": 0.3, "softcap": 1.5, "combine": "concat"},
    "gated, sinks": {"gated": True, "sinks": True, "causal": 0, "length": 7},
    "window": {"causal": 0, "window": 3, "length": 9, "bias": False, "batch_first": False},
}


def run_cases(n, m, cases):
    return [errors(case, place(n, m)) for case in cases]


def heads(scheme, n, m, grouped):
    """Query and KV heads that the grid takes; for whole heads, each side of the rule in turn."""
    if scheme == "heads":
        return {"heads": 2 * m * n, "kv_heads": n if grouped else n * m}
    return {"heads": 4 * n, "kv_heads": 2 * n if grouped else 4 * n}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_against_the_unsplit_layer(pool, scheme, grid):
    """T. Localises: padding of narrow slices that is sent into heads, columns dealt to another rank, an empty slice in
    a projection, in attention or in a gradient; per scheme.
    """
    n, m = grid
    cases = []
    for at, options in enumerate(FEATURES.values()):
        for width in WIDTHS if at < 3 else WIDTHS[at % 2 : at % 2 + 1]:
            cases.append(replace(Case(scheme=scheme, head_dim=width, **heads(scheme, n, m, at % 2 == 0)), **options))
    failures = [
        f"rank {rank}, {name} off by {error:.1e}: {case}"
        for rank, found in enumerate(pool.run(run_cases, n * m, n, m, cases, timeout=180))
        for case, by_name in zip(cases, found, strict=True)
        for name, error in by_name.items()
        if not error <= 1e-10
    ]
    assert not failures, "\n".join(failures[:20])
