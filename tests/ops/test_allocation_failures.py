"""Every allocation of an operator's call, forward and backward, fails once: an exception comes out of it, of the thread
of the pass that it was in too, and the next call has the right bits.

Of allocations through torch's allocator, which are those of tensors and of the kernels' scratch memory: the k-th fails,
for k = 1, 2 and so on until a call has no k-th. In a process of its own, with an allocator that is compiled here.
"""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

pytestmark = pytest.mark.cpu_only("its allocator fails for the host's memory")

SOURCE = Path(__file__).resolve().parents[1] / "cpp" / "failing_allocator.cpp"
THREADS = 2

B, L, S, D, H, K, d = 1, 5, 37, 10, 4, 2, 6


def calls() -> dict:
    """By name, a function of no arguments that runs an operator and its backward pass and returns all results."""
    import two_level_mha as tlm

    ops, C = torch.ops.two_level_mha, tlm._C

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape).to(dtype).requires_grad_()

    numbers = {"head_groups": 1, "slices": 1, "num_heads": H, "num_kv_heads": K, "head_dim": d, "embed_dim": D,
               "bias": 1, "reduce_dtype": -1, "memory": 10, "link": 10, "network": 10, "node": 8,
               "element_size": 4, "batch_first": 1}  # fmt: skip
    numbers |= {name: 10 for name in C.constant_fields() if name.startswith(("flops", "attention"))}
    text = " ".join(str(numbers.get(name, 0)) for name in C.constant_fields()) + "\n\n\n"
    sizes = [{"batch": B, "length": L, "keys": S}.get(name, 0) for name in C.size_fields()]
    cache = [{"slices": 1, "by_position": 1, "batch": B}.get(name, 0) for name in C.cache_fields()]
    q, k, v, mask = random(B, H, L, d), random(B, K, S, d), random(B, K, S, d), random(H, L, S)
    left = (q, k, v, random(D, H, d), random(D), mask.detach(), None, 2, None, 2.0, 0.3, torch.tensor([3]))
    cached = (*left[:10], 0.0, None, text, sizes, [], cache)
    entered = [random(B, L, D), random(B, S, D), random(B, S, D), random(H, d, D), random(K, d, D), random(K, d, D),
               random(H, d), random(K, d), random(K, d), None, None, [random(B, 1, L, 4)], [random(d)]]  # fmt: skip
    parts = random(3, B, H, L, d), random(3, B, H, L)
    options = {"causal": 32, "softcap": 2.0, "dropout_p": 0.3, "seed": torch.tensor([3])}
    asked = {
        "enter": (ops.enter, (*entered, text, sizes), {}),
        "leave": (ops.leave, (*left, text, sizes), {}),
        "leave_with_weights": (ops.leave_with_weights, (*left, text, sizes, True), {}),
        "leave_with_cache": (ops.leave_with_cache, cached, {}),
        "merge_partials": (ops.merge_partials, parts, {}),
        "pack": (ops.pack, ([q, k], [2, -1], 2, True), {}),
        "mask gradient": (ops.partial_attention, (q, k, v, mask), options),
    }
    for kernel, dtype in [("cpu_blocked", torch.float32), ("cpu_blocked", torch.bfloat16),
                          ("cpu_decode", torch.float16), ("chunked", torch.float64)]:  # fmt: skip
        inputs = [random(*x.shape, dtype=dtype) for x in (q, k, v)]
        given = {"causal": 32, "kernel_name": kernel} if kernel == "cpu_decode" else options | {"kernel_name": kernel}
        if kernel == "cpu_decode":  # which has no backward
            inputs = [x.detach() for x in inputs]
        asked[f"{kernel}, {dtype}"] = (ops.partial_attention, inputs, given)
    if C.Machine().cpu == "portable":
        asked = {name: call for name, call in asked.items() if not name.startswith("cpu_")}
    return {name: lambda call=call: results(*call) for name, call in asked.items()}


def tensors_of(found) -> list[torch.Tensor]:
    if isinstance(found, torch.Tensor):
        return [found]
    return [x for one in found for x in tensors_of(one)] if isinstance(found, (list, tuple)) else []


def results(op, given, options) -> list[torch.Tensor]:
    """Outputs and the gradients of all inputs, which are left without them."""
    out = tensors_of(op(*given, **options))
    inputs = [x for x in tensors_of(list(given)) if x.requires_grad]
    trained = [x for x in out if x.requires_grad]
    # a fixed loss, of as few allocations as can be: they fail too
    grads = torch.autograd.grad(trained, inputs, trained, allow_unused=True) if trained else ()
    return [x.detach() for x in (*out, *grads) if x is not None]


def failures(library: ctypes.CDLL, call) -> int:
    """How many allocations a call has, after each has failed in one."""
    expected = call()
    for k in range(1, 1000):
        library.fail_at(k)
        try:
            found = call()
        except RuntimeError as error:
            library.fail_at(0)
            assert isinstance(error, torch.OutOfMemoryError), error
            found = call()
        else:
            assert library.fail_at(0), f"allocation {k} failed, and no one said so"
            same(found, expected)
            return k - 1
        same(found, expected)
    raise AssertionError("too many allocations")


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> str:
    """Path of the failing allocator."""
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    path = tmp_path_factory.mktemp("allocator") / "failing_allocator.so"
    flags = [f"-I{folder}" for folder in include_paths()] + [f"-L{folder}" for folder in library_paths()]
    subprocess.run(["g++", "-std=c++20", "-O1", "-shared", "-fPIC", str(SOURCE), *flags, "-lc10", "-o", str(path)],
                   check=True, timeout=300)  # fmt: skip
    return str(path)


def test_every_allocation(library):
    """E. Localises: by the last line printed, an operator that a failure of memory ends, or that keeps what a failed
    call left: half-written results, a lock, a thread's state.
    """
    found = subprocess.run([sys.executable, __file__, library], capture_output=True, text=True, timeout=300)
    lines = found.stdout.splitlines()
    assert found.returncode == 0, f"exit status {found.returncode}: {lines[-1:]}\n{found.stderr[-2000:]}"
    counts = {name: int(number) for name, number in (line.rsplit(": ", 1) for line in lines)}
    assert len(counts) >= 8 and min(counts.values()) > 0, counts


def main(path: str) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    library = ctypes.CDLL(path)
    library.fail_at.argtypes, library.fail_at.restype = [ctypes.c_int64], ctypes.c_bool
    library.install()
    for name, call in calls().items():
        print(name, end=": ", flush=True)
        print(failures(library, call), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
