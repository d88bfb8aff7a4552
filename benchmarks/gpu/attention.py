"""The attention operator on a GPU: held against float64, then timed against scaled_dot_product_attention.

    python benchmarks/partial_attention.py --device cuda [--case TEXT] [--repeats N] [--out FOLDER]

Each of stock's kernels that takes the call is timed under its own name, pinned, and what torch says it chose is
asserted; for d_v < d_qk also with V padded by zeros. The ratio is that of the fastest of them to ours. TFLOP/s count
what a call needs: half of the scores where it is causal, 2.5 times as much backward as forward.
Letters: B sequences, L queries, S keys, h query heads, k KV heads.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from common import device_ms, graph_ms, past_the_cache, tflops
from gpu.driver import Cases, Options
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from two_level_mha import _C

attend = torch.ops.two_level_mha.partial_attention
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
KIND = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
MASKS: dict[str, Callable[["Call"], Tensor]] = {
    "bool mask (1,1,L,S)": lambda c: torch.rand(1, 1, c.L, c.S) < 0.7,
    "additive mask (1,h,L,S)": lambda c: torch.randn(1, c.h, c.L, c.S),
    "padding (B,1,1,S)": lambda c: torch.arange(c.S) >= torch.arange(c.B)[:, None, None, None],
}


class Call(NamedTuple):
    """Sizes of one call of the operator, and its options."""

    d_qk: int
    d_v: int
    causal: int | None = None
    backward: bool = False
    dtype: torch.dtype = torch.bfloat16
    B: int = 4
    L: int = 4096
    S: int = 4096
    h: int = 16
    k: int = 16
    mask: str = ""
    dropout: float = 0.0
    window: int | None = None
    key_stride: int = 1

    def name(self) -> str:
        options = [f"{KIND[self.dtype]} ({self.d_qk},{self.d_v}) B={self.B} L={self.L} S={self.S} h={self.h}/{self.k}"]
        options += ["full" if self.causal is None else "causal", self.mask]
        options += [f"{field}={getattr(self, field)}" for field in ("dropout", "window") if getattr(self, field)]
        if self.key_stride > 1:
            options.append(f"key_stride={self.key_stride}")
        return " ".join([*filter(None, options), "forward+backward" if self.backward else "forward"])

    def tiny(self) -> "Call":
        """The same call with sizes for a CPU."""
        keys = 32 // self.key_stride
        causal = self.causal if self.causal is None else (31 if self.L == 1 else self.causal)
        sizes = {"B": min(self.B, 2), "L": min(self.L, 32), "S": keys, "h": 4, "k": max(1, 4 * self.k // self.h)}
        return self._replace(**sizes, causal=causal, window=self.window and 8, d_qk=self.d_qk // 8, d_v=self.d_v // 8)

    def flops(self) -> float:
        """Of the scores that a causal call, without a window, needs; a mask hides nothing here."""
        seen = 1.0
        if self.causal is not None and self.L > 1:
            rows = torch.arange(self.L)
            seen = (((rows + self.causal) // self.key_stride + 1).clamp(0, self.S).double().mean() / self.S).item()
        forward = 2 * self.B * self.h * self.L * self.S * (self.d_qk + self.d_v) * seen
        back = 2 * self.B * self.h * self.L * self.S * (3 * self.d_qk + 2 * self.d_v) * seen
        return forward + (back if self.backward else 0)


def calls() -> list[Call]:
    both = (False, True)
    widths = ((64, 64), (128, 128), (256, 256), (512, 512), (512, 256))
    found = [Call(*width, causal, back) for width in widths for causal in (None, 0) for back in both]
    found += [Call(d, d, causal, back, k=2) for d in (128, 256, 512) for causal in (None, 0) for back in both]
    found += [Call(d, d, None, back, torch.float32, B=1) for d in (128, 512) for back in both]
    found += [Call(128, 128, None, back, mask=mask) for mask in MASKS for back in both]
    found += [Call(128, 128, causal, back, dropout=0.1, B=1) for causal in (None, 0) for back in both]
    found += [Call(128, 128, 0, back, window=1024) for back in both]
    # a rank's part of a prefill by the layout "position": every m-th key is here
    found += [Call(128, 128, 0, False, B=1, L=8192, S=8192 // m, h=8, k=1, key_stride=m) for m in (2, 4)]
    decode = {"L": 1, "h": 8, "B": 8}
    found += [Call(128, 128, keys - 1, S=keys, k=k, **decode) for keys in (4096, 32768) for k in (1, 8)]
    found += [Call(128, 128, None, S=keys, k=1, mask="padding (B,1,1,S)", **decode) for keys in (4096, 32768)]
    return found


def ours(call: Call, mask: Tensor | None, seed: Tensor, q: Tensor, k: Tensor, v: Tensor, kernel: str = "") -> Tensor:
    options = {"attn_mask": mask, "causal": call.causal, "window": call.window, "key_stride": call.key_stride}
    options |= {"dropout_p": call.dropout, "seed": seed} if call.dropout else {}
    return attend(q, k, v, **options, **({"kernel_name": kernel} if kernel else {}))[0]


def stock(call: Call, mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    causal = call.causal is not None and call.L > 1
    v = F.pad(v, (0, call.d_qk - call.d_v))
    options = {"attn_mask": mask, "is_causal": causal, "enable_gqa": call.h != call.k, "dropout_p": call.dropout}
    return F.scaled_dot_product_attention(q, k, v, **options)[..., : call.d_v]


def pinned(backend: SDPBackend, function: Callable[..., object], *inputs: Tensor) -> object:
    with sdpa_kernel([backend]):
        return function(*inputs)


def stocks(call: Call, run: Callable[..., object], inputs: tuple) -> tuple[dict[str, Callable], dict[str, str]]:
    """Stock's kernels that take the call, each pinned, and why others do not. None has a window or keys apart."""
    if call.window or call.key_stride > 1:
        return {}, {}
    found, refused = {}, {}
    for name, backend in BACKENDS.items():
        if name == "math" and found:
            continue  # what is left where nothing else serves the call
        try:
            pinned(backend, run, *inputs)
        except RuntimeError as error:
            refused[name] = str(error).splitlines()[0]
        else:
            found[name] = partial(pinned, backend, run)
    return found, refused


