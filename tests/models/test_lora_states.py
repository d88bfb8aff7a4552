"""LoRA of PEFT on layers that keep states, put there before and after the split, against the unsplit model.

T: 4 ranks, in float64. A failure with test_states green is in AdaptedStates of `integrations/lora_layers.py`.
"""

import re

import pytest
from harness.calls import mesh, text_of
from harness.families import build

import two_level_mha as tlm

peft = pytest.importorskip("peft")
from harness.lora import compare  # noqa: E402

DELTA = {"_experts_implementation": "eager", "linear_num_value_heads": 4, "linear_value_head_dim": 12}
KIMI = DELTA | {"linear_num_heads": 8, "linear_head_dim": 12}
CASES = {
    "parts by heads": ("qwen3_next", DELTA | {"linear_num_key_heads": 2}, ("in_proj_qkvz", "in_proj_ba", "out_proj")),
    "parts by columns": ("olmo_hybrid", DELTA | {"linear_num_key_heads": 1, "linear_num_value_heads": 1},
                         ("q_proj", "v_proj", "b_proj", "g_proj", "o_proj")),
    "whole ones inside": ("kimi_linear", KIMI, ("q_proj", "b_proj", "g_a_proj", "g_b_proj", "f_a_proj", "f_b_proj",
                                                "kv_b_proj", "o_proj")),
    "two heads of 64 columns": ("bamba", {"mamba_n_heads": 2, "mamba_d_head": 64, "mamba_proj_bias": True},
                                ("in_proj", "out_proj", "q_proj")),
    "sums inside": ("jamba", DELTA, ("in_proj", "x_proj", "out_proj")),
    "two numbers of each": ("zamba", {"n_mamba_heads": 2}, ("in_proj", "out_proj")),
    "lightning": ("minimax", DELTA | {"num_attention_heads": 8}, ("qkv_proj", "output_gate", "out_proj")),
    "whole heads": ("recurrent_gemma", {}, ("linear_x", "linear_y", "linear_out")),
    "convolutions": ("lfm2", {"conv_bias": True, "layer_types": ["conv", "full_attention"]}, ("in_proj", "out_proj")),
    "states of all layers": ("rwkv", {}, ("key", "output")),
}  # fmt: skip
FAST = ("parts by heads", "sums inside")


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("case", [pytest.param(case, marks=() if case in FAST else pytest.mark.slow) for case in CASES])
def test_as_unsplit(pool, case, before):
    """Localises: rows or columns of others, a gradient that is not summed, a term that is merged elsewhere."""
    family, sizes, targets = CASES[case]
    kind = family, tuple(sizes.items())
    for off in pool.run(compare, 4, kind, before, {"targets": targets, "rest": False}, timeout=300):
        assert not off


def test_dropout(pool):
    """Localises: elements that are dropped otherwise where a rank has columns of them."""
    family, sizes, targets = CASES["parts by heads"]
    options = {"targets": targets, "rest": False, "lora": {"lora_dropout": 0.3}}
    for off in pool.run(compare, 4, (family, tuple(sizes.items())), True, options, timeout=300):
        assert not off


def kinds():
    """Which layers with states are split under adapters; the errors for one that came otherwise, and for parts."""
    family, sizes, targets = CASES["whole ones inside"]
    config = peft.LoraConfig(r=2, target_modules=["f_a_proj"])
    before = tlm.parallelize(peft.get_peft_model(build(family, **sizes), config), mesh((2, 2)))
    outside = peft.get_peft_model(tlm.parallelize(build(family, **sizes), mesh((2, 2))), config)
    parts = tlm.parallelize(build("mamba2", n_groups=4), mesh((2, 2)), activations="batch")

    def after():
        with tlm.adaptable(parts):
            pass

    ids = outside.dummy_inputs["input_ids"]
    return tlm.report(before).states, text_of(lambda: outside(input_ids=ids)), text_of(after)


def test_refused(pool):
    """Localises: a layer that is gathered under adapters again; gradients of a part of the heads, without a word."""
    for states, outside, parts in pool.run(kinds, 4, timeout=120):
        assert states and re.search("f_a_proj of .* is split, and now inside a Linear", outside)
        assert "adapters are not supported on a model with activations='batch'" in parts
