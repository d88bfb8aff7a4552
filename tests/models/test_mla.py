"""Multi-head latent attention: DeepSeek-V2 and V3, GLM-4-MoE-lite, MiniCPM3, Youtu, Kimi Linear, LongCat and their kin.

In float64 against the stock model. A failure here with test_llama and test_forms green is in `integrations/latent.py`,
or in what `integrations/forms.py` knows of its names.
"""

import copy

import pytest
import torch
from harness.calls import mesh
from harness.decoders import (
    EXACT,
    LATENT,
    check,
    difference,
    differences,
    full_gradients,
    gradient_differences,
    gradients_off,
    logits_off,
    make,
    make_meta,
    pair,
    prompt,
)
from torch import nn
from transformers import DynamicCache

import two_level_mha as tlm
from two_level_mha.integrations.latent import LatentAttention

LIMITS = dict.fromkeys(LATENT, 1e-10) | {
    "deepseek v2": 1e-6,  # whose queries and rotary keys round to float32
    "bailing hybrid": 1e-6,  # whose gates do
}
EVERY_GRID = ("deepseek v3", "youtu", "deepseek v32", "6 heads")
TIMEOUT = 400


def compare(pool, function, names, *args, ranks: int = 4) -> None:
    for per_model in pool.run(function, ranks, names, *args, EXACT, timeout=TIMEOUT):
        for name, errors in per_model.items():
            check([{name: errors}], LIMITS[name])


def kinds(names, grid):
    """Which attentions of each model are split, and how many are gathered."""
    found = {}
    for name in names:
        _, ours = pair(name, grid, tuple(EXACT.items()))
        split = [module for module in ours.modules() if isinstance(module, LatentAttention)]
        found[name] = len(split), len(tlm.report(ours).gathered), {module.place.grid.size for module in split}
    return found


def test_split(pool):
    """E. Localises: a family that is gathered again, since its parts or its numbers are not known any more."""
    for found in pool.run(kinds, 4, list(LATENT), (2, 2), timeout=TIMEOUT):
        for name, (split, gathered, ranks) in found.items():
            assert split > 1 and not gathered and ranks == {4}, (name, found[name])


@pytest.mark.parametrize("cache", ["position", "batch"])
@pytest.mark.parametrize("names", [list(LATENT)[:6], list(LATENT)[6:]])
def test_logits(pool, names, cache):
    """T. Localises: rotary functions, widths, scales and masks of a family; two steps with a cache."""
    compare(pool, logits_off, names, (2, 2), {"cache": cache})


@pytest.mark.parametrize("grid", [(1, 4), (4, 1)])
def test_grids(pool, grid):
    """T. Localises: the grid that such attention takes of another; six heads on four ranks: slices filled up."""
    compare(pool, logits_off, EVERY_GRID, grid, {"rest": True})
    compare(pool, gradients_off, EVERY_GRID, grid, True, {})


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("names", [list(LATENT)[:6], list(LATENT)[6:]])
def test_gradients(pool, use_cache, names):
    """T. Localises: sums over the ranks of the latents' and the rotary key's gradients, parts of kv_b_proj's."""
    compare(pool, gradients_off, names, (2, 2), use_cache, {})


@pytest.mark.parametrize("name", ["deepseek v3", "6 heads"])
def test_eight_ranks(pool, name):
    """T. Localises: (4, 2) and (2, 4) of a mesh of (2, 4): more ranks than heads, slices of 2 columns of a head's 7."""
    for cache in ("position", "batch"):
        compare(pool, logits_off, [name], (2, 4), {"cache": cache}, ranks=8)
    compare(pool, gradients_off, [name], (2, 4), True, {}, ranks=8)
    assert pool.run(tokens_off, 8, [name], (2, 4), {}, {}, timeout=TIMEOUT) == [[]] * 8


def compiled_off(name, grid, scheme):
    """Differences of logits and gradients of a compiled model, without a cache."""
    stock = make(name, exact=True)
    ours = tlm.parallelize(copy.deepcopy(stock), mesh(grid), rest=False, scheme=scheme)
    ids, keep = prompt()
    logits = []
    for model in (stock, torch.compile(ours, backend="aot_eager", fullgraph=True)):
        logits.append(model(ids, attention_mask=keep, use_cache=False).logits)
        (logits[-1].log_softmax(-1)[..., 3] * keep).sum().backward()
    return [difference(*logits, keep), *gradient_differences(stock, ours)]


@pytest.mark.parametrize(
    "name, grid, scheme",
    [pytest.param("youtu", (2, 2), "auto", marks=pytest.mark.slow), ("6 heads", (2, 2), "sequence")],
)
def test_compiled(pool, name, grid, scheme):
    """T. Localises: what a graph cannot hold of latent attention: children that every rank has, slices filled up."""
    for found in pool.run(compiled_off, 4, name, grid, scheme, timeout=TIMEOUT):
        assert max(found) <= 1e-10


