"""A KV cache of which ranks keep unequal shares: the same numbers as the unsplit layer, and bytes in proportion."""

import re
from dataclasses import replace

import pytest
import torch
from harness.cached import Cached, Plan, gradients_off, make, new_cache, off, unsplit
from harness.calls import mesh
from harness.device import DEVICE
from hypothesis import given
from hypothesis import strategies as st

import two_level_mha as tlm
from two_level_mha.mesh import Grid, Place, mesh_of, place_on
from two_level_mha.turn import turn_of

SHARED = [(1, 3, (2, 1, 1)), (2, 2, (2, 1, 1, 3)), (1, 4, (0, 1, 5, 2)), (1, 2, (1, 3)), (2, 2, (1, 1, 1, 3))]
PLANS = {
    "prefill, decode, chunk": Plan(),
    "ranks without a position at first": Plan((1, 1, 2, 1, 1, 1)),
    "chunked prefill": Plan((3, 3, 3, 3, 9)),
    "left padding": Plan((6, 1, 3, 1), padding=True),
    "window": Plan((3, 1, 1, 1, 1, 1, 1, 1, 1, 4, 1, 1), window=5),
    "prefill beyond the window": Plan((19, 1, 7, 1, 1), window=4),
    "window and padding": Plan((6, 1, 3, 1), window=4, padding=True),
    "allocated once": Plan((5, 1, 1, 2), max_length=9),
    "window, allocated once": Plan((5, 1, 1, 2, 1, 1, 1, 1), window=3, max_length=24),
    "gathered output": Plan(combine="concat"),
    "more rows than are masked at once": Plan((3, 1100, 40), batch=1, kv_heads=2, heads=4),
    "the same with a window": Plan((3, 700), batch=1, heads=4, window=40),
}
TRAINED = {"two calls": Plan((9, 3)), "window": Plan((6, 1, 2), window=4), "padding": Plan((6, 2), padding=True)}


def ranks_of(grid: tuple) -> int:
    return grid[0] * grid[1]


def by_both_storages(plans: dict[str, Plan], grid: tuple) -> list[Plan]:
    """With weights in blocks, and by whole heads where those fit."""
    schemes = ("slices", "heads") if 4 // grid[0] % grid[1] == 0 else ("slices",)
    return [replace(plan, scheme=scheme) for plan in plans.values() for scheme in schemes]


def run_plans(function, grid, plans):
    return [function(plan, grid) for plan in plans]


@pytest.mark.parametrize("grid", SHARED, ids=str)
def test_calls_with_unequal_shares_are_the_unsplit_layer(pool, grid):
    """T. Localises: which tokens a rank is sent, which it has in memory, or which of them a row sees."""
    plans = by_both_storages(PLANS, grid)
    for rank, found in enumerate(pool.run(run_plans, ranks_of(grid), off, grid, plans, timeout=240)):
        for plan, error in zip(plans, found, strict=True):
            assert error <= 1e-10, (rank, error, plan)


@pytest.mark.parametrize("grid", SHARED[:3], ids=str)
def test_gradients_pass_through_unequal_shares(pool, grid):
    """T. Localises: gradients of rows that are sent to ranks which have no use for them."""
    plans = by_both_storages(TRAINED, grid)
    for rank, found in enumerate(pool.run(run_plans, ranks_of(grid), gradients_off, grid, plans, timeout=240)):
        for plan, errors in zip(plans, found, strict=True):
            assert max(errors.values()) <= 1e-10, (rank, errors, plan)


def low_precision_off(grid, plan):
    """Relative errors of cached calls and of a grid's whose shares are equal."""
    weights, x_BLD, sees = make(plan)
    exact = unsplit({name: p.double() for name, p in weights.items()}, x_BLD.double(), sees)
    found = []
    for one in (grid, grid[:2]):
        module, layer = Cached(plan, one, weights), new_cache(plan, one).layers[0]
        with torch.no_grad():
            y = torch.cat([module(x, layer) for x in x_BLD.split(plan.calls, 1)], 1)
        found.append(((y.double() - exact).norm() / exact.norm()).item())
    return found


def test_low_precision_is_as_good_as_with_equal_shares(pool):
    """R. Localises: what ranks find of unequal parts, merged from rounded numbers."""
    plan = Plan((17, 1, 5, 1), heads=4, head_dim=32, embed_dim=64, dtype=torch.bfloat16)
    for unequal, equal in pool.run(low_precision_off, 4, (1, 4, (3, 1, 1, 2)), plan):
        assert unequal <= 1.5 * equal, (unequal, equal)


def held(grid, plan):
    """Tokens that this rank has room for."""
    weights, x_BLD, _ = make(plan)
    module, layer = Cached(plan, grid, weights), new_cache(plan, grid).layers[0]
    with torch.no_grad():
        module(x_BLD, layer)
    return layer.memory[0].shape[2]


