"""Models of transformers whose ranks keep unequal shares of their KV caches: the stock model's logits and tokens."""

import copy

import pytest
import torch
from harness.calls import mesh
from harness.decoders import EXACT, compiled_steps, logits_off, make, pair, prompt
from transformers import T5Config, T5ForConditionalGeneration

import two_level_mha as tlm

GRIDS = [(1, 4, (0, 1, 5, 2)), (2, 2, (2, 1, 1, 3)), (2, 2, (1, 1, 1, 2))]
# windows, chunks, biases of positions, keys that layers share, a gate, latents, latents with an indexer
NAMES = ("gemma3", "llama4", "falcon rw", "gemma3n", "qwen3 next", "deepseek v3", "deepseek v32")
LIMITS = dict.fromkeys(NAMES, 1e-10) | {"gemma3n": 1e-6, "llama4": 1e-6}  # they round to float32


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_logits(pool, grid):
    """T. Localises: a family's cache, mask or bias that takes a rank's tokens for every m-th."""
    for found in pool.run(logits_off, 4, NAMES, grid, {}, EXACT, timeout=240):
        for name, errors in found.items():
            assert max(errors) <= LIMITS[name], (name, errors)


def tokens(model, ids, keep, **options):
    return model.generate(ids, attention_mask=keep, do_sample=False, pad_token_id=0, **options)


def generated(grid, names):
    """Whether greedy search, beams and a cache that is allocated once give stock's tokens, by model."""
    ids, keep = prompt(rows=3)
    found = {}
    for name in names:
        stock, ours = pair(name, grid, tuple(EXACT.items()))
        ways = [{"max_new_tokens": 24}, {"max_new_tokens": 12, "num_beams": 3}]
        ways += [] if "deepseek" in name else [{"max_new_tokens": 12, "cache_implementation": "static"}]
        plain = [{key: x for key, x in way.items() if key != "cache_implementation"} for way in ways]
        found[name] = [
            torch.equal(tokens(ours, ids, keep, **way), tokens(stock, ids, keep, **same))
            for way, same in zip(ways, plain, strict=True)
        ]
    return found


@pytest.mark.parametrize("grid", GRIDS[:2], ids=str)
def test_generate(pool, grid):
    """E. Localises: the turns of single steps, of reordered beams, and in memory that is allocated once."""
    for found in pool.run(generated, 4, grid, ("qwen2", "gemma3", "deepseek v3"), timeout=240):
        assert all(all(same) for same in found.values()), found


def copied(grid):
    """Whether a copy of a split model, with a copy of its mesh, makes caches of the same shares."""
    stock, ours = pair("llama", grid)
    ids, keep = prompt()
    way = {"max_new_tokens": 8}
    made = tokens(copy.deepcopy(ours), ids, keep, cache_implementation="static", **way)
    return torch.equal(made, tokens(stock, ids, keep, **way))


@pytest.mark.parametrize("grid", GRIDS[:2], ids=str)
def test_a_copy(pool, grid):
    """Localises: shares that are looked up by the mesh itself, and not by its groups."""
    assert all(pool.run(copied, 4, grid))


def encoder_decoder(grid):
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    stock = T5ForConditionalGeneration(config).double().eval()
    ours = tlm.parallelize(copy.deepcopy(stock), mesh(grid))
    ids, keep = prompt(rows=3)
    return [
        torch.equal(*(tokens(model, ids, keep, max_new_tokens=14, num_beams=beams) for model in (stock, ours)))
        for beams in (1, 3)
    ]


@pytest.mark.parametrize("grid", GRIDS[:2], ids=str)
def test_encoder_decoder(pool, grid):
    """E. Localises: keys of the encoder, which a later call attends to without new ones, and relative biases."""
    assert pool.run(encoder_decoder, 4, grid, timeout=120) == [[True, True]] * 4


def kept(grid, name):
    """Bytes of a model's cache after 14 cycles, on this rank."""
    stock, ours = pair(name, grid, tuple(EXACT.items()))
    torch.manual_seed(2)
    ids = torch.randint(2, 64, (2, 14 * sum(grid[2])))
    cache = tlm.KVCache(ours.config, mesh(grid), max_length=ids.shape[1])
    with torch.no_grad():
        ours(ids, past_key_values=cache)
    return cache.nbytes


@pytest.mark.parametrize("name, grid", [("llama", GRIDS[0]), ("deepseek v3", GRIDS[1])])
def test_bytes_are_in_proportion(pool, name, grid):
    """T. Localises: tokens that are kept twice; latents, whose shares are those of all ranks."""
    found, shares = pool.run(kept, 4, grid, name, timeout=120), grid[2]
    assert found == [sum(found) * share // sum(shares) for share in shares] and sum(found)


def trained(grid):
    """Losses in training with attention dropout, where transformers makes a cache, with shares and without."""
    losses = []
    for one in (grid, grid[:2]):
        stock = make("qwen3", attention_dropout=0.3)
        ours = tlm.parallelize(stock, mesh(one)).train()
        ids, keep = prompt()
        torch.manual_seed(4)
        losses.append(ours(ids, attention_mask=keep, labels=ids, use_cache=True).loss.item())
    return losses


def test_training_with_dropout(pool):
    """E. Localises: the cache by batch that such a call makes, for which shares are none of its business."""
    for unequal, equal in pool.run(trained, 4, GRIDS[1]):
        assert unequal == pytest.approx(equal, abs=1e-12)


def by_batch(grid):
    """What is said of layout "batch"."""
    _, ours = pair("llama", grid)
    found = []
    for call in (
        lambda: tlm.parallelize(make("llama"), mesh(grid), cache="batch"),
        lambda: tlm.KVCache(ours.config, mesh(grid), layout="batch"),
    ):
        with pytest.raises(tlm.GridError) as error:
            call()
        found.append(str(error.value))
    return found


def test_sequences_are_dealt_equally(pool):
    """Localises: shares that are taken no account of without a word."""
    for found in pool.run(by_batch, 4, GRIDS[2]):
        assert all("deals sequences equally, the mesh has cache_shares=[1, 1, 1, 2]" in text for text in found), found


def others_cache(grid):
    """What is said of a cache whose ranks keep other shares."""
    ids, _ = prompt()
    _, ours = pair("llama", grid)
    with pytest.raises(tlm.GridError) as error:
        ours(ids, past_key_values=tlm.KVCache(ours.config, mesh(grid[:2])))
    return str(error.value)


def test_a_cache_of_other_shares(pool):
    """Localises: a cache that is taken for the model's own, whose tokens would be read as others'."""
    for text in pool.run(others_cache, 4, GRIDS[1]):
        grid = "Grid(head_groups=2, slices=2) with cache_shares="
        assert text == f"the KV cache was made for {grid}None, the attention keeps it on {grid}[2, 1, 1, 3]"


@pytest.mark.slow
def test_a_compiled_step(pool):
    """E. Localises: a turn's arithmetic that a graph cannot take as symbolic: each step would be compiled anew."""
    for counts, same in pool.run(compiled_steps, 2, (1, 2, (3, 1)), timeout=500):
        assert same
        assert counts[-1] <= 4 and counts[8:] == [counts[8]] * 4, counts  # none after two cycles
