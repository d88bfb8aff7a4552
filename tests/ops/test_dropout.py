"""Dropout by counter: the mask itself, and that every kernel draws it."""

import itertools

import pytest
import torch
from harness.attention_op import attend, ops, qkv


def splitmix64(x):
    mask = (1 << 64) - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def keep_by_hand(seed, p, batch, head, row, column):
    """dropout.h in Python's integers."""
    mask = (1 << 32) - 1
    x = splitmix64(seed & ((1 << 64) - 1))
    for index in (batch, head, row):
        x = splitmix64(x ^ index)
    low, high = x & mask, x >> 32
    x = column ^ low
    x ^= x >> 16
    x = (x * 0x7FEB352D) & mask
    x ^= high
    x ^= x >> 15
    x = (x * 0x846CA68B) & mask
    x ^= x >> 16
    return x < min(int(2**32 * (1 - p)), 2**32 - 1)


def test_dropout_counter():
    """E. Localises: the counter itself, against Python's integers,
    and its independence of the block asked for.
    """
    seed, p = -987654321, 0.4
    whole = ops.dropout_keep_mask(torch.tensor([seed]), p, [2, 3, 5, 40], [1, 2, 3])
    by_hand = [
        keep_by_hand(seed, p, 1 + b, 2 + h, 3 + row, column)
        for b, h, row, column in itertools.product(range(2), range(3), range(5), range(40))
    ]
    assert torch.equal(whole, torch.tensor(by_hand).view(2, 3, 5, 40))
    part = ops.dropout_keep_mask(torch.tensor([seed]), p, [1, 2, 2, 25], [2, 3, 5])
    assert torch.equal(part, whole[1:, 1:, 2:4, :25])
    many = ops.dropout_keep_mask(torch.tensor([seed]), p, [4, 8, 64, 64])
    assert abs(many.float().mean().item() - 0.6) < 4 * (0.24 / many.numel()) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dropout_blocks_draw_one_mask(dtype):
    """E. Localises: the mask a kernel draws: v = identity shows the kept elements,
    rows and heads split or not.
    """
    L, S = 40, 48
    q, k = torch.zeros(2, 4, L, 8, dtype=dtype), torch.zeros(2, 2, S, 8, dtype=dtype)
    v = torch.eye(S, dtype=dtype).expand(2, 2, S, S)
    seed = torch.tensor([5])
    out, _ = attend(q, k, v, dropout_p=0.5, seed=seed)
    assert torch.equal(out != 0, ops.dropout_keep_mask(seed, 0.5, [2, 4, L, S]))
    part, _ = attend(q[1:, 2:, 7:], k[1:, 1:], v[1:, 1:], dropout_p=0.5, seed=seed, origin=[1, 2, 7])
    assert torch.equal(part, out[1:, 2:, 7:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("L", [2, 100], ids=["few rows", "blocks"])
def test_dropout_of_everything(L, dtype):
    """E (logsumexp: R). Localises: p = 1, where 1 / (1 - p) has no value: nothing is kept, so out is 0 and passes no
    gradient; the logsumexp does not know of dropout.
    """
    q, k, v = qkv((1, 2, 1, L, 150, 8, 8), dtype)
    out, logsumexp = attend(q, k, v, dropout_p=1.0, seed=torch.tensor([3]))
    assert not out.any()
    atol = 1e-4 if dtype.itemsize == 2 else 1e-5  # by another kernel, perhaps, which rounds products elsewhere
    torch.testing.assert_close(logsumexp, attend(q, k, v)[1], rtol=0, atol=atol)
    assert not any(x.any() for x in torch.autograd.grad(out.sum(), (q, k, v)))
