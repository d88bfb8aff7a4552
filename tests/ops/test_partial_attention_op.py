"""The attention op as an op: merging of parts, schema, fake kernel, autograd, autocast, errors."""

import pytest
import torch
from harness.attention_op import NAMES, SIZES, attend, by_reference, features, gradients, ops, qkv, relative
from harness.device import DEVICE, of_device


@pytest.mark.parametrize("cuts", [(5,), (0, 5), (3, 4, 9), (11,)])
def test_merge_of_parts_is_the_whole(cuts):
    """T. Localises: merge_partials and the gradient of the logsumexp, empty parts and empty rows included."""
    S = 11
    q, k, v = qkv((2, 4, 2, 6, S, 8, 5))
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
    q, k, v = qkv((1, 4, 2, L, S, 8, 5), dtype, grad=False)
    parts = [attend(q, k[:, :, j::m], v[:, :, j::m], causal=S - L - j, window=window, key_stride=m) for j in range(m)]
    merged = ops.merge_partials(torch.stack([out for out, _ in parts]), torch.stack([x for _, x in parts]))
    for mine, whole in zip(merged, attend(q, k, v, causal=S - L, window=window), strict=True):
        assert relative(mine, whole) <= (1e-12 if dtype == torch.float64 else of_device("fp32 by another way"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("feature", ["none", "bias", "everything"])
def test_opcheck(feature, grad, dtype):
    """Localises: schema, fake kernel, strides or autograd registration of the op (not its numbers)."""
    sizes = SIZES["gqa, wide v"]
    q, k, v = qkv(sizes, dtype, grad)
    options = dict(features(sizes, dtype)[feature])
    mask = options.pop("attn_mask", None)
    if feature == "bias":
        mask.requires_grad_(grad)
    torch.library.opcheck(attend.default, (q, k, v, mask), options)


def test_gradcheck():
    """Localises: the formulas of the backward against finite differences, independent of any reference."""
    q, k, v = qkv((1, 2, 1, 3, 4, 3, 2))
    bias = torch.randn(1, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    options = {"causal": 1, "softcap": 2.0, "dropout_p": 0.3, "seed": torch.tensor([11])}
    assert torch.autograd.gradcheck(lambda q, k, v, b: attend(q, k, v, b, **options), (q, k, v, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Localises: the autocast kernel: float32 inputs come out in the autocast dtype, gradients in float32."""
    q, k, v = qkv((1, 2, 2, 5, 5, 8, 8), torch.float32)
    with torch.autocast(DEVICE, dtype):
        out, logsumexp = attend(q, k, v)
    assert out.dtype == dtype and logsumexp.dtype == torch.float32
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.ones(1, 2, 3)}, "q, k and v must be 4-D"),
        ({"k": torch.ones(1, 2, 3, 4).double()}, "must have one dtype"),
        ({"v": torch.ones(2, 2, 3, 4)}, "must have one batch size"),
        ({"v": torch.ones(1, 2, 5, 4)}, "k and v must have one length"),
        ({"k": torch.ones(1, 2, 3, 5)}, "q and k must have one head dim"),
        ({"q": torch.ones(1, 3, 3, 4)}, "the heads of k and v must be equal and divide those of q"),
        ({"attn_mask": torch.ones(4, 3)}, "attn_mask must be broadcastable to .* = .1, 2, 3, 3., got .4, 3."),
        ({"attn_mask": torch.ones(3, 3, dtype=torch.int)}, "attn_mask must be bool, float64"),
        ({"dropout_p": 0.5}, "dropout_p > 0 needs seed"),
        ({"dropout_p": 1.5}, "dropout_p must be in .0, 1., got 1.5"),
        ({"window": 2}, "window needs causal"),
        ({"softcap": -1.0}, "softcap must be positive"),
        ({"origin": [0, 0]}, "origin must be .batch, head, row., got 2 numbers"),
        ({"key_stride": 0}, "key_stride must be at least 1"),
        (
            {"key_stride": 2, "dropout_p": 0.5, "seed": torch.tensor([1])},
            "dropout_p must be 0 where key_stride is not 1",
        ),
    ],
)
def test_errors(change, message):
    """Localises: argument checks of the op: ValueError that names the argument."""
    arguments = {**dict.fromkeys("qkv", torch.ones(1, 2, 3, 4)), **change}
    with pytest.raises(ValueError, match=message):
        attend(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)
