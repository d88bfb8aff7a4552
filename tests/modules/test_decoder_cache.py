"""TwoLevelAttention with a KV cache, call after call, is itself over all tokens at once: float64, level T.

A failure here with test_cache.py green is in how decoder.py uses the cache: positions, masks, what is rotated.
"""

from dataclasses import replace

import pytest
import torch
from harness.calls import mesh, on_ranks
from harness.two_level_attention import HALF, PAIRS, Decoder, finish, make

import two_level_mha as tlm

CALLS = (5, 1, 1, 3, 1)
CASES = {
    "norm and rope": Decoder(batch=3, length=11, options={"qk_norm": 1e-3, "rope": HALF, "bias": True}),
    "caller's angles": Decoder(batch=3, length=11, given=4, options={"rope": PAIRS}),
    "window": Decoder(batch=3, length=11, options={"window": 4, "rope": HALF, "softcap": 1.5}),
    "left padding": Decoder(batch=3, length=11, mask="left padding", options={"rope": HALF, "window": 6}),
    "bias mask": Decoder(length=11, mask="bias", options={"scale": 0.6}),
}


def difference(case: Decoder, grid, layout: str, scheme: str, training: bool) -> float:
    """Of outputs, and with training of all gradients, between one call and CALLS."""
    layer = case.layer(grid, scheme=scheme)
    state, x, mask, given, weight = make(case, layer.stock_names)
    layer.load_state_dict(state)
    window = case.options.get("window")
    sizes = {"num_layers": 1, "num_kv_heads": case.kv_heads, "head_dim": case.head_dim, "window": window}
    cache = tlm.KVCache(sizes, mesh(grid), layout=layout).layers[0]

    def whole(x):
        return layer(x, position_embeddings=given, attn_mask=mask)

    def by_calls(x):
        ys, first = [], 0
        for tokens in CALLS:
            end = first + tokens
            angles = None if given is None else [part[:, first:end] for part in given]
            seen = None
            if mask is not None:
                rows = mask if mask.shape[2] == 1 else mask[:, :, first:end]
                seen = rows[..., cache.first_key : end]
            ys.append(layer(x[:, first:end], position_embeddings=angles, attn_mask=seen, cache=cache))
            first = end
        return torch.cat(ys, 1)

    with torch.set_grad_enabled(training):
        found = []
        for run in (whole, by_calls):
            leaf = {"x": x.clone().requires_grad_(training), **dict(layer.named_parameters())}
            y = run(leaf["x"])
            found.append(finish(y, weight, leaf) if training else {"y": y})
    assert cache.length == sum(CALLS)
    return max((found[0][name] - found[1][name]).abs().max().item() for name in found[0])


def differences(grid, case: Decoder) -> dict[str, float]:
    found = {}
    for layout in ("position", "batch"):
        for scheme in ("slices", "heads"):
            for training in (False, True):
                error = difference(case, grid, layout, scheme, training)
                if not error <= 1e-10:
                    found[f"{layout}, {scheme}, training={training}"] = error
    return found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("grid", [None, (1, 4), (2, 2)])
def test_call_after_call(pool, name, grid):
    """T. Localises: positions of angles and rows after the first call, what norm and rotary act on, first_key."""
    case = replace(CASES[name], heads=16, kv_heads=4)
    found = on_ranks(pool, differences, grid, case)
    assert not any(found), found


def cache(grid=None, **sizes):
    return tlm.KVCache({"num_layers": 1, "num_kv_heads": 4, "head_dim": 8, **sizes}, mesh(grid))


@pytest.mark.parametrize(
    "make_cache, options, sentence",
    [
        (lambda: cache(), {}, "must be one of the layers of a KVCache, got LayersCache"),
        (lambda: cache(window=3).layers[0], {}, "keeps a window of 3 tokens, but the module's window is None"),
        (lambda: cache(window=3).layers[0], {"window": 4}, "keeps a window of 3 tokens, but the module's window is 4"),
        (lambda: cache().layers[0], {"scheme": "independent"}, "'independent' takes no cache"),
    ],
)
def test_refused(make_cache, options, sentence):
    """Localises: a cache whose sizes, window or scheme are not those of the module, used as if they were."""
    layer = tlm.TwoLevelAttention(12, 8, 4, 8, **options)
    with pytest.raises(tlm.GridError, match=sentence):
        layer(torch.zeros(2, 3, 12), cache=make_cache())


def other_grid() -> str:
    layer = tlm.TwoLevelAttention(12, 8, 4, 8, mesh=mesh((2, 2)))
    try:
        layer(torch.zeros(2, 3, 12), cache=cache((4, 1)).layers[0])
    except tlm.GridError as error:
        return str(error)
    return ""


def test_cache_of_another_grid(pool):
    """Localises: a cache of another mesh, whose exchanges the ranks would not all join."""
    for message in pool.run(other_grid, 4):
        assert "give both one mesh" in message


def test_frozen_keys():
    """Localises: memory of frozen keys written to while the query's graph still reads it."""
    torch.manual_seed(0)
    layer = tlm.TwoLevelAttention(16, 4, 2, dtype=torch.float64)
    layer.k_weight.requires_grad_(False)
    layer.v_weight.requires_grad_(False)
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    layers = cache(num_layers=1, num_kv_heads=2, head_dim=4).layers
    by_calls = torch.cat([layer(x[:, :4], cache=layers[0]), layer(x[:, 4:], cache=layers[0])], 1)
    grads = [torch.autograd.grad(y.square().sum(), layer.q_weight)[0] for y in (by_calls, layer(x))]
    assert torch.allclose(*grads, rtol=0, atol=1e-12)
