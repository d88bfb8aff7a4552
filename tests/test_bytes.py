"""The bytes a rank sends are the table of design section 5, exactly, forward and backward (level E)."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from harness.layer import Case, block, leaves, make, place, run

from two_level_mha.testing import record_collectives

FLAT_SUM_ELEMENTS = 1 << 16  # csrc/combine/reduce.h


def ceil_to(size, m):
    return -(-size // m) * m


def moved_in(case, n, m):
    """Elements sent before attention: d-slices of q, k, v into the layout of the scheme."""
    B, L, S, E = case.batch, case.length, case.all_keys, case.head_dim // m
    H, K = case.heads // n, case.kv_heads // n
    if case.scheme == "independent":
        return 0
    if case.scheme == "slices":
        return (m - 1) * B * E * (H * L + K * S)
    rows = ceil_to(L, 2 * m if case.causal is not None else m)
    return (m - 1) * B * E * (Fraction(H * rows, m) + 2 * K * S)


def moved_out(case, n, m):
    """Elements sent after attention: back to d-slices."""
    if case.scheme != "sequence":
        return 0
    rows = ceil_to(case.length, 2 * m if case.causal is not None else m)
    return (m - 1) * case.batch * (case.head_dim // m) * Fraction((case.heads // n) * rows, m)


def summed(elements, n, m):
    """Elements sent by a sum over the grid: flat, or in three stages."""
    P = n * m
    if n == 1 or m == 1 or elements < FLAT_SUM_ELEMENTS:
        return Fraction(2 * (P - 1) * elements, P)
    padded = ceil_to(elements, m)
    return Fraction((m - 1) * padded, m) + Fraction(2 * (n - 1) * padded, n * m) + Fraction((m - 1) * padded, m)


def combined(case, n, m):
    """Elements sent by combine, forward: the sum of y, or the gather of O, head axis first."""
    if case.combine == "reduce":
        return summed(case.batch * case.length * case.embed_dim, n, m)
    local = case.batch * case.length * (case.heads // n) * (case.head_dim // m)
    return (n - 1) * local + (m - 1) * n * local


def sent(n, m, cases):
    """Bytes and numbers of collectives of a call on this rank, forward and backward."""
    found = []
    for case in cases:
        weights, inputs, mask, weight, seed = make(case)
        at = place(n, m)
        leaf = leaves({name: block(name, x, case, at) for name, x in weights.items()}, inputs, mask)
        with record_collectives() as record:
            y = run(case, at, leaf, mask, seed)
            (y * weight).sum().backward()
        dtypes = {call.dtype for call in record.calls}
        found.append(
            [(record.sent(backward=backward), record.counts(backward=backward), dtypes) for backward in (False, True)]
        )
    return found


CASES = [
    replace(base, scheme=scheme, combine=combine)
    for base in (
        Case(),
        Case(kv_heads=4, length=7),
        Case(kv_heads=4, length=7, causal=0, dtype=torch.float32),
        Case(length=5, keys=9, extra_keys=True),
        Case(batch=4, length=64, embed_dim=256, heads=4, kv_heads=4, dtype=torch.float32),
    )
    for scheme in ("independent", "slices", "sequence")
    for combine in ("reduce", "concat")
]


@pytest.mark.parametrize("grid", [(1, 1), (2, 1), (1, 2), (2, 2), (2, 4), (4, 2)])
def test_bytes_are_the_table(pool, grid):
    """E. Localises: an exchange too many, too wide, or of the wrong kind, per scheme,
    combine and direction.
    """
    n, m = grid
    for rank, per_case in enumerate(pool.run(sent, n * m, n, m, CASES, timeout=120)):
        for case, ((forward, *_), (backward, *_)) in zip(CASES, per_case, strict=True):
            exchanges = moved_in(case, n, m) + moved_out(case, n, m)
            size = case.dtype.itemsize
            assert forward == size * (exchanges + combined(case, n, m)), ("forward", rank, case)
            inputs = case.embed_dim * case.batch * (case.length + 2 * (case.keys or 0))
            assert backward == size * (exchanges + summed(inputs, n, m)), ("backward", rank, case)


def test_numbers_of_collectives(pool):
    """E. Localises: exchanges that should be packed into one and are not."""
    cases = [
        Case(scheme=scheme, combine=combine) for scheme in ("slices", "sequence") for combine in ("reduce", "concat")
    ]
    expected = [
        ({"all_gather": 1, "all_reduce": 1}, {"all_to_all": 1, "all_reduce": 1}),
        ({"all_gather": 3}, {"all_to_all": 1, "all_reduce": 1}),
        ({"all_to_all": 2, "all_reduce": 1}, {"all_to_all": 2, "all_reduce": 1}),
        ({"all_to_all": 2, "all_gather": 2}, {"all_to_all": 2, "all_reduce": 1}),
    ]
    for per_case in pool.run(sent, 4, 2, 2, cases):
        assert [(forward[1], backward[1]) for forward, backward in per_case] == expected


def test_sums_travel_in_reduce_dtype(pool):
    """E. Localises: reduce_dtype: the sums and only the sums go in it."""
    case = Case(dtype=torch.bfloat16, reduce_dtype=torch.float32, bias=False)
    B, L, D = case.batch, case.length, case.embed_dim
    for (((forward, _, dtypes), (backward, *_)),) in pool.run(sent, 4, 2, 2, [case]):
        assert dtypes == {torch.bfloat16, torch.float32}
        total = 2 * moved_in(case, 2, 2) + 4 * summed(B * L * D, 2, 2)
        assert forward == total and backward == total


def gathers(n, m, slices_first):
    at = place(n, m)
    x = torch.arange(6.0).reshape(1, 2, 1, 3) + 100 * at.i + 10000 * at.j
    with record_collectives() as record:
        y = torch.ops.two_level_mha.hierarchical_all_gather(x, 1, 3, *at.arguments[:3], slices_first)
    return y, [c.elements for c in record.calls], record.sent()


@pytest.mark.parametrize("slices_first", [False, True])
def test_order_of_the_hierarchical_gather(pool, slices_first):
    """E. Localises: the two stages of the paper's concatenation: where blocks land,
    and which stage carries what.
    """
    n, m, local = 2, 4, 6
    block = torch.arange(6.0).reshape(2, 3)
    heads = [torch.cat([block + 100 * i + 10000 * j for j in range(m)], 1) for i in range(n)]
    expected = torch.cat(heads)[None, :, None]
    for y, elements, total in pool.run(gathers, n * m, n, m, slices_first):
        assert torch.equal(y, expected)
        assert elements == ([local, m * local] if slices_first else [local, n * local])
        first, second = (m, n) if slices_first else (n, m)
        assert total == 4 * local * ((first - 1) + (second - 1) * first)
