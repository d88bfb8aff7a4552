"""Unmodified model.generate() of split decoders on real Gloo ranks: the tokens of the stock model."""

import copy

import pytest
import torch
from harness.calls import mesh
from harness.decoders import MODELS, compiled_steps, pair, prompt

import two_level_mha as tlm

GREEDY = {"max_new_tokens": 50, "do_sample": False, "pad_token_id": 0}


def tokens(model, ids, mask=None, seed=3, **options):
    torch.manual_seed(seed)
    return model.generate(ids, attention_mask=mask, **(GREEDY | options))


def greedy(names, grid, make, options):
    """Which models give other tokens than stock, with left padding, by the default cache."""
    ids, keep = prompt()
    wrong = []
    for name in names:
        stock, ours = pair(name, grid, tuple(make.items()), **options)
        if not torch.equal(tokens(ours, ids, keep), tokens(stock, ids, keep)):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("rest", [False, True])
def test_greedy(pool, rest):
    """E. Localises: the cache in single steps: windows that move, padding, positions; rest: MLPs and experts split."""
    names = ["qwen3 moe", "mixtral"] if rest else ["qwen2", "gemma3"]
    assert pool.run(greedy, 4, names, (2, 2), {}, {"rest": rest}, timeout=240) == [[]] * 4


@pytest.mark.parametrize("name, grid", [("28 heads", (4, 2)), ("2 kv heads", (2, 4))])
def test_greedy_past_the_kv_heads(pool, name, grid):
    """E. Localises: grids of more ranks than key/value heads, or of head counts that 8 does not divide."""
    assert pool.run(greedy, 8, [name], grid, {}, {}, timeout=240) == [[]] * 8


@pytest.mark.slow
@pytest.mark.parametrize(
    "grid, cache",
    [(grid, "position") for grid in [(2, 1), (1, 2), (1, 4), (2, 4), (1, 8), (2, 8)]]
    + [(grid, "batch") for grid in [(1, 2), (2, 4), (2, 8)]],
)
def test_greedy_of_every_family(pool, grid, cache):
    """E. As test_greedy, when only a family, a grid or a layout fails."""
    ranks = grid[0] * grid[1]
    names = [name for name in MODELS if name != "gemma2" and not (grid[0] > 1 and name == "head_dim 512")]
    if ranks == 16:
        names = ["qwen3", "gemma3"]
    assert pool.run(greedy, ranks, names, grid, {}, {"cache": cache}, timeout=580) == [[]] * ranks


@pytest.mark.slow
def test_greedy_of_gemma2(pool):
    """E. Localises: eager masks in single steps; Gemma 2 has no other attention."""
    make = {"implementation": "eager", "dtype": torch.float32}
    for grid in ((2, 2), (1, 4)):
        assert pool.run(greedy, 4, ["gemma2"], grid, make, {}, timeout=240) == [[]] * 4


def continued(model, ids, cache, **options):
    """Two turns, the second from the cache that the first returned."""
    first = tokens(model, ids, past_key_values=cache, return_dict_in_generate=True, max_new_tokens=9, **options)
    more = torch.cat([first.sequences, ids[:, :3]], 1)
    return tokens(model, more, past_key_values=first.past_key_values, max_new_tokens=9, **options)


def assisted(model, ids, cache, name):
    from harness.decoders import make

    draft = make(name)
    with torch.no_grad():  # right sometimes
        for p in draft.parameters():
            p.add_(0.02 * torch.randn_like(p))
    draft.generation_config.num_assistant_tokens = 4
    return tokens(model, ids, past_key_values=cache, assistant_model=draft, max_new_tokens=20)


MODES = {
    "sampled": lambda model, ids, keep, cache, name: tokens(
        model, ids, keep, past_key_values=cache, do_sample=True, top_k=20, max_new_tokens=20
    ),
    "beams": lambda model, ids, keep, cache, name: tokens(
        model, ids, keep, past_key_values=cache, num_beams=3, num_return_sequences=2, max_new_tokens=20
    ),
    "assisted": lambda model, ids, keep, cache, name: assisted(model, ids[1:], cache, name),
    "chunked": lambda model, ids, keep, cache, name: tokens(
        model, ids[1:], past_key_values=cache, prefill_chunk_size=4, max_new_tokens=20
    ),
    "continued": lambda model, ids, keep, cache, name: continued(model, ids[1:], cache),
}


