"""Shares of a KV cache for ranks of unequal memory: what they come to, what the planner says, and what is refused."""

import json
import subprocess
import sys

import pytest
import torch
from harness.programs import environment
from hypothesis import given, settings
from hypothesis import strategies as st

import two_level_mha as tlm
from two_level_mha.memory_shares import IN_PROPORTION, share_memory

LAYER = {"embed_dim": 8192, "num_heads": 64, "num_kv_heads": 8, "head_dim": 128}
CALL = {"batch": 8, "seq": 8192, "decode": True}


@settings(deadline=None)
@given(
    memory=st.lists(st.floats(1.0, 8.0), min_size=1, max_size=6),
    weights=st.integers(10**6, 10**9),
    cache=st.integers(10**6, 10**10),
)
def test_shares_of_any_memory(memory, weights, cache):
    """T. Localises: shares whose bytes are not the cache's, or that leave what a rank could take to others."""
    found = share_memory(memory, 1, weights, cache)
    assert len(found.cache_shares) == len(memory) and min(found.cache_shares) >= 0
    assert abs(sum(found.rank_bytes) - len(memory) * weights - cache) <= len(memory)  # rounded to bytes
    total = len(memory) * weights + cache
    should = [size / sum(memory) * total for size in memory]
    assert found.off == pytest.approx(max(abs(a / b - 1) for a, b in zip(found.rank_bytes, should, strict=True)))
    if all(weights <= goal for goal in should):  # then tokens can make up for the rest
        granular = cache / 1024 / min(should)  # a share of the longest cycle
        assert found.off <= IN_PROPORTION / 4 + granular, found


def test_shares_of_three_ranks_and_of_groups():
    """T. Localises: proportions of a rank in place of those of a head group's; which cycle is taken."""
    found = share_memory([48, 24, 24], 1, 1, 10**9)
    assert found.cache_shares == (2, 1, 1) and found.in_proportion
    by_groups = share_memory([48, 24, 24, 48], 2, 1, 10**9)
    assert by_groups.cache_shares == (2, 1, 1, 2) and by_groups.in_proportion
    apart = share_memory([48, 48, 24, 24], 2, 1, 10**9)  # no tokens of one head group go to the other
    assert apart.cache_shares == (1, 1, 1, 1) and apart.off == pytest.approx(1 / 2, rel=1e-3)
    full = share_memory([8, 8, 1], 1, 10**9, 10**9)  # weights alone are more than the third should have
    assert full.cache_shares == (1, 1, 0) and not full.in_proportion


def kept(plan, grid):
    return {option.scheme: option for option in plan.options if option.grid == grid}["position"]


@pytest.mark.parametrize("memory", [[48, 24, 24], [80, 80, 40, 40], [24, 24, 24, 20, 24, 24, 24, 24]])
def test_a_plan_holds_in_proportion(memory):
    """T. Localises: shares that are found for other bytes than those of the table; the grid that is picked."""
    plan = tlm.plan(**LAYER, **CALL, memory=memory)
    assert plan.shares.in_proportion and plan.call["devices"] == len(memory)
    total, held = sum(memory), plan.shares.rank_bytes
    for size, have in zip(memory, held, strict=True):
        assert abs(have / sum(held) / (size / total) - 1) <= IN_PROPORTION
    assert max(held) == pytest.approx(plan.pick.weight_bytes + plan.pick.cache_bytes, rel=1e-2)  # whole cycles
    equal = kept(tlm.plan(**LAYER, **CALL, ranks=len(memory)), plan.pick.grid)
    assert plan.pick.predicted_seconds["memory"] > equal.predicted_seconds["memory"]  # of the rank that keeps the most
    n, m = plan.pick.grid
    assert sum(plan.shares.cache_shares) % n == 0
    for i in range(n):  # as init_mesh wants them
        assert any(plan.shares.cache_shares[i * m : (i + 1) * m])
    text = " ".join(str(plan).split())
    assert f"cache_shares={list(plan.shares.cache_shares)} deals its tokens so that the ranks hold" in text
    assert plan.to_dict()["shares"]["cache_shares"] == plan.shares.cache_shares


