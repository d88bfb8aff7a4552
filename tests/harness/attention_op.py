"""What the tests of the attention op share: inputs, the reference in its place, errors and what is allowed."""

import torch

import two_level_mha  # noqa: F401 (registers the ops)
from two_level_mha import reference

from .device import of_device

ops = torch.ops.two_level_mha
attend = ops.partial_attention

NEG_INF = float("-inf")

# (B, H, K, L, S, D, Dv): square, cross, odd, GQA, wide and narrow values, one row, one key
SIZES = {
    "plain": (2, 3, 3, 6, 6, 8, 8),
    "cross, narrow v": (2, 4, 4, 5, 9, 8, 3),
    "gqa, wide v": (1, 6, 2, 7, 7, 4, 12),
    "one kv head": (2, 4, 1, 3, 11, 5, 5),
    "one row": (2, 2, 1, 1, 13, 8, 8),
    "one key": (1, 2, 2, 4, 1, 8, 2),
    "blocks": (1, 2, 1, 131, 150, 16, 8),
}

# Relative L2 error against float64 of a kernel that computes in this dtype with float32 sums.
TOLERANCE = {torch.float32: of_device("fp32 against float64"), torch.bfloat16: 2e-2, torch.float16: 3e-3}


def qkv(sizes, dtype=torch.float64, grad=True):
    """q, k, v of sizes (B, H, K, L, S, D, Dv)."""
    B, H, K, L, S, D, Dv = sizes
    shapes = [(B, H, L, D), (B, K, S, D), (B, K, S, Dv)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_(grad) for shape in shapes]


def relative(x, y):
    """Relative L2 distance."""
    return ((x.double() - y.double()).norm() / y.double().norm().clamp_min(1e-30)).item()


def by_reference(q, k, v, attn_mask=None, seed=None, origin=(0, 0, 0), dropout_p=0.0, **options):
    """out and logsumexp of the op's arguments, from whole tensors."""
    keep = None
    if dropout_p:
        sizes = [q.shape[0], q.shape[1], q.shape[2], k.shape[2]]
        keep = ops.dropout_keep_mask(seed, dropout_p, sizes, list(origin))
    return reference.attention(q, k, v, mask=attn_mask, dropout_p=dropout_p, keep_BHLS=keep, **options)[:2]


def features(sizes, dtype=torch.float64):
    """The op's keyword arguments by the name of the feature they are for."""
    B, H, K, L, S, D, Dv = sizes
    bias = torch.randn(1, H, L, S, dtype=torch.float64).to(dtype)
    keep = torch.rand(B, 1, L, S) < 0.7
    empty = keep.clone()
    empty[:, :, L // 2] = False
    empty_bias = torch.zeros(B, 1, 1, S, dtype=dtype)
    empty_bias[0] = NEG_INF
    seed = torch.tensor([1234])
    return {
        "none": {},
        "scale": {"scale": 0.3},
        "causal": {"causal": 0},
        "causal offset": {"causal": max(S - L, 1)},
        "causal, rows before the first key": {"causal": -2},
        "window": {"causal": S // 2, "window": 3},
        "key stride": {"causal": S, "key_stride": 3},
        "key stride, rows before the first key": {"causal": -2, "key_stride": 2},
        "key stride and window": {"causal": 2 * S - L, "window": S, "key_stride": 2},
        "softcap": {"softcap": 1.5},
        "bool mask": {"attn_mask": keep},
        "padding": {"attn_mask": (torch.arange(S) < S - S // 3).expand(B, 1, 1, S)},
        "2-D bias": {"attn_mask": bias[0, 0]},
        "bias": {"attn_mask": bias},
        "empty rows": {"attn_mask": empty},
        "empty sequence by bias": {"attn_mask": empty_bias},
        "dropout": {"dropout_p": 0.3, "seed": seed},
        "everything": {
            "attn_mask": bias,
            "causal": S - L + 1,
            "window": max(S // 2, 2),
            "softcap": 2.0,
            "scale": 0.5,
            "dropout_p": 0.25,
            "seed": seed,
            "origin": [3, 5, 7],
        },
    }


FEATURES = tuple(features((1, 1, 1, 1, 1, 1, 1)))
NAMES = ("out", "logsumexp", "dq", "dk", "dv", "dmask")


def gradients(function, inputs, weights):
    """Values and gradients of a loss that uses both outputs; rows without keys have no logsumexp to use."""
    out, logsumexp = function(*inputs)
    finite = logsumexp.masked_fill(logsumexp == NEG_INF, 0.0)
    loss = (out * weights[0].to(out.dtype)).sum() + (finite * weights[1].to(finite.dtype)).sum()
    return out, logsumexp, *torch.autograd.grad(loss, inputs)
