"""ATen's CUDA kernels of attention, called raw, against what stand_ins.py claims that they ask for and answer.

    PYTHONPATH=tests python -m harness.contracts [--device cuda|stand-ins] [--out FOLDER]

Each call goes to the kernel and to its stand-in, on the same numbers. Claimed, and an error where it is otherwise: that
the kernel takes the call, and shape, dtype and values of what it answers, wherever the stand-in's is not NaN. What no
stand-in takes is asked all the same, and held against float64: those answers are news, no errors. Strides, and what
stands where the stand-in gives no meaning, are written down with both. With "stand-ins" they answer for the kernels:
that tries this program, no kernel.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from harness import stand_ins
from harness.stand_ins import KERNELS

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
KIND = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
LOWEST = torch.finfo(torch.bfloat16).min


class Call(NamedTuple):
    """One call: kernel is flash, flash_window, cudnn or efficient; layout is of q, k and v."""

    kernel: str
    L: int
    S: int
    d: int
    causal: bool = False
    dtype: torch.dtype = torch.bfloat16
    H: int = 4
    K: int = 4
    d_v: int = 0  # 0: d
    bias: str = ""  # "random", "empty rows", "lowest rows"
    layout: str = "contiguous"  # "transposed", "expanded"
    window: int = 0
    backward: bool = True

    def name(self) -> str:
        parts = [self.kernel, KIND[self.dtype], f"L={self.L} S={self.S} h={self.H}/{self.K}"]
        parts.append(f"d={self.d}" + (f",{self.d_v}" if self.d_v else ""))
        parts += ["causal" if self.causal else "full", self.bias, self.layout.replace("contiguous", "")]
        return " ".join([*filter(None, parts), *([f"window={self.window}"] if self.window else [])])

    def hidden(self) -> Tensor | None:
        """Keys that a row does not see, (L, S)."""
        corner = "top left" if self.kernel == "cudnn" else "bottom right"
        hidden = stand_ins.hidden_from(corner, self.L, self.S) if self.causal or self.window else None
        if self.window:
            hidden = hidden | (torch.arange(self.S) <= torch.arange(self.L)[:, None] + self.S - self.L - self.window)
        return hidden


def calls() -> list[Call]:
    half = (torch.bfloat16, torch.float16)
    flash = [Call("flash", L, S, d, causal, dtype) for d in (64, 128, 256) for dtype in half
             for L, S, causal in ((128, 128, True), (96, 192, False), (65, 193, True), (33, 33, True))]  # fmt: skip
    flash += [Call("flash", 1, 193, 128, causal) for causal in (False, True)]
    flash += [Call("flash", 64, 96, 128, True, H=8, K=1), Call("flash", 64, 96, 64, layout="transposed", H=8, K=2)]
    flash += [Call("flash", 40, 65, 128, layout="expanded")]
    window = [Call("flash_window", L, S, 128, True, window=9) for L, S in ((64, 64), (40, 97))]
    cudnn = [Call("cudnn", 128, 128, d, causal, dtype) for d in (64, 128, 256) for causal in (False, True)
             for dtype in half]  # fmt: skip
    cudnn += [Call("cudnn", 33, 33, 128, True), Call("cudnn", 192, 192, 128, True), Call("cudnn", 40, 65, 128)]
    cudnn += [Call("cudnn", 65, 65, 256, True), Call("cudnn", 64, 96, 128, H=8, K=2)]
    cudnn += [Call("cudnn", 64, 96, 64, layout="transposed"), Call("cudnn", 64, 65, 128, layout="expanded")]
    efficient = [Call("efficient", 37, 53, d, causal, dtype) for d in (64, 512) for causal in (False, True)
                 for dtype in (torch.bfloat16, torch.float32)]  # fmt: skip
    efficient += [Call("efficient", 64, 64, 512, d_v=256), Call("efficient", 40, 65, 512, layout="expanded")]
    efficient += [Call("efficient", 40, 65, 512), Call("efficient", 64, 64, 128, layout="transposed")]
    efficient += [Call("efficient", 37, 53, 64, causal, dtype, bias=bias, backward=bias == "random")
                  for causal in (False, True) for dtype in (torch.bfloat16, torch.float32)
                  for bias in ("random", "empty rows", "lowest rows")]  # fmt: skip
    efficient += [Call("efficient", L, S, 64, True, torch.float32, window=9) for L, S in ((64, 64), (40, 97))]
    return flash + window + cudnn + efficient


def inputs_of(call: Call) -> tuple[list[Tensor], Tensor | None]:
    """q, k, v, the gradient of out, all (B, heads, length, d), and the bias (B, H, L, S), on the CPU."""
    generator = torch.Generator().manual_seed(3)
    d_v, found = call.d_v or call.d, []
    for heads, length, d in ((call.H, call.L, call.d), (call.K, call.S, call.d), (call.K, call.S, d_v),
                             (call.H, call.L, d_v)):  # fmt: skip
        x = torch.randn(2, heads, length, d, generator=generator).to(call.dtype)
        if call.layout == "transposed":
            x = stand_ins.in_memory_of(x, call.dtype)
        if call.layout == "expanded" and length == call.S and len(found) in (1, 2):
            x = x[:, :, :1].expand(-1, -1, length, -1)
        found.append(x)
    if not call.bias:
        return found, None
    columns = -(-call.S // 16) * 16
    bias = torch.randn(2, call.H, call.L, columns, generator=generator).to(call.dtype)[..., : call.S]
    if call.bias != "random":
        bias[:, :, ::5] = -math.inf if call.bias == "empty rows" else LOWEST
    return found, bias


Kernels = Callable[[str], Callable]


def forward(call: Call, kernels: Kernels, q, k, v, bias) -> tuple[Tensor, Tensor]:
    """out and logsumexp as the kernel answers them."""
    scale = call.d**-0.5
    if call.kernel == "flash":
        answer = kernels("_scaled_dot_product_flash_attention")(q, k, v, 0.0, call.causal, False, scale=scale)
    elif call.kernel == "flash_window":
        rows = [x.transpose(1, 2) for x in (q, k, v)]
        answer = kernels("_flash_attention_forward")(
            *rows, None, None, call.L, call.S, 0.0, False, False, scale=scale,
            window_size_left=call.window - 1, window_size_right=0,
        )  # fmt: skip
        answer = (answer[0].transpose(1, 2), answer[1])
    elif call.kernel == "cudnn":
        answer = kernels("_scaled_dot_product_cudnn_attention")(
            q, k, v, None, True, 0.0, call.causal, False, scale=scale
        )
    else:
        rows = [x.transpose(1, 2) for x in (q, k, v)]
        window = {"window_size": call.window} if call.window else {}
        answer = kernels("_efficient_attention_forward")(
            *rows, bias, None, None, None, None, 0.0, 2 * call.causal, True, scale=scale, **window
        )
        answer = (answer[0].transpose(1, 2), answer[1])
    return answer[0], answer[1]


def backward(call: Call, kernels: Kernels, grad_out, q, k, v, bias, out, logsumexp) -> tuple[Tensor, ...]:
    """dq, dk, dv, from what forward answered; cuDNN's also by its own backward."""
    scale, none = call.d**-0.5, q.new_empty(0)
    random = torch.zeros(2, dtype=torch.int64, device=q.device)
    if call.kernel == "flash":
        return kernels("_scaled_dot_product_flash_attention_backward")(
            grad_out, q, k, v, out, logsumexp, none, none, call.L, call.S, 0.0, call.causal, random, random, scale=scale
        )
    if call.kernel == "flash_window":
        rows = [x.transpose(1, 2) for x in (grad_out, q, k, v, out)]
        found = kernels("_flash_attention_backward")(
            *rows, logsumexp, None, None, call.L, call.S, 0.0, False, random, none, scale=scale,
            window_size_left=call.window - 1, window_size_right=0,
        )  # fmt: skip
        return tuple(x.transpose(1, 2) for x in found)
    if call.kernel == "cudnn":
        return kernels("_scaled_dot_product_cudnn_attention_backward")(
            grad_out, q, k, v, out, logsumexp, random[0], random[1], None, None, None, call.L, call.S, 0.0,
            call.causal, scale=scale,
        )  # fmt: skip
    rows = [x.transpose(1, 2) for x in (grad_out, q, k, v, out)]
    padded = torch.full_like(logsumexp, math.inf)
    padded[..., : call.L] = logsumexp[..., : call.L]
    window = {"window_size": call.window} if call.window else {}
    found = kernels("_efficient_attention_backward")(
        rows[0].contiguous(), *rows[1:4], bias, rows[4].contiguous(), None, None, call.L, call.S, padded, 0.0,
        random[0], random[0], 2 * call.causal, False, scale=scale, **window,
    )  # fmt: skip
    return tuple(x.transpose(1, 2) for x in found[:3])


