"""Decoders that look like the Llama family and do something else keep their own code, and the report says why."""

import re

import pytest
import torch
from harness.calls import mesh
from harness.decoders import BASE, make

import two_level_mha as tlm

transformers = pytest.importorskip("transformers")

OTHERS = {
    "a mask of its own": ("DogeConfig", {}, "has a parameter that decoder attention has not: A"),
    "dropout elsewhere": ("FalconConfig", {"attention_dropout": 0.1}, "with all attention weights dropped"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_others(case):
    """Localises: structure that is taken for the whole truth."""
    kind, options, message = OTHERS[case]
    config = getattr(transformers, kind)(**(BASE | options))
    model = transformers.AutoModelForCausalLM.from_config(config)
    before = {name: module for name, module in model.named_modules() if name.endswith("attn")}
    report = tlm.report(tlm.parallelize(model, None, rest=False))
    assert report.attentions == 0 and all(model.get_submodule(name) is module for name, module in before.items())
    assert any(re.search(message, why) for why in report.gathered.values()), report.gathered


def test_arguments():
    """Localises: options that a decoder cannot follow, and a config that a cache cannot."""
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**BASE))
    with pytest.raises(tlm.GridError, match="cache must be one of position, batch, got 'rows'"):
        tlm.parallelize(model, None, cache="rows")
    with pytest.raises(tlm.GridError, match=r"self_attn \(LlamaAttention\) .* scheme 'independent' has no KV cache"):
        tlm.parallelize(model, None, scheme="independent")
    hybrid = transformers.FalconH1Config(**BASE)
    with pytest.raises(tlm.GridError, match="layer 0 of FalconH1Config is of type 'hybrid'"):
        tlm.KVCache(hybrid, None)


def test_what_the_original_had_stays_readable():
    """Localises: attributes that a model's code reads off its attention, its class, and positions of the layers."""
    config = transformers.Gemma3TextConfig(**BASE, head_dim=16, layer_types=["sliding_attention"] * 3)
    stock = transformers.AutoModelForCausalLM.from_config(config).model.layers[1].self_attn
    ours = tlm.parallelize(torch.nn.ModuleList([stock]), None, rest=False)[0]
    assert ours is not stock and isinstance(ours, type(stock))
    for name in ("layer_idx", "head_dim", "is_sliding", "sliding_window", "num_key_value_groups", "scaling", "config"):
        assert getattr(ours, name) == getattr(stock, name), name


def test_the_core_needs_no_transformers():
    """Localises: an import of transformers where a user of plain modules has none."""
    import subprocess
    import sys

    program = "import sys; sys.modules['transformers'] = None; import two_level_mha as tlm; " \
              "tlm.KVCache(dict(num_layers=1, num_kv_heads=2, head_dim=8), None)"  # fmt: skip
    subprocess.run([sys.executable, "-c", program], check=True)


def alone(case):
    """The text on this rank when a call is wrong on rank 1 only."""
    model = make("llama")
    attention = tlm.parallelize(model, mesh((1, 2)), rest=False).model.layers[0].self_attn
    hidden_BLD, angles = torch.zeros(1, 3, 32, dtype=torch.float64), [torch.zeros(1, 3, 8, dtype=torch.float64)] * 2
    past = transformers.DynamicCache(config=model.config)
    if torch.distributed.get_rank() == 1:
        if case == "implementation":
            model.config._attn_implementation = "flash_attention_2"
        else:
            past.update(*torch.zeros(2, 1, 2, 4, 8), 0)
    with pytest.raises(ValueError) as caught:
        attention(hidden_BLD, angles, past_key_values=past)
    return str(caught.value)


@pytest.mark.parametrize(
    ("case", "text"),
    [("implementation", "is now 'flash_attention_2'"), ("cache", "filled by a model that is not split")],
)
def test_wrong_on_one_rank(pool, case, text):
    """Localises: a rank that raises alone, while the others wait for it until the time-out."""
    others, own = pool.run(alone, 2, case)
    assert text in own and others == f"rank 1 of the grid: {own}"


def test_flash_and_flex_are_refused():
    """Localises: masks of another kind, which a split attention would take for its own."""
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**BASE))
    for implementation in ("flash_attention_2", "flex_attention"):
        model.config._attn_implementation = implementation
        with pytest.raises(tlm.GridError, match=rf'is {implementation!r}: call model.set_attn_implementation\("sdpa"'):
            tlm.parallelize(model, None)


def test_repr_says_where_it_is():
    """Localises: a replacement that prints like the original."""
    model = tlm.parallelize(transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**BASE)), None)
    assert "num_heads=4, num_kv_heads=2, head_dim=8, grid=(1, 1), scheme='auto'" in repr(model)


def test_what_is_split_already():
    """Localises: a replacement with norms of heads that looks like attention of unknown structure."""
    config = transformers.Qwen3Config(**BASE, head_dim=16)
    model = transformers.AutoModelForCausalLM.from_config(config)
    tlm.parallelize(model.model.layers[0], None, rest=False)
    tlm.parallelize(model, None, rest=False, reduce_dtype=torch.float32)
    assert [layer.self_attn.reduce_dtype for layer in model.model.layers] == [None, torch.float32, torch.float32]
    with pytest.raises(tlm.GridError, match="it is split already"):
        tlm.parallelize(model, None)
