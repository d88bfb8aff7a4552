"""Planted mistakes: the checks of levels E and T must see each of them, or they check nothing."""

from dataclasses import replace

import pytest
import torch
from harness.layer import Case, errors, place, split

N, M = 2, 2
EXACT = Case(kv_heads=4, causal=0, length=7)

# name -> (what is told wrong to one call, on which quantities it must show)
MUTATIONS = {
    "swapped slices": lambda at: {"blocks": replace(at, slice=1 - at.slice)},
    "swapped head groups": lambda at: {"blocks": replace(at, head_group=1 - at.head_group)},
    "slice swapped on one rank": lambda at: {"blocks": replace(at, slice=0)},
    "scale of the slice": lambda at: {"scale": (EXACT.head_dim / M) ** -0.5},
    "no sum over head groups": lambda at: {"groups": (*at.groups[:2], at.groups[0])},
    "no sum over slices": lambda at: {"groups": (*at.groups[:2], at.groups[1])},
    "head groups told apart wrongly": lambda at: {"head_group": 1 - at.head_group},
}


def mutated(case, name):
    at = place(N, M)
    return errors(case, at, **(MUTATIONS[name](at) if name else {}))


def test_the_check_passes_unmutated(pool):
    """T. Localises: nothing planted, nothing found: the other tests here mean something."""
    for found in pool.run(mutated, N * M, EXACT, None):
        assert max(found.values()) <= 1e-10


@pytest.mark.parametrize("name", [name for name in MUTATIONS if name != "head groups told apart wrongly"])
@pytest.mark.parametrize("scheme", ["slices", "sequence"])
def test_a_mutation_fails_the_tight_check(pool, scheme, name):
    """T. Localises: a check too weak: some rank must be off by far more than 1e-10 in the output."""
    results = pool.run(mutated, N * M, replace(EXACT, scheme=scheme), name)
    assert max(found["y"] for found in results) > 1e-3


def test_mistaken_coordinates_fail_with_a_mask_per_head(pool):
    """T. Localises: masks and dropout are cut by head group; a wrong coordinate must show."""
    for case in (replace(EXACT, mask="bias"), replace(EXACT, dropout=0.3)):
        results = pool.run(mutated, N * M, case, "head groups told apart wrongly")
        assert max(found["y"] for found in results) > 1e-3


def integer_outputs(name):
    """Integers in, 0/1-valued attention out: q = 0 makes every weight 1 / 4, so the output is exact."""
    at = place(N, M)
    case = Case(length=4, heads=4, kv_heads=4, head_dim=4, embed_dim=4, bias=False, dtype=torch.float32)
    weights = integer_weights(case)
    return run_integers(case, weights, at, **(MUTATIONS[name](at) if name else {}))


def integer_weights(case):
    torch.manual_seed(3)
    shapes = {"k_weight": (4, 4, 4), "v_weight": (4, 4, 4), "out_weight": (4, 4, 4)}
    weights = {name: torch.randint(-4, 5, shape).to(case.dtype) for name, shape in shapes.items()}
    return {"q_weight": torch.zeros(4, 4, 4, dtype=case.dtype), **weights}


def run_integers(case, weights, at, blocks=None, **mutation):
    from harness.layer import block, run

    owner = blocks or at
    leaf = {name: block(name, x, case, at if name == "out_weight" else owner) for name, x in weights.items()}
    leaf["query"] = torch.randint(-4, 5, (case.batch, case.length, 4)).to(case.dtype)
    scale = mutation.pop("scale", None)
    return run(case, replace(at, **mutation), leaf, None, torch.tensor([0]), scale)


def expected_integers():
    case = Case(length=4, heads=4, kv_heads=4, head_dim=4, embed_dim=4, bias=False, dtype=torch.float32)
    weights = integer_weights(case)
    x = torch.randint(-4, 5, (case.batch, case.length, 4)).to(case.dtype)
    mean = torch.einsum("bld,hed->bhle", x, weights["v_weight"]).mean(2, keepdim=True).expand(-1, -1, 4, -1)
    return torch.einsum("bhle,dhe->bld", mean, weights["out_weight"])


@pytest.mark.parametrize("name", [None, "swapped slices", "swapped head groups", "no sum over slices"])
def test_exact_arithmetic_sees_mutations(pool, name):
    """E. Localises: distributed sums of exact numbers are exact, and a planted mistake changes them."""
    expected = expected_integers()
    same = [torch.equal(y, expected) for y in pool.run(integer_outputs, N * M, name)]
    assert all(same) if name is None else not any(same)


def test_split_is_repeatable(pool):
    """E. Localises: run-to-run differences, which would hide behind tolerances elsewhere."""
    first, second = (pool.run(split_once, N * M) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def split_once():
    return split(replace(EXACT, dtype=torch.float32), place(N, M))
