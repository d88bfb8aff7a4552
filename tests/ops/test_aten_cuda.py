"""csrc/attend/aten/cuda.cpp on the CPU: ATen's CUDA kernels are answered by harness/stand_ins.py.

A failure here is in how a call is cut, padded, aligned or folded for one of those kernels, or in how its answer is
read. What the kernels themselves do is not run: emulated only.
"""

import itertools
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from harness.stand_ins import KERNELS
from torch.utils.cpp_extension import include_paths

import two_level_mha
from two_level_mha import _C

SOURCE = Path(__file__).resolve().parents[1] / "cpp" / "cuda_kernels.cpp"
GPU = _C.Machine(cuda=True, arch=90, cudnn=91501)
SERVED = {"aten_cudnn": 9, "aten_flash": 39, "aten_efficient": 208}  # of the calls below
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
attend = torch.ops.two_level_mha.partial_attention

pytestmark = [
    pytest.mark.cpu_only("its stand-ins are of the CPU"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """The functions of cuda.cpp as operators, over stand-ins that are gone afterwards."""
    library = tmp_path_factory.mktemp("cuda_kernels") / "cuda_kernels.so"
    package = Path(two_level_mha.__file__).parent
    headers = [f"-I{path}" for path in (*include_paths(), package / "include")]
    command = ["c++", "-std=c++20", "-O0", "-fPIC", "-shared", *headers, str(SOURCE), "-o", str(library)]
    subprocess.run([*command, str(package / "_ops.abi3.so")], check=True, timeout=300)
    torch.ops.load_library(library)
    stand_ins = torch.library.Library("aten", "IMPL", "CPU")
    for name, function in KERNELS.items():
        stand_ins.impl(name, function)
    yield torch.ops.two_level_mha_cuda_kernels
    stand_ins._destroy()


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
]
# dtype, H, K, d_qk, d_v
SHAPES = [
    (torch.bfloat16, 4, 4, 64, 64),
    (torch.float16, 4, 2, 24, 40),
    (torch.bfloat16, 6, 1, 100, 36),
    (torch.float32, 4, 2, 20, 7),
]
MASKS = ["", "bool", "additive", "bool row"]


def inputs(shape, L: int, S: int, layout: str) -> list[torch.Tensor]:
    """layout: contiguous, transposed (B, L, H, D), cut from wider ones, or of one sequence for all."""
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
    mask = torch.rand(2, 1, 1 if kind == "bool row" else L, S) > 0.4
    if kind == "bool":
        mask[0, 0, L // 2] = False  # a row without a key
    return torch.randn(2, 1, L, S).to(dtype) if kind == "additive" else mask


def serves(name: str, shape, visible, kind: str, **grads: bool) -> bool:
    dtype, H, K, d_qk, d_v = shape
    L, S, causal, window, key_stride = visible
    request = _C.Request(
        dtype=str(dtype).removeprefix("torch."), mask=kind.removesuffix(" row"), mask_rows=kind in ("bool", "additive"),
        causal=causal, window=window, key_stride=key_stride, **grads,
    )  # fmt: skip
    request.B, request.H, request.K, request.L, request.S, request.d_qk, request.d_v = 2, H, K, L, S, d_qk, d_v
    return name not in _C.refusals(request, GPU)


def close(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, what: object) -> None:
    assert got.shape == expected.shape, what
    assert torch.equal(got.isneginf(), expected.isneginf()), what
    finite = expected.isfinite()
    error = (got.double() - expected)[finite].norm() / expected[finite].norm().clamp(min=1e-3)
    assert got[finite].isfinite().all() and error <= TOLERANCE[dtype], (what, error.item())


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "cut", "expanded"])
@pytest.mark.parametrize("name", SERVED)
def test_a_kernel_gives_what_the_contract_says(kernels, name, layout):
    """Localises: corner, padding, alignment, groups or empty rows on the way to a kernel, or how its answer is read."""
    served = 0
    for shape, visible, kind in itertools.product(SHAPES, VISIBLE, MASKS):
        if not serves(name, shape, visible, kind):
            continue
        (dtype, *_), (L, S, causal, window, key_stride) = shape, visible
        q, k, v = inputs(shape, L, S, layout)
        mask, scale = mask_of(kind, dtype, L, S), 1 / math.sqrt(q.size(3))
        leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
        bias = mask.double() if kind == "additive" else mask
        expected, expected_logsumexp = attend(
            *leaves, bias, scale=scale, causal=causal, window=window, key_stride=key_stride, kernel_name="chunked"
        )
        how = (mask, scale, causal, window, key_stride)
        out, logsumexp = kernels.forward(name, q, k, v, *how)
        what = (name, shape, visible, kind)
        close(out, expected.detach(), dtype, (*what, "out"))
        close(logsumexp, expected_logsumexp.detach(), dtype, (*what, "logsumexp"))
        served += 1
        for more in (False, True):
            if name == "aten_cudnn" or not serves(name, shape, visible, kind, backward=True, grad_logsumexp=more):
                continue
            grad_out = torch.randn_like(expected).to(dtype)
            grad_logsumexp = torch.randn_like(expected_logsumexp).float() if more else None
            given = [grad_out.double(), grad_logsumexp.double() if more else torch.zeros_like(expected_logsumexp)]
            grads = torch.autograd.grad([expected, expected_logsumexp], leaves, given, retain_graph=True)
            found = kernels.backward(name, grad_out, grad_logsumexp, q, k, v, out, logsumexp, *how)
            for label, got, wanted in zip(("dq", "dk", "dv"), found, grads, strict=True):
                close(got, wanted, dtype, (*what, label, more))
    assert served == SERVED[name]