def test_equal_memory_is_the_plan_without():
    """E. Localises: shares that change what equal ranks would do."""
    plan = tlm.plan(**LAYER, **CALL, memory=[80.0] * 4)
    assert set(plan.shares.cache_shares) == {1} and plan.options == tlm.plan(**LAYER, **CALL, ranks=4).options


def test_where_no_grid_is_in_proportion():
    """Localises: a sentence that promises what weights, which are equal, do not let be."""
    plan = tlm.plan(**LAYER, **CALL | {"seq": 16}, memory=[80, 10])
    assert not plan.shares.in_proportion and "off the proportion of their memory, the nearest that there is" in plan.why


def test_latents_are_dealt_to_all_ranks():
    """T. Localises: a cache of latents, which has no head groups: its shares are those of one row of all ranks."""
    latent = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    plan = tlm.plan(embed_dim=2048, num_heads=16, **latent, **CALL | {"batch": 64}, memory=[80, 80, 40, 40])
    assert plan.pick.grid == (4, 1) and plan.pick.scheme == "position" and plan.shares.in_proportion
    assert plan.shares.cache_shares[0] > plan.shares.cache_shares[3] > 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"memory": [24, -1]}, r"memory must be a positive number for each rank, all in one unit, got \[24, -1\]"),
        ({"memory": []}, "memory must be a positive number for each rank"),
        ({"memory": [True, 1]}, "memory must be a positive number for each rank"),
        ({"memory": [float("nan"), 1]}, "memory must be a positive number for each rank"),
        ({"memory": "48,24"}, "memory must be a positive number for each rank"),
        ({"memory": [1, 2], "ranks": 3}, "memory is that of 2 ranks, got ranks=3: leave ranks out"),
        ({"memory": [1, 2], "decode": False}, r"plan a call with decode=True \(--decode\)"),
        ({}, "plan needs the number of ranks, once"),
    ],
)
def test_refused(options, message):
    """Localises: memory of which nothing can be made, before anything is priced."""
    with pytest.raises(tlm.GridError, match=message):
        tlm.plan(**LAYER, **CALL | options)


def command(*words: str) -> subprocess.CompletedProcess:
    layer = "plan --embed-dim 8192 --num-heads 64 --num-kv-heads 8 --head-dim 128 --batch 8 --seq 8192 --decode".split()
    return subprocess.run(
        [sys.executable, "-m", "two_level_mha", *layer, *words], capture_output=True, text=True, timeout=200,
        env=environment(),
    )  # fmt: skip


def test_command():
    """Localises: --memory, alone and with what does not go with it."""
    shown = command("--memory", "48,24,24", "--json")
    expected = tlm.plan(**LAYER, **CALL, memory=[48.0, 24.0, 24.0]).to_dict()
    assert json.loads(shown.stdout) == json.loads(json.dumps(expected)), shown.stderr
    wrong = command("--memory", "48,x")
    assert (
        wrong.returncode == 2 and "a number of GB for each rank, with commas between them, got '48,x'" in wrong.stderr
    )
    other = command("--memory", "48,24", "--ranks", "3")
    assert other.returncode == 2 and other.stderr == (
        "memory is that of 2 ranks, got ranks=3: leave ranks out, or name each rank's\n"
    )


def test_dtypes_of_a_plan():
    """E. Localises: the dtype's name, by which a plan is priced again with shares."""
    for dtype in (torch.bfloat16, torch.float32):
        assert tlm.plan(**LAYER, **CALL, memory=[2, 1], dtype=dtype).pick.weight_bytes == (
            tlm.plan(**LAYER, **CALL, ranks=2, dtype=dtype).pick.weight_bytes
        )
