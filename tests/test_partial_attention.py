"""The attention op against the reference and against stock SDPA, levels E, T and R apart;
opcheck and gradcheck.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F

import two_level_mha  # noqa: F401 (registers the ops)
from two_level_mha import reference

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


def make(sizes, dtype=torch.float64, grad=True):
    B, H, K, L, S, D, Dv = sizes
    shapes = [(B, H, L, D), (B, K, S, D), (B, K, S, Dv)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_(grad) for shape in shapes]


def features(name, sizes, dtype=torch.float64):
    """The keyword arguments of a feature, and those of the reference where they differ."""
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
    }[name]


FEATURES = [
    "none",
    "scale",
    "causal",
    "causal offset",
    "causal, rows before the first key",
    "window",
    "key stride",
    "key stride, rows before the first key",
    "key stride and window",
    "softcap",
    "bool mask",
    "padding",
    "2-D bias",
    "bias",
    "empty rows",
    "empty sequence by bias",
    "dropout",
    "everything",
]


def by_reference(q, k, v, attn_mask=None, seed=None, origin=(0, 0, 0), dropout_p=0.0, **options):
    keep = None
    if dropout_p:
        sizes = [q.shape[0], q.shape[1], q.shape[2], k.shape[2]]
        keep = ops.dropout_keep_mask(seed, dropout_p, sizes, list(origin))
    return reference.attention(q, k, v, mask=attn_mask, dropout_p=dropout_p, keep_BHLS=keep, **options)[:2]


def gradients(function, inputs, weights):
    """Values and gradients of a loss that uses both outputs; rows without keys have no logsumexp to use."""
    out, logsumexp = function(*inputs)
    finite = logsumexp.masked_fill(logsumexp == NEG_INF, 0.0)
    loss = (out * weights[0].to(out.dtype)).sum() + (finite * weights[1].to(finite.dtype)).sum()
    return out, logsumexp, *torch.autograd.grad(loss, inputs)


NAMES = ("out", "logsumexp", "dq", "dk", "dv", "dmask")


def relative(x, y):
    """Relative L2 distance."""
    return ((x.double() - y.double()).norm() / y.double().norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("feature", FEATURES)
def test_float64_against_the_reference(feature, sizes):
    """T. Localises: the op's arithmetic, one feature and one shape at a time, values and every gradient."""
    sizes = SIZES[sizes]
    q, k, v = make(sizes)
    options = features(feature, sizes)
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
    q, k, v = make((B, H, K, L, S, D, Dv))
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
@pytest.mark.parametrize("sizes", [(2, 4, 4, 96, 96, 64, 64), (1, 4, 2, 70, 133, 48, 48), (1, 2, 2, 130, 40, 32, 32)])
def test_ratio_to_stock(sizes, feature, dtype):
    """R. Localises: precision inside a kernel (accumulation, exp, casts):
    error at most twice stock SDPA's.
    """
    torch.manual_seed(7)
    exact = make(sizes)
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in exact)
    options = features(feature, sizes, dtype)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("feature", FEATURES)
def test_low_precision_features_against_the_reference(feature, dtype):
    """R. Localises: a feature that only the float32 / half kernels get wrong;
    error in units of the dtype's eps.
    """
    for sizes in ((2, 4, 4, 37, 53, 24, 8), (1, 4, 2, 131, 150, 16, 16)):
        q, k, v = make(sizes, dtype)
        options = features(feature, sizes, dtype)
        mask = options.get("attn_mask")
        wide_mask = mask.double() if mask is not None and mask.is_floating_point() else mask
        weights = torch.randn(*q.shape[:3], v.shape[3]).to(dtype), torch.randn(q.shape[:3])
        ours = gradients(lambda *x, o=options: attend(*x, **o), (q, k, v), weights)
        wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
        theirs = gradients(lambda *x, o={**options, "attn_mask": wide_mask}: by_reference(*x, **o), wide, weights)
        for name, x, y in zip(NAMES, ours, theirs, strict=False):
            hidden = y == NEG_INF
            assert torch.equal(x == NEG_INF, hidden), name
            error = relative(x.masked_fill(hidden, 0), y.masked_fill(hidden, 0))
            assert error <= 4 * torch.finfo(dtype).eps, (name, error)


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
    q, k, v = make((2, 4, 2, 19, 33, 16, 8), dtype)
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
    inputs = make(sizes, dtype)
    weight = torch.randn(*inputs[0].shape[:3], sizes[-1], dtype=torch.float64).to(dtype)
    out, logsumexp = attend(*inputs, mask)
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
    q, k, v = make((B, 4, 2, L, S, 8, 6), dtype)
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
    q, k, v = make((1, 3, 1, 150, 200, 32, 16), dtype)
    first, second = (
        (out, *torch.autograd.grad(out.sum(), (q, k, v))) for out in (attend(q, k, v, causal=50)[0] for _ in range(2))
    )
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


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
    part = ops.dropout_keep_mask(torch.tensor([seed]), p, [1, 2, 2, 40], [2, 3, 5])
    assert torch.equal(part, whole[1:, 1:, 2:4])
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


