"""Arguments that the modules never give, but a program that calls the operators may."""

import pytest
import torch
from harness.device import DEVICE
from harness.layer import Case, decided, place

import two_level_mha as tlm

ops = torch.ops.two_level_mha


@pytest.mark.parametrize("tokens", [3, 300])
@pytest.mark.parametrize("names", [(), ("q",), ("k",), ("q", "v"), ("q", "k", "v")])
def test_some_biases(names, tokens):
    """Localises: the one GEMM of many tokens, which has no bias or all three."""
    x = torch.randn(1, tokens, 6, dtype=torch.float64)
    weights = [torch.randn(heads, 4, 6, dtype=torch.float64) for heads in (4, 2, 2)]
    biases = [torch.randn_like(w[..., 0]) if n in names else None for n, w in zip("qkv", weights, strict=True)]
    for y, w, b in zip(ops.qkv_projection(x, x, x, *weights, *biases), weights, biases, strict=True):
        expected = torch.einsum("bld,hed->bhle", x, w)
        torch.testing.assert_close(y, expected if b is None else expected + b[:, None], rtol=1e-10, atol=1e-10)


def test_biases_are_of_heads():
    """Localises: sizes of a bias read beyond their end."""
    x, weights = torch.randn(1, 3, 6), [torch.randn(heads, 4, 6) for heads in (4, 2, 2)]
    biases = [torch.randn(heads, 4) for heads in (4, 2, 2)]
    for i, name in enumerate(("q_bias", "k_bias", "v_bias")):
        for wrong in (torch.tensor(0.0), torch.randn(4), torch.randn(2, 4, 1)):
            given = [*biases[:i], wrong, *biases[i + 1 :]]
            with pytest.raises(ValueError, match=rf"{name} must be \(heads, E\), got"):
                ops.qkv_projection(x, x, x, *weights, *given)


def test_float64_bias_of_float32_scores():
    """Localises: the dtype of the chunked path's scores, which a wider mask must not change."""
    q, k, v = (torch.randn(1, 2, length, 8) for length in (5, 7, 7))
    bias = torch.randn(5, 7)
    masks = [bias.to(dtype).requires_grad_() for dtype in (torch.float64, torch.float32)]
    grads = [torch.autograd.grad(ops.partial_attention(q, k, v, mask)[0].sum(), mask)[0] for mask in masks]
    assert grads[0].dtype == torch.float64
    torch.testing.assert_close(grads[0].float(), grads[1])


def test_nothing_is_sent_of_nothing():
    """Localises: empty tensors, which no group is needed for."""
    assert ops.all_gather(torch.ones(3, 0, 5), 0, 2, "no group").shape == (6, 0, 5)
    assert ops.all_gather(torch.ones(3, 0, 5), 1, 2, "no group").shape == (3, 0, 5)
    assert ops.reduce_scatter(torch.ones(4, 0), 0, 2, "no group").shape == (2, 0)
    assert ops.all_to_all(torch.ones(4, 0), 0, 1, 2, "no group").shape == (2, 0)


@pytest.mark.parametrize("sizes", [(0, 0, 0), (8, 0, 4), (8, 4, 0)])
def test_sizes_of_zero_have_no_grid(sizes):
    """Localises: divisions in the choice of a grid, before anything has checked the sizes."""
    assert tlm._C.ranked_grids(4, *sizes, tlm.Profile.named("cpu").numbers) == []
    assert "must be positive" in tlm._C.grid_problem(1, 2, *sizes)


def test_dropout_mask_is_four_dimensional():
    """Localises: sizes read beyond the end of the argument."""
    for seed, sizes, origin in ((1, [2, 3], [0, 0, 0]), (1, [1, 2, 3, 4], [0]), (2, [1, 2, 3, 4], [0, 0, 0])):
        with pytest.raises(ValueError, match="seed must be|sizes must be"):
            ops.dropout_keep_mask(torch.ones(seed, dtype=torch.int64), 0.5, sizes, origin)


def enter_on(numbers: list[int], x: torch.Tensor, weight: torch.Tensor) -> None:
    """`enter` on a grid (n, m, i, j) that perhaps is none."""
    case = Case(heads=2, kv_heads=2, head_dim=4, embed_dim=8, batch=2, length=3, dtype=torch.float32)
    text, sizes = decided(case, place(1, 1))
    text = " ".join([*map(str, numbers), *text.split(" ")[4:]])
    ops.enter(x, x, x, *[weight] * 3, *[None] * 5, None, None, text, sizes)


