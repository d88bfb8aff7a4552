"""What the tests of the attention op share: inputs, the reference in its place, errors and what is allowed."""

import torch

import two_level_mha  # noqa: F401 (registers the ops)
from two_level_mha import reference

ops = torch.ops.two_level_mha
attend = ops.partial_attention

NEG_INF = float("-inf")

# Relative L2 error against float64 of a kernel that computes in this dtype with float32 sums.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def make(sizes, dtype=torch.float64, grad=True):
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
