"""Decoders of the Llama family split over real Gloo ranks, against the stock model: logits, gradients, weights."""

import pytest
import torch
from harness.decoders import EXACT, MODELS, check, gradients_off, logits_off, pair, prompt

SDPA = [name for name in MODELS if name != "gemma2"]  # which has "eager" attention only
EAGER = {"implementation": "eager", "dtype": torch.float32}
WIDE = ("qwen3", "qwen3 moe", "gemma", "gemma3", "head_dim 512")  # heads that 16 slices divide
SMALL = [name for name in SDPA if name not in ("28 heads", "2 kv heads", "head_dim 512")]


@pytest.mark.parametrize("cache", ["position", "batch"])
def test_logits(pool, cache):
    """T. Localises: the adapter: norms, rotary, scale, masks and windows, the layers' cache, per family."""
    found = pool.run(logits_off, 4, SMALL, (2, 2), {"cache": cache}, EXACT, timeout=240)
    check(found, 1e-10)


@pytest.mark.parametrize("name, grid", [("28 heads", (4, 2)), ("2 kv heads", (2, 4)), ("head_dim 512", (1, 8))])
def test_logits_past_the_kv_heads(pool, name, grid):
    """T. Localises: grids of more ranks than key/value heads, or of head counts that 8 does not divide."""
    check(pool.run(logits_off, 8, [name], grid, {}, EXACT, timeout=240), 1e-10)


def test_logits_with_the_models_own_norms(pool):
    """T. Localises: norms that are called with weights of another kind. They round to float32."""
    check(pool.run(logits_off, 4, ["llama", "qwen3", "gemma3"], (1, 4), {}, {}, timeout=240), 1e-8)


def test_logits_of_eager_attention(pool):
    """Localises: additive masks, soft-cap, and windows of Gemma 2. Eager attention rounds to float32; in which order a
    sum over ranks is made moves Gemma 3, whose activations are large, by 1e-5."""
    names = ["llama", "gemma2", "gemma3"]
    found = pool.run(logits_off, 4, names, (2, 2), {}, EAGER, timeout=240)
    check(found, 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "grid, scheme",
    [(grid, "auto") for grid in [(2, 1), (1, 2), (1, 4), (2, 4), (1, 8), (1, 16), (2, 8)]]
    + [((2, 2), scheme) for scheme in ("slices", "sequence", "batch", "weights")],
)
def test_logits_of_every_family_on_every_grid(pool, grid, scheme):
    """T. As test_logits, when only a grid or a scheme fails."""
    names = [name for name in SDPA if grid != (1, 16) or name in WIDE]
    if grid[0] > 1:
        names.remove("head_dim 512")
    for cache in ("position", "batch"):
        options = {"cache": cache, "scheme": scheme}
        check(pool.run(logits_off, grid[0] * grid[1], names, grid, options, EXACT, timeout=500), 1e-10)


@pytest.mark.parametrize("use_cache", [False, True])
def test_gradients(pool, use_cache):
    """T. Localises: gradients of every parameter of a model, norms and embeddings too, also through a cache."""
    names = ["llama", "qwen3", "gemma3"]
    for grid in ((2, 2), (1, 4)):
        check(pool.run(gradients_off, 4, names, grid, use_cache, {}, timeout=240), 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(
    "grid, cache", [*((grid, "position") for grid in [(2, 1), (1, 2), (2, 4), (2, 8)]), ((2, 4), "batch")]
)
def test_gradients_of_every_family(pool, grid, cache):
    """T. As test_gradients, when only a family or a grid fails."""
    for use_cache in (False, True):
        names = [name for name in SDPA if name != "head_dim 512"]
        found = pool.run(gradients_off, grid[0] * grid[1], names, grid, use_cache, {"cache": cache}, timeout=500)
        check(found, 1e-10)


def attentions(grid, name, cache, use_cache):
    stock, ours = pair(name, grid, tuple(EAGER.items()), cache=cache)
    ids, keep = prompt()
    with torch.no_grad():
        options = {"attention_mask": keep, "output_attentions": True, "use_cache": use_cache}
        wanted = stock(ids, **options).attentions
        try:
            got = ours(ids, **options).attentions
        except RuntimeError as error:
            return str(error)
    assert len(got) == len(wanted) == 3
    rows = keep[:, None].bool().expand(wanted[0].shape[:-1])
    return max((a - b)[rows].abs().max().item() for a, b in zip(got, wanted, strict=True))


def test_attention_weights(pool):
    """Localises: recording of weights, by class, or weights that would come back empty."""
    for grid, cache, use_cache in (((2, 2), "position", False), ((1, 4), "batch", True)):
        assert max(pool.run(attentions, 4, grid, "llama", cache, use_cache)) <= 1e-5
    for message in pool.run(attentions, 4, (2, 2), "llama", "position", True):
        assert "output_attentions needs all keys of a query on one rank" in message