def modes_off(names, grid, modes, layout):
    """(mode, model, cache) that give other tokens than the stock model, with the default cache and with a KVCache."""
    ids, keep = prompt()
    wrong = []
    for name in names:
        stock, ours = pair(name, grid, cache=layout)
        for mode in modes:
            run, wanted = MODES[mode], None
            for own in (False, True):
                cache = tlm.KVCache(ours.config, mesh(grid), layout=layout, max_length=64) if own else None
                torch.manual_seed(5)
                got = run(ours, ids, keep, cache, name)
                if wanted is None:
                    torch.manual_seed(5)
                    wanted = run(stock, ids, keep, None, name)
                if not torch.equal(got, wanted):
                    wrong.append((mode, name, "KVCache" if own else "default"))
    return wrong


@pytest.mark.parametrize("layout", ["position", "batch"])
@pytest.mark.parametrize("mode", MODES)
def test_modes(pool, mode, layout):
    """E. Localises: what a mode does to a cache: other orders of beams, tokens taken back, chunks, a second turn."""
    assert pool.run(modes_off, 4, ["gemma3"], (2, 2), [mode], layout, timeout=240) == [[]] * 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "grid, layout", [*((grid, "position") for grid in [(1, 2), (1, 4), (2, 4), (2, 8)]), ((2, 4), "batch")]
)
def test_every_mode_on_every_grid(pool, grid, layout):
    """E. As test_modes, when only a grid or a family fails."""
    ranks = grid[0] * grid[1]
    names = ["qwen2", "qwen3"]
    assert pool.run(modes_off, ranks, names, grid, list(MODES), layout, timeout=580) == [[]] * ranks


def apart(grid, cache="position", eos=None, seconds=(None,) * 4, noise=0.0, **options):
    """Tokens of ranks that are seeded apart, compared at each call, and what rank 0's seed gives the unsplit model.

    eos: a token that ends a row, or None; seconds: max_time of each rank; noise: of the logits of all but rank 0.
    """
    stock, ours = pair("llama", grid, debug=True, cache=cache)
    ids, keep = prompt()
    rank = torch.distributed.get_rank()
    draws = {"do_sample": True, "max_new_tokens": 12, **options}
    if eos is not None:
        draws["eos_token_id"] = eos

    def blur(model, args, output):
        if noise and rank:  # or the draw itself would change what comes next
            output.logits.add_(noise * torch.randn_like(output.logits))

    hook = ours.register_forward_hook(blur)
    got = tokens(ours, ids, keep, seed=rank, max_time=seconds[rank], **draws)
    hook.remove()
    return got, tokens(stock, ids, keep, seed=0, **draws)


def noisy(grid):
    """Greedy tokens where logits differ between ranks."""
    return apart(grid, noise=1.0, do_sample=False)


@pytest.mark.parametrize("cache", ["position", "batch"])
@pytest.mark.parametrize("stops", ["length", "eos"])
def test_ranks_that_are_seeded_apart(pool, stops, cache):
    """E. Localises: rank 0's token, which all take (integrations/generate.py); else tokens part, and are refused."""
    eos = None
    if stops == "eos":  # one that rank 0 draws midway
        eos = pool.run(apart, 4, (2, 2))[0][1][0, 11 + 5].item()
    for got, wanted in pool.run(apart, 4, (2, 2), cache, eos):
        assert torch.equal(got, wanted)


def test_ranks_whose_logits_differ(pool):
    """E. Localises: the same where nothing is drawn, but kernels after a sum differ, as they may between GPUs."""
    for got, wanted in pool.run(noisy, 4, (2, 2)):
        assert torch.equal(got, wanted)


def test_the_first_rank_says_when_to_stop(pool):
    """E. Localises: whose clock ends generate(max_time=): a rank that ended alone would leave the others waiting."""
    for got, wanted in pool.run(apart, 4, (2, 2), "position", None, (None, 0.0, None, 0.0)):
        assert torch.equal(got, wanted)


def kept(grid):
    """Of a split model and its copy: class, whether it is the original's, module; whether both draw the same tokens."""
    stock, ours = pair("llama", grid)
    ids, keep = prompt()
    copies = [ours, copy.deepcopy(ours)]
    seen = [(type(one).__name__, isinstance(one, type(stock)), type(one).__module__) for one in copies]
    drawn = [tokens(one, ids, keep, seed=torch.distributed.get_rank(), do_sample=True) for one in copies]
    return seen, torch.equal(*drawn)


