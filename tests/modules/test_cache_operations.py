"""What is done to a KV cache between calls: other sequences, going back, starting anew; its memory and its bytes."""

import copy
import re
from dataclasses import replace

import pytest
import torch
from harness.cached import Cached, Plan, by_calls, make, new_cache, unsplit
from harness.layer import random
from transformers import LlamaConfig

import two_level_mha as tlm
from two_level_mha.mesh import place_on
from two_level_mha.testing import record_collectives

LAYOUTS = ["position", "batch"]

# order of sequences after the first call; the second: back into order, some twice, fewer, more than there were
ORDERS = [[2, 0, 1, 4, 3], [0, 0, 3, 3, 1], [4, 1], [1, 1, 1, 0, 2, 2, 4, 3, 3], [0, 1, 2, 3, 4]]


def selected_off(plan, grid, orders):
    """Difference from the unsplit layer over sequences that were reordered after the first of plan.calls."""
    found = []
    weights, x_BLD, _ = make(plan)
    module, first = Cached(plan, grid, weights), plan.calls[0]
    for order in orders:
        index = torch.tensor(order)
        whole = torch.cat(
            [x_BLD[index, :first], random((len(order), plan.length - first, plan.embed_dim), plan.dtype)], 1
        )
        layer = new_cache(plan, grid).layers[0]
        with torch.no_grad():
            module(x_BLD[:, :first], layer)
            layer.select(index)
            ys = [module(x, layer) for x in whole[:, first:].split(plan.calls[1:], 1)]
            sees = torch.ones(plan.length, plan.length, dtype=torch.bool).tril()
            if plan.window is not None:
                sees = sees.triu(1 - plan.window)
            expected = unsplit(weights, whole, sees)[:, first:]
        found.append((torch.cat(ys, 1) - expected).abs().max().item())
    return found


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (1, 4)])
def test_sequences_in_another_order(pool, grid):
    """T. Localises: select: rows of the memory, or, by batch, what moves between ranks and the new chunks."""
    plans = [
        Plan((6, 1, 2), batch=5, layout=layout, window=window, max_length=max_length)
        for layout in LAYOUTS
        for window in (None, 4)
        for max_length in (None, 9)
    ]
    for plan in plans:
        for found in pool.run(selected_off, grid[0] * grid[1], plan, grid, ORDERS, timeout=60):
            assert max(found) <= 1e-10, (plan, dict(zip(map(tuple, ORDERS), found, strict=True)))


def exchanged(plan, grid, order):
    weights, x_BLD, _ = make(plan)
    layer = new_cache(plan, grid).layers[0]
    with torch.no_grad():
        Cached(plan, grid, weights)(x_BLD, layer)
    with record_collectives() as record:
        layer.select(torch.tensor(order))
    return record.sent(), layer.nbytes


def test_only_sequences_of_other_ranks_move(pool):
    """E. Localises: an exchange where none is needed, or of sequences that stay or are sent twice."""
    plan = Plan((4,), batch=4, dtype=torch.float64)
    one = 2 * 8 * plan.kv_heads * plan.head_dim * plan.length  # K and V of one sequence
    for layout, order, sent in (
        ("position", [3, 2, 1, 0], [0, 0]),
        ("batch", [1, 0, 3, 3], [0, 0]),
        ("batch", [2, 2, 1, 0], [2 * one, one]),
    ):
        found = pool.run(exchanged, 2, replace(plan, layout=layout), (1, 2), order)
        assert [bytes_ for bytes_, _ in found] == sent, (layout, order)


def went_back_off(plan, grid, keep):
    """Two calls, the second forgotten but for `keep` of its tokens, then other tokens."""
    weights, x_BLD, _ = make(plan)
    module, layer = Cached(plan, grid, weights), new_cache(plan, grid).layers[0]
    first, second, rest = plan.calls
    other = torch.cat([x_BLD[:, : first + keep], random((plan.batch, rest, plan.embed_dim), plan.dtype)], 1)
    with torch.no_grad():
        module(x_BLD[:, :first], layer)
        layer.recording = True
        module(x_BLD[:, first : first + second], layer)
        layer.rewind(second - keep)
        layer.trim()
        y = module(other[:, first + keep :], layer)
        sees = torch.ones(other.shape[1], other.shape[1], dtype=torch.bool).tril()
        if plan.window is not None:
            sees = sees.triu(1 - plan.window)
        return (y - unsplit(weights, other, sees)[:, first + keep :]).abs().max().item()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_taken_back(pool, layout):
    """T. Localises: rewind, and which old tokens a window keeps for it while recording."""
    for window in (None, 3, 5):
        for keep in (0, 1, 4):
            plan = Plan((7, 4, 3), layout=layout, window=window)
            assert max(pool.run(went_back_off, 2, plan, (1, 2), keep)) <= 1e-10, (window, keep)


