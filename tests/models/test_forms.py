"""Attention of other shapes than Llama's: fused projections, norms over all heads, ALiBi, sinks, gates, encoders.

In float64 against the stock model. A failure here with test_llama green is in the tables of `integrations/forms.py`, in
how a fused tensor is taken apart (`stock.py`), or in `integrations/positions.py`.
"""

import copy

import pytest
import torch
import transformers
from harness.calls import mesh
from harness.decoders import (
    EXACT,
    FORMS,
    check,
    difference,
    full_gradients,
    gradients_off,
    logits_off,
    make,
    make_config,
    make_meta,
    pair,
    prompt,
)
from harness.encoders import SIZES, TEXT
from safetensors.torch import load_file
from torch import nn

import two_level_mha as tlm
from two_level_mha.blocks import full_tensor
from two_level_mha.layer import GridAttention
from two_level_mha.stock import StockTensor, put

ONE_GROUP = ("falcon 7b", "bigcode")  # of one key/value head
IN_FLOAT32 = ("bloom", "granite swa", "xglm", "mpt", "mpt clipped")  # stock's masks of float64 overflow, or give NaN
LIMITS = dict.fromkeys(FORMS, 1e-10) | {
    "bloom": 5e-5,
    "granite swa": 5e-5,
    "xglm": 5e-5,
    "cohere": 1e-6,  # whose norms round to float32
    "laguna": 1e-5,  # whose gates do
    "gptj": 1e-5,  # and whose scores do
    "codegen": 1e-5,
    "gpt neo": 1e-5,
    "mpt": 5e-5,
    "mpt clipped": 5e-5,
    "llama4": 1e-5,  # which rotates and norms in float32
}
GROUPED = [name for name in FORMS if name not in ONE_GROUP]
PACKED = ("phi3", "gpt neox", "falcon 40b", "bloom", "persimmon", "codegen")
EVERY_KIND = ("opt", "phi with norms", "gpt neox", "falcon 40b", "bloom", "olmo2", "cohere", "gpt oss", "qwen3 next")
SINCE = ("falcon rw", "stablelm 2", "codegen", "gpt neo", "mpt", "afmoe", "laguna", "lfm3", "gemma4", "gemma4 k = v")
LATER = ("llama4", "roformer", "gpt neox japanese", "gemma4 shared", "gemma3n")
TIMEOUT = 400


def compare(pool, function, ranks: int, names, *args) -> None:
    """logits_off or gradients_off of every model, within its limit."""
    for own, options in ((False, EXACT), (True, {"dtype": torch.float32})):
        some = [name for name in names if (name in IN_FLOAT32) == own]
        for per_model in pool.run(function, ranks, some, *args, options, timeout=TIMEOUT) if some else ():
            for name, errors in per_model.items():
                check([{name: errors}], LIMITS[name])


@pytest.mark.parametrize("cache", ["position", "batch"])
@pytest.mark.parametrize("names", [GROUPED[:9], GROUPED[9:18], GROUPED[18:27], GROUPED[27:]])
def test_logits(pool, names, cache):
    """T. Localises: the names and shapes of a family, its arguments and masks, per family."""
    compare(pool, logits_off, 4, names, (2, 2), {"cache": cache})


@pytest.mark.parametrize("scheme", ["auto", "heads"])
def test_logits_of_one_group(pool, scheme):
    """T. Localises: one key/value head, of a fused projection, on four slices: keys that ranks hold alike."""
    compare(pool, logits_off, 4, [*ONE_GROUP, "olmo2", "qwen3 next"], (1, 4), {"scheme": scheme})


@pytest.mark.parametrize("grid", [(2, 2), (4, 1)])
def test_one_group_on_head_groups(pool, grid):
    """T. Localises: one key/value head where the grid has head groups: its ranks in one row, and a cache of them."""
    compare(pool, logits_off, 4, ONE_GROUP, grid, {"rest": True})
    compare(pool, gradients_off, 4, ONE_GROUP, grid, True, {})
    for cache in ("position", "batch"):
        assert pool.run(tokens_off, 4, ONE_GROUP, grid, {"cache": cache}, timeout=TIMEOUT) == [[]] * 4
    assert all(pool.run(same_with_own_cache, 4, "head_dim 512", grid, timeout=TIMEOUT))


def same_with_own_cache(name, grid):
    """Whether greedy tokens are stock's with a KVCache that was made for the model's mesh."""
    stock, ours = pair(name, grid)
    ids = prompt()[0][1:]
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = stock.generate(ids, **options)
    return torch.equal(expected, ours.generate(ids, past_key_values=tlm.KVCache(ours.config, mesh(grid)), **options))


