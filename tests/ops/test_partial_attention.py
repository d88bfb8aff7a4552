"""The numbers of the attention op against the reference and against stock SDPA, levels E, T and R apart."""

import sys

import pytest
import torch
import torch.nn.functional as F
from harness.attention_op import (
    FEATURES,
    NAMES,
    NEG_INF,
    SIZES,
    attend,
    by_reference,
    features,
    gradients,
    qkv,
    relative,
)
from harness.device import of_device


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("feature", FEATURES)
def test_float64_against_the_reference(feature, sizes):
    """T. Localises: the op's arithmetic, one feature and one shape at a time, values and every gradient."""
    sizes = SIZES[sizes]
    q, k, v = qkv(sizes)
    options = features(sizes)[feature]
    weights = torch.randn(*q.shape[:3], v.shape[3]), torch.randn(q.shape[:3])
    ours = gradients(lambda *x: attend(*x, **options), (q, k, v), weights)
    theirs = gradients(lambda *x: by_reference(*x, **options), (q, k, v), weights)
    for name, x, y in zip(NAMES, ours, theirs, strict=False):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("shape", ["full", "heads", "batch", "rows", "keys", "2-D"])
def test_float64_gradient_of_a_bias(shape):
    """T. Localises: dmask, summed over the dims in which the mask is broadcast."""
    sizes = SIZES["gqa, wide v"]
    B, H, K, L, S, D, Dv = (2, *sizes[1:])
    q, k, v = qkv((B, H, K, L, S, D, Dv))
    size = {
        "full": (B, H, L, S),
        "heads": (1, H, L, S),
        "batch": (B, 1, L, S),
        "rows": (B, H, L, 1),
        "keys": (B, 1, 1, S),
        "2-D": (L, S),
    }[shape]
    bias = torch.randn(size, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(B, H, L, Dv), torch.randn(B, H, L)
    options = {"causal": 1, "softcap": 3.0}
    ours = gradients(lambda q, k, v, b: attend(q, k, v, b, **options), (q, k, v, bias), weights)
    theirs = gradients(lambda q, k, v, b: by_reference(q, k, v, b, **options), (q, k, v, bias), weights)
    for name, x, y in zip(NAMES, ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("feature", ["none", "causal", "bias", "bool mask", "padding"])
@pytest.mark.parametrize(
    "sizes",
    [(2, 4, 4, 96, 96, 64, 64), (1, 4, 2, 70, 133, 48, 48), (1, 2, 2, 130, 40, 32, 32), (1, 2, 2, 400, 400, 64, 64)],
)
def test_ratio_to_stock(sizes, feature, dtype):
    """R. Localises: precision inside a kernel (accumulation, exp, casts):
    error at most twice stock SDPA's.
    """
    torch.manual_seed(7)
    exact = qkv(sizes)
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in exact)
    options = features(sizes, dtype)[feature]
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    mask = options.get("attn_mask")
    wide_mask = mask.double() if mask is not None and mask.is_floating_point() else mask
    weight = torch.randn(*q.shape[:3], v.shape[3]).to(dtype)

    def values(function, inputs):
        out = function(*inputs)
        return out, *torch.autograd.grad(out, inputs, weight.to(out.dtype))

    def stock(*x):
        return F.scaled_dot_product_attention(*x, attn_mask=mask, is_causal=feature == "causal", enable_gqa=True)

    truth = values(lambda *x: by_reference(*x, **{**options, "attn_mask": wide_mask})[0], wide)
    for name, mine, theirs, exact in zip(
        ("out", "dq", "dk", "dv"),
        values(lambda *x: attend(*x, **options)[0], (q, k, v)),
        values(stock, (q, k, v)),
        truth,
        strict=True,
    ):
        assert relative(mine, exact) <= 2 * relative(theirs, exact) + torch.finfo(dtype).eps / 100, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("feature", FEATURES)
def test_low_precision_features_against_the_reference(feature, dtype):
    """R. Localises: a feature that only the float32 / half kernels get wrong; error at most
    twice that of the formula in plain PyTorch in that dtype, and one rounding.
    """
    for sizes in ((2, 4, 4, 37, 53, 24, 8), (1, 4, 2, 131, 150, 16, 16)):
        q, k, v = qkv(sizes, dtype)
        options = features(sizes, dtype)[feature]
        mask = options.get("attn_mask")
        wide_mask = mask.double() if mask is not None and mask.is_floating_point() else mask
        weights = torch.randn(*q.shape[:3], v.shape[3]).to(dtype), torch.randn(q.shape[:3])
        ours = gradients(lambda *x, o=options: attend(*x, **o), (q, k, v), weights)
        wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
        theirs = gradients(lambda *x, o={**options, "attn_mask": wide_mask}: by_reference(*x, **o), wide, weights)
        plain = gradients(lambda *x, o=options: by_reference(*x, **o), (q, k, v), weights)
        for name, x, y, z in zip(NAMES, ours, theirs, plain, strict=False):
            hidden = y == NEG_INF
            assert torch.equal(x == NEG_INF, hidden), name
            error, allowed = (relative(t.masked_fill(hidden, 0), y.masked_fill(hidden, 0)) for t in (x, z))
            assert error <= 2 * allowed + torch.finfo(dtype).eps, (name, error, allowed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_routing_is_exact(dtype):
    """E. Localises: which key a row reads: one-hot scores must copy rows of v, GQA and causal included."""
    B, H, K, L, S, Dv = 2, 4, 2, 37, 64, 8
    v = torch.randint(-8, 9, (B, K, S, Dv)).to(dtype)
    k = 64 * torch.eye(S).to(dtype).expand(B, K, S, S)
    target = torch.randint(0, S, (B, H, L))
    q = 64 * F.one_hot(target, S).to(dtype)
    out, _ = attend(q, k, v, scale=1.0)
    owner = torch.arange(H) // (H // K)
    expected = v[:, owner].gather(2, target[..., None].expand(-1, -1, -1, Dv))
    assert torch.equal(out, expected)
    rows = torch.arange(L) + 5
    target = torch.minimum(target, rows)
    q = 64 * F.one_hot(target, S).to(dtype)
    out, _ = attend(q, k, v, scale=1.0, causal=5)
    assert torch.equal(out, v[:, owner].gather(2, target[..., None].expand(-1, -1, -1, Dv)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_uniform_weights_are_exact(dtype):
    """E. Localises: normalisation: equal scores over 2^n visible keys average -1, 0 and 1.

    The mean has few bits, so that it survives rounding to bfloat16, whatever way a kernel divides.
    """
    B, H, L, S, Dv = 1, 2, 64, 64, 5
    q, k = torch.zeros(B, H, L, 16, dtype=dtype), torch.randn(B, H, S, 16).to(dtype)
    v = torch.randint(-1, 2, (B, H, S, Dv)).to(dtype)
    out, _ = attend(q, k, v, causal=0)
    for row in (0, 1, 3, 7, 15, 31, 63):
        mean = v[:, :, : row + 1].double().mean(2)
        assert torch.equal(out[:, :, row].bfloat16(), mean.bfloat16()), row


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_without_keys(dtype):
    """E. Localises: empty rows: out 0, logsumexp -inf, no gradient, in the kernel of each dtype."""
    q, k, v = qkv((2, 4, 2, 19, 33, 16, 8), dtype)
    mask = torch.ones(2, 1, 19, 33, dtype=torch.bool)
    mask[0, :, 3:7] = False
    mask[1] = False
    out, logsumexp = attend(q, k, v, mask)
    assert not out[0, :, 3:7].any() and not out[1].any()
    assert (logsumexp[0, :, 3:7] == NEG_INF).all() and (logsumexp[1] == NEG_INF).all()
    finite = logsumexp.masked_fill(logsumexp == NEG_INF, 0.0)
    dq, dk, dv = torch.autograd.grad(out.sum() + finite.sum(), (q, k, v))
    assert not dq[0, :, 3:7].any() and not dq[1].any() and not dk[1].any() and not dv[1].any()
    assert all(x.isfinite().all() for x in (dq, dk, dv))


@pytest.mark.parametrize(
    "dtype, lowest",
    [
        (torch.float64, torch.finfo(torch.float64).min),
        (torch.float32, torch.finfo(torch.float32).min),
        (torch.float32, -1e9),
    ],
    ids=str,
)
@pytest.mark.parametrize("sizes", [(2, 4, 2, 5, 33, 16, 8), (1, 2, 2, 150, 300, 16, 16)], ids=["few rows", "blocks"])
def test_rows_hidden_by_finite_numbers(sizes, dtype, lowest):
    """T / R. Localises: softmax of a row whose scores all are the lowest number, as transformers' eager padding
    makes it: equal weights in values and gradients, though the logsumexp has no room for log(n).
    """
    mask = torch.zeros(sizes[0], 1, sizes[3], sizes[4], dtype=dtype)
    mask[..., : sizes[4] // 2] = lowest
    mask[:, :, 1:4] = lowest
    inputs = qkv(sizes, dtype)
    weight = torch.randn(*inputs[0].shape[:3], sizes[-1], dtype=torch.float64).to(dtype)
    out, logsumexp = attend(*inputs, mask)
    if dtype == torch.float32 and lowest < -1e9 and of_device("rows of finfo.min") == "zero":
        assert not out[:, :, 1:4].any()
        return
    assert (logsumexp[:, :, 1:4] == lowest).all()
    mine = out, *torch.autograd.grad(out, inputs, weight)
    whole = by_reference(*inputs, mask)[0]
    theirs = whole, *torch.autograd.grad(whole, inputs, weight)
    for name, x, y in zip(("out", "dq", "dk", "dv"), mine, theirs, strict=True):
        assert relative(x, y) <= (1e-10 if dtype == torch.float64 else 1e-5), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("empty", ["B", "L", "S"])
def test_sizes_of_zero(dtype, empty):
    """E. Localises: short cuts for empty inputs (ATen's kernel dies of S = 0)."""
    B, L, S = (0 if empty == name else size for name, size in (("B", 2), ("L", 3), ("S", 4)))
    q, k, v = qkv((B, 4, 2, L, S, 8, 6), dtype)
    out, logsumexp = attend(q, k, v)
    assert out.shape == (B, 4, L, 6) and logsumexp.shape == (B, 4, L)
    assert not out.any() and (logsumexp == NEG_INF).all()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape] and not any(g.any() for g in grads)


def strided_results(dtype):
    """Values and gradients from sliced and transposed, from column-major and from contiguous inputs."""
    B, H, L, S, D = 2, 3, 17, 21, 8
    wide = torch.randn(B, S, H, 3 * D, dtype=torch.float64).to(dtype)
    q, k, v = (wide[:, :, :, i * D : (i + 1) * D].transpose(1, 2) for i in range(3))
    q = q[:, :, :L]
    column_major = [x.mT.contiguous().mT for x in (q, k, v)]
    for inputs in ((q, k, v), column_major, [x.contiguous() for x in (q, k, v)]):
        inputs = [x.detach().requires_grad_() for x in inputs]
        out, logsumexp = attend(*inputs, causal=2)
        grad = torch.ones((), dtype=dtype).expand_as(out)
        yield out, logsumexp, *torch.autograd.grad(out, inputs, grad)


def test_strides_do_not_matter_in_float64():
    """T. Localises: a kernel that trusts strides: transposed, sliced and expanded inputs and gradients."""
    *others, contiguous = strided_results(torch.float64)
    for other in others:
        for mine, theirs in zip(other, contiguous, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_do_not_matter(dtype):
    """R. Localises: as above, in the kernels of the lower precisions."""
    *others, contiguous = strided_results(dtype)
    for other in others:
        for mine, theirs in zip(other, contiguous, strict=True):
            assert relative(mine, theirs) <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_run_to_run(dtype):
    """E. Localises: an order of summation that depends on threads."""
    q, k, v = qkv((1, 3, 1, 150, 200, 32, 16), dtype)
    first, second = (
        (out, *torch.autograd.grad(out.sum(), (q, k, v))) for out in (attend(q, k, v, causal=50)[0] for _ in range(2))
    )
    compared = 4 if of_device("the same bits in backward") else 1
    assert all(torch.equal(x, y) for x, y in zip(first[:compared], second[:compared], strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_far_windows(dtype):
    """Localises: an overflow of positions where sys.maxsize stands for no window or no causal mask."""
    q, k, v = qkv((1, 4, 2, 70, 70, 8, 8), dtype)
    weights = torch.randn(1, 4, 70, 8, dtype=dtype), torch.randn(1, 4, 70, dtype=dtype)
    for options, same in (
        ({"causal": 0, "window": sys.maxsize}, {"causal": 0}),
        ({"causal": sys.maxsize, "window": sys.maxsize}, {}),
        ({"causal": sys.maxsize}, {}),
    ):
        found, expected = (gradients(lambda *x, o=o: attend(*x, **o), (q, k, v), weights) for o in (options, same))
        for name, x, y in zip(NAMES, found, expected, strict=False):
            assert relative(x, y) <= (1e-12 if dtype == torch.float64 else 1e-5), (options, name)


@pytest.mark.parametrize("scale", [1e-31, 1e-38, 1e-50, 0.0])
def test_tiny_scales(scale):
    """R. Localises: logsumexp in units of raw scores, which overflows where scores are next to nothing."""
    q, k, v = qkv((1, 2, 2, 33, 40, 16, 16), torch.float32)
    weights = torch.randn(1, 2, 33, 16), torch.randn(1, 2, 33)
    ours = gradients(lambda *x: attend(*x, scale=scale), (q, k, v), weights)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    theirs = gradients(lambda *x: by_reference(*x, scale=scale), wide, weights)
    for name, x, y in zip(NAMES, ours, theirs, strict=False):
        torch.testing.assert_close(x, y.float(), rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kernel", ["", "chunked"])
def test_a_tiny_softcap_still_caps(kernel):
    """R. Localises: a cap that is 0 as a float32, which would be none."""
    q, k, v = qkv((1, 2, 2, 33, 40, 16, 16), torch.float32, grad=False)
    uniform = v.mean(2, keepdim=True).expand(1, 2, 33, 16)
    for softcap in (1e-20, 1e-37, 1e-50, 1e-300):
        out = attend(q, k, v, softcap=softcap, kernel_name=kernel)[0]
        torch.testing.assert_close(out, uniform, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1e4, 1e6, 3e8])
@pytest.mark.parametrize("mask", [None, torch.ones(96, 96, dtype=torch.bool)], ids=["no mask", "bool mask"])
def test_equal_huge_scores(size, mask):
    """R. Localises: weights that sum to more than 1, since rounding takes log(n) from the logsumexp."""
    ones = torch.ones(1, 2, 96, 16)
    v, weights = torch.randn(1, 2, 96, 16), (torch.randn(1, 2, 96, 16), torch.zeros(1, 2, 96))
    inputs = [x.clone().requires_grad_() for x in (ones, ones, v)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    options = {"attn_mask": mask, "scale": size / 16}
    ours = gradients(lambda *x: attend(*x, **options), inputs, weights)
    theirs = gradients(lambda *x: by_reference(*x, **options), wide, weights)
    for name, x, y in zip(("dk", "dv"), ours[3:], theirs[3:], strict=True):
        assert relative(x, y) <= 1e-5, name
