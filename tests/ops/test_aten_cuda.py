"""csrc/attend/aten/cuda.cpp, and chunked.cpp as on CUDA, on the CPU: harness/stand_ins.py answers for CUDA's operators.

A failure here is in how a call is cut, padded, aligned or folded for one of those, or in how its answer is read. What
they do themselves is not run: emulated only.
"""

import dataclasses
import functools
import itertools
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harness.stand_ins import KERNELS
from torch.utils.cpp_extension import include_paths

import two_level_mha
from two_level_mha import _C

SOURCE = Path(__file__).resolve().parents[1] / "cpp" / "cuda_kernels.cpp"
GPU = _C.Machine(cuda=True, arch=90, cudnn=91501)
SERVED = {"aten_cudnn": 16, "aten_flash": 88, "aten_efficient": 660}  # of the calls below
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
attend = torch.ops.two_level_mha.partial_attention

pytestmark = [
    pytest.mark.cpu_only("its stand-ins are of the CPU"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
]


@dataclasses.dataclass
class Kernels:
    """The functions of cuda.cpp, and what they called: names of ATen's operators and the shapes they were given."""

    forward: Callable
    backward: Callable
    calls: list[tuple[str, list[torch.Size]]]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """cuda.cpp over stand-ins that are gone afterwards."""
    path = tmp_path_factory.mktemp("cuda_kernels") / "cuda_kernels.so"
    package = Path(two_level_mha.__file__).parent
    headers = [f"-I{path}" for path in (*include_paths(), package / "include")]
    command = ["c++", "-std=c++20", "-O0", "-fPIC", "-shared", *headers, str(SOURCE), "-o", str(path)]
    subprocess.run([*command, str(package / "_ops.abi3.so")], check=True, timeout=300)
    torch.ops.load_library(path)
    calls = []

    def recorded(name: str, function: Callable) -> Callable:
        def call(*given, **options):
            calls.append((name, [x.shape for x in given if isinstance(x, torch.Tensor)]))
            return function(*given, **options)

        return call

    stand_ins = torch.library.Library("aten", "IMPL", "CPU")
    for name, function in KERNELS.items():
        stand_ins.impl(name, recorded(name, function))
    ops = torch.ops.two_level_mha_cuda_kernels
    yield Kernels(ops.forward, ops.backward, calls)
    stand_ins._destroy()


@pytest.fixture
def kernels(library):
    library.calls.clear()
    return library


# L, S, causal, window, key_stride
VISIBLE = [
    (37, 53, None, None, 1),
    (37, 37, 0, None, 1),
    (20, 53, 33, None, 1),  # the corner at the end
    (20, 53, 7, None, 1),  # keys that no row sees
    (53, 20, 5, None, 1),  # cut: the last rows see all
    (1, 53, 52, None, 1),
    (1, 53, 40, 9, 1),  # one row: a window is a range
    (64, 96, 0, None, 1),
    (5, 33, 40, None, 3),
    (50, 30, 40, None, 3),  # a cache by position: every third key is here
    (64, 16, 0, None, 4),
    (7, 11, 70, None, 8),
    (3, 40, 37, None, 2),
    (37, 37, -5, None, 1),  # rows before the first key
    (40, 13, -2, None, 3),  # a cache by position on another rank than the first
    (37, 37, 0, 9, 1),
    (20, 53, 33, 12, 1),
    (20, 53, 7, 3, 1),  # keys before the first window and after the last
    (30, 37, -4, 6, 1),
    (37, 37, 0, 40, 1),  # hides nothing
    (50, 30, 40, 20, 3),
    (40, 13, -2, 2, 3),  # some rows see no key
]
# dtype, H, K, d_qk, d_v
SHAPES = [
    (torch.bfloat16, 4, 4, 64, 64),
    (torch.float16, 4, 2, 24, 40),
    (torch.bfloat16, 6, 1, 100, 36),
    (torch.float32, 4, 2, 20, 7),
    (torch.float16, 2, 1, 200, 136),
    (torch.bfloat16, 2, 1, 264, 40),
]
LAYOUTS = ["contiguous", "transposed", "cut", "expanded"]
# What a call's mask is: bool or additive, and whether it differs from row to row.
MASKS = {
    "": ("", False),
    "bool": ("bool", True),
    "additive": ("additive", True),
    "padding": ("bool", False),
    "bias of keys": ("additive", False),
}


def inputs(shape, L: int, S: int, layout: str) -> list[torch.Tensor]:
    """layout: of LAYOUTS: contiguous, memory (B, L, H, D), cut from wider ones, or of one sequence for all."""
    dtype, H, K, d_qk, d_v = shape
    found = []
    for heads, length, width in ((H, L, d_qk), (K, S, d_qk), (K, S, d_v)):
        x = torch.randn(2, heads, length, width, dtype=torch.float64).to(dtype)
        if layout == "transposed":
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        elif layout == "cut":
            x = torch.cat([x, x], -1)[..., 1 : width + 1]
        elif layout == "expanded":
            x = x[:1].expand(2, -1, -1, -1)
        found.append(x)
    return found


def mask_of(kind: str, dtype: torch.dtype, L: int, S: int) -> torch.Tensor | None:
    if not kind:
        return None
    form, by_row = MASKS[kind]
    keep = torch.rand(2, 1, L if by_row else 1, S) > 0.4
    keep[0, 0, keep.size(2) // 2] = False  # a row without a key; without rows, a sequence without one
    if form == "bool":
        return keep
    return torch.randn(keep.shape).to(dtype).masked_fill(keep.logical_not(), -math.inf)


def request_of(shape, visible, kind: str, **grads: bool):
    dtype, H, K, d_qk, d_v = shape
    L, S, causal, window, key_stride = visible
    form, by_row = MASKS[kind]
    request = _C.Request(
        dtype=str(dtype).removeprefix("torch."), mask=form, mask_rows=by_row and L > 1, causal=causal, window=window,
        key_stride=key_stride, **grads,
    )  # fmt: skip
    request.B, request.H, request.K, request.L, request.S, request.d_qk, request.d_v = 2, H, K, L, S, d_qk, d_v
    return request


def serves(name: str, *call, **grads: bool) -> bool:
    return name not in _C.refusals(request_of(*call, **grads), GPU)


def close(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, what: object) -> None:
    assert got.shape == expected.shape, what
    assert torch.equal(got.isneginf(), expected.isneginf()), what
    finite = expected.isfinite()
    error = (got.double() - expected)[finite].norm() / expected[finite].norm().clamp(min=1e-3)
    assert got[finite].isfinite().all() and error <= TOLERANCE[dtype], (what, error.item())


@pytest.mark.parametrize("name", SERVED)
def test_a_kernel_gives_what_the_contract_says(kernels, name):
    """Localises: corner, padding, alignment, groups or empty rows on the way to a kernel, or how its answer is read."""
    served, layouts = 0, itertools.cycle(LAYOUTS)
    for shape, visible, kind in itertools.product(SHAPES, VISIBLE, MASKS):
        if not serves(name, shape, visible, kind):
            continue
        (dtype, *_), (L, S, causal, window, key_stride) = shape, visible
        layout = next(layouts)
        q, k, v = inputs(shape, L, S, layout)
        mask, scale = mask_of(kind, dtype, L, S), 1 / math.sqrt(q.size(3))
        leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
        bias = mask.double() if mask is not None and mask.is_floating_point() else mask
        expected, expected_logsumexp = attend(
            *leaves, bias, scale=scale, causal=causal, window=window, key_stride=key_stride, kernel_name="chunked"
        )
        how = (mask, scale, causal, window, key_stride)
        out, logsumexp = kernels.forward(name, q, k, v, *how)
        what = (name, shape, visible, kind, layout)
        close(out, expected.detach(), dtype, (*what, "out"))
        close(logsumexp, expected_logsumexp.detach(), dtype, (*what, "logsumexp"))
        served += 1
        for more in (False, True):
            if not serves(name, shape, visible, kind, backward=True, grad_logsumexp=more):
                continue
            grad_out = torch.randn_like(expected).to(dtype)
            grad_logsumexp = torch.randn_like(expected_logsumexp).float() if more else None
            given = [grad_out.double(), grad_logsumexp.double() if more else torch.zeros_like(expected_logsumexp)]
            grads = torch.autograd.grad([expected, expected_logsumexp], leaves, given, retain_graph=True)
            found = kernels.backward(name, grad_out, grad_logsumexp, q, k, v, out, logsumexp, *how)
            for label, got, wanted in zip(("dq", "dk", "dv"), found, grads, strict=True):
                close(got, wanted, dtype, (*what, label, more))
    assert served == SERVED[name]


@pytest.mark.parametrize("kind", ["", "padding", "bias of keys"])
def test_groups_share_their_keys(kernels, kind):
    """Localises: keys and values copied to every head of a group where one mask, or none, holds for all its rows."""
    shape, visible = (torch.bfloat16, 6, 2, 64, 64), (1, 53, None, None, 1)
    q, k, v = inputs(shape, 1, 53, "contiguous")
    how = (mask_of(kind, q.dtype, 1, 53), 0.125, *visible[2:])
    out, logsumexp = kernels.forward("aten_efficient", q, k, v, *how)
    kernels.backward("aten_efficient", out, None, q, k, v, out, logsumexp, *how)
    forward, backward = (shapes for _, shapes in kernels.calls)
    assert forward[1] == forward[2] == backward[2] == backward[3] == (2, 53, 2, 64)


CHUNKED = {
    "dropout": {"dropout_p": 0.3},
    "softcap": {"softcap": 1.5},
    "softcap, window": {"softcap": 1.5, "causal": 16, "window": 9},
    "dropout, causal": {"dropout_p": 0.3, "causal": 16},
    "dropout, mask": {"dropout_p": 0.3, "kind": "additive"},
    "softcap, no keys for some": {"softcap": 1.5, "causal": -3, "kind": "padding"},
}


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CHUNKED)
def test_chunked_multiplies_halves(kernels, case, dtype, heads):
    """Localises: a product of chunked on CUDA, by values and gradients; keys that are widened or copied to heads."""
    given = dict(CHUNKED[case])
    (H, K), L, S, kind = heads, 37, 53, given.pop("kind", "")
    q, k, v = inputs((dtype, H, K, 24, 40), L, S, "transposed")
    mask, seed = mask_of(kind, dtype, L, S), torch.tensor([11])
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    bias = mask.double() if mask is not None and mask.is_floating_point() else mask
    dropped = {"seed": seed} if "dropout_p" in given else {}
    expected = attend(*leaves, bias, scale=0.2, **given, **dropped, kernel_name="chunked")
    how = (mask, 0.2, given.get("causal"), given.get("window"), 1, given.get("softcap", 0.0),
           given.get("dropout_p", 0.0), seed)  # fmt: skip
    out, logsumexp = kernels.forward("chunked", q, k, v, *how)
    close(out, expected[0].detach(), dtype, "out")
    close(logsumexp, expected[1].detach(), dtype, "logsumexp")
    given = [torch.randn_like(expected[0]).to(dtype), torch.randn_like(expected[1]).float()]
    grads = torch.autograd.grad(expected, leaves, [x.double() for x in given])
    found = kernels.backward("chunked", *given, q, k, v, out, logsumexp, *how)
    for label, got, wanted in zip(("dq", "dk", "dv"), found, grads, strict=True):
        close(got, wanted, dtype, label)
        assert got.dtype is dtype
    assert {name for name, _ in kernels.calls} == {"bmm.dtype"} and len(kernels.calls) == 7
    assert all(shapes[1][0] == 2 * K for _, shapes in kernels.calls)


@pytest.fixture
def older_kernels(kernels):
    """The memory-efficient backward as before torch 2.15."""
    older, name = torch.library.Library("aten", "IMPL", "CPU"), "_efficient_attention_backward"
    older.impl(name, functools.partial(KERNELS[name], offset_windows=False), allow_override=True)
    yield kernels
    older._destroy()


@pytest.mark.parametrize("kind", ["", "bool", "padding"])
def test_windows_in_the_backward_of_older_torch(older_kernels, kind):
    """Localises: a window whose gradients torch before 2.15 gets wrong, and which the rules let through."""
    kernels, shape = older_kernels, (torch.float32, 4, 2, 20, 7)
    machine = _C.Machine(cuda=True, arch=90, cudnn=91501, offset_windows=False)
    right = {False: 0, True: 0}
    for visible in (x for x in VISIBLE if x[3]):
        L, S, *_ = visible
        served = "aten_efficient" not in _C.refusals(request_of(shape, visible, kind, backward=True), machine)
        q, k, v = inputs(shape, L, S, "contiguous")
        how = (mask_of(kind, q.dtype, L, S), 0.2, *visible[2:])
        out, logsumexp = kernels.forward("aten_efficient", q, k, v, *how)
        given = dict(zip(("scale", "causal", "window", "key_stride"), how[1:], strict=True))
        wanted = torch.ops.two_level_mha.partial_attention_backward(
            out, None, q, k, v, out, logsumexp, False, how[0], **given, kernel_name="chunked"
        )
        found = kernels.backward("aten_efficient", out, None, q, k, v, out, logsumexp, *how)
        same = all(torch.allclose(x, y, atol=1e-4) for x, y in zip(found, wanted[:3], strict=True))
        assert same or not served, visible
        right[served] += same
    assert right[True] >= 4 and right[False] == 0, "the rules refuse just what is wrong"


def test_which_calls_one_kernel_of_norms_and_rotary_embedding_takes(library):
    """Localises: a call whose gradient, tangent, sign or layout a kernel of plain pointers would lose."""
    takes = torch.ops.two_level_mha_cuda_kernels.one_kernel

    def angles(length: int, r: int = 4, dtype=torch.float32, batch: int = 1) -> list[torch.Tensor]:
        return [torch.randn(batch, 1, length, r, dtype=torch.float64).to(dtype) for _ in range(2)]

    def call(q, weights=(), dtype=torch.float32, r: int = 4, batch: int = 1) -> bool:
        k = torch.randn(2, 1, 7, 8).to(q.dtype)
        turned = [angles(length, r, dtype, batch) if r else [] for length in (5, 7)]
        return takes(q, k, list(weights), *turned)

    q, weights = torch.randn(2, 3, 5, 8), [torch.randn(8), torch.randn(8)]
    assert call(q) and call(q, weights, r=0) and call(q, weights, batch=2)
    assert call(q.transpose(1, 2).contiguous().transpose(1, 2))
    assert call(q.bfloat16()) and call(q.half(), dtype=torch.float16) and call(q.double(), dtype=torch.float64)
    assert not call(q, r=0), "nothing to do"
    assert not call(q.double()) and not call(q, dtype=torch.float16), "an angle of a dtype that it has no form for"
    assert not call(q, batch=3) and not call(q, r=10) and not call(q.mT.contiguous().mT), "shapes and strides"
    assert not call(q.clone().requires_grad_()) and not call(q, [weights[0], weights[1].clone().requires_grad_()])
    with torch.no_grad():
        assert call(q.clone().requires_grad_())
    assert not call(torch.randn(2, 3, 5, 8, dtype=torch.complex64).conj().imag), "a sign that is not in memory"
    with torch.autograd.forward_ad.dual_level():
        assert not call(torch.autograd.forward_ad.make_dual(q, q)), "a tangent"
