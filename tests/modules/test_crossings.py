"""How often a call of one layer goes from Python into the operators."""

from collections import Counter
from functools import partial

import pytest
import torch
from harness.calls import mesh
from harness.decoders import pair, prompt
from torch.profiler import ProfilerActivity, profile

import two_level_mha as tlm

PREFIX = "two_level_mha::"


def outermost(call) -> dict[str, int]:
    """Operators of ours that `call` enters from Python, not from another of ours, and how often."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as prof:
        call()
    found = Counter()
    for event in prof.events():
        above = event.cpu_parent
        while above is not None and not above.name.startswith(PREFIX):
            above = above.cpu_parent
        if event.name.startswith(PREFIX) and above is None:
            found[event.name.removeprefix(PREFIX)] += 1
    return dict(found)


def decode_steps(names: list[str], grid: tuple[int, int]) -> dict[str, dict[str, int]]:
    """Of one decode step, by model."""
    found = {}
    ids, _ = prompt(1)
    for name in names:
        _, model = pair(name, grid)
        with torch.no_grad():
            past = model(ids, use_cache=True).past_key_values
        found[name] = outermost(partial(model, ids[:, -1:], past_key_values=past))
    return found


@pytest.mark.parametrize("grid", [(2, 1), (1, 2)])
def test_a_decode_step_is_two_operators_a_layer(pool, grid):
    """E. Localises: what goes with tokens, norms or the cache crossing from Python once more: three layers each."""
    for found in pool.run(decode_steps, 2, ["llama", "qwen3"], grid):
        assert found == {name: {"enter": 3, "leave_with_cache": 3} for name in ("llama", "qwen3")}


def call_of_a_layer(grid: tuple[int, int]) -> dict[str, int]:
    layer = tlm.TwoLevelMultiheadAttention(16, 4, batch_first=True, mesh=mesh(grid))
    x = torch.randn(2, 5, 16)
    layer(x, x, x, need_weights=False)
    return outermost(lambda: layer(x, x, x, need_weights=False))


def test_a_call_without_a_cache(pool):
    """E. Localises: the same in nn.MultiheadAttention's place."""
    for found in pool.run(call_of_a_layer, 2, (1, 2)):
        assert found == {"attention": 1}