def test_what_the_operators_refuse():
    """Localises: a division by zero, or memory read that is not there, where only the modules checked."""
    x, weight = torch.ones(2, 3, 8), torch.ones(2, 4, 8)
    for numbers in ([0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 5], [2, 1, 2, 0]):
        with pytest.raises(ValueError, match="grid must be"):
            enter_on(numbers, x, weight)
    for call in (lambda: ops.all_gather(x, 0, 0, ""), lambda: ops.reduce_scatter(x, 0, 0, ""),
                 lambda: ops.all_to_all(x, 0, 1, 0, ""), lambda: ops.all_reduce(x, 0, "")):  # fmt: skip
        with pytest.raises(ValueError, match="group_size must be positive, at most 1048576, got 0"):
            call()
    q = torch.ones(1, 2, 3, 4)
    with pytest.raises(ValueError, match=f"int64 tensor of one element on {DEVICE}"):
        ops.partial_attention(q, q, q, dropout_p=0.5, seed=torch.ones(1, dtype=torch.int64, device="meta"))
    with pytest.raises(ValueError, match="pack takes 4-D tensors of one dtype and device"):
        ops.pack([q, q.to("meta")], [1, 1], 2)
    for p in (-1.0, 2.0, float("nan")):
        with pytest.raises(ValueError, match="p must be in"):
            ops.dropout_keep_mask(torch.ones(1, dtype=torch.int64), p, [1, 2, 3, 4], [0, 0, 0])
    for wrong in ({"out": q[:, :1]}, {"logsumexp": q[0, 0, 0]}, {"grad_out": q[:, :, :1]}, {"v": q[:, :, :1]}):
        sizes = {"grad_out": q, "grad_logsumexp": None, "q": q, "k": q, "v": q, "out": q, "logsumexp": q[..., 0]}
        with pytest.raises(ValueError, match="must have shape|must have one length"):
            ops.partial_attention_backward(**sizes | wrong, mask_grad=False)


FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu]


def alone(**options) -> tuple:
    """q, k, v, the other arguments of `leave` and `leave_with_weights` in one process, some of them changed."""
    case = Case(heads=2, kv_heads=2, head_dim=4, embed_dim=8, batch=1, length=5, dtype=torch.float32)
    given = {"q": torch.randn(1, 2, 5, 4), "k": torch.randn(1, 2, 5, 4), "v": torch.randn(1, 2, 5, 4),
             "weight": torch.randn(8, 2, 4), "bias": None, "mask": None, "scale": None, "causal": None, "window": None,
             "softcap": 0.0, "dropout_p": 0.0, "seed": None}  # fmt: skip
    return *(given | options).values(), *decided(case, place(1, 1))


@pytest.mark.parametrize("leave", [ops.leave, ops.leave_with_weights])
@pytest.mark.parametrize(
    "scores", [torch.randn(2, 5, 5), torch.randn(1, 4, 5, 5), torch.randn(1, 2, 5, 4), torch.ones(1, 2, 5, 5).long()]
)
def test_scores_that_fit_no_call(leave, scores):
    """Localises: what is added to scores, of other heads or keys, broadcast or read beyond its end."""
    with pytest.raises(ValueError, match=r"scores must be float64, .* broadcastable to .* as q and k lie"):
        leave(*alone(), scores=scores)


@pytest.mark.parametrize("leave", [ops.leave, ops.leave_with_weights])
def test_scores_are_a_mask_of_their_own(leave):
    """T. Localises: scores that replace a mask, or a bool one that they turn off."""
    bias = torch.randn(1, 2, 5, 5)
    keep = torch.ones(5, 5, dtype=torch.bool).tril()
    given = dict(zip(("q", "k", "v"), torch.randn(3, 1, 2, 5, 4), strict=True)) | {"weight": torch.randn(8, 2, 4)}
    first = [x for x in (leave(*alone(**given, mask=keep), scores=bias), leave(*alone(**given, mask=bias, causal=0)))]
    ys = [x[0] if isinstance(x, tuple) else x for x in first]
    torch.testing.assert_close(*ys)


@pytest.mark.parametrize("dtype", [*FLOAT8, torch.int32, torch.complex64])
def test_dtypes_of_masks(dtype):
    """Localises: a mask that a kernel would read as float16, beyond its end."""
    mask = torch.zeros(5, 5).to(dtype)
    q = torch.randn(1, 2, 5, 4)
    calls = [lambda: ops.partial_attention(q, q, q, mask), lambda: ops.leave(*alone(mask=mask)),
             lambda: ops.leave_with_weights(*alone(mask=mask)),
             lambda: ops.partial_attention(q.to("meta"), q.to("meta"), q.to("meta"), mask.to("meta"))]  # fmt: skip
    for call in calls:
        with pytest.raises(ValueError, match="attn_mask must be bool, float64, float32, bfloat16 or float16, got"):
            call()
    layers = [
        tlm.TwoLevelMultiheadAttention(8, 2),
        lambda x, mask: tlm.TwoLevelAttention(8, 2, 2, 4)(x, attn_mask=mask),
    ]
    x = torch.randn(5, 1, 8)
    with pytest.raises(ValueError, match="bool, float64, float32, bfloat16 or float16, got"):
        layers[0](x, x, x, attn_mask=mask)
    with pytest.raises(ValueError, match="bool, float64, float32, bfloat16 or float16, got"):
        layers[1](x.transpose(0, 1), mask)


