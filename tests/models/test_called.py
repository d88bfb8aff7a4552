"""Attention that is called in another way, or holds what it has under other names: CTRL, CPM-Ant, XLM, MVP, Moshi,
HRM-Text, MiMo, Phi-4's audio; and Llama 4's experts.

In float64 against the stock model. A failure here with test_forms green is in the tables of `integrations/forms.py`, in
values that are filled up to the width of keys (`integrations/projected.py`), or in `integrations/tp_plan.py`.
"""

import copy

import pytest
import torch
import transformers
from harness.calls import mesh
from harness.decoders import (
    CALLED,
    EXACT,
    check,
    difference,
    differences,
    full_gradients,
    gradients_off,
    logits_off,
    make,
    make_config,
    pair,
    prompt,
)
from torch import nn

import two_level_mha as tlm
from two_level_mha.integrations.projected import ProjectedAttention

LIMITS = dict.fromkeys(CALLED, 1e-10) | {"llama4 moe": 1e-5}  # which rotates and norms in float32
NARROW = ("mimo", "mimo, wide values")
TIMEOUT = 400


def compare(pool, function, names, *args) -> None:
    for per_model in pool.run(function, 4, names, *args, EXACT, timeout=TIMEOUT):
        for name, errors in per_model.items():
            check([{name: errors}], LIMITS[name])


@pytest.mark.parametrize("name", CALLED)
def test_split(name):
    """Localises: a form that the trial refuses: gathered, it would give the right numbers in all that is below."""
    report = tlm.report(tlm.parallelize(make(name), None))
    layers = getattr(make_config(name), "decoder_layers", make_config(name).num_hidden_layers)
    expected = {"hrm text": 4, "mvp": 2 * layers}  # two stacks; self- and cross-attention
    assert report.attentions == expected.get(name, layers) and not report.gathered


@pytest.mark.parametrize("cache", ["position", "batch"])
def test_logits(pool, cache):
    """T. Localises: a name, an argument, an own rotary embedding, another slot of the cache, per family."""
    compare(pool, logits_off, list(CALLED), (2, 2), {"cache": cache})


@pytest.mark.parametrize("use_cache", [False, True])
def test_gradients(pool, use_cache):
    """T. Localises: gradients of the same, and of values that are scaled, or filled up and cut."""
    compare(pool, gradients_off, list(CALLED), (2, 2), use_cache, {})


@pytest.mark.parametrize(
    "scheme",
    [
        "slices",
        "sequence",
        "batch",
        pytest.param("heads", marks=pytest.mark.slow),
        pytest.param("weights", marks=pytest.mark.slow),
    ],
)
def test_narrow_values(pool, scheme):
    """T. Localises: where the columns of values are after each move, and in the whole output projection."""
    for combine in ("reduce", "concat"):
        compare(pool, logits_off, NARROW, (2, 2), {"scheme": scheme, "combine": combine})
        compare(pool, gradients_off, NARROW, (1, 4), False, {"scheme": scheme, "combine": combine})


def adapted_off(grid: tuple[int, int]) -> float:
    """Difference of logits of MiMo with LoRA on queries, values and the output."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)
    stock = peft.get_peft_model(make("mimo", exact=True), config).double()
    ours = tlm.parallelize(copy.deepcopy(stock), mesh(grid), rest=False)
    assert not tlm.report(ours).gathered
    ids, keep = prompt()
    with torch.no_grad():
        outputs = [model(ids, attention_mask=keep, use_cache=False).logits for model in (stock, ours)]
    return difference(*outputs, keep)


def test_adapters_of_narrow_values(pool):
    """T. Localises: rows of an adapter's product that stand for columns which a slice was filled up by."""
    for grid in ((2, 2), (1, 4)):
        assert max(pool.run(adapted_off, 4, grid, timeout=TIMEOUT)) <= 1e-10


def rest_off(name: str) -> list[float]:
    """Differences of logits and gradients with all of the model split."""
    stock, ours = pair(name, (2, 2), tuple(EXACT.items()), rest=True)
    assert not tlm.report(ours).gathered
    return differences(stock, ours)


def test_lists_of_mlps(pool):
    """T. Localises: a linear of LongCat's MLPs, which stand in a list, tried as if it were one."""
    found = pool.run(rest_off, 4, "longcat flash", timeout=TIMEOUT)
    assert max(map(max, found)) <= 1e-6  # its router is float32


def test_experts_of_llama4(pool):
    """T. Localises: an addition to the output of the shared expert that changes what autograd has kept."""
    assert max(max(found) for found in pool.run(rest_off, 4, "llama4 moe", timeout=TIMEOUT)) <= LIMITS["llama4 moe"]


def split_activations(name: str) -> list[float]:
    stock = make(name, exact=True)
    ours = [tlm.parallelize(copy.deepcopy(stock), mesh((2, 2)), activations=kind) for kind in ("sequence", "batch")]
    return [off for model in ours for off in differences(stock, model)]


@pytest.mark.parametrize("name, limit", [("ctrl", 1e-10), ("hrm text", 1e-10), ("moshi", 1e-10), ("mimo", 1e-6)])
def test_split_activations(pool, name, limit):
    """T. Localises: an input that is given more than once where rows come split; angles of all rows. MiMo's router
    rounds to float32.
    """
    assert max(max(found) for found in pool.run(split_activations, 4, name, timeout=TIMEOUT)) <= limit


