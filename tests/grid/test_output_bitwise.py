"""Every rank returns the same bits, or ranks would diverge in a generation loop (level E)."""

from dataclasses import replace

import pytest
import torch
from harness.layer import Case, place, split


def outputs(n, m, cases):
    return [split(case, place(n, m)) for case in cases]


@pytest.mark.parametrize("grid", [(2, 2), (1, 4), (4, 1), (2, 4), (4, 2)])
def test_output_and_input_gradient_are_the_same_bits_on_every_rank(pool, grid):
    """E. Localises: a sum over the grid whose order depends on the rank (flat or hierarchical),
    forward or backward.
    """
    cases = [
        replace(base, scheme=scheme, combine=combine)
        for base in (
            Case(dtype=torch.float32, causal=0, kv_heads=4),
            Case(dtype=torch.bfloat16, mask="padding"),
            Case(dtype=torch.bfloat16, reduce_dtype=torch.float32),
            Case(dtype=torch.float32, batch=4, length=65, embed_dim=260, heads=4, kv_heads=4),
        )
        for scheme in ("slices", "sequence")
        for combine in ("reduce", "concat")
    ]
    results = pool.run(outputs, grid[0] * grid[1], *grid, cases, timeout=120)
    for case, *per_rank in zip(cases, *results, strict=True):
        for other in per_rank[1:]:
            for name in ("y", "query", "out_bias"):
                assert torch.equal(other[name], per_rank[0][name]), (name, case)