@pytest.mark.parametrize("scheme", ["slices", "sequence", "batch", "heads", "weights"])
def test_schemes(pool, scheme):
    """T. Localises: sums over the heads of a norm, sinks, gates, shared keys, where heads and rows are elsewhere."""
    names = ("olmo2", "cohere", "gpt oss", "qwen3 next", "afmoe", "lfm3", "gemma4 k = v", "gemma4 shared")
    compare(pool, logits_off, 4, names, (2, 2), {"scheme": scheme})
    compare(pool, gradients_off, 4, names, (2, 2), False, {"scheme": scheme})


@pytest.mark.parametrize("names", [EVERY_KIND, SINCE, LATER])
@pytest.mark.parametrize("use_cache", [False, True])
def test_gradients(pool, use_cache, names):
    """T. Localises: gradients of parts of a fused tensor, of a norm's shared sum, of sinks, of what is added."""
    compare(pool, gradients_off, 4, names, (2, 2), use_cache, {})


def test_gradients_on_other_grids(pool):
    """T. Localises: the same, over one axis alone."""
    for grid in ((2, 1), (1, 2)):
        compare(pool, gradients_off, 2, EVERY_KIND, grid, True, {"cache": "batch"})


def tokens_off(names, grid, options):
    """Which models give other tokens than stock, with left padding, 12 by the cache."""
    ids, keep = prompt()
    wrong = []
    for name in names:
        make_options = {"dtype": torch.float32} if name in IN_FLOAT32 else EXACT
        models = pair(name, grid, tuple(make_options.items()), **options)
        given = {"attention_mask": keep, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        if not torch.equal(*(model.generate(ids, **given) for model in models)):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("names", [EVERY_KIND, SINCE, LATER])
@pytest.mark.parametrize("cache", ["position", "batch"])
def test_greedy(pool, cache, names):
    """E. Localises: one query at a time against a cache: ALiBi of all its keys, sinks that ranks share."""
    assert pool.run(tokens_off, 4, names, (2, 2), {"cache": cache}, timeout=TIMEOUT) == [[]] * 4


def split_activations(names):
    """Logits and gradients of models whose hidden states stay split."""
    found = {}
    ids, keep = prompt(rows=4, length=16)
    for name in names:
        stock = make(name, exact=True)
        for activations in ("sequence", "batch"):
            ours = tlm.parallelize(copy.deepcopy(stock), mesh((2, 2)), activations=activations)
            assert not tlm.report(ours).gathered
            errors = []
            for model in (stock, ours):
                model.zero_grad()
                logits = model(ids, attention_mask=keep, use_cache=False).logits
                (logits.log_softmax(-1)[..., 3] * keep).sum().backward()
                errors.append(logits)
            grads = full_gradients(ours)
            offs = [
                ((grads[key] - p.grad).abs().max() / p.grad.abs().max().clamp(min=1.0)).item()
                for key, p in stock.named_parameters()
                if p.grad is not None
            ]
            found.setdefault(name, []).extend([difference(*errors, keep), *offs])
    return found


def test_split_activations(pool):
    """T. Localises: sums over heads, sinks and gates where rows or sequences come split."""
    for found in pool.run(
        split_activations,
        4,
        ["olmo2", "gpt oss", "phi3", "falcon 7b", "afmoe", "lfm3", "gemma4 k = v", "gemma4 shared"],
        timeout=TIMEOUT,
    ):
        check([found], 1e-10)


def stored(name, grid, folder):
    """full_state_dict, load_state_dict, save_pretrained and load_pretrained of a split model."""
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
    if name not in IN_FLOAT32:
        with torch.no_grad():
            outputs = [model(ids, attention_mask=keep, use_cache=False).logits for model in (stock, read)]
        assert difference(*outputs, keep) <= 1e-5
    return len(load_file(f"{folder}/model.safetensors"))


@pytest.mark.parametrize(
    "name",
    [
        *PACKED,
        "falcon 7b",
        "opt",
        "gpt oss",
        "qwen3 next",
        "gptj",
        "gpt neo",
        "nanochat",
        "stablelm 2",
        "afmoe",
        "lfm3",
        "gemma4 k = v",
        "gemma3n",
    ],
)
def test_stored(pool, tmp_path, name):
    """E. Localises: which rows of a fused tensor a rank's heads are, in both directions."""
    for grid in ((2, 2), (1, 4)):
        folder = tmp_path / f"{grid[1]}"
        assert min(pool.run(stored, 4, name, grid, str(folder), timeout=120)) > 0


def test_groups():
    """E. Localises: key/value heads between the query heads of a fused tensor, by hand."""
    h, k, d, D = 4, 2, 3, 5
    whole = torch.arange((h + 2 * k) * d * D).view(k, h // k + 2, d, D)
    stock = {"shape": ((h + 2 * k) * d, D), "groups": k}
    q = StockTensor("w", own=(h, d, D), **stock)
    v = StockTensor("w", own=(k, d, D), start=(h // k + 1) * d, **stock)
    flat = whole.flatten(0, 2)
    assert torch.equal(q.read(flat), whole[:, : h // k].reshape(h, d, D))
    assert torch.equal(v.read(flat), whole[:, -1])
    state = {"w": torch.zeros_like(flat)}
    put(state, "w", v, whole[:, -1])
    assert (
        torch.equal(state["w"].view(whole.shape)[:, -1], whole[:, -1]) and not state["w"].view(whole.shape)[:, 0].any()
    )
    assert torch.equal(v.features(flat), whole[:, -1])


DROPPED = {
    "opt": {"attention_dropout": 1.0},
    "gpt neox": {"attention_dropout": 1.0},
    "bloom": {"attention_dropout": 1.0, "hidden_dropout": 1.0},
    "gpt oss": {"attention_dropout": 1.0},
    "qwen3 next": {"attention_dropout": 1.0},
    "falcon rw": {"attention_dropout": 1.0},
    "gpt neo": {"attention_dropout": 1.0},
    "xglm": {"attention_dropout": 1.0},
}


def dropped(name: str) -> float:
    dtype = torch.float32 if name in IN_FLOAT32 else torch.float64
    stock = make(name, dtype, exact=True, **DROPPED[name]).train()
    ours = tlm.parallelize(copy.deepcopy(stock), mesh((2, 2)), rest=False)
    assert tlm.report(ours).attentions and not tlm.report(ours).gathered
    ids, keep = prompt()
    models = [model(ids, attention_mask=keep, use_cache=False).logits for model in (stock, ours)]
    return difference(*models, keep)


@pytest.mark.parametrize("name", DROPPED)
def test_dropout(pool, name):
    """T. Localises: dropout under another name, which only training shows; here all of it."""
    assert max(pool.run(dropped, 4, name)) <= LIMITS[name]


def attention_weights(name: str, cache: str) -> list[torch.Tensor]:
    stock = make(name, torch.float32, "eager")
    ours = tlm.parallelize(copy.deepcopy(stock), mesh((2, 2)), cache=cache)
    ids, keep = prompt()
    with torch.no_grad():
        expected, got = (m(ids, attention_mask=keep, output_attentions=True, use_cache=False) for m in (stock, ours))
    rows = keep[:, None].bool().expand(2, 4, -1)
    return [(a - b)[rows].abs().max().item() for a, b in zip(expected.attentions, got.attentions, strict=True)]


@pytest.mark.parametrize("name", ["gpt oss", "olmo2", "gpt neox", "falcon rw", "lfm3", "xglm"])
def test_attention_weights(pool, name):
    """Localises: weights that leave room for a sink; those of eager attention round to float32."""
    assert max(max(found) for found in pool.run(attention_weights, 4, name, "position")) <= 2e-5


def compiled(name: str) -> float:
    stock = make(name, exact=True)
    ours = tlm.parallelize(copy.deepcopy(stock), mesh((2, 2)), rest=False)
    ids, keep = prompt()
    run = torch.compile(ours, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        return difference(stock(ids, use_cache=False).logits, run(ids, use_cache=False).logits, keep)


@pytest.mark.parametrize(
    "name", ["olmo2", "gpt neox", "granite swa", "afmoe", "lfm3", pytest.param("gemma4 shared", marks=pytest.mark.slow)]
)
def test_compiled(pool, name):
    """T. Localises: what a graph cannot hold of the adapter: a lookup by name, a sum over heads."""
    assert max(pool.run(compiled, 4, name, timeout=200)) <= (1e-5 if name in IN_FLOAT32 else 1e-10)


def rounded(name: str) -> tuple[float, float]:
    """Errors under autocast to bfloat16, ours and stock's, against float64."""
    exact, ids, found = make(name), prompt()[0][1:], []
    with torch.no_grad():
        expected = exact(ids).logits
        stock = make(name, torch.float32)
        for model in (tlm.parallelize(copy.deepcopy(stock), mesh((2, 2))), stock):
            with torch.autocast("cpu", torch.bfloat16):
                found.append((model(ids).logits.double() - expected).abs().max().item())
    return tuple(found)


@pytest.mark.parametrize("name", ["olmo2", "opt", "phi3"])
def test_autocast(pool, name):
    """R. Localises: a norm or a sum taken in low precision."""
    for ours, stock in pool.run(rounded, 4, name):
        assert ours <= 2 * stock


def without_cache(grid: tuple[int, int]) -> tuple[float, bool]:
    """Largest difference of logits and gradients of the first GPT, and whether tokens and weights are alike."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    config = transformers.OpenAIGPTConfig(**sizes, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
    stock = transformers.OpenAIGPTLMHeadModel(config).double().eval()
    for p in stock.parameters():
        p.data.normal_(1.0 if p.ndim == 1 else 0.0, 0.2)
    ours = tlm.parallelize(copy.deepcopy(stock), mesh(grid))
    assert tlm.report(ours).attentions == 2
    ids, keep = prompt()
    found, tokens = [], []
    for model in (stock, ours):
        output = model(ids, attention_mask=keep, output_attentions=True)
        (output.logits.log_softmax(-1)[..., 3] * keep).sum().backward()
        weights = [x.transpose(1, 2)[keep.bool()] for x in output.attentions]
        found.append([output.logits[keep.bool()], *weights])
        tokens.append(model.generate(ids[1:], max_new_tokens=8, do_sample=False, pad_token_id=0))
    grads = full_gradients(ours)
    found = [*zip(*found, strict=True), *((p.grad, grads[name]) for name, p in stock.named_parameters())]
    return max((a - b).abs().max().item() for a, b in found), torch.equal(*tokens)


def test_without_cache(pool):
    """T. Localises: a mask that is a buffer of floats, a list as output, hidden states by another name."""
    for grid in ((2, 2), (1, 4)):
        for off, alike in pool.run(without_cache, 4, grid):
            assert off <= 1e-10 and alike


ENCODERS = {
    "DistilBertModel": ("DistilBertConfig", {"dim": 16, "n_heads": 4, "n_layers": 2, "hidden_dim": 24, "dropout": 0.0,
                                             "attention_dropout": 0.0}),
    "MPNetModel": ("MPNetConfig", SIZES),
    "AlbertModel": ("AlbertConfig", SIZES | {"embedding_size": 8}),
    "CLIPTextModel": ("CLIPTextConfig", SIZES),
    "SiglipTextModel": ("SiglipTextConfig", SIZES),
    "ModernBertModel": ("ModernBertConfig", SIZES | {"local_attention": 6, "global_attn_every_n_layers": 2}),
}  # fmt: skip


def encoder_off(kind: str, grid: tuple[int, int], options: dict) -> dict[str, float]:
    """Differences of the output and of the gradients of one encoder, over all parameters that have the stock's name."""
    config, sizes = ENCODERS[kind]
    torch.manual_seed(0)
    stock = getattr(transformers, kind)(getattr(transformers, config)(**TEXT, **sizes)).double()
    for p in stock.parameters():
        nn.init.normal_(p, std=0.3)
    ours = tlm.parallelize(copy.deepcopy(stock), mesh(grid), **options)
    assert tlm.report(ours).attentions and not any(isinstance(m, GridAttention) for m in stock.modules())
    ids = torch.randint(2, 30, (2, 12))
    keep = torch.ones_like(ids)
    keep[1, 8:] = 0
    found, outputs = {}, []
    for model in (stock, ours):
        model.zero_grad()
        y = model(input_ids=ids, attention_mask=keep).last_hidden_state[keep.bool()]
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        outputs.append(y)
    found["output"] = (outputs[0] - outputs[1]).abs().max().item()
    theirs = {name: p.grad for name, p in stock.named_parameters() if p.grad is not None}
    for name, p in ours.named_parameters():
        if name in theirs and p.grad is not None and p.shape == theirs[name].shape:
            off = (full_tensor(p.grad) - theirs[name]).abs().max() / theirs[name].abs().max().clamp(min=1.0)
            found[name] = off.item()
    return found


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders(pool, kind):
    """T. Localises: names, a position bias, a norm inside, rotary embedding and windows of encoders."""
    for grid, options in (((2, 2), {}), ((1, 4), {"rest": False, "scheme": "sequence"})):
        for found in pool.run(encoder_off, 4, kind, grid, options, timeout=120):
            limit = 1e-7 if kind == "ModernBertModel" else 1e-10  # which rotates in float32
            assert max(found.values()) <= limit, found


@pytest.mark.parametrize("name", FORMS)
def test_split(name):
    """Localises: a form that the trial refuses: gathered, it would give the right numbers in all that is above."""
    report = tlm.report(tlm.parallelize(make(name), None))
    assert report.attentions == make_config(name).num_hidden_layers and not report.gathered
