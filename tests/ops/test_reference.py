"""The reference against stock torch, in float64. A failure here is the reference's own, not the package's."""

import pytest
import torch
import torch.nn.functional as F

from two_level_mha import reference

CLOSE = {"rtol": 0.0, "atol": 1e-12}


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("mask", ["none", "causal", "bool", "bias"])
def test_attention_is_stock_sdpa(num_kv_heads, mask):
    """Localises: scale, GQA order, causal offset 0, mask conventions of `reference.attention`."""
    q, k, v = random(2, 4, 5, 8), random(2, num_kv_heads, 7, 8), random(2, num_kv_heads, 7, 6)
    given = {"bool": torch.rand(2, 1, 5, 7) < 0.7, "bias": random(1, 4, 5, 7)}.get(mask)
    if mask == "bool":
        given[..., 0] = True
    ours, logsumexp, weights = reference.attention(q, k, v, mask=given, causal=0 if mask == "causal" else None)
    stock = F.scaled_dot_product_attention(q, k, v, attn_mask=given, is_causal=mask == "causal", enable_gqa=True)
    torch.testing.assert_close(ours, stock, **CLOSE)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(logsumexp), **CLOSE)


def test_causal_offset_and_window_by_hand():
    """Localises: `reference.visible`, on a picture small enough to read."""
    seen = reference.visible(3, 5, causal=1, window=2).int().tolist()
    assert seen == [[1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0]]
    every_third = reference.visible(4, 3, causal=2, window=5, key_stride=3).int().tolist()  # keys at 0, 3, 6
    assert every_third == [[1, 0, 0], [1, 1, 0], [1, 1, 0], [0, 1, 0]]


def test_empty_rows_and_no_keys():
    """Localises: rows that see nothing give 0, logsumexp -inf and no gradient; S = 0 is such a row."""
    q, k, v = (random(1, 2, 3, 4).requires_grad_() for _ in range(3))
    mask = torch.ones(3, 3, dtype=torch.bool)
    mask[1] = False
    out, logsumexp, _ = reference.attention(q, k, v, mask=mask)
    assert torch.equal(out[:, :, 1], torch.zeros(1, 2, 4, dtype=torch.float64))
    assert (logsumexp[:, :, 1] == float("-inf")).all() and logsumexp[:, :, 0].isfinite().all()
    out.sum().backward()
    assert torch.equal(q.grad[:, :, 1], torch.zeros(1, 2, 4, dtype=torch.float64)) and q.grad.isfinite().all()
    out, logsumexp, _ = reference.attention(q, k[:, :, :0], v[:, :, :0])
    assert torch.equal(out, torch.zeros_like(out)) and (logsumexp == float("-inf")).all()


@pytest.mark.parametrize("extra", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 6, "vdim": 10}])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_layer_is_stock_multihead_attention(extra, need_weights, mask):
    """Localises: `reference.multihead_attention` and `stock_parameters`, values and gradients,
    per feature.
    """
    mha = torch.nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64, **extra)
    for parameter in mha.parameters():
        torch.nn.init.normal_(parameter)
    x, key, value = random(3, 4, 8), random(3, 5, mha.kdim), random(3, 5, mha.vdim)
    given = {"bool": torch.rand(4, 5) < 0.4, "float": random(4, 5)}.get(mask)
    if mask == "bool":
        given[:, 0] = False
    stock, weights = mha(x, key, value, attn_mask=given, need_weights=need_weights)
    gradients = torch.autograd.grad(stock.square().sum(), list(mha.parameters()))
    ours, all_weights = reference.multihead_attention(
        x,
        key,
        value,
        **reference.stock_parameters(mha),
        add_zero_attn=mha.add_zero_attn,
        mask=~given if mask == "bool" else given,
        empty_rows="nan" if need_weights else "zero",
    )
    torch.testing.assert_close(ours, stock, **CLOSE)
    if need_weights:
        torch.testing.assert_close(all_weights.mean(1), weights, **CLOSE)
    for mine, theirs in zip(torch.autograd.grad(ours.square().sum(), list(mha.parameters())), gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-10)


def test_independent_is_narrower_heads():
    """Localises: the model of scheme "independent":
    a grid of one whose heads are the slices gives the same.
    """
    heads, kv_heads, width, slices = 4, 2, 6, 3
    counts = {"q_weight": heads, "k_weight": kv_heads, "v_weight": kv_heads}
    weights = {name: random(count, width, 5) for name, count in counts.items()}
    out_weight = random(5, heads, width)
    x = random(2, 3, 5)
    ours, _ = reference.multihead_attention(x, x, x, **weights, out_weight=out_weight, slices=slices, causal=0)
    expected = torch.zeros_like(ours)
    for j in range(slices):
        cut = slice(j * width // slices, (j + 1) * width // slices)
        one = {name: w[:, cut] for name, w in weights.items()}
        expected += reference.multihead_attention(x, x, x, **one, out_weight=out_weight[:, :, cut], causal=0)[0]
    torch.testing.assert_close(ours, expected, **CLOSE)