def restarted(plan, grid):
    weights, x_BLD, _ = make(plan)
    module, layer = Cached(plan, grid, weights), new_cache(plan, grid).layers[0]
    with torch.no_grad():
        fresh = module(x_BLD[:2], layer)
        addresses = [x.data_ptr() for x in layer.memory]
        layer.reset()
        again = module(x_BLD[:2], layer)
        kept = addresses == [x.data_ptr() for x in layer.memory]
        layer.reset()
        other = module(x_BLD, layer)[:2]
    return torch.equal(fresh, again), kept, (fresh - other).abs().max().item()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reset(pool, layout):
    """E. Localises: what is left of earlier tokens, or memory that is given up."""
    for equal, kept, error in pool.run(restarted, 2, Plan((6,), layout=layout), (1, 2)):
        assert equal and kept and error <= 1e-10


def after_inference_mode(plan, grid, between):
    """A call in inference mode, then the others under no_grad: difference from the unsplit layer."""
    weights, x_BLD, sees = make(plan)
    module, layer = Cached(plan, grid, weights), new_cache(plan, grid).layers[0]
    with torch.inference_mode():
        module(x_BLD[:, : plan.calls[0]], layer)
    with torch.no_grad():
        if between == "reset":
            layer.reset()
            y, expected = by_calls(module, plan, layer, x_BLD, sees), unsplit(weights, x_BLD, sees)
        else:
            if between == "select":
                layer.select(torch.arange(plan.batch))
            y = torch.cat([module(x, layer) for x in x_BLD[:, plan.calls[0] :].split(plan.calls[1:], 1)], 1)
            expected = unsplit(weights, x_BLD, sees)[:, plan.calls[0] :]
    return (y - expected).abs().max().item()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("between", ["nothing", "reset", "select"])
def test_inference_mode_then_no_grad(pool, layout, between):
    """T. Localises: memory that was made in inference mode written to outside of it, or old tokens lost with it."""
    plan = Plan((5, 1, 2), layout=layout, max_length=8)
    for grid in ((1, 1), (1, 2)):
        assert max(pool.run(after_inference_mode, grid[0] * grid[1], plan, grid, between)) <= 1e-10, grid


def copied_off(plan, grid):
    """Differences from the unsplit layer of a cache and of its deep copy, which go on with other tokens."""
    weights, x_BLD, sees = make(plan)
    module, cache, first = Cached(plan, grid, weights), new_cache(plan, grid), plan.calls[0]
    other = torch.cat([x_BLD[:, :first], random(x_BLD[:, first:].shape, plan.dtype)], 1)
    found = []
    with torch.no_grad():
        module(x_BLD[:, :first], cache.layers[0])
        twin = copy.deepcopy(cache)
        for at in range(first, plan.length):
            for c, x in ((twin, other), (cache, x_BLD)):
                y = module(x[:, at : at + 1], c.layers[0]) - unsplit(weights, x, sees)[:, at : at + 1]
                found.append(y.abs().max().item())
    assert type(twin) is type(cache) and twin.layers[0] is not cache.layers[0]
    return max(found)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_deep_copy(pool, layout):
    """T. Localises: a copy that cannot be made, or that shares memory or counts with its original."""
    assert max(pool.run(copied_off, 2, Plan((5, 1, 1), layout=layout, max_length=7), (1, 2))) <= 1e-10


