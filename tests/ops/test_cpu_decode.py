"""The CPU kernel for few rows alone: long keys in stretches, stacked query heads, caches that stay where they are."""

import pytest
import torch
import torch.nn.functional as F
from harness.attention_op import NEG_INF, TOLERANCE, attend, by_reference, qkv, relative

pytestmark = pytest.mark.cpu_only("a kernel of the CPU")

# (B, H, K, L, S, D, Dv): several stretches and a tail, odd widths, one row and many, less than a chunk
SIZES = {
    "stretches, one row": (1, 2, 2, 1, 2500, 32, 32),
    "stretches, group of 8": (1, 8, 1, 1, 2100, 64, 48),
    "rows and heads": (2, 6, 2, 3, 1300, 33, 17),
    "one row, registers and a tail": (1, 2, 1, 1, 1100, 80, 47),
    "panels and a tail": (1, 16, 1, 1, 1100, 96, 80),
    "few keys": (3, 4, 2, 2, 5, 8, 12),
    "one of everything": (1, 1, 1, 1, 1, 1, 1),
}

FEATURES = {
    "none": lambda B, H, L, S: {},
    "scale": lambda B, H, L, S: {"scale": -0.3},
    "causal": lambda B, H, L, S: {"causal": S - L},
    "rows before the first key": lambda B, H, L, S: {"causal": 1 - L},
    "window over a border": lambda B, H, L, S: {"causal": min(S, 1100), "window": 300},
    "key stride": lambda B, H, L, S: {"causal": 3 * S - 40, "window": 2 * S, "key_stride": 3},
    "key stride, no keys": lambda B, H, L, S: {"causal": -L, "key_stride": 2},
    "softcap": lambda B, H, L, S: {"softcap": 2.0, "causal": S - 1},
    "padding": lambda B, H, L, S: {"attn_mask": (torch.arange(S) >= S // 2).expand(B, 1, 1, S)},
    "bias": lambda B, H, L, S: {"attn_mask": torch.randn(B, H, L, S), "causal": S - L},
    "empty rows": lambda B, H, L, S: {"attn_mask": torch.arange(H).view(H, 1, 1).expand(H, L, S) > 0},
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("sizes", SIZES)
def test_against_the_reference(sizes, feature, dtype):
    """R. Localises: a feature in the decode kernel, values and logsumexp; the gradients show that the blocked
    backward can follow it.
    """
    B, H, K, L, S, D, Dv = SIZES[sizes]
    q, k, v = qkv(SIZES[sizes], dtype)
    options = FEATURES[feature](B, H, L, S)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, logsumexp = attend(q, k, v, **options)
    out_wide, logsumexp_wide = by_reference(*wide, **options)
    hidden = logsumexp_wide == NEG_INF
    assert torch.equal(logsumexp == NEG_INF, hidden)
    assert relative(logsumexp.masked_fill(hidden, 0), logsumexp_wide.masked_fill(hidden, 0)) <= TOLERANCE[dtype]
    g = torch.randn(B, H, L, Dv)
    mine = torch.autograd.grad(out, (q, k, v), g.to(dtype))
    true = torch.autograd.grad(out_wide, wide, g.to(dtype).double())
    for name, x, y in zip(("out", "dq", "dk", "dv"), (out, *mine), (out_wide, *true), strict=True):
        # of a single key dq and dk are 0, and what is left of terms of order 1 that cancel, over 8 heads, is noise
        least = 2 if y.norm() == 0 else 1
        assert (x.double() - y).norm() <= TOLERANCE[dtype] * max(y.norm(), least), name


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads", [(1, 1), (8, 1), (8, 4)], ids=str)
def test_error_at_most_twice_that_of_sdpa(heads, dtype):
    """R. Localises: precision over long keys: the sum over stretches and the widening of half types."""
    q, k, v = qkv((1, *heads, 1, 5000, 64, 64), dtype, grad=False)
    stock = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    true = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True)
    assert relative(attend(q, k, v)[0], true) <= 2 * relative(stock, true)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", ["(B, K, S, D)", "(B, S, K, D)"])
def test_a_cache_is_read_where_it_is(layout, dtype):
    """E. Localises: strides of K and V: a part of a longer cache gives the same bits and is never copied."""
    whole = [torch.randn(2, 2, 4000, 32).to(dtype) for _ in range(2)]
    if layout == "(B, S, K, D)":
        whole = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in whole]
    q, cache = torch.randn(2, 8, 1, 32).to(dtype), [x.narrow(2, 0, 3000) for x in whole]
    expected = attend(q, *(x.contiguous() for x in cache), causal=2990)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        mine = attend(q, *cache, causal=2990)
    assert all(torch.equal(x, y) for x, y in zip(mine, expected, strict=True))
    assert not {event.name for event in profile.events()} & {"aten::contiguous", "aten::clone", "aten::copy_"}


@pytest.mark.parametrize("keys", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half(dtype, keys):
    """R. Localises: a number of 16 bits that becomes another as float: subnormal, of either sign, infinite. Keys
    alike weigh alike, so the values come back as they are.
    """
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.float().abs() < 1e37] if dtype == torch.bfloat16 else every[~every.isnan()]
    q = torch.zeros(1, 1, 1, 4, dtype=dtype)
    out, _ = attend(q, q.expand(1, 1, keys, 4), every.expand(1, 1, keys, -1))
    assert torch.equal(out.flatten(), every)


def test_threads_give_the_same_bits():
    """E. Localises: stretches whose borders depend on the number of threads."""
    threads = torch.get_num_threads()
    q, k, v = qkv((1, 4, 2, 1, 5000, 16, 16), torch.float32, grad=False)
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(attend(q, k, v)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


@pytest.mark.parametrize("sizes", [(1, 4, 2, 1, 0, 8, 8), (0, 4, 2, 1, 9, 8, 8)], ids=["S", "B"])
def test_sizes_of_zero(sizes):
    """E. Localises: no keys at all, as on a rank that holds none yet: out 0, logsumexp -inf."""
    out, logsumexp = attend(*qkv(sizes, torch.float32, grad=False))
    assert out.shape == (sizes[0], 4, 1, 8) and not out.any() and (logsumexp == NEG_INF).all()


def test_nan_propagates():
    """E. Localises: a maximum or a merge that drops NaN: one bad key spoils the rows that see it, no others."""
    q, k, v = qkv((1, 2, 2, 1, 3000, 8, 8), torch.float32, grad=False)
    k[0, 1, 2500, 3] = float("nan")
    assert torch.equal(attend(q, k, v)[0].isnan().all(-1), torch.tensor([[[False], [True]]]))