@pytest.mark.parametrize("cuts", [(5,), (0, 5), (3, 4, 9), (11,)])
def test_merge_of_parts_is_the_whole(cuts):
    """T. Localises: merge_partials and the gradient of the logsumexp, empty parts and empty rows included."""
    S = 11
    q, k, v = make((2, 4, 2, 6, S, 8, 5))
    bounds = [0, *cuts, S]
    mask = torch.rand(2, 1, 6, S) < 0.6
    mask[0, :, 2] = False

    def merged(q, k, v):
        parts = [
            attend(q, k[:, :, a:b], v[:, :, a:b], mask[..., a:b]) for a, b in zip(bounds, bounds[1:], strict=False)
        ]
        return ops.merge_partials(torch.stack([o for o, _ in parts]), torch.stack([x for _, x in parts]))

    weights = torch.randn(2, 4, 6, 5), torch.randn(2, 4, 6)
    ours = gradients(merged, (q, k, v), weights)
    theirs = gradients(lambda *x: by_reference(*x, mask), (q, k, v), weights)
    for name, x, y in zip(NAMES, ours, theirs, strict=False):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_merge_of_every_mth_key_is_the_whole(dtype, window):
    """T / R. Localises: key_stride, by the way a cache uses it: token p on rank p % m, causal seen from there."""
    L, S, m = 70, 200, 3
    q, k, v = make((1, 4, 2, L, S, 8, 5), dtype, grad=False)
    parts = [attend(q, k[:, :, j::m], v[:, :, j::m], causal=S - L - j, window=window, key_stride=m) for j in range(m)]
    merged = ops.merge_partials(torch.stack([out for out, _ in parts]), torch.stack([x for _, x in parts]))
    for mine, whole in zip(merged, attend(q, k, v, causal=S - L, window=window), strict=True):
        assert relative(mine, whole) <= (1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("feature", ["none", "bias", "everything"])
def test_opcheck(feature, grad, dtype):
    """Localises: schema, fake kernel, strides or autograd registration of the op (not its numbers)."""
    sizes = SIZES["gqa, wide v"]
    q, k, v = make(sizes, dtype, grad)
    options = dict(features(feature, sizes, dtype))
    mask = options.pop("attn_mask", None)
    if feature == "bias":
        mask.requires_grad_(grad)
    torch.library.opcheck(attend.default, (q, k, v, mask), options)


def test_gradcheck():
    """Localises: the formulas of the backward against finite differences, independent of any reference."""
    q, k, v = make((1, 2, 1, 3, 4, 3, 2))
    bias = torch.randn(1, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    options = {"causal": 1, "softcap": 2.0, "dropout_p": 0.3, "seed": torch.tensor([11])}
    assert torch.autograd.gradcheck(lambda q, k, v, b: attend(q, k, v, b, **options), (q, k, v, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Localises: the autocast kernel: float32 inputs come out in the autocast dtype, gradients in float32."""
    q, k, v = make((1, 2, 2, 5, 5, 8, 8), torch.float32)
    with torch.autocast("cpu", dtype):
        out, logsumexp = attend(q, k, v)
    assert out.dtype == dtype and logsumexp.dtype == torch.float32
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.ones(1, 2, 3)}, "4-D"),
        ({"k": torch.ones(1, 2, 3, 4).double()}, "one dtype"),
        ({"v": torch.ones(2, 2, 3, 4)}, "one batch size"),
        ({"v": torch.ones(1, 2, 5, 4)}, "one length"),
        ({"k": torch.ones(1, 2, 3, 5)}, "one head dim"),
        ({"q": torch.ones(1, 3, 3, 4)}, "divide those of q"),
        ({"attn_mask": torch.ones(4, 3)}, "broadcastable"),
        ({"attn_mask": torch.ones(3, 3, dtype=torch.int)}, "bool or floating point"),
        ({"dropout_p": 0.5}, "seed"),
        ({"dropout_p": 1.5}, "dropout_p"),
        ({"window": 2}, "causal"),
        ({"softcap": -1.0}, "softcap"),
        ({"origin": [0, 0]}, "origin"),
        ({"key_stride": 0}, "key_stride"),
        ({"key_stride": 2, "dropout_p": 0.5, "seed": torch.tensor([1])}, "key_stride"),
    ],
)
def test_errors(change, message):
    """Localises: argument checks of the op: ValueError that names the argument."""
    arguments = {**dict.fromkeys("qkv", torch.ones(1, 2, 3, 4)), **change}
    with pytest.raises(ValueError, match=message):
        attend(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)