@pytest.mark.parametrize("grid", SHARED, ids=str)
def test_memory_is_in_proportion(pool, grid):
    """T. Localises: room for more than a rank's own tokens. 240 is a multiple of every cycle."""
    n, m, shares = grid
    rooms = pool.run(held, n * m, grid, Plan((240,), max_length=240), timeout=60)
    for i in range(n):
        own = shares[i * m : (i + 1) * m]
        assert rooms[i * m : (i + 1) * m] == [240 * share // sum(own) for share in own]


def undone_off(grid):
    """Difference from the unsplit layer after sequences were reordered, tokens taken back, and all forgotten."""
    plan = Plan((6, 1, 3, 1), batch=3)
    weights, x_BLD, sees = make(plan)
    module, layer = Cached(plan, grid, weights), new_cache(plan, grid).layers[0]
    order = torch.tensor([2, 0, 0])
    with torch.no_grad():
        module(x_BLD[:, :6], layer)
        layer.select(order)
        module(x_BLD[order][:, 6:9], layer)
        layer.rewind(3)
        picked = torch.cat([x_BLD[order][:, :6], x_BLD[:, 6:]], 1)
        ys = torch.cat([module(x, layer) for x in picked[:, 6:].split([2, 1, 2], 1)], 1)
        found = [(ys - unsplit(weights, picked, sees)[:, 6:]).abs().max().item()]
        layer.reset()
        ys = torch.cat([module(x, layer) for x in x_BLD.split([4, 7], 1)], 1)
        return [*found, (ys - unsplit(weights, x_BLD, sees)).abs().max().item()]


@pytest.mark.parametrize("grid", SHARED, ids=str)
def test_sequences_reordered_and_tokens_taken_back(pool, grid):
    """T. Localises: where a rank's tokens begin in memory after select, rewind and reset."""
    for found in pool.run(undone_off, ranks_of(grid), grid, timeout=60):
        assert max(found) <= 1e-10


REFUSED = {
    "too few": [2, 1],
    "negative": [2, -1, 1, 1],
    "no integers": [2.0, 1, 1, 1],
    "bools": [True, True, False, True],
    "all zero": [0, 0, 0, 0],
    "no list": 2,
    "a long cycle": [1000, 1, 30, 1],
    "a head group without": [0, 0, 1, 2],
}


def refusals() -> dict[str, str]:
    found = {}
    for name, shares in REFUSED.items():
        with pytest.raises(tlm.GridError) as error:
            tlm.init_mesh(DEVICE, (2, 2), cache_shares=shares)
        found[name] = str(error.value)
    own = mesh((2, 2, (1, 1, 1, 3)))  # equal in one head group
    with pytest.raises(tlm.GridError) as error:
        tlm.KVCache({"num_layers": 1, "num_kv_heads": 2, "head_dim": 8}, own, layout="batch")
    found["by batch"] = str(error.value)
    return found


def test_what_are_no_shares(pool):
    """T. Localises: checks of cache_shares, alike on every rank."""
    expected = "cache_shares must be 4 integers, one for each rank in order, none of them negative nor all zero, got "
    for found in pool.run(refusals, 4):
        assert found.pop("a long cycle") == (
            "cache_shares must add up to at most 1024 in their smallest numbers, got [1000, 1, 30, 1]"
        )
        assert re.search(r"cache_shares=\[0, 0, 1, 2\] gives the 2 ranks of head group 0 nothing", found.pop(
            "a head group without"
        ))  # fmt: skip
        assert "cache_shares=[1, 1, 1, 3]" in found.pop("by batch")
        for name, text in found.items():
            assert text == expected + repr(REFUSED[name]), name


def other_on_one_rank() -> str:
    rank = torch.distributed.get_rank()
    with pytest.raises(tlm.GridError) as error:
        tlm.init_mesh(DEVICE, (1, 2), cache_shares=[2, 1] if rank else [1, 2])
    return str(error.value)


def test_shares_that_ranks_differ_in(pool):
    """T. Localises: shares that are left out of what the ranks compare, after which they would wait for each other."""
    for text in pool.run(other_on_one_rank, 2):
        assert "cache_shares" in text


def places() -> list:
    equal = tlm.init_mesh(DEVICE, (2, 2), cache_shares=[3, 3, 3, 3])
    unequal = tlm.init_mesh(DEVICE, (2, 2), cache_shares=(4, 2, 2, 6))
    again = tlm.init_mesh(DEVICE, (2, 2), cache_shares=[2, 1, 1, 3])
    row = place_on(mesh_of(unequal, lambda grid: Grid(1, grid.size)))
    return [equal is mesh((2, 2)), again is unequal, again is equal, place_on(equal).shares, place_on(again).shares,
            row.shares, tuple(row.turn)]  # fmt: skip


def test_meshes_by_their_shares(pool):
    """T. Localises: shares in their smallest numbers, those of a row of all ranks, and which meshes are one."""
    for rank, found in enumerate(pool.run(places, 4)):
        own = [(2, 1), (2, 1), (1, 3), (1, 3)][rank]
        turn = [(7, 0, 2), (7, 2, 1), (7, 3, 1), (7, 4, 3)][rank]
        assert found == [True, True, False, (), own, (2, 1, 1, 3), turn]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any), st.integers(0, 60), st.integers(0, 60))
def test_turns(shares, begin, length):
    """T. Localises: the arithmetic of turns, which csrc/plan/turn.h has too: every position has one owner."""
    owner = [rank for rank, share in enumerate(shares) for _ in range(share)]
    positions = torch.arange(begin, begin + length)
    for rank in range(len(shares)):
        turn = turn_of(shares, len(shares), rank)
        own = [p for p in range(begin + length) if owner[p % len(owner)] == rank]
        assert turn.before(begin + length) == len(own)
        assert [turn.position(number) for number in range(len(own))] == own
        assert turn.of(positions, 0, begin).tolist() == [p for p in own if p >= begin]


def test_a_cache_of_a_place_with_other_shares():
    """T. Localises: places that are taken for one though their ranks keep other tokens."""
    assert Place(Grid(1, 2), 0, 0, cache_shares=(2, 1)) != Place(Grid(1, 2), 0, 0)
