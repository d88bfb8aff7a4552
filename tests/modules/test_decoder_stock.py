"""TwoLevelAttention with the weights of a transformers attention module is that module: float64, level T.

A failure here with test_decoder.py green is a convention of ours (and of reference.py) that the models do not share.
"""

import pytest
import torch

import two_level_mha as tlm

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 2}
# model -> (its config, TwoLevelAttention's options, tolerance: Qwen3's norm is computed in float32)
MODELS = {
    "llama": ({"attention_bias": True}, {"bias": True}, 1e-10),
    "qwen2": ({}, {"bias": "qkv"}, 1e-10),
    "mistral": ({"sliding_window": 3}, {"window": 3}, 1e-10),
    "qwen3": ({"rms_norm_eps": 1e-5}, {"qk_norm": 1e-5}, 1e-6),
    "cohere": ({"use_qk_norm": False}, {"interleaved": True}, 1e-6),
}
CLASSES = {"llama": "Llama", "qwen2": "Qwen2", "mistral": "Mistral", "qwen3": "Qwen3", "cohere": "Cohere"}


@pytest.mark.parametrize("model", MODELS)
def test_attention_of(model):
    """T. Localises: names and layout of weights, where biases, norm and rotary act, which tokens a window has."""
    changes, options, tolerance = MODELS[model]
    name = CLASSES[model]
    modeling = getattr(transformers.models, model)
    rope = {"rope_type": "default", "rope_theta": 100.0}
    config = getattr(modeling, f"{name}Config")(**SIZES, **changes, rope_parameters=rope)
    config._attn_implementation = "sdpa"
    source = getattr(modeling, f"modeling_{model}")
    torch.manual_seed(0)
    stock = getattr(source, f"{name}Attention")(config, layer_idx=0).double()
    with torch.no_grad():
        for p in stock.parameters():
            p.copy_(torch.randn(p.shape))
    options = dict(options)
    rotary = tlm.Rotary(100.0, interleaved=options.pop("interleaved", False))
    ours = tlm.TwoLevelAttention(24, 6, 2, 8, rope=rotary, dtype=torch.float64, **options)
    ours.load_state_dict(stock.state_dict())

    x = torch.randn(2, 7, 24, dtype=torch.float64)
    embedding = getattr(source, f"{name}RotaryEmbedding")(config)
    cos_sin = embedding(x, torch.arange(7)[None])
    rows = torch.arange(7)
    seen = rows <= rows[:, None]
    if "window" in options:
        seen &= rows > rows[:, None] - options["window"]
    found = []
    for call in (
        lambda x: stock(x, position_embeddings=cos_sin, attention_mask=seen[None, None])[0],
        lambda x: ours(x),
        lambda x: ours(x, position_embeddings=cos_sin),
    ):
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        found.append([y, *torch.autograd.grad(y.square().sum(), leaf)])
    for result in found[1:]:
        for mine, theirs in zip(result, found[0], strict=True):
            assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_state_dict_is_stock():
    """E. Localises: stock_names; full_state_dict gives a stock module's keys and tensors back, bit for bit."""
    config = transformers.Qwen3Config(**SIZES, attention_bias=True)
    stock = transformers.models.qwen3.modeling_qwen3.Qwen3Attention(config, layer_idx=0)
    ours = tlm.TwoLevelAttention(24, 6, 2, 8, bias=True, qk_norm=1e-6)
    ours.load_state_dict(stock.state_dict())
    back = tlm.full_state_dict(ours)
    assert back.keys() == stock.state_dict().keys()
    for name, x in stock.state_dict().items():
        assert torch.equal(back[name], x)