def apart(got: Tensor, expected: Tensor) -> float:
    """Relative error where `expected` has a meaning: a NaN, or another infinity there, is one without end."""
    means = ~expected.isnan()
    got, expected = got.double()[means], expected.double()[means]
    same = got == expected  # infinities too
    difference = torch.where(same, 0.0, got - expected).norm() / expected[expected.isfinite()].norm().clamp(min=1e-3)
    return difference.item() if not difference.isnan() else math.inf


def facts_of(x: Tensor, expected: Tensor | None) -> dict:
    """Shape, strides, dtype and alignment of an answer, and what stands where a stand-in says nothing."""
    found = {"shape": list(x.shape), "stride": list(x.stride()), "dtype": str(x.dtype).removeprefix("torch.")}
    found["aligned"] = x.data_ptr() % 16 == 0
    if expected is not None and expected.shape == x.shape and expected.isnan().any():
        found["without a meaning"] = sorted({str(value) for value in x[expected.isnan()].flatten()[:64].tolist()})[:4]
    return found


def answers(call: Call, kernels: Kernels, inputs: list[Tensor], bias: Tensor | None) -> dict:
    """What a kernel answers by name; "refused": why its backward does not."""
    q, k, v, grad_out = inputs
    out, logsumexp = forward(call, kernels, q, k, v, bias)
    found = {"out": out, "logsumexp": logsumexp}
    if call.backward:
        try:
            grads = backward(call, kernels, grad_out, q, k, v, bias, out, logsumexp)
        except RuntimeError as error:
            return found | {"refused": str(error).splitlines()[0] if str(error) else ""}
        found |= dict(zip(("dq", "dk", "dv"), grads, strict=True))
    return found


