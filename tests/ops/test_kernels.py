"""Every attention kernel, asked for by name, and the function that says which one serves a call.

B batch, H query and K KV heads, L queries, S keys, D and Dv widths of keys and of values.
"""

import dataclasses
import re

import pytest
import torch

from two_level_mha import _C, reference

ops = torch.ops.two_level_mha
attend = ops.partial_attention

NEG_INF = float("-inf")
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAMES = [row["name"] for row in _C.kernels()]
# Relative L2 error against float64, sums in float32 but for float64
TOLERANCE = {"float64": 1e-12, "float32": 5e-6, "bfloat16": 2e-2, "float16": 3e-3}


@dataclasses.dataclass(frozen=True)
class Call:
    """Sizes and options of a call, as the op and as the table of kernels are asked."""

    dtype: str = "float32"
    B: int = 2
    H: int = 4
    K: int = 2
    L: int = 37
    S: int = 53
    D: int = 24
    Dv: int = 24
    mask: str = ""
    mask_rows: bool = True
    options: tuple = ()  # causal, window, key_stride, softcap, dropout_p

    def inputs(self) -> list[torch.Tensor]:
        shapes = [(self.B, self.H, self.L, self.D), (self.B, self.K, self.S, self.D), (self.B, self.K, self.S, self.Dv)]
        return [torch.randn(s, dtype=torch.float64).to(DTYPES[self.dtype]).requires_grad_() for s in shapes]

    def arguments(self) -> dict:
        given = dict(self.options)
        if self.mask:
            rows = self.L if self.mask_rows else 1
            bias = torch.randn(self.B, 1, rows, self.S)
            given["attn_mask"] = bias > -1 if self.mask == "bool" else bias.to(DTYPES[self.dtype])
        if "dropout_p" in given:
            given["seed"] = torch.tensor([11])
        return given

    def request(self, **grads: bool):
        given = dict(self.options)
        request = _C.Request(
            dtype=self.dtype,
            mask=self.mask,
            mask_rows=bool(self.mask) and self.mask_rows and self.L > 1,
            softcap=given.pop("softcap", 0.0) > 0,
            dropout=given.pop("dropout_p", 0.0) > 0,
            **given,
            **grads,
        )
        request.B, request.H, request.K, request.L, request.S = self.B, self.H, self.K, self.L, self.S
        request.d_qk, request.d_v = self.D, self.Dv
        return request


def options(**given) -> tuple:
    return tuple(given.items())


FEATURES = {
    "none": Call(),
    "one head": Call(H=1, K=1),
    "one row": Call(L=1, S=200),
    "wide values": Call(Dv=40),
    "narrow values": Call(Dv=8),
    "several blocks": Call(B=1, L=270, S=280, D=16, Dv=16),
    "no keys": Call(S=0),
    "causal": Call(options=options(causal=0)),
    "causal offset": Call(options=options(causal=16)),
    "causal, corner in mid-matrix": Call(options=options(causal=40)),
    "causal that hides nothing": Call(options=options(causal=60, window=200)),
    "rows before the first key": Call(options=options(causal=-5)),
    "one range of keys": Call(L=1, options=options(causal=30, window=9)),
    "window": Call(options=options(causal=20, window=7)),
    "key_stride": Call(options=options(causal=60, key_stride=3)),
    "softcap": Call(options=options(softcap=1.5)),
    "bool mask": Call(mask="bool"),
    "padding": Call(mask="bool", mask_rows=False),
    "additive mask": Call(mask="additive"),
    "dropout": Call(options=options(dropout_p=0.3)),
    "everything": Call(mask="additive", options=options(causal=20, window=30, softcap=2.0, dropout_p=0.2)),
}


def by_reference(q, k, v, attn_mask=None, seed=None, dropout_p=0.0, **given):
    keep = None
    if dropout_p:
        keep = ops.dropout_keep_mask(seed, dropout_p, [q.shape[0], q.shape[1], q.shape[2], k.shape[2]])
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.double()
    return reference.attention(q, k, v, mask=attn_mask, dropout_p=dropout_p, keep_BHLS=keep, **given)[:2]


def relative(x: torch.Tensor, y: torch.Tensor) -> float:
    return ((x.double() - y.double()).norm() / y.double().norm().clamp_min(1e-30)).item()


