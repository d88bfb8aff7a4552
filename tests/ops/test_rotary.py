"""What acts where d is whole: rotary embedding and the norm of heads, as operators, against the reference and stock."""

import pytest
import torch
from harness.device import DEVICE
from torch.autograd import gradcheck

import two_level_mha as tlm
from two_level_mha import reference

ops = torch.ops.two_level_mha


def angles(batch: int, length: int, width: int, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (B, 1, L, r) whose columns all differ, so that a swapped half shows."""
    return torch.randn(2, batch, 1, length, width, dtype=dtype).unbind(0)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [8, 4, 2])
@pytest.mark.parametrize("batch", [1, 3])
def test_rotary_against_the_reference(interleaved, width, batch):
    """T. Localises: which dims are a pair, the sign, the dims that pass, one angle for all sequences; on a view."""
    torch.manual_seed(0)
    x = torch.randn(3, 5, 4, 8, dtype=torch.float64).transpose(1, 2)
    cos, sin = angles(batch, 5, width)
    expected = reference.rotary(x, cos, sin, interleaved)
    torch.testing.assert_close(ops.rotary(x, cos, sin, interleaved), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("interleaved, module", [(False, "llama"), (True, "cohere"), (False, "gpt_neox")])
def test_rotary_against_transformers(interleaved, module):
    """T. Localises: a convention of ours that is nobody else's. Cohere computes in float32."""
    modeling = pytest.importorskip(f"transformers.models.{module}.modeling_{module}")
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 3, 5, 8, dtype=torch.float64).unbind(0)
    cos, sin = angles(2, 5, 4 if module == "gpt_neox" else 8)
    expected = modeling.apply_rotary_pos_emb(q, k, cos[:, 0], sin[:, 0])
    for x, y in zip((q, k), expected, strict=True):
        error = (ops.rotary(x, cos, sin, interleaved) - y).abs().max()
        assert error <= (1e-5 if module == "cohere" else 1e-10)


@pytest.mark.parametrize("interleaved, module", [(False, "llama"), (True, "cohere")])
def test_angles_against_transformers(interleaved, module):
    """E. Localises: frequencies and positions of the built-in embedding, its order of columns."""
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip(f"transformers.models.{module}.modeling_{module}")
    name = module.capitalize()
    config = getattr(transformers, f"{name}Config")(
        hidden_size=64, num_attention_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 500.0}
    )
    stock = getattr(modeling, f"{name}RotaryEmbedding")(config)
    expected = stock(torch.zeros(1), torch.arange(3, 12)[None])
    ours = tlm.Rotary(500.0, interleaved=interleaved).embeddings(3, 9, 16)
    for x, y in zip(ours, expected, strict=True):
        assert torch.equal(x, y)


def test_rotary_keeps_the_dtype():
    """R. Localises: rounding: bf16 turned by float32 angles is rounded once, at the end."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 8).bfloat16()
    cos, sin = angles(1, 5, 4, torch.float32)
    y = ops.rotary(x, cos, sin)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, reference.rotary(x.float(), cos, sin).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_norm_against_the_reference(dtype, autocast):
    """T in float64, R in bf16 (one rounding). Localises: the formula, eps, the dtype of the sum and of the result."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 5, 8).to(dtype), torch.randn(8)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        y = ops.head_norm(x, weight, 0.1)
    assert y.dtype == dtype
    expected = reference.rms_norm(x.double(), weight.to(dtype).double(), 0.1)
    tolerance = 1e-10 if dtype == torch.float64 else 2**-8
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


def test_gradients():
    """Localises: a formula whose derivative autograd does not have, against finite differences."""
    torch.manual_seed(0)
    x = torch.randn(1, 2, 3, 8, dtype=torch.float64, requires_grad=True)
    cos, sin = (part.requires_grad_() for part in angles(1, 3, 4))
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    for interleaved in (False, True):
        assert gradcheck(lambda *xs, kind=interleaved: ops.rotary(*xs, kind), (x, cos, sin))
    assert gradcheck(lambda *xs: ops.head_norm(*xs, 1e-6), (x, weight))


@pytest.mark.parametrize("widths", [(3, 3), (10, 10), (4, 2)])
def test_refused_widths(widths):
    """Localises: odd, too wide, or different widths of cos and sin."""
    cos, sin = (torch.zeros(1, 1, 5, width) for width in widths)
    with pytest.raises(ValueError, match="even width, at most head_dim 8"):
        ops.rotary(torch.zeros(1, 2, 5, 8), cos, sin)


@pytest.mark.parametrize("norms, width", [(False, 4), (False, 8), (True, 0), (True, 4), (True, 8)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_norm_and_rotary_at_once(norms, width, interleaved):
    """E. Localises: which of q and k has which weight and which angles, and the order of the two; gradients too."""
    q, k = (torch.randn(2, heads, length, 8, dtype=torch.float64) for heads, length in ((4, 5), (2, 7)))
    weights = [torch.randn(8, dtype=torch.float64) for _ in range(2 * norms)]
    q_angles, k_angles = ([*angles(2, length, width)] if width else [] for length in (5, 7))
    leaves = [x.requires_grad_() for x in (q, k, *weights)]
    found = ops.norm_rotary(q, k, weights, 1e-6, q_angles, k_angles, interleaved)
    expected = []
    for i, (x, own) in enumerate(((q, q_angles), (k, k_angles))):
        x = ops.head_norm(x, weights[i], 1e-6) if norms else x
        expected.append(ops.rotary(x, *own, interleaved) if own else x)
    grads = [torch.randn_like(x) for x in expected]
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got, want)
    for got, want in zip(
        torch.autograd.grad(found, leaves, grads), torch.autograd.grad(expected, leaves, grads), strict=True
    ):
        assert torch.equal(got, want)


def test_norm_and_rotary_want_pairs():
    """Localises: one weight or one angle, which would be read as another's; nothing to do, an alias then."""
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match="weights or angles must be given"):
        ops.norm_rotary(q, q, [], 1e-6, [], [])
    for weights, angle in (([torch.randn(4)], []), ([], [torch.randn(1, 1, 3, 4)])):
        with pytest.raises(ValueError, match="must be none or two tensors, got 1"):
            ops.norm_rotary(q, q, weights, 1e-6, angle, angle)
