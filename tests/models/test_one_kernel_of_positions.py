"""Which models' norms of heads and rotary functions are those of norm_rotary, one kernel on a GPU."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import two_level_mha as tlm
from two_level_mha.layer import Aside

SIZES = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 8, "head_dim": 8,
    "num_key_value_heads": 4, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# (eps of the norms, interleaved), or None where the model's own functions are others
FORMS = {
    "llama": (0.0, False), "qwen2": (0.0, False), "qwen3": (1e-6, False), "gemma2": (0.0, False),
    "cohere": (0.0, True), "gemma3_text": None, "glm": None, "helium": None,
}  # fmt: skip


def attention(kind: str, dtype: torch.dtype):
    config = AutoConfig.for_model(kind, **SIZES)
    model = tlm.parallelize(AutoModelForCausalLM.from_config(config, dtype=dtype), None)
    return next(module for module in model.modules() if hasattr(module, "fused"))


@pytest.mark.parametrize("kind", FORMS)
def test_forms(kind):
    """Localises: a family that runs many kernels, or one whose function is taken for another's; a trial that draws
    from the user's generator.
    """
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES)
    model = AutoModelForCausalLM.from_config(config)
    state = torch.get_rng_state()
    layer = next(module for module in tlm.parallelize(model, None).modules() if hasattr(module, "fused"))
    assert layer.fused == FORMS[kind] and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [kind for kind, form in FORMS.items() if form is not None])
def test_the_same_numbers(kind, dtype):
    """At most twice the error of the model's own functions. Localises: angles or weights exchanged."""
    layer = attention(kind, dtype)
    torch.manual_seed(1)
    q, k = torch.randn(2, 8, 5, 8), torch.randn(2, 4, 5, 8)
    q_angles, k_angles = ([torch.randn(2, 1, 5, 8) for _ in range(2)] for _ in "qk")
    shared = [torch.randn(8) for _ in layer.norms()]

    def results(by, to: torch.dtype) -> list[torch.Tensor]:
        aside = Aside(*([x.to(to) for x in xs] for xs in (q_angles, k_angles, shared)))
        return [x.float() for x in by(q.to(to), k.to(to), aside)]

    exact = results(layer.by_model, torch.float32)
    for ours, own, true in zip(results(layer.by_operator, dtype), results(layer.by_model, dtype), exact, strict=True):
        assert (ours - true).abs().max() <= 2 * (own - true).abs().max() + 1e-5


def test_another_function():
    """Localises: a trial that cannot fail."""
    layer = attention("qwen3", torch.float32)
    rotary, norm = layer.rotary, layer.k_norm
    layer.rotary = lambda q, k, cos, sin: rotary(q, k, cos, -sin)
    assert layer.fused_form(8) is None
    layer.rotary = rotary
    assert layer.fused_form(8) == (1e-6, False)
    norm.variance_epsilon = 1e-3
    assert layer.fused_form(8) is None
    norm.variance_epsilon = 1e-6
    norm.forward = lambda x: x * norm.weight
    assert layer.fused_form(8) is None
