"""What a GPU reaches in the simplest work there is: the ceilings that other rates are read against.

python -m gpu.ceilings [--device cuda|cpu] [--out FOLDER]        in benchmarks/
"""

import torch
from common import device_ms, past_the_cache, tflops
from gpu.driver import Cases, Options, run_program

KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def copy(options: Options) -> dict:
    """A copy inside the device's memory: bytes read and bytes written."""
    elements = 1 << 12 if options.tiny else 1 << 30
    source, to = torch.randn(elements, device=options.device), torch.empty(elements, device=options.device)
    ms = device_ms({"copy": to.copy_}, [(source,)], options.repeats)["copy"]
    return {"bytes": 2 * 4 * elements, "ms": round(ms, 4), "gb_per_s": round(2 * 4 * elements / ms / 1e6, 1)}


def square_product(options: Options, dtype: torch.dtype, size: int) -> tuple[float, float]:
    """Milliseconds and TFLOP/s of a square product of random numbers: zeros are faster."""

    def draw() -> tuple:
        return tuple(torch.randn(size, size, device=options.device).to(dtype) for _ in range(2))

    ms = device_ms({"matmul": torch.matmul}, past_the_cache(draw, options.device), options.repeats)["matmul"]
    return ms, tflops(2 * size**3, ms, dtype, options.device)


def product(options: Options, dtype: torch.dtype, size: int) -> dict:
    size = 64 if options.tiny else size
    ms, rate = square_product(options, dtype, size)
    return {"size": size, "ms": round(ms, 4), "tflops": round(rate, 1)}


def cases(options: Options) -> Cases:
    products = [(dtype, size) for dtype in KINDS for size in (4096, 8192)]
    return {"copy": lambda: copy(options)} | {
        f"matmul {KINDS[dtype]} {size}": lambda dtype=dtype, size=size: product(options, dtype, size)
        for dtype, size in products
    }


if __name__ == "__main__":
    run_program("ceilings", __doc__, cases)