def test_deep_copy_of_a_models_cache():
    """E. Localises: the same for the class that is made from a transformers config."""
    config = LlamaConfig(hidden_size=8, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2)
    cache = tlm.KVCache(config, None, max_length=4)
    k_BKLd, v_BKLd = torch.randn(2, 2, 1, 3, 4)
    for layer in cache.layers:
        layer.begin(2, 3)
        layer.append(k_BKLd, v_BKLd, 3)
    twin = copy.deepcopy(cache)
    assert type(twin) is type(cache) and twin.get_seq_length() == 3
    twin.layers[1].begin(2, 1)
    seen = twin.layers[1].append(-k_BKLd[:, :, :1], -v_BKLd[:, :, :1], 1)
    for x, new in zip(seen, (k_BKLd, v_BKLd), strict=True):
        assert torch.equal(x, torch.cat([new, -new[:, :, :1]], 2))
    assert (cache.layers[1].length, twin.layers[0].length, twin.layers[1].length) == (3, 3, 4)


def memory(plan, grid):
    weights, x_BLD, _ = make(plan)
    module, cache = Cached(plan, grid, weights), new_cache(plan, grid, layers=2)
    sizes = []
    with torch.no_grad():
        for x in x_BLD.split(plan.calls, 1):
            for layer in cache.layers:
                module(x, layer)
            sizes.append((cache.nbytes, cache.length))
    return sizes


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grid", [(1, 4), (2, 2), (2, 4)])
def test_memory_is_stored_once(pool, layout, grid):
    """E. Localises: copies of keys on several ranks, or memory allocated more than once or twice too large."""
    P = grid[0] * grid[1]
    plan = Plan((5, 1, 1, 1), layout=layout, batch=4, max_length=8)
    per_token = 2 * 2 * 8 * plan.batch * plan.kv_heads * plan.head_dim  # layers, K and V, float64
    for sizes in pool.run(memory, P, plan, grid):
        assert [P * size for size, _ in sizes] == [8 * per_token] * 4
    growing = replace(plan, calls=(5,) + (1,) * 20, max_length=None)
    for sizes in pool.run(memory, P, growing, grid):
        assert all(P * size <= 2 * per_token * (tokens + grid[1]) for size, tokens in sizes)
    sliding = replace(plan, calls=(40,) + (1,) * 40, max_length=None, window=8)
    for sizes in pool.run(memory, P, sliding, grid):
        assert all(P * size <= 2 * per_token * (8 + grid[1]) for size, _ in sizes)


def step_bytes(plan, grid, contexts):
    """Bytes that one decode step sends after contexts of these lengths."""
    weights, x_BLD, _ = make(plan)
    module, found = Cached(plan, grid, weights), []
    for context in contexts:
        layer = new_cache(plan, grid).layers[0]
        with torch.no_grad():
            module(x_BLD[:, :1].expand(-1, context, -1), layer)
            with record_collectives() as record:
                module(x_BLD[:, :1], layer)
        found.append((record.sent(), record.counts()))
    return found