def assert_chosen(call: Call, mask: Tensor | None, backend: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """torch's own choice under the pin is the pin."""
    wide = F.pad(v, (0, call.d_qk - call.d_v))
    with sdpa_kernel([BACKENDS[backend]]):
        chosen = torch._fused_sdp_choice(
            q, k, wide, mask, call.dropout, call.causal is not None and call.L > 1, enable_gqa=call.h != call.k
        )
    assert chosen == BACKENDS[backend].value, f"{backend} is pinned, and torch chose {chosen}"


def relative(x: Tensor, y: Tensor) -> float:
    return ((x.double() - y.double()).norm() / y.double().norm()).item()


def served_by(call: Call, device: str, backward: bool) -> str:
    """The kernel of ours that serves the call, or its backward."""
    machine = _C.Machine()
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        machine = _C.Machine(cuda=True, arch=10 * major + minor, cudnn=torch.backends.cudnn.version() or 0)
    mask = "" if not call.mask else "additive" if call.mask.startswith("additive") else "bool"
    request = _C.Request(
        dtype=str(call.dtype).removeprefix("torch."), mask=mask, mask_rows=bool(mask) and "L" in call.mask,
        causal=call.causal, window=call.window, key_stride=call.key_stride, dropout=call.dropout > 0,
        backward=backward,
    )  # fmt: skip
    request.B, request.H, request.K, request.L, request.S = call.B, call.h, call.k, call.L, call.S
    request.d_qk, request.d_v = call.d_qk, call.d_v
    return _C.serving(request, machine)[0]


def run(call: Call, options: Options) -> dict:
    """Holds ours against float64 by the plainest kernel, stock's against ours, then times all of them."""
    if options.tiny:
        call = call.tiny()
    device = options.device
    mask = MASKS[call.mask](call).to(device) if call.mask else None
    if mask is not None and mask.is_floating_point():
        mask = mask.to(call.dtype)
    seed = torch.tensor([3], device=device)
    grads = torch.randn(call.B, call.h, call.L, call.d_v, device=device).to(call.dtype)

    def draw() -> tuple:
        shapes = (call.h, call.L, call.d_qk), (call.k, call.S, call.d_qk), (call.k, call.S, call.d_v)
        drawn = [torch.randn(call.B, *shape, device=device).to(call.dtype) for shape in shapes]
        return tuple(x.requires_grad_(call.backward) for x in drawn)

    def both(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        out = function(*inputs)
        back = torch.autograd.grad(out, inputs, grads.to(out.dtype)) if call.backward else ()
        return (out.detach(), *back)

    mine = partial(both, partial(ours, call, mask, seed))
    theirs = partial(both, partial(stock, call, mask))
    inputs = past_the_cache(draw, device)
    found = mine(*inputs[0])
    errors = [relative(a, b) for a, b in zip(found, reference(call, mask, seed, grads, inputs[0]), strict=True)]
    assert max(errors) < TOLERANCE[call.dtype] and not any(map(math.isnan, errors)), f"relative errors {errors}"
    others, refused = stocks(call, theirs, inputs[0])
    for name, other in others.items():
        if name != "math":
            assert_chosen(call, mask, name, *inputs[0])
        if not call.dropout:
            apart = max(relative(a, b) for a, b in zip(other(*inputs[0]), found, strict=True))
            assert apart < 2 * TOLERANCE[call.dtype], f"{name} differs by {apart:.1e}"
    timed = {"ours": mine, **others}
    ms = device_ms(timed, inputs, options.repeats)
    kernels = [served_by(call, device, backward) for backward in ((False, True) if call.backward else (False,))]
    row = {"kernels": kernels, "errors": [float(f"{e:.1e}") for e in errors]}
    row |= {f"{name}_ms": round(one, 4) for name, one in ms.items()}
    if call.L == 1 and device == "cuda":  # eager, it is timed by its launches
        row |= {f"{name}_graph_ms": round(graph_ms(f, inputs, options.repeats), 4) for name, f in timed.items()}
    if call.window is None:
        row["tflops"] = round(tflops(call.flops(), ms["ours"], call.dtype, device), 1)
    fastest = min((one for name, one in ms.items() if name != "ours"), default=None)
    row["ratio"] = round(fastest / ms["ours"], 3) if fastest else None
    return row | ({"refused": refused} if refused else {})


def reference(call: Call, mask: Tensor | None, seed: Tensor, grads: Tensor, inputs: tuple) -> list[Tensor]:
    """Out and gradients in float64, a sequence at a time."""
    parts = []
    for b in range(call.B):
        wide = [x[b : b + 1].detach().double().requires_grad_(call.backward) for x in inputs]
        own = mask[b : b + 1] if mask is not None and mask.size(0) > 1 else mask
        own = own.double() if own is not None and own.is_floating_point() else own
        out = ours(call, own, seed, *wide, kernel="chunked")
        back = torch.autograd.grad(out, wide, grads[b : b + 1].double()) if call.backward else ()
        parts.append((out.detach(), *back))
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def cases(options: Options) -> Cases:
    return {call.name(): lambda call=call: run(call, options) for call in calls()}