REFUSED_BY_LEAVE = {
    "window without causal": ({"window": 2}, "window needs causal"),
    "dropout_p is NaN": ({"dropout_p": float("nan")}, "dropout_p must be in"),
    "dropout_p is negative": ({"dropout_p": -0.5}, "dropout_p must be in"),
    "no seed": ({"dropout_p": 0.5}, "needs seed"),
    "softcap is negative": ({"softcap": -1.0}, "softcap must be positive"),
    "softcap is NaN": ({"softcap": float("nan")}, "softcap must be positive"),
    "an integer mask": ({"mask": torch.ones(5, 5, dtype=torch.int64)}, "attn_mask must be bool"),
    "no heads": ({"k": torch.randn(1, 0, 5, 4), "v": torch.randn(1, 0, 5, 4)}, "k must have shape"),
}


@pytest.mark.parametrize("name", REFUSED_BY_LEAVE)
@pytest.mark.parametrize("leave", [ops.leave, ops.leave_with_weights])
def test_both_ways_to_leave_refuse(leave, name):
    """Localises: checks of only one of the two, without which arguments are ignored, or end the process."""
    options, message = REFUSED_BY_LEAVE[name]
    with pytest.raises(ValueError, match=message):
        leave(*alone(**options))


@pytest.mark.parametrize("options", [{"causal": 2**63 - 1}, {"causal": 1, "window": 2**63 - 1},
                                     {"causal": -(2**63), "window": 2**63 - 1}])  # fmt: skip
def test_offsets_beyond_every_key(options):
    """Localises: positions that wrap around, so that a row sees none or all of the keys."""
    inputs = dict(zip("qkv", torch.randn(3, 1, 2, 5, 4), strict=True)) | {"weight": torch.randn(8, 2, 4)}
    near = {"causal": {2**63 - 1: 9, 1: 1, -(2**63): -9}[options["causal"]]}
    y, (z, _) = (leave(*alone(**inputs, **options)) for leave in (ops.leave, ops.leave_with_weights))
    torch.testing.assert_close(y, ops.leave(*alone(**inputs, **near)))
    if options["causal"] > 0:  # a row without keys is NaN with weights
        torch.testing.assert_close(z, y)


def test_positions_are_not_negative():
    """Localises: a key row that is cropped where a cache by position would begin before the first token."""
    case = Case(heads=2, kv_heads=2, head_dim=4, embed_dim=8, batch=2, length=3, dtype=torch.float32)
    text, sizes = decided(case, place(1, 1), scheme="position")
    x, weight = torch.ones(2, 3, 8), torch.ones(2, 4, 8)
    for at, name in enumerate(tlm._C.size_fields()):
        wrong = [*sizes[:at], -1, *sizes[at + 1 :]]
        with pytest.raises(ValueError, match=f"{name} must not be negative, got -1"):
            ops.enter(x, x, x, *[weight] * 3, *[None] * 5, None, None, text, wrong)


def test_one_device():
    """Localises: results on one device that are computed, or not, on another."""
    outs, logsumexps = torch.randn(2, 1, 1, 3, 4), torch.randn(2, 1, 1, 3)
    for a, b in ((outs, logsumexps.to("meta")), (outs.to("meta"), logsumexps)):
        with pytest.raises(ValueError, match="outs and logsumexps must be on one device, got"):
            ops.merge_partials(a, b)
    q = torch.ones(1, 2, 3, 4)
    with pytest.raises(ValueError, match=f"must be on {DEVICE}.*, got meta"):
        ops.partial_attention_backward(q, q[..., 0].to("meta"), q, q, q, q, q[..., 0], False)