def test_class_of_a_model_that_generates(pool):
    """Localises: the subclass that generate() is changed by: its name, which configs keep, and copies of a model."""
    for seen, equal in pool.run(kept, 4, (2, 2)):
        assert seen == [("LlamaForCausalLM", True, "transformers.models.llama.modeling_llama")] * 2
        assert equal


def refusals(grid):
    """What a split decoder says to caches that it cannot take."""
    from transformers import DynamicCache, StaticCache

    ids, _ = prompt()
    stock, ours = pair("llama", grid)
    filled = DynamicCache(config=stock.config)
    stock(ids, past_key_values=filled)
    calls = {
        "static": lambda: ours(ids, past_key_values=StaticCache(config=ours.config, max_cache_len=32)),
        "filled": lambda: ours(ids, past_key_values=filled),
        "another grid": lambda: ours(ids, past_key_values=tlm.KVCache(ours.config, None)),
        "too long": lambda: ours(ids, past_key_values=tlm.KVCache(ours.config, mesh(grid), max_length=5)),
        "not split": lambda: stock(ids, past_key_values=tlm.KVCache(ours.config, mesh(grid))),
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = "nothing"
        except ValueError as error:
            found[name] = str(error)
    return found


def test_caches_that_are_refused(pool):
    """Localises: a cache of another kind, which would be used as if it were ours."""
    parts = {
        "static": "a two_level_mha.KVCache, whose max_length= allocates once, got a StaticCache with StaticLayer",
        "filled": "filled by a model that is not split",
        "another grid": "was made for",
        "too long": "max_length=5",
        "not split": "call parallelize(model, mesh) first",
    }
    for found in pool.run(refusals, 4, (2, 2)):
        assert all(parts[name] in message for name, message in found.items()), found


def memory(grid, layout):
    ids, _ = prompt(rows=4)
    _, ours = pair("llama", grid)
    cache = tlm.KVCache(ours.config, mesh(grid), layout=layout, max_length=64)
    tokens(ours, ids, past_key_values=cache, max_new_tokens=4)
    return cache.nbytes


@pytest.mark.parametrize("layout", ["position", "batch"])
def test_memory_of_a_models_cache(pool, layout):
    """E. Localises: keys of one layer or rank kept twice."""
    whole = 3 * 2 * 8 * 4 * 2 * 64 * 8  # layers, K and V, float64, sequences, heads, tokens, head_dim
    assert pool.run(memory, 4, (2, 2), layout) == [whole // 4] * 4


def allocated_once(grid, layout):
    """Tokens by cache_implementation="static" beside stock's, of greedy search and beams; bytes of the cache."""
    ids, keep = prompt(rows=4)
    found = []
    for name in ("llama", "gemma3"):
        stock, ours = pair(name, grid, cache=layout)
        for beams in (1, 3):
            options = {"max_new_tokens": 20, "num_beams": beams}
            static = options | {"cache_implementation": "static", "return_dict_in_generate": True}
            got = tokens(ours, ids, keep, **static)
            same = torch.equal(got.sequences, tokens(stock, ids, keep, **options))
            found.append((same, got.past_key_values.nbytes if name == "llama" and beams == 1 else 0))
    return found


@pytest.mark.parametrize("layout", ["position", "batch"])
def test_a_static_cache(pool, layout):
    """E. Localises: the cache that a split model makes for cache_implementation="static", allocated at once."""
    longest = 11 + 19  # tokens of the prompt, and new ones but the last
    whole = 3 * 2 * 8 * 4 * 2 * longest * 8
    for found in pool.run(allocated_once, 4, (2, 2), layout):
        assert [same for same, _ in found] == [True] * 4
        assert found[0][1] == whole // 4


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["position", "batch"])
def test_a_compiled_step(pool, layout):
    """E. Localises: a number of the cache that a graph takes as constant: each step would be compiled anew."""
    for counts, same in pool.run(compiled_steps, 2, (1, 2), layout, timeout=500):
        assert same
        assert counts[-1] <= 3 and counts[3:] == [counts[3]] * 9, counts