def tokens_off(names, cache):
    """Which models give other tokens than stock, with left padding, 12 by the cache."""
    ids, keep = prompt()
    given = {"attention_mask": keep, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    models = {name: pair(name, (2, 2), tuple(EXACT.items()), cache=cache) for name in names}
    return [name for name, two in models.items() if not torch.equal(*(m.generate(ids, **given) for m in two))]


@pytest.mark.parametrize("cache", ["position", pytest.param("batch", marks=pytest.mark.slow)])
def test_greedy(pool, cache):
    """E. Localises: one query at a time: the slot of a layer that runs again, narrower values of a cache."""
    assert pool.run(tokens_off, 4, list(CALLED), cache, timeout=TIMEOUT) == [[]] * 4


def whole_masks(kind: str) -> tuple[list[float], bool]:
    """Differences of logits and gradients of CPM-Ant or XLM, which make their masks and caches of the tokens."""
    torch.manual_seed(0)
    if kind == "cpmant":
        config = transformers.CpmAntConfig(
            vocab_size=64, hidden_size=32, num_attention_heads=4, dim_head=8, dim_ff=48, num_hidden_layers=2,
            prompt_length=4, prompt_types=4, segment_types=4, position_bias_num_buckets=8,
        )  # fmt: skip
        stock, given = transformers.CpmAntForCausalLM(config), {}
    else:
        config = transformers.XLMConfig(
            vocab_size=64, emb_dim=32, n_layers=2, n_heads=4, causal=kind == "causal xlm", dropout=0.0,
            attention_dropout=0.0, mask_token_id=5, pad_token_id=0,
        )  # fmt: skip
        stock, given = transformers.XLMWithLMHeadModel(config), {"attention_mask": prompt()[1]}
    stock = stock.double().eval()
    for p in stock.parameters():
        nn.init.normal_(p, std=0.3)
    ours = tlm.parallelize(copy.deepcopy(stock), mesh((2, 2)))
    assert sum(isinstance(module, ProjectedAttention) for module in ours.modules()) == 2
    ids, keep = prompt()
    found, tokens = [], []
    for model in (stock, ours):
        output = model(ids, **given)
        (output.logits.log_softmax(-1)[..., 3] * keep).sum().backward()
        found.append(output.logits[keep.bool()])
        with torch.no_grad():
            tokens.append(model.generate(ids[1:], max_new_tokens=8, do_sample=False, eos_token_id=None))
    grads = full_gradients(ours)
    pairs = [found, *((p.grad, grads[name]) for name, p in stock.named_parameters() if p.grad is not None)]
    return [((a - b).abs().max() / a.abs().max().clamp(min=1.0)).item() for a, b in pairs], torch.equal(*tokens)


@pytest.mark.parametrize("kind, limit", [("cpmant", 1e-10), ("xlm", 1e-6), ("causal xlm", 1e-6)])
def test_masks_of_tokens(pool, kind, limit):
    """T. Localises: masks of fewer dims, of numbers, with rows that see nothing; XLM's scores round to float32."""
    for off, alike in pool.run(whole_masks, 4, kind, timeout=TIMEOUT):
        assert max(off) <= limit and alike, off


def audio_off(grid: tuple[int, int]) -> list[float]:
    """Differences of Phi-4's audio encoder layer, of its output and its gradients, under a bias of every head."""
    kinds = transformers.models.phi4_multimodal.modeling_phi4_multimodal
    torch.manual_seed(0)
    config = kinds.Phi4MultimodalAudioConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_blocks=1, ext_pw_out_channel=32,
        depthwise_separable_out_channel=32, nemo_conv_channels=32,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    stock = kinds.Phi4MultimodalAudioModel(config).double().eval()
    for p in stock.parameters():
        nn.init.normal_(p, std=0.3)
    ours = tlm.parallelize(copy.deepcopy(stock), mesh(grid))
    assert tlm.report(ours).attentions == 1
    x, mask = torch.randn(2, 6, 32, dtype=torch.float64), torch.randn(2, 4, 6, 6, dtype=torch.float64)
    outputs = []
    for model in (stock, ours):
        outputs.append(model.encoders[0](x, mask))
        outputs[-1].square().sum().backward()
    grads = full_gradients(ours.encoders[0])
    pairs = [outputs, *((p.grad, grads[name]) for name, p in stock.encoders[0].named_parameters())]
    return [((a - b).abs().max() / a.abs().max().clamp(min=1.0)).item() for a, b in pairs]


def test_output_alone(pool):
    """T. Localises: attention that gives a tensor and no weights beside it."""
    for grid in ((2, 2), (1, 4)):
        assert max(max(found) for found in pool.run(audio_off, 4, grid)) <= 1e-10


def test_prompts():
    """E. Localises: keys that a model puts before all others, which would be left out without a word."""
    ours = tlm.parallelize(make("mvp"), None)
    layer = ours.model.decoder.layers[0].self_attn
    prompt_keys = torch.zeros(2, 4, 3, 8, dtype=torch.float64)
    with pytest.raises(tlm.GridError, match="attn_prompt is not supported by this attention"):
        layer(torch.zeros(1, 2, 32, dtype=torch.float64), attn_prompt=prompt_keys)


def test_another_input():
    """E. Localises: keys of other states than the queries', which would be taken for the same."""
    layer = tlm.parallelize(make("ctrl"), None).transformer.h[0].multi_head_attention
    x = torch.zeros(1, 2, 32, dtype=torch.float64)
    with pytest.raises(tlm.GridError, match="k must be v, the same tensor"):
        layer(x, x + 1, x)