class Unclaimed(RuntimeError):
    """No stand-in takes the call."""


def claimed(name: str) -> Callable:
    if name not in KERNELS:
        raise Unclaimed(f"no stand-in for {name}")

    def call(*args, **kwargs):
        try:
            return KERNELS[name](*args, **kwargs)
        except (AssertionError, TypeError) as error:
            raise Unclaimed(str(error)) from error

    return call


def formula(call: Call, inputs: list[Tensor], bias: Tensor | None) -> dict[str, Tensor]:
    """The same in float64, logsumexp as (B, H, L)."""
    q, k, v, grad_out = inputs
    args = (call.d**-0.5, call.hidden(), bias)
    out, logsumexp = stand_ins.attended(q, k, v, *args)
    grads = stand_ins.gradients(grad_out, q, k, v, out, logsumexp, *args)
    return {"out": out, "logsumexp": logsumexp, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}


def check(call: Call, device: str) -> dict:
    """One row: "error" where a claim does not hold, "asked" for answers that nothing is claimed of."""
    inputs, bias = inputs_of(call)
    row: dict = {"case": call.name()}
    try:
        expected = answers(call, claimed, inputs, bias)
        if "refused" in expected:
            row["asked"] = f"backward not claimed: {expected['refused']}"
    except Unclaimed as reason:
        expected, row["asked"] = {}, f"not claimed: {reason}"
    exact = formula(call, inputs, bias)
    try:
        if device == "stand-ins":
            found = dict(expected)
        else:
            moved = [moved_to(device, x) for x in (*inputs, bias)]
            found = answers(call, lambda name: getattr(torch.ops.aten, name), moved[:4], moved[4])
            torch.cuda.synchronize()
    except RuntimeError as error:
        row["error" if expected else "refused"] = str(error).splitlines()[0]
        return row
    refused = found.pop("refused", None)
    if refused is not None:
        row["error" if "dq" in expected else "refused"] = f"backward: {refused}"
    for name, got in found.items():
        # on the GPU's answer the device's layout is a fact; values are compared on the CPU
        wanted, here = expected.get(name), got.detach().cpu()
        row[name] = facts_of(got.detach(), None if wanted is None else wanted.to(got.device))
        meaning = exact[name] if wanted is None else wanted
        if name == "logsumexp" and wanted is None:
            here = here.reshape(*here.shape[:2], -1)[..., : call.L]
        if here.shape != meaning.shape or (wanted is not None and here.dtype != wanted.dtype):
            wrong = f"{name} is {tuple(here.shape)} {here.dtype}, not {tuple(meaning.shape)} {meaning.dtype}"
        else:
            row[name]["apart"] = float(f"{apart(here, meaning):.1e}")
            wrong = "" if row[name]["apart"] <= TOLERANCE[call.dtype] else f"{name} is {row[name]['apart']:.1e} apart"
        if wrong:
            row["error" if wanted is not None else "wrong"] = wrong
    return row


def moved_to(device: str, x: Tensor | None) -> Tensor | None:
    """A copy on the device with the same strides: what is expanded stays so, what is aligned too."""
    if x is None:
        return None
    storage = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0).to(device)
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "stand-ins"))
    parser.add_argument("--out", type=Path, default=Path("."))
    args = parser.parse_args()
    rows = [check(call, args.device) for call in calls()]
    (args.out / "contracts.json").write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        state = next(
            (f"{kind}: {row[kind]}" for kind in ("error", "refused", "wrong", "asked") if kind in row), "holds"
        )
        print(f"{row['case']:<60} {state}")
    wrong = [row["case"] for row in rows if "error" in row]
    if wrong:
        raise SystemExit(f"{len(wrong)} of {len(rows)} calls are not answered as claimed: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