def gradients(function, inputs, weights) -> tuple:
    """Values, and gradients of a loss of both results, or of out alone; rows without keys have no logsumexp."""
    out, logsumexp = function(*inputs)
    loss = (out * weights[0].to(out.dtype)).sum()
    if len(weights) > 1:
        loss = loss + (logsumexp.masked_fill(logsumexp == NEG_INF, 0.0) * weights[1].to(logsumexp.dtype)).sum()
    return out, logsumexp, *torch.autograd.grad(loss, inputs)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("kernel", NAMES)
def test_forced_against_the_reference(kernel, feature, dtype):
    """T / R. Localises: a kernel, by name, and one feature, by values and gradients, whatever the table prefers on
    this machine; a call that it refuses, or takes, against what the table says.
    """
    call = dataclasses.replace(FEATURES[feature], dtype=dtype)
    inputs, given = call.inputs(), call.arguments()
    weights = [torch.randn(call.B, call.H, call.L, call.Dv), torch.randn(call.B, call.H, call.L)]
    refused = _C.refusals(call.request(), _C.Machine()).get(kernel)
    if refused:
        with pytest.raises(ValueError, match=re.escape(f"kernel '{kernel}' cannot serve this call: it {refused}.")):
            attend(*inputs, **given, kernel_name=kernel)
        return
    backward = _C.refusals(call.request(backward=True, grad_logsumexp=True), _C.Machine()).get(kernel, "")
    if "a gradient of logsumexp" in backward and "backward" not in backward.split("(")[0]:
        with pytest.raises(ValueError, match="does not support a gradient of logsumexp"):
            gradients(lambda *x: attend(*x, **given, kernel_name=kernel), inputs, weights)
        del weights[1]
    mine = gradients(lambda *x: attend(*x, **given, kernel_name=kernel), inputs, weights)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    theirs = gradients(lambda *x: by_reference(*x, **given), wide, weights)
    for name, x, y in zip(("out", "logsumexp", "dq", "dk", "dv"), mine, theirs, strict=True):
        hidden = y == NEG_INF
        assert torch.equal(x == NEG_INF, hidden), name
        error = relative(x.masked_fill(hidden, 0), y.masked_fill(hidden, 0))
        assert error <= TOLERANCE[dtype], (name, error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", FEATURES)
def test_what_serves_is_what_the_function_says(feature, dtype):
    """E. Localises: the way from a call's tensors to the numbers that choose a kernel, forward and backward."""
    call = dataclasses.replace(FEATURES[feature], dtype=dtype)
    (q, k, v), given = [x.detach() for x in call.inputs()], call.arguments()
    here = _C.Machine()
    chosen = _C.serving(call.request(), here)[0]
    by_name = {}
    for name in NAMES:
        if name not in _C.refusals(call.request(), here):
            by_name[name] = attend(q, k, v, **given, kernel_name=name)
    out, logsumexp = attend(q, k, v, **given)
    assert torch.equal(out, by_name[chosen][0]) and torch.equal(logsumexp, by_name[chosen][1])
    if feature == "several blocks" and chosen != "chunked":  # where sums are long no two kernels have the same bits
        assert not torch.equal(logsumexp, by_name["chunked"][1])
    g, g_lse = torch.randn(out.shape).to(out.dtype), torch.randn(logsumexp.shape, dtype=logsumexp.dtype)
    mask = given.pop("attn_mask", None)
    for grad_logsumexp in (False, True):
        arguments = (g, g_lse if grad_logsumexp else None, q, k, v, out, logsumexp, False, mask)
        chosen = _C.serving(call.request(backward=True, grad_logsumexp=grad_logsumexp), here)[0]
        free, forced = (ops.partial_attention_backward(*arguments, **given, kernel_name=name) for name in ("", chosen))
        assert all(torch.equal(x, y) for x, y in zip(free, forced, strict=True))


@pytest.mark.cpu_only("it names kernels of the CPU")
def test_a_kernel_without_a_backward():
    """Localises: whom autograd asks after a forward that was asked for by name."""
    call = Call()
    q, k, v = call.inputs()
    out, logsumexp = attend(q, k, v, kernel_name="cpu_decode")
    with pytest.raises(ValueError, match="kernel 'cpu_decode' cannot serve this call: it does not support backward"):
        ops.partial_attention_backward(out, None, q, k, v, out, logsumexp, False, kernel_name="cpu_decode")
    mine = torch.autograd.grad(out.sum(), (q, k, v))
    theirs = ops.partial_attention_backward(torch.ones_like(out), None, q, k, v, out, logsumexp, False,
                                            kernel_name="cpu_blocked")  # fmt: skip
    assert all(torch.equal(x, y) for x, y in zip(mine, theirs, strict=False))


@pytest.mark.cpu_only("it names kernels of the CPU")
def test_a_gradient_of_the_mask():
    """Localises: the one kernel that has it, which autograd's backward must not leave to the one asked for."""
    (q, k, v), mask = Call().inputs(), torch.randn(37, 53, requires_grad=True)
    assert _C.serving(_C.Request(backward=True, grad_mask=True, mask="additive"), _C.Machine())[0] == "chunked"
    assert torch.autograd.grad(attend(q, k, v, mask)[0].sum(), mask)[0].shape == mask.shape
    out, _ = attend(q, k, v, mask, kernel_name="cpu_blocked")
    with pytest.raises(ValueError, match="does not support a gradient of the mask"):
        torch.autograd.grad(out.sum(), mask)


@pytest.mark.cpu_only("it names kernels of the CPU")
def test_forced_under_compile():
    """E. Localises: a kernel's name in a traced graph, and arguments whose names inductor cannot pass on."""
    q, k, v = Call().inputs()
    for name in ("chunked", "cpu_decode"):

        def forced(*x, name=name):
            return attend(*x, kernel_name=name)

        compiled = torch.compile(forced, fullgraph=True)
        mine, theirs = (gradients(f, (q, k, v), [torch.ones(2, 4, 37, 24)]) for f in (compiled, forced))
        assert all(torch.equal(x, y) for x, y in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_unknown_name(device):
    """Localises: the check of the name, which tracing needs as well; the message lists the names."""
    q = torch.ones(1, 2, 3, 4, device=device)
    with pytest.raises(ValueError, match=f"kernel_name must be one of {', '.join(NAMES)}, or '' .* got 'fastest'"):
        attend(q, q, q, kernel_name="fastest")


@pytest.mark.cpu_only("it names kernels of the CPU")
def test_what_a_refusal_says():
    """Localises: asked against supported, the call's sizes and what would serve it."""
    q, k, v = Call(dtype="bfloat16").inputs()
    with pytest.raises(ValueError) as refused:
        attend(q, k, v, causal=20, window=3, softcap=1.0, kernel_name="aten_cpu")
    assert str(refused.value).splitlines()[0] == (
        "kernel 'aten_cpu' cannot serve this call: it does not support a causal offset, window, softcap (it supports "
        "bfloat16, float16, groups of query heads, causal, backward). The call needs bfloat16, groups of query heads, "
        "causal, a causal offset, window, softcap, with q (2, 4, 37, 24), k (2, 2, 53, 24) and d_v = 24; "
        f"kernel_name='' would take 'cpu_decode'. Kernels: {', '.join(NAMES)}"
    )


def on_gpu(arch=90, cudnn=91900, **switches):
    return _C.Machine(cuda=True, arch=arch, cudnn=cudnn, **switches)


HALF = Call(dtype="bfloat16", B=2, H=8, K=8, L=256, S=256, D=64, Dv=64)
LONG = dataclasses.replace(HALF, S=512)


def with_(call: Call, **changes) -> Call:
    given = dict(call.options) | {n: changes.pop(n) for n in list(changes) if n in GIVEN}
    return dataclasses.replace(call, options=tuple(given.items()), **changes)


GIVEN = ("causal", "window", "key_stride", "softcap", "dropout_p")

# (call, machine, forward, backward, backward with a gradient of logsumexp)
ON_GPUS = {
    "full": (HALF, on_gpu(), "aten_cudnn", "aten_cudnn", "aten_efficient"),
    "narrow values": (with_(HALF, Dv=16), on_gpu(), "aten_cudnn", "aten_cudnn", "aten_efficient"),
    "square causal": (with_(HALF, causal=0), on_gpu(), "aten_cudnn", "aten_cudnn", "aten_efficient"),
    "causal, tail of keys cut off": (with_(LONG, causal=0), on_gpu(), "aten_cudnn", "aten_cudnn", "aten_efficient"),
    "causal offset": (with_(LONG, causal=256), on_gpu(), "aten_flash", "aten_flash", "aten_efficient"),
    "corner in mid-matrix": (with_(HALF, causal=9), on_gpu(), "aten_flash", "aten_flash", "aten_efficient"),
    "more rows than keys": (with_(HALF, S=200, causal=0), on_gpu(), "aten_cudnn", "aten_cudnn", "aten_efficient"),
    "two rows below the corner": (with_(HALF, L=257, causal=0), on_gpu(), "aten_cudnn", "aten_cudnn", "aten_efficient"),
    "decode": (with_(HALF, L=1, causal=255), on_gpu(), "aten_flash", "aten_flash", "aten_efficient"),
    "decode with a window": (with_(HALF, L=1, causal=255, window=9), on_gpu(), "aten_flash", "aten_flash",
                             "aten_efficient"),
    "decode, keys dealt": (with_(HALF, L=1, causal=99, key_stride=4), on_gpu(), "aten_flash", "aten_flash",
                           "aten_efficient"),
    "decode before the first key": (with_(HALF, L=1, causal=-1), on_gpu(), "chunked", "chunked", "chunked"),
    "groups": (with_(HALF, K=2), on_gpu(), "aten_cudnn", "aten_cudnn", "aten_efficient"),
    "width 192": (with_(HALF, D=192, Dv=192), on_gpu(), "aten_cudnn", "aten_cudnn", "aten_efficient"),
    "width 192, B200": (with_(HALF, D=192, Dv=192), on_gpu(100), "aten_flash", "aten_flash", "aten_efficient"),
    "width 512": (with_(HALF, D=512, Dv=512), on_gpu(), *["aten_efficient"] * 3),
    "bool mask": (with_(HALF, mask="bool"), on_gpu(), *["aten_efficient"] * 3),
    "padding": (with_(HALF, mask="additive", mask_rows=False), on_gpu(), *["aten_efficient"] * 3),
    "a mask of 2**31 elements": (with_(HALF, L=65536, S=65536, mask="bool"), on_gpu(), *["chunked"] * 3),
    "padding of 65536 keys": (with_(HALF, L=65536, S=65536, mask="bool", mask_rows=False), on_gpu(),
                              *["aten_efficient"] * 3),
    "float32": (with_(HALF, dtype="float32"), on_gpu(), *["aten_efficient"] * 3),
    "float64": (with_(HALF, dtype="float64"), on_gpu(), *["chunked"] * 3),
    "dropout": (with_(HALF, dropout_p=0.1), on_gpu(), *["chunked"] * 3),
    "softcap": (with_(HALF, softcap=30.0), on_gpu(), *["chunked"] * 3),
    "window": (with_(HALF, causal=0, window=64), on_gpu(), "aten_flash", "aten_flash", "aten_efficient"),
    "window that hides nothing": (with_(HALF, causal=0, window=256), on_gpu(), "aten_cudnn", "aten_cudnn",
                                  "aten_efficient"),
    "window, keys dealt": (with_(HALF, causal=0, window=64, key_stride=2), on_gpu(), "aten_flash", "aten_flash",
                           "aten_efficient"),
    "window, float32": (with_(HALF, dtype="float32", causal=0, window=64), on_gpu(), *["aten_efficient"] * 3),
    "window and a mask": (with_(LONG, causal=256, window=64, mask="bool"), on_gpu(), *["aten_efficient"] * 3),
    "window and a mask, torch 2.11": (with_(LONG, causal=256, window=64, mask="bool"), on_gpu(offset_windows=False),
                                      "aten_efficient", "chunked", "chunked"),
    "square window, torch 2.11": (with_(HALF, causal=0, window=64), on_gpu(offset_windows=False), "aten_flash",
                                  "aten_flash", "aten_efficient"),
    "window past the last key": (with_(HALF, causal=9, window=64), on_gpu(), *["chunked"] * 3),
    "window of no keys": (with_(HALF, causal=0, window=0), on_gpu(), "aten_flash", "aten_flash", "aten_efficient"),
    "keys dealt": (with_(HALF, causal=0, key_stride=2), on_gpu(), "aten_flash", "aten_flash", "aten_efficient"),
    "rows before the first key": (with_(HALF, causal=-3), on_gpu(), "aten_flash", "aten_flash", "aten_efficient"),
    "keys dealt, on another rank than the first": (with_(HALF, S=128, causal=-1, key_stride=2), on_gpu(), "aten_flash",
                                                   "aten_flash", "aten_efficient"),
    "keys far apart": (with_(HALF, L=2048, S=4, causal=0, key_stride=1025), on_gpu(), *["chunked"] * 3),
    "no keys": (with_(HALF, S=0), on_gpu(), *["chunked"] * 3),
    "70000 sequences": (with_(HALF, B=70000), on_gpu(), *["chunked"] * 3),
    "old cuDNN": (HALF, on_gpu(cudnn=91500), "aten_flash", "aten_flash", "aten_efficient"),
    "cuDNN's backward off": (HALF, on_gpu(cudnn_backward=False), "aten_cudnn", "aten_flash", "aten_efficient"),
    "cuDNN switched off": (HALF, on_gpu(cudnn_enabled=False), "aten_flash", "aten_flash", "aten_efficient"),
    "flash switched off": (HALF, on_gpu(flash_enabled=False), "aten_cudnn", "aten_cudnn", "aten_efficient"),
    "all switched off": (HALF, on_gpu(cudnn_enabled=False, flash_enabled=False, efficient_enabled=False),
                         *["chunked"] * 3),
    "A100": (HALF, on_gpu(80), "aten_flash", "aten_flash", "aten_efficient"),
    "B200": (HALF, on_gpu(100), "aten_cudnn", "aten_cudnn", "aten_efficient"),
    "sm_86, width 200": (with_(HALF, D=200, Dv=200), on_gpu(86), *["aten_efficient"] * 3),
    "sm_120, width 256": (with_(HALF, D=256, Dv=256), on_gpu(120), "aten_flash", "aten_flash", "aten_efficient"),
    "T4, float16": (with_(HALF, dtype="float16"), on_gpu(75), *["aten_efficient"] * 3),
    "T4, bfloat16": (HALF, on_gpu(75), *["chunked"] * 3),
    "built without CUDA": (HALF, on_gpu(0), *["chunked"] * 3),
}  # fmt: skip

FEW = with_(HALF, L=1, S=4096)

# (call, level, forward, backward)
ON_CPUS = {
    "float32": (with_(HALF, dtype="float32"), "AVX2", "cpu_blocked", "cpu_blocked"),
    "float64": (with_(HALF, dtype="float64"), "AVX512", "chunked", "chunked"),
    "without AVX2": (with_(HALF, dtype="float32"), "portable", "chunked", "chunked"),
    "bfloat16": (HALF, "AVX512-BF16", "cpu_blocked", "cpu_blocked"),
    "bfloat16 by AMX": (HALF, "AMX", "aten_cpu", "aten_cpu"),
    "causal by AMX": (with_(HALF, causal=0), "AMX", "aten_cpu", "aten_cpu"),
    "narrow values by AMX": (with_(HALF, Dv=32), "AMX", "cpu_blocked", "cpu_blocked"),
    "float16 by AMX without float16": (with_(HALF, dtype="float16"), "AMX", "cpu_blocked", "cpu_blocked"),
    "float16 by AMX": (with_(HALF, dtype="float16"), "AMX-FP16", "aten_cpu", "aten_cpu"),
    "one row": (FEW, "AVX2", "cpu_decode", "cpu_blocked"),
    "128 rows for a KV head": (with_(FEW, L=16, K=1, dtype="float32"), "AVX512", "cpu_decode", "cpu_blocked"),
    "129 rows for a KV head": (with_(FEW, L=129, dtype="float32"), "AVX2", "cpu_blocked", "cpu_blocked"),
    "512 rows of 4 a head": (with_(FEW, L=4, H=128, K=1), "AVX512-BF16", "cpu_decode", "cpu_blocked"),
    "516 rows of 4 a head": (with_(FEW, L=4, H=129, K=1), "AVX512-BF16", "cpu_blocked", "cpu_blocked"),
    "one row with AMX": (FEW, "AMX", "cpu_decode", "aten_cpu"),
    "16 rows of float16 with AMX": (with_(FEW, L=16, dtype="float16"), "AMX-FP16", "cpu_decode", "aten_cpu"),
    "17 rows of float16 with AMX": (with_(FEW, L=17, dtype="float16"), "AMX-FP16", "aten_cpu", "aten_cpu"),
    "one row with dropout": (with_(FEW, dropout_p=0.1), "AVX512", "cpu_blocked", "cpu_blocked"),
    "width 0": (with_(HALF, D=0), "AVX512", "chunked", "chunked"),
}


@pytest.mark.parametrize("case", ON_GPUS)
def test_what_serves_on_a_gpu(case):
    """E. Localises: a row of the table, or a corner of a causal call, without a GPU."""
    call, machine, forward, backward, with_logsumexp = ON_GPUS[case]
    assert _C.serving(call.request(), machine)[0] == forward
    assert _C.serving(call.request(backward=True), machine)[0] == backward
    assert _C.serving(call.request(backward=True, grad_logsumexp=True), machine)[0] == with_logsumexp


@pytest.mark.parametrize("case", ON_CPUS)
def test_what_serves_on_a_cpu(case):
    """E. Localises: a row of the table for CPUs of another level than this one's."""
    call, level, forward, backward = ON_CPUS[case]
    machine = _C.Machine(cpu=level)
    assert _C.serving(call.request(), machine)[0] == forward
    assert _C.serving(call.request(backward=True), machine)[0] == backward


NO_AVX2 = _C.Machine(cpu="portable")

# (call, machine, kernel, why it does not serve the call)
REASONS = {
    "another device": (HALF, on_gpu(), "cpu_blocked", "is for CPUs with AVX2, this is sm_90"),
    "another level": (HALF, NO_AVX2, "cpu_blocked", "is for CPUs with AVX2, this is a CPU without AVX2"),
    "another GPU": (HALF, on_gpu(80), "aten_cudnn", "is for sm_90 to sm_109, this is sm_80"),
    "no GPU sources": (
        HALF,
        on_gpu(0),
        "aten_flash",
        "is for sm_80 and newer, this is a GPU, and the CUDA sources were left out of the build",
    ),
    "features": (
        with_(HALF, causal=0, softcap=1.0, dropout_p=0.5),
        on_gpu(),
        "aten_cudnn",
        "does not support softcap, dropout (it supports bfloat16, float16, d_v != d_qk, groups of query heads, "
        "one range of keys for all rows, causal, backward)",
    ),
    "a switch": (
        HALF,
        on_gpu(flash_enabled=False),
        "aten_flash",
        "is switched off: torch.backends.cuda.enable_flash_sdp",
    ),
    "a version": (HALF, on_gpu(cudnn=90000), "aten_cudnn", "needs cuDNN 9.15.1 or newer"),
    "a width": (with_(HALF, D=264), on_gpu(), "aten_cudnn", "takes widths up to 256"),
    "a width on B200": (with_(HALF, D=136), on_gpu(100), "aten_cudnn", "takes widths above 128 on sm_90 only"),
    "a window": (
        with_(HALF, causal=9, window=64),
        on_gpu(),
        "aten_flash",
        "takes windows that end at the last key or before",
    ),
    "a faster one": (
        HALF,
        _C.Machine(cpu="AVX512"),
        "aten_cpu",
        "is the fastest in bfloat16 only where the CPU has AMX",
    ),
    "an earlier one": (HALF, on_gpu(), "chunked", "comes after aten_cudnn, which serves it"),
}


@pytest.mark.parametrize("case", REASONS)
def test_every_other_kernel_has_a_reason(case):
    """Localises: a silent next row; the text of a reason."""
    call, machine, kernel, reason = REASONS[case]
    chosen, others = _C.serving(call.request(), machine)
    assert others[kernel] == reason
    assert sorted([chosen, *others]) == sorted(NAMES) and all(others.values())


def test_arguments_of_the_asking():
    """Localises: names of dtypes, masks and levels that nobody knows."""
    for make, text in (
        (lambda: _C.Request(dtype="int8"), "dtype must be one of 'float64', .* got 'int8'"),
        (lambda: _C.Request(mask="causal"), "mask must be one of '', 'bool', 'additive', got 'causal'"),
        (lambda: _C.Machine(cpu="SSE"), "cpu must be one of 'portable', 'AVX2', .* got 'SSE'"),
    ):
        with pytest.raises(ValueError, match=text):
            make()
