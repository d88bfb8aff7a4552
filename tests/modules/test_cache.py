"""The KV cache through the raw pass, on real Gloo ranks, against the unsplit layer over all tokens at once."""

from dataclasses import replace

import pytest
import torch
from harness.cached import Plan, gradients_off, off, visible
from torch.nn.functional import scaled_dot_product_attention

from two_level_mha import KVCache

GRIDS = [(1, 1), (2, 2), (1, 4), *(pytest.param(grid, marks=pytest.mark.slow) for grid in ((2, 1), (1, 2), (2, 4)))]

PLANS = {
    "prefill, decode, chunk": Plan(),
    "ranks without a position at first": Plan((1, 1, 2, 1, 1, 1)),
    "chunked prefill": Plan((3, 3, 3, 3)),
    "left padding": Plan((6, 1, 3, 1), padding=True),
    "window": Plan((3, 1, 1, 1, 1, 1, 1, 1, 1, 4, 1, 1), window=5),
    "prefill beyond the window": Plan((9, 1, 7, 1, 1), window=4),
    "window and padding": Plan((6, 1, 3, 1), window=4, padding=True),
    "allocated once": Plan((5, 1, 1, 2), max_length=9),
    "window, allocated once": Plan((5, 1, 1, 2, 1, 1, 1, 1), window=3, max_length=24),
    "many queries on one KV head": Plan(heads=16, embed_dim=32),
    "gathered output": Plan(combine="concat"),
}


def in_every_layout(plans: dict[str, Plan]) -> list[Plan]:
    """With both layouts of the cache, and the weights in blocks and by whole heads."""
    both = [(layout, scheme) for layout in ("position", "batch") for scheme in ("slices", "heads")]
    return [replace(plan, layout=layout, scheme=scheme) for plan in plans.values() for layout, scheme in both]


def run_plans(grid, plans):
    return [off(plan, grid) for plan in plans]


@pytest.mark.parametrize("grid", GRIDS)
def test_calls_with_a_cache_are_the_unsplit_layer(pool, grid):
    """T. Localises: the cache's columns, its growth and trimming, or the pass with keys by position and by batch."""
    n, m = grid
    plans = in_every_layout(PLANS)
    for rank, found in enumerate(pool.run(run_plans, n * m, grid, plans, timeout=240)):
        for plan, error in zip(plans, found, strict=True):
            assert error <= 1e-10, (rank, error, plan)


@pytest.mark.parametrize("layout", ["position", "batch"])
def test_low_precision_is_as_good_as_one_call(pool, layout):
    """R. Localises: numbers rounded once more than in a call without a cache, or a wrong dtype in the merge."""
    plan = Plan((17, 1, 5, 1), layout=layout, heads=4, head_dim=32, embed_dim=64, dtype=torch.bfloat16)
    for cached, stock in pool.run(low_precision, 4, plan, (1, 4)):
        assert cached <= 2 * stock, (cached, stock)


def low_precision(plan, grid):
    """Relative errors against float64, of cached calls and of stock attention in one call."""
    from harness.cached import Cached, by_calls, make, new_cache, unsplit

    weights, x_BLD, sees = make(plan)
    exact = unsplit({name: p.double() for name, p in weights.items()}, x_BLD.double(), sees)
    with torch.no_grad():
        module = Cached(plan, grid, weights)
        cached = by_calls(module, plan, new_cache(plan, grid).layers[0], x_BLD, sees)
        q, k, v = (
            (torch.einsum("bld,hed->bhle", x_BLD, weights[f"{x}_weight"]) + weights[f"{x}_bias"][:, None])
            for x in "qkv"
        )
        o = torch.nn.functional.scaled_dot_product_attention(q, k, v, sees, enable_gqa=True)
        stock = torch.einsum("bhle,dhe->bld", o, weights["out_weight"]) + weights["out_bias"]
    return tuple(((y.double() - exact).norm() / exact.norm()).item() for y in (cached, stock))


TRAINED = {
    "one call": Plan((7,)),
    "two calls": Plan((5, 3)),
    "window": Plan((6, 1, 2), window=4),
    "padding": Plan((6, 2), padding=True),
}


def run_gradients(grid, plans):
    return [gradients_off(plan, grid) for plan in plans]


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (1, 4)])
def test_gradients_pass_through_the_cache(pool, grid):
    """T. Localises: memory that autograd does not see, in the first call (training with use_cache=True) or later."""
    n, m = grid
    plans = in_every_layout(TRAINED)
    for rank, found in enumerate(pool.run(run_gradients, n * m, grid, plans, timeout=240)):
        for plan, errors in zip(plans, found, strict=True):
            assert max(errors.values()) <= 1e-10, (rank, errors, plan)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("trained", ["query", "mask"])
@pytest.mark.parametrize("later", ["append", "select"])
def test_gradients_with_frozen_keys(later, trained, window):
    """T. Localises: memory written to by a later call, also without gradients, though attention's graph saved it."""
    B, K, d, calls = 2, 2, 8, (1, 2, 6)
    L = sum(calls)
    q, k, v = torch.randn(3, B, K, L, d, dtype=torch.float64)
    bias = torch.zeros(L, L, dtype=torch.float64).masked_fill(~visible(Plan((L,), window=window))[0, 0], float("-inf"))
    weight = torch.randn(B, K, L, d, dtype=torch.float64)

    def gradient(attend):
        leaf = (q if trained == "query" else bias).clone().requires_grad_()
        y = attend(leaf if trained == "query" else q, leaf if trained == "mask" else bias)
        return torch.autograd.grad((y * weight).sum(), leaf)[0]

    def by_calls(q, bias):
        layer = KVCache({"num_layers": 1, "num_kv_heads": K, "head_dim": d, "window": window}, None).layers[0]
        ys, first = [], 0
        for tokens in calls:
            rows = slice(first, first + tokens)
            seen = slice(layer.first_key, rows.stop)
            layer.begin(B, tokens)
            kv = layer.append(k[:, :, rows], v[:, :, rows], tokens, for_gradients=True)
            ys.append(scaled_dot_product_attention(q[:, :, rows], *kv, bias[rows, seen]))
            first = rows.stop
        with torch.no_grad():  # there is room in the memory: what the window dropped, or what is taken back
            if later == "select":
                layer.select(torch.tensor([1, 0]))
            else:
                layer.rewind(1 if window is None else 0)
                layer.begin(B, 1)
                layer.append(k[:, :, :1], v[:, :, :1], 1)
        return torch.cat(ys, 2)

    expected = gradient(lambda q, bias: scaled_dot_product_attention(q, k, v, bias))
    assert (gradient(by_calls) - expected).abs().max() <= 1e-10
