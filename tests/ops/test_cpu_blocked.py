"""The blocked CPU kernel alone: block borders, half types, skipped blocks, threads."""

import itertools

import pytest
import torch
from harness.attention_op import TOLERANCE, attend, qkv, relative

pytestmark = pytest.mark.cpu_only("a kernel of the CPU")

# (B, H, K, L, S, D, Dv): block borders, odd widths, groups, fewer heads than threads, one of everything
SIZES = {
    "tails": (1, 2, 2, 300, 513, 64, 64),
    "odd widths, gqa": (2, 4, 2, 77, 90, 33, 17),
    "wide": (1, 3, 1, 257, 256, 512, 130),
    "one head": (1, 1, 1, 600, 600, 64, 32),
    "one short head": (1, 1, 1, 110, 90, 32, 40),
    "one of everything": (1, 1, 1, 1, 1, 1, 1),
}


def make_with_gradient(sizes, dtype):
    B, H, K, L, S, D, Dv = sizes
    return *qkv(sizes, dtype, grad=False), torch.randn(B, H, L, Dv, dtype=torch.float64).to(dtype)


def results(function, q, k, v, g, **options):
    """Output and gradients; the weights of the loss are g."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*inputs, **options)
    return out.detach(), *torch.autograd.grad(out, inputs, g.to(out.dtype))


def ours(q, k, v, **options):
    return attend(q, k, v, **options)[0]


def assert_close(tensors, expected, tolerance):
    for name, x, y in zip(("out", "dq", "dk", "dv"), tensors, expected, strict=True):
        assert relative(x, y) <= tolerance, name


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("options", [{}, {"causal": 250}, {"causal": 290, "window": 70}, {"causal": -3}], ids=str)
def test_one_row_of_groups(dtype, options):
    """R. Localises: heads of a group as rows of one head: their order, and the keys that they are given."""
    inputs = make_with_gradient((2, 12, 3, 1, 300, 72, 40), dtype)
    expected = results(ours, *(x.double() for x in inputs), **options)
    found = results(ours, *inputs, kernel_name="cpu_blocked", **options)
    if options.get("causal", 0) < 0:  # sees nothing
        assert not any(x.any() for x in found)
    else:
        assert_close(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("causal", [None, 0, 5, -40, 10_000])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sizes", SIZES)
def test_against_float64(sizes, dtype, causal):
    """R. Localises: block borders of rows, keys and widths, per dtype and causal offset."""
    inputs = make_with_gradient(SIZES[sizes], dtype)
    expected = results(ours, *(x.double() for x in inputs), causal=causal)
    assert_close(results(ours, *inputs, causal=causal), expected, TOLERANCE[dtype])


def masks(L, S):
    keep = torch.rand(1, 1, L, S) < 0.5
    keep[..., :256] = False
    keep[:, :, 10] = False
    bias = torch.randn(1, 4, L, S)
    return {
        "whole blocks hidden": keep,
        "bias": bias,
        "bias by columns": bias.transpose(2, 3).contiguous().transpose(2, 3),
        "padding": (torch.arange(S) < 290).expand(1, 1, 1, S),
        "one number a row": torch.randn(1, 1, L, 1),
        "lowest finite": torch.where(keep, 0.0, torch.finfo(torch.float32).min),
    }


@pytest.mark.parametrize("name", masks(300, 400))
def test_masks_over_several_blocks(name):
    """R. Localises: the mask of a block that is not the first, its strides, blocks that are skipped as hidden."""
    mask = masks(300, 400)[name]
    inputs = make_with_gradient((1, 4, 2, 300, 400, 24, 40), torch.float32)
    wide = mask if mask.dtype == torch.bool else mask.double()
    doubles = [x.double() for x in inputs]
    expected = results(ours, *doubles, attn_mask=wide)
    mine = results(ours, *inputs, attn_mask=mask)
    assert all(x.isfinite().all() for x in mine)
    for x, y in zip(mine, expected, strict=True):
        assert relative(x, y) <= 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"causal": 100, "window": 33},
        {"causal": 500, "key_stride": 3},
        {"causal": 900, "window": 150, "key_stride": 3},
        {"causal": -50, "key_stride": 2},
        {"softcap": 1.5},
        {"softcap": 50.0},
        {"dropout_p": 0.3, "seed": 7, "origin": [1, 2, 3]},
        {"scale": -0.3},
        {"scale": 0.0},
        {"causal": 110, "window": 90, "softcap": 2.0, "dropout_p": 0.25, "seed": 7},
    ],
    ids=str,
)
def test_features_over_several_blocks(options):
    """R. Localises: what goes by the position of a row or key: windows, strides of keys, the dropout counter."""
    if "seed" in options:
        options = options | {"seed": torch.tensor([options["seed"]])}
    inputs = make_with_gradient((1, 4, 2, 300, 400, 24, 40), torch.float32)
    expected = results(ours, *(x.double() for x in inputs), **options)
    mine = results(ours, *inputs, **options)
    for name, x, y in zip(("out", "dq", "dk", "dv"), mine, expected, strict=True):
        assert (x.double() - y).norm() <= 1e-5 * y.norm() + 1e-12, name


def test_gradient_expanded_from_a_sum():
    """E. Localises: a gradient with strides of 0, as sum() gives it."""
    q, k, v, _ = make_with_gradient((1, 2, 2, 40, 50, 16, 8), torch.float32)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    whole = torch.autograd.grad(ours(*inputs).sum(), inputs)
    out = ours(*inputs)
    for x, y in zip(whole, torch.autograd.grad(out, inputs, torch.ones_like(out)), strict=True):
        assert torch.equal(x, y)


def test_nan_propagates():
    """E. Localises: a maximum or an exp that swallows a NaN of one row, or spreads it to others."""
    q = torch.randn(1, 2, 5, 4)
    one = q.clone()
    one[0, 0, 2, 1] = float("nan")
    hit = torch.tensor([[[True] * 5, [False] * 5]])
    assert torch.equal(attend(q, one, q)[0].isnan().any(-1), hit)
    assert attend(q, torch.full_like(q, float("nan")), q)[0].isnan().all()


def test_runs_and_threads_give_the_same_bits():
    """E. Localises: sums whose order depends on who comes first."""
    threads = torch.get_num_threads()
    inputs = make_with_gradient((1, 4, 4, 300, 300, 32, 16), torch.float32)
    try:
        found = []
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            found.append(results(ours, *inputs, causal=0))
    finally:
        torch.set_num_threads(threads)
    for one, other in itertools.pairwise(found):
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))
