"""Every scheme on every grid against the unsplit layer, float64 on real Gloo ranks (level T),
values and gradients.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from harness.layer import Case, errors, place

GRIDS = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 2), (2, 4), (3, 2)]
SCHEMES = ["independent", "slices", "sequence", "batch", "heads", "weights", "auto"]
COMBINES = ["reduce", "concat"]

# What changes which rows, keys or numbers meet: each meets every scheme on every grid.
FEATURES = {
    "none": {},
    "odd length": {"length": 7},
    "causal": {"causal": 0, "length": 7},
    "causal, short": {"causal": 0, "length": 3},
    "padding": {"mask": "padding"},
    "causal and padding": {"causal": 0, "mask": "padding", "length": 5},
    "bias": {"mask": "bias", "length": 5},
    "causal and bias": {"causal": 0, "mask": "bias", "length": 9},
    "empty rows": {"mask": "empty rows"},
    "cross": {"length": 5, "keys": 7},
    "cross, bias, offset": {"length": 3, "keys": 8, "causal": 5, "mask": "bias"},
    "extra keys": {"extra_keys": True, "mask": "bias", "length": 5},
    "window and softcap": {"causal": 0, "window": 3, "softcap": 1.5, "length": 9},
    "dropout": {"dropout": 0.3, "causal": 0, "length": 7},
    "one row": {"length": 1, "keys": 5},
}


def run_cases(n, m, cases):
    return [errors(case, place(n, m)) for case in cases]


def heads(scheme, n, m, grouped):
    """Query and KV heads that the grid takes; for whole heads, each side of the rule in turn."""
    if scheme == "heads":
        return {"heads": 8 * n, "kv_heads": n * max(1, m // 2) if grouped else n * m}
    return {"kv_heads": 12 if not grouped else 6 if n == 3 else 4}


def check(pool, grid, cases, timeout):
    n, m = grid
    results = pool.run(run_cases, n * m, n, m, cases, timeout=timeout)
    failures = [
        f"rank {rank}, {name} off by {error:.1e}: {case}"
        for rank, per_case in enumerate(results)
        for case, found in zip(cases, per_case, strict=True)
        for name, error in found.items()
        if not error <= 1e-10
    ]
    assert not failures, "\n".join(failures[:20])


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_against_the_unsplit_layer(pool, scheme, grid):
    """T. Localises: the pass, per scheme and grid; GQA, combine,
    bias and batch_first alternate over the features.
    """
    cases = []
    for at, options in enumerate(FEATURES.values()):
        base = Case(
            scheme=scheme,
            combine=COMBINES[at % 2],
            bias=at % 4 != 3,
            batch_first=at % 5 != 4,
            **heads(scheme, *grid, at % 3 != 0),
        )
        cases.append(replace(base, **options))
    check(pool, grid, cases, timeout=120)


# What `leave` does besides attention: of its output, and of its scores.
AFTER = (
    {"gated": True},
    {"sinks": True},
    {"gated": True, "sinks": True, "causal": 0, "length": 7},
    {"scores": True, "mask": "padding"},
    {"scores": True, "causal": 0, "length": 7, "sinks": True},
)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != "independent"])
def test_gates_sinks_and_scores(pool, scheme, grid):
    """T. Localises: gates of other heads, rows or slices than the output's; sinks of others, their gradients; what is
    added to scores of other rows or keys.
    """
    cases = []
    for at, options in enumerate(AFTER):
        base = Case(scheme=scheme, combine=COMBINES[at % 2], bias=at != 1, **heads(scheme, *grid, at % 2 == 0))
        cases.append(replace(base, **options))
    check(pool, grid, cases, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_combination_against_the_unsplit_layer(pool, scheme, grid):
    """T. Localises: as above, when only a combination of features, GQA, combine and bias fails."""
    cases = [
        replace(Case(scheme=scheme, combine=combine, bias=bias, **heads(scheme, *grid, grouped)), **options)
        for options, combine, grouped, bias in itertools.product(
            FEATURES.values(), COMBINES, (False, True), (False, True)
        )
    ]
    check(pool, grid, cases, timeout=580)


@pytest.mark.parametrize("grid", [(2, 2), (2, 4)])
@pytest.mark.parametrize("combine", COMBINES)
def test_large_outputs_take_the_hierarchical_sum(pool, grid, combine):
    """T. Localises: the three-stage sum over the grid (above a size),
    with a length that slices do not divide.
    """
    case = Case(combine=combine, batch=3, length=43, embed_dim=516, causal=0, head_dim=8)
    assert case.batch * case.length * case.embed_dim >= 1 << 16
    check(pool, grid, [case], timeout=120)


@pytest.mark.parametrize("scheme", ["slices", "sequence"])
def test_half_precision_sums(pool, scheme):
    """R. Localises: reduce_dtype: an fp32 sum of bf16 partial outputs is no worse than a bf16 one,
    and near exact.
    """
    case = Case(scheme=scheme, dtype=torch.bfloat16, embed_dim=64, length=32, bias=False)
    plain, wide = (
        pool.run(relative_error, 8, 2, 4, replace(case, reduce_dtype=dtype)) for dtype in (None, torch.float32)
    )
    assert max(wide) <= max(plain) * 1.05 and max(wide) < 4 * torch.finfo(torch.bfloat16).eps


def relative_error(n, m, case):
    from harness.layer import split, whole

    y = split(case, place(n, m))["y"].double()
    exact = whole(replace(case, dtype=torch.float64))["y"]
    return ((y - exact).norm() / exact.norm()).item()