def test_copies_on_write():
    """Localises: pointers for writing to what is only read, which torch forbids in a parallel loop."""
    q, k, v = torch.randn(3, 1, 2, 40, 16).unbind()
    mask, grad = torch.randn(40, 40), torch.randn(1, 2, 40, 16)
    for rows in (40, 1):  # blocked and decode
        expected = ops.partial_attention(q[:, :, :rows], k, v, mask[:rows])
        lazy = [torch._lazy_clone(x) for x in (q[:, :, :rows].contiguous(), k, v, mask[:rows].contiguous())]
        for x, y in zip(ops.partial_attention(*lazy), expected, strict=True):
            assert torch.equal(x, y)
        assert all(torch._C._is_cow_tensor(x) for x in lazy)
    out, logsumexp = ops.partial_attention(q, k, v)
    saved = [grad, torch.randn_like(logsumexp), q, k, v, out.contiguous(), logsumexp]
    expected = ops.partial_attention_backward(*saved, False)
    lazy = [torch._lazy_clone(x) for x in saved]
    for x, y in zip(ops.partial_attention_backward(*lazy, False), expected, strict=True):
        assert torch.equal(x, y)
    packed = ops.pack([q, k], [1, -1], 2)
    lazy = [torch._lazy_clone(x) for x in (q, k)]
    assert torch.equal(ops.pack(lazy, [1, -1], 2), packed)
    sizes = [*q.shape, *k.shape]
    for x, y in zip(ops.unpack(torch._lazy_clone(packed), sizes, [1, -1], 2), ops.unpack(packed, sizes, [1, -1], 2),
                    strict=True):  # fmt: skip
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64, torch.float16, torch.float64])
@pytest.mark.parametrize("device", [DEVICE, "meta"])
def test_a_sum_over_parts_keeps_the_dtype(dtype, device):
    """Localises: integers, which a sum promotes to int64, on one of the devices."""
    buffer = torch.ones(3, 8, device=device, dtype=dtype)
    (y,) = ops.unpack(buffer, [1, 2, 2, 2], [-1], 3)
    assert y.dtype == dtype and (device == "meta" or torch.equal(y, torch.full((1, 2, 2, 2), 3, dtype=dtype)))


def refused(call) -> str:
    """The sentence of a ValueError."""
    with pytest.raises(ValueError) as error:
        call()
    return str(error.value)


def test_what_would_end_the_process():
    """Localises: divisions by zero and memory that is not there, by arguments that only a program gives."""
    q = torch.ones(1, 2, 3, 4)
    meta = [x.to("meta") for x in (q, q[..., 0], q, q, q, q, q[..., 0])]
    assert "mask_grad needs attn_mask" in refused(lambda: ops.partial_attention_backward(*meta, True))
    x, weight = torch.ones(2, 3, 8), torch.ones(2, 4, 8)
    for wrong in (weight[:0], weight[0], weight[0, 0]):
        assert "q_weight must be (heads, E, D)" in refused(lambda w=wrong: ops.qkv_projection(x, x, x, w, w, w))
        assert "q_weight must be (heads, E, D)" in refused(lambda w=wrong: enter_on([1, 1, 0, 0], x, w))
    for wrong in (weight[0], weight[0, 0], weight[0, 0, 0]):
        assert "out_weight must be (D, heads, E)" in refused(lambda w=wrong: ops.leave(*alone(weight=w)))
    assert "grid must be" in refused(lambda: enter_on([2**40, 2**40, 0, 0], x, weight))
    buffer = torch.ones(1, 8)
    for sizes in ([1, 1, 1, 2**28, -1, 1, 1, 2**28 - 8], [2, 2, 2, 2, -1, 2, 2, 2]):
        assert "sizes must not be negative" in refused(lambda s=sizes: ops.unpack(buffer, s, [0, 0], 1))
    assert "2**62 elements" in refused(lambda: ops.unpack(torch.ones(1, 0), [2**32, 2**32, 1, 1], [0], 1))
    assert "parts must be positive" in refused(lambda: ops.pack([q], [0], 2**63 - 1))
    k = torch.ones(1, 2, 3, 4)

    def cache_with(**numbers: int) -> list[int]:
        return [numbers.get(name, {"slices": 1, "by_position": 1}.get(name, 0)) for name in tlm._C.cache_fields()]

    cache, held = cache_with(), cache_with(length=2**63 - 1)
    for wrong, message in (
        (cache_with(slices=0), "slice j of m"),
        (cache_with(length=-1), "must not be negative"),
        (cache_with(cycle=2**40), "a cycle of at most 1024"),
        (cache_with(cycle=4, first=3, run=2), "must lie in it"),
        (cache_with(cycle=4, first=-1, run=2), "must lie in it"),
        (cache_with(cycle=4, run=-1), "must lie in it"),
        (cache_with(cycle=4, first=2**63 - 1, run=2**63 - 1), "must lie in it"),
        (held, "where a cache has tokens"),
    ):
        assert message in refused(lambda c=wrong: ops.cache_append([], c, k, k, 3))
    assert "keys and values, got 1" in refused(lambda: ops.cache_append([k], cache, k, k, 3))


