"""Attention on the CPU where memory runs out: an exception or the right result, never the end of the process.

A process of its own forks a child for every limit. A child makes its inputs, may from then on have so many more bytes
of addresses, and calls. Then the limit is lifted and it calls again. To see the outcomes, run this file.
"""

import collections
import ctypes
import os
import signal
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.cpu_only("its limits are of the host's memory")

MB = 1 << 20
WRITE_NO_CODE = (65, 1)  # prctl: PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN

# kernel, dtype, (B, H, L, D), threads, limits in MB: a kernel of code takes a quarter of one, and 4 must be there
CASES = {
    "float32": ("cpu_blocked", torch.float32, (2, 4, 128, 32), 1, (0, 0.2, 0.4, 0.8, 1.2, 1.8, 2.6, 4.2, 16)),
    "bfloat16": ("cpu_blocked", torch.bfloat16, (2, 4, 200, 96), 2, (0, 0.7, 1.4, 3, 5, 6, 32)),
    "large": ("cpu_blocked", torch.float32, (64, 4, 128, 32), 2, (1, 4, 8, 13, 16, 64)),
    "decode": ("cpu_decode", torch.float16, (2, 8, 24, 32), 2, (0, 0.3, 0.6, 1, 2, 4.2, 16)),
}


def sweep(kernel: str, dtype: torch.dtype, sizes, threads: int, limits) -> dict[str, list[float]]:
    """The limits by outcome."""
    found = collections.defaultdict(list)
    for limit in limits:
        reader, writer = os.pipe()
        if (child := os.fork()) == 0:
            try:
                outcome = called(kernel, dtype, sizes, threads, int(limit * MB))
            except BaseException as error:
                outcome = f"wrong: {error!r}"
            os.write(writer, outcome.encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            outcome = pipe.read()
        status = os.waitpid(child, 0)[1]
        found[signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else outcome].append(limit)
    return dict(found)


def called(kernel: str, dtype: torch.dtype, sizes, threads: int, limit: int) -> str:
    import resource

    torch.set_num_threads(threads)
    torch.ones(1 << 17).add_(1)  # the threads, whose stacks are large
    q, k, v, g = torch.randn(4, *sizes).to(dtype)
    trains = kernel != "cpu_decode"  # which has no backward
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + limit, resource.RLIM_INFINITY))
    try:
        first = results(kernel, q, k, v, g, trains)
    except RuntimeError as error:
        first, outcome = None, type(error).__name__
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    again = results(kernel, q, k, v, g, trains)
    if first is None:
        right = results("chunked", *(x.double() for x in (q, k, v, g)), trains)
        for x, y in zip(again, right, strict=True):
            assert (x - y).norm() <= {torch.float32: 5e-6, torch.float16: 3e-3}.get(dtype, 2e-2) * y.norm()
        return outcome
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    return "right"


def results(kernel: str, q, k, v, g, trains: bool = True) -> list[torch.Tensor]:
    """The output and the gradients."""
    inputs = [x.detach().requires_grad_(trains) for x in (q, k, v)]
    out = torch.ops.two_level_mha.partial_attention(*inputs, kernel_name=kernel)[0]
    return [out.detach(), *(torch.autograd.grad(out, inputs, g.to(out.dtype)) if trains else ())]


def run(what: str) -> list[str]:
    found = subprocess.run([sys.executable, __file__, what], capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, f"exit status {found.returncode}: {found.stdout}\n{found.stderr[-2000:]}"
    return found.stdout.splitlines()


def has_kernels() -> bool:
    import two_level_mha as tlm

    return sys.platform == "linux" and tlm._C.Machine().cpu != "portable"


def test_short_of_memory():
    """R and, where a call succeeds, E. Localises: SIGSEGV: a kernel that is made without looking for memory first;
    wrong: what a failed call leaves behind in a thread's kernels.
    """
    if not has_kernels():
        pytest.skip("needs Linux and a CPU with AVX2")
    found = run("limits")
    for case in CASES:
        outcomes = {line.split()[1] for line in found if line.startswith(case)}
        # what is looked for before a kernel is made, and a call with enough
        assert {"OutOfMemoryError", "right"} <= outcomes <= {"OutOfMemoryError", "RuntimeError", "right"}, found


def test_no_machine_code():
    """R. Localises: a CPU level that was found without asking whether the system lets kernels be written."""
    if not has_kernels() or (found := run("no code")) == ["not here"]:
        pytest.skip("needs Linux 6.3 and a CPU with AVX2")
    assert found == ["portable right"]


def main(what: str) -> None:
    import resource

    if what == "no code" and ctypes.CDLL(None).prctl(*WRITE_NO_CODE, 0, 0, 0) != 0:
        return print("not here")
    import two_level_mha as tlm

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.manual_seed(0)
    if what == "no code":
        q, k, v, g = torch.randn(4, 2, 4, 40, 8)
        right = results("chunked", *(x.double() for x in (q, k, v, g)))
        good = all((x - y).norm() <= 5e-6 * y.norm() for x, y in zip(results("", q, k, v, g), right, strict=True))
        return print(tlm._C.Machine().cpu, "right" if good else "wrong")
    for case, arguments in CASES.items():
        for outcome, limits in sweep(*arguments).items():
            print(f"{case}: {outcome} at", *limits, flush=True)


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else "limits")