@pytest.mark.parametrize("scheme", ["slices", "sequence", "batch", "weights"])
def test_schemes(pool, scheme):
    """T. Localises: heads of three widths where slices move; the rotary key's rows."""
    for combine in ("reduce", "concat"):
        compare(pool, logits_off, ["6 heads"], (2, 2), {"scheme": scheme, "combine": combine})
        compare(pool, gradients_off, ["6 heads"], (2, 2), False, {"scheme": scheme, "combine": combine})


def tokens_off(names, grid, options, generate):
    """Which models give other tokens than stock, with left padding, 12 by the cache."""
    ids, keep = prompt()
    given = {"attention_mask": keep, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    wrong = []
    for name in names:
        models = pair(name, grid, tuple(EXACT.items()), **options)
        if not torch.equal(*(model.generate(ids, **given | generate) for model in models)):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("cache", ["position", pytest.param("batch", marks=pytest.mark.slow)])
def test_greedy(pool, cache):
    """E. Localises: one query at a time against a cache, also of six heads on four ranks; beams that move in it."""
    assert pool.run(tokens_off, 4, list(LATENT), (2, 2), {"cache": cache}, {}, timeout=TIMEOUT) == [[]] * 4
    for grid in ((1, 4), (4, 1)):
        found = pool.run(tokens_off, 4, EVERY_GRID, grid, {"cache": cache}, {"num_beams": 3}, timeout=TIMEOUT)
        assert found == [[]] * 4


def kept(name, grid, layout):
    """Greedy tokens with a KVCache made for the model's mesh: whether they are stock's, and what a rank holds of it."""
    stock, ours = pair(name, grid, tuple(EXACT.items()))
    ids = prompt()[0][:, 4:]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cache = tlm.KVCache(ours.config, mesh(grid), layout=layout, max_length=12)
    same = torch.equal(stock.generate(ids, **options), ours.generate(ids, past_key_values=cache, **options))
    return same, cache.nbytes


@pytest.mark.parametrize("name", ["deepseek v3", "6 heads"])
@pytest.mark.parametrize("grid", [(2, 2), (4, 1)])
def test_latents_are_kept_once(pool, name, grid):
    """E. Localises: a cache by position that has more of a token than one latent and one rotary key on one rank."""
    config = LATENT[name][1]
    width, layers = config["kv_lora_rank"] + config["qk_rope_head_dim"], config["num_hidden_layers"]
    for same, held in pool.run(kept, 4, name, grid, "position", timeout=TIMEOUT):
        assert same and held == layers * 2 * 12 // 4 * width * 8
    assert all(same for same, _ in pool.run(kept, 4, name, grid, "batch", timeout=TIMEOUT))


def later_call_off(names, grid, options):
    """Differences of logits and gradients, of two calls with one cache, to a loss of both."""
    found = {}
    ids, keep = prompt(length=13)
    for name in names:
        models = pair(name, grid, tuple(EXACT.items()), **options)
        logits = []
        for model in models:
            model.zero_grad()
            cache, parts = None, []
            for first, end in ((0, 6), (6, 7), (7, 13)):
                output = model(ids[:, first:end], attention_mask=keep[:, :end], past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                parts.append(output.logits)
            logits.append(torch.cat(parts, 1))
            (logits[-1].log_softmax(-1)[..., 3] * keep).sum().backward()
        stock, ours = models
        grads = full_gradients(ours)
        found[name] = [
            difference(*logits, keep),
            *(
                (grads[key] - p.grad).abs().max().item() / max(1.0, p.grad.abs().max().item())
                for key, p in stock.named_parameters()
                if p.grad is not None
            ),
        ]
    return found


@pytest.mark.parametrize(
    "names, grid, options",
    [
        (["deepseek v3", "mistral4", "kimi linear", "bailing hybrid", "glm dsa"], (2, 2), {}),
        (["6 heads"], (2, 2), {"combine": "concat"}),
        (["6 heads"], (4, 1), {}),
        (["youtu"], (1, 4), {"combine": "concat"}),
    ],
)
def test_later_calls(pool, names, grid, options):
    """T. Localises: queries on latents, the merge of ranks' positions, and gradients through the cache of latents."""
    for found in pool.run(later_call_off, 4, names, grid, options, timeout=TIMEOUT):
        for name, errors in found.items():
            check([{name: errors}], LIMITS[name])


def without_mask(grid):
    """How a later call of a layer without a mask differs from one whose mask says the same."""
    _, ours = pair("youtu", grid, tuple(EXACT.items()))
    layer, outputs = ours.model.layers[0].self_attn, []
    torch.manual_seed(2)
    x, positions = torch.randn(2, 9, 32, dtype=torch.float64), torch.arange(9).expand(2, 9)
    angles = ours.model.rotary_emb(x, positions)
    seen = torch.ones(9, 9, dtype=torch.bool).tril().expand(2, 1, 9, 9)
    for masked in (True, False):
        cache, parts = DynamicCache(), []
        for first, end in ((0, 3), (3, 9)):
            mask = seen[:, :, first:end, :end] if masked else None
            own = tuple(each[:, first:end] for each in angles)
            parts.append(layer(x[:, first:end], own, mask, past_key_values=cache)[0])
        outputs.append(torch.cat(parts, 1))
    return (outputs[0] - outputs[1]).abs().max().item()


def test_without_mask(pool):
    """T. Localises: which of a rank's positions a row of a later call sees, where no mask says it."""
    for grid in ((2, 2), (1, 4)):
        assert max(pool.run(without_mask, 4, grid, timeout=TIMEOUT)) <= 1e-10


def stored(name, grid, folder):
    """full_state_dict, load_state_dict, save_pretrained and load_pretrained of a split model; the share of a rank."""
    stock = make(name)
    ours = tlm.parallelize(copy.deepcopy(stock), mesh(grid))
    expected = stock.state_dict()
    state = tlm.full_state_dict(ours)
    assert not state or (state.keys() == expected.keys() and all(torch.equal(state[k], x) for k, x in expected.items()))
    for p in ours.parameters():
        nn.init.zeros_(p)
    ours.load_state_dict(expected)
    ours.save_pretrained(folder)
    torch.distributed.barrier()
    read = tlm.load_pretrained(tlm.parallelize(make_meta(name), mesh(grid)), folder)
    state = tlm.full_state_dict(read)
    assert not state or all(torch.equal(state[k], x) for k, x in expected.items())
    ids, keep = prompt()
    with torch.no_grad():
        outputs = [model(ids, attention_mask=keep, use_cache=False).logits for model in (stock, read)]
    assert difference(*outputs, keep) <= 1e-5
    held = {}
    for module in (module for module in read.modules() if isinstance(module, LatentAttention)):
        for parameter in module.stock_names:
            p = module.get_parameter(parameter)
            held.setdefault(parameter, (p.to_local().numel(), p.numel()))
    return held


@pytest.mark.parametrize("name", ["deepseek v3", "kimi linear", "6 heads"])
def test_stored(pool, tmp_path, name):
    """E. Localises: which rows of kv_b_proj are keys and which values, of a rank's heads, in both directions."""
    for grid in ((2, 2), (1, 4)):
        for held in pool.run(stored, 4, name, grid, str(tmp_path / f"{grid[1]}"), timeout=120):
            for parameter, (own, whole) in held.items():
                share = 4 if name != "6 heads" else 3  # of seven columns a rank has four
                assert own * share <= whole or parameter.startswith("out_bias"), (parameter, own, whole)


def split_activations(names, grid):
    """Logits and gradients of models whose hidden states stay split."""
    found = {}
    for name in names:
        stock = make(name, exact=True)
        for activations in ("sequence", "batch"):
            ours = tlm.parallelize(copy.deepcopy(stock), mesh(grid), activations=activations)
            report = tlm.report(ours)
            assert not report.gathered and not any("hidden states" in what for what in report.left_out)
            found.setdefault(name, []).extend(differences(stock, ours))
    return found


def test_split_activations(pool):
    """T. Localises: gradients of the linears and norms before latents where each rank has its own rows."""
    for names, grid in ((["minicpm3", "youtu", "deepseek v32"], (4, 1)), (["minicpm3"], (1, 4)), (["6 heads"], (2, 2))):
        for found in pool.run(split_activations, 4, names, grid, timeout=TIMEOUT):
            check([found], 1e-10)


def left_whole(grid):
    """What the report says of hidden states that stay whole."""
    ours = tlm.parallelize(make("youtu"), mesh(grid), activations="sequence")
    return [why for what, why in tlm.report(ours).left_out.items() if "hidden states" in what]


def test_parts_of_another_grid(pool):
    """E. Localises: hidden states whose parts lie on other ranks than attention's own grid has them."""
    for whys in pool.run(left_whole, 4, (2, 2), timeout=120):
        assert whys and all("attention takes the ranks as a grid (4, 1)" in why for why in whys)


def dropped(name, grid):
    """Logits in training with half of the attention weights dropped, in one process and on a grid."""
    stock, found = make(name, exact=True, attention_dropout=0.5), []
    ids, keep = prompt()
    for mesh_ in (None, mesh(grid)):
        ours = tlm.parallelize(copy.deepcopy(stock), mesh_, rest=False).train()
        for use_cache in (False, True):
            torch.manual_seed(3)
            found.append(ours(ids, attention_mask=keep, use_cache=use_cache).logits)
    return max(difference(x, found[0], keep) for x in found[1:])


@pytest.mark.parametrize("name, grid", [("youtu", (2, 2)), ("6 heads", (1, 4))])
def test_dropout(pool, name, grid):
    """T. Localises: dropout that depends on the grid, or on a cache, which is kept by batch then."""
    assert max(pool.run(dropped, 4, name, grid, timeout=TIMEOUT)) <= 1e-10