@pytest.mark.parametrize("scheme", ["slices", "heads"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grid", [(1, 2), (2, 4)])
def test_bytes_of_a_decode_step(pool, grid, layout, scheme):
    """E. Localises: an exchange that grows with the context, too many, or too wide."""
    n, m = grid
    plan = Plan((1,), layout=layout, scheme=scheme, batch=4, heads=16, kv_heads=4, dtype=torch.float32)
    B, H, K, d, D = 4, 16 // n, 4 // n, plan.head_dim, plan.embed_dim
    E, P, part = d // m, n * m, -(-4 // m)
    if layout == "position":  # gather q, deal k and v out; exchange partial outputs and their logsumexp
        elements = (m - 1) * (B * H * E + 2 * B * K * E) + (m - 1) * B * H * E
        elements += (m - 1) * B * H // m if scheme == "heads" else (m - 1) * B * H
        calls = {"all_to_all": 2, "all_reduce": 1}
    else:
        elements = (m - 1) * part * (2 * H + 2 * K) * E
        calls = {"all_to_all": 2, "all_reduce": 1}
    seal = 4  # two digits, each with its square: what the ranks compare
    expected = 4 * elements + 4 * 2 * (P - 1) * (B * D + seal) // P
    for found in pool.run(step_bytes, P, plan, grid, [1, 5, 64, 257]):
        assert found == [(expected, calls)] * 4


@pytest.mark.parametrize(
    "options, message",
    [
        ({"layout": "rows"}, "layout must be one of position, batch, got 'rows'"),
        ({"max_length": 0}, "max_length must be positive"),
        ({"config": {"num_layers": 2}}, "config must be a transformers config, or dict"),
        ({"config": {"num_layers": 2, "num_kv_heads": 2, "head_dim": 8, "heads": 2}}, "config must be"),
        ({"config": {"num_layers": 2, "num_kv_heads": 2, "head_dim": 8, "window": [4]}}, "window has 1 entries"),
        ({"config": {"num_layers": 2, "num_kv_heads": 2, "head_dim": 8, "window": 0}}, "window must be positive"),
    ],
)
def test_what_a_cache_refuses(options, message):
    """Localises: the checks of the constructor."""
    sizes = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 8}
    with pytest.raises(tlm.GridError, match=message):
        tlm.KVCache(**({"config": sizes, "mesh": None} | options))


def refused(plan, grid):
    from harness.calls import mesh

    weights, x_BLD, _ = make(plan)
    module, layer = Cached(plan, grid, weights), new_cache(plan, grid).layers[0]
    messages = []

    def expect(call):
        with pytest.raises(tlm.GridError) as error:
            call()
        messages.append(str(error.value))

    expect(lambda: new_cache(replace(plan, kv_heads=3), grid))
    with torch.no_grad():
        module(x_BLD[:, :4], layer)
        assert layer.length - layer.first_key == plan.window - 1
        expect(lambda: module(x_BLD[:1, 4:5], layer))
        expect(lambda: module(x_BLD[:, 4:], layer))
        expect(lambda: layer.rewind(5))
        expect(lambda: layer.rewind(2))
    assert place_on(mesh(grid)).grid.size == 4
    return messages


def test_calls_that_do_not_fit(pool):
    """Localises: the checks of a call; the same on every rank, before anything is sent."""
    for messages in pool.run(refused, 4, Plan((4, 6), max_length=8, window=3), (2, 2)):
        parts = ("3", "holds 3 sequences, but the input has 1", "max_length=8 and holds 4 tokens: 6 more",
                 "holds 4 tokens: cannot forget 5", "has dropped token")  # fmt: skip
        assert all(part in message for part, message in zip(parts, messages, strict=True)), messages


NO_INDICES = {
    "list": ([0, 1], "1-D integer tensor, got list"),
    "floats": (torch.tensor([0.0, 1.0]), r"1-D integer tensor, got shape \(2,\) of torch.float32"),
    "mask": (torch.tensor([True, False, True]), r"1-D integer tensor, got shape \(3,\) of torch.bool"),
    "number": (torch.tensor(1), r"1-D integer tensor, got shape \(\)"),
    "none": (torch.tensor([], dtype=torch.int64), "of at least one sequence, got none"),
    "negative": (torch.tensor([0, -1, 1]), "sequences 0 to 2 that the cache holds, got values from -1 to 1"),
    "beyond": (torch.tensor([0, 1, 2, 3]), "sequences 0 to 2 that the cache holds, got values from 0 to 3"),
}


def refused_indices(plan, grid):
    """Texts of the errors, and the difference from the unsplit layer of a call after them."""
    weights, x_BLD, sees = make(plan)
    module, cache = Cached(plan, grid, weights), new_cache(plan, grid)
    texts = []
    with torch.no_grad():
        module(x_BLD[:, :-1], cache.layers[0])
        with record_collectives() as record:
            for refused in (
                *(lambda index=index: cache.select(index) for index, _ in NO_INDICES.values()),
                *(lambda repeats=repeats: cache.repeat_interleave(repeats) for repeats in (0, -1, 2.0)),
            ):
                with pytest.raises(tlm.GridError) as error:
                    refused()
                texts.append(str(error.value))
        y = module(x_BLD[:, -1:], cache.layers[0])
    assert not record.calls
    return texts, (y - unsplit(weights, x_BLD, sees)[:, -1:]).abs().max().item()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sequences_that_are_not_there(pool, layout):
    """Localises: the checks of select and repeat_interleave: alike on every rank, or those that pass them wait."""
    found = pool.run(refused_indices, 2, Plan((4, 1), layout=layout), (1, 2), timeout=30)
    assert found[0][0] == found[1][0] and max(error for _, error in found) <= 1e-10
    patterns = [pattern for _, pattern in NO_INDICES.values()]
    patterns += [f"repeats must be a positive integer, got {repeats}" for repeats in ("0", "-1", "2.0")]
    for text, pattern in zip(found[0][0], patterns, strict=True):
        assert re.search(pattern, text), text