def test_hostile_rates_and_layers():
    """Localises: rates that prices are divided by; the search for other grids where a layer's sizes are absurd."""
    case = Case(heads=2, kv_heads=2, head_dim=4, embed_dim=8, batch=2, length=3, dtype=torch.float32)
    text, sizes = decided(case, place(1, 1))
    names, numbers = tlm._C.constant_fields(), text.split("\n")[0].split(" ")
    x, weight = torch.ones(2, 3, 8), torch.ones(2, 4, 8)

    def enter(**changed):
        row = [str(changed.get(name, number)) for name, number in zip(names, numbers, strict=False)]
        rest = text[len(" ".join(numbers)) :]
        ops.enter(x, x, x, *[weight] * 3, *[None] * 5, None, None, " ".join(row) + rest, sizes)

    for name in ("flops", "memory", "link", "network", "node"):
        for rate in (0, -1):
            assert "rates must be positive" in refused(lambda n=name, r=rate: enter(**{n: r}))
    for changed in ({"head_dim": 0}, {"num_kv_heads": 2**40, "num_heads": 2**41 + 1, "head_dim": 2**40}):
        assert "does not fit" in refused(lambda c=changed: enter(**{"head_groups": 3} | c))


def test_the_private_module_refuses():
    """Localises: divisions by zero in plan/, which is told numbers that are checked."""
    C, rates = tlm._C, tlm.Profile.named("cpu").numbers
    call = {"B": 1, "L": 8, "S": 8, "H": 4, "K": 4, "d": 8, "m": 2}
    assert "m must be positive" in refused(lambda: C.whole_heads_fit(8, 4, 0))
    assert "K must be positive" in refused(lambda: C.whole_heads_fit(8, 0, 4))
    assert "m must be positive" in refused(lambda: C.stores_whole_heads(8, 4, 1, 0))
    assert "kv_heads / n must be positive" in refused(lambda: C.stores_whole_heads(8, 4, 8, 1))
    for name in ("H", "K", "d", "m"):
        wrong = C.Call(**call | {name: 0})
        assert f"{name} must be positive" in refused(lambda w=wrong: C.traffic("slices", w))
        assert f"{name} must be positive" in refused(lambda w=wrong: C.resolve_scheme("auto", w, rates))
    assert "rates must be positive" in refused(lambda: C.resolve_scheme("auto", C.Call(**call), [0] * 15))
    assert "key_stride must be positive" in refused(lambda: C.Request(causal=0, key_stride=0))
    assert not C.has_grid(2**62, 2**62, 2**62, 8)
    assert "must be at most" in C.grid_problem(2**40, 2**40, 2**40, 2**40, 2**40)
    assert "no grid of" in C.grid_choices(2**62, 2**62, 2**62, 2**62)


def refused_masks(grid: tuple[int, int], scheme: str) -> dict[str, str]:
    """What `leave` says to masks that fit no call, or that fit only what this rank holds."""
    at = place(*grid)
    B, h, L, d, D = 4, 4, 6, 4, 5
    case = Case(
        scheme, heads=h, kv_heads=h, head_dim=d, embed_dim=D, batch=B, length=L, bias=False, dtype=torch.float32
    )
    call = decided(case, at)
    x = torch.ones(B, L, D)
    weight = torch.ones(h // grid[0], d // grid[1], D)
    q, k, v, *_ = ops.enter(x, x, x, weight, weight, weight, *[None] * 5, None, None, *call)
    found = {}
    for sizes in ((3, 1, L, L), (B + 1, 1, L, L), (1, h + 1, L, L), (1, 1, L - 1, L), (1, 1, 2 * L, L), (L, L - 1)):
        mask, out_weight = torch.ones(sizes, dtype=torch.bool), weight.permute(2, 0, 1)
        try:
            ops.leave(q, k, v, out_weight, None, mask, None, None, None, 0.0, 0.0, None, *call)
            found[str(sizes)] = ""
        except ValueError as error:
            found[str(sizes)] = str(error)
    return found


@pytest.mark.parametrize("scheme", ["slices", "sequence", "batch", "weights", "position"])
def test_masks_that_do_not_fit(pool, scheme):
    """Every rank refuses them alike. Localises: a part of a mask that fits a rank although the whole does not."""
    found = pool.run(refused_masks, 4, (2, 2), scheme)
    assert all(one == found[0] for one in found)
    assert all("broadcastable to (B, h, L, S) = (4, 4, 6, 6)" in text for text in found[0].values()), found[0]
