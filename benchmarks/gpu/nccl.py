"""NCCL in a world of one rank: each collective that csrc/comm/exchange.h issues, in every dtype, eager and replayed.

    python -m gpu.nccl [--device cuda|cpu] [--out FOLDER]        in benchmarks/

Of one rank every collective gives back what it was given: dtypes, shapes and capture are what this tries, not sums.
With --device cpu over Gloo, without a CUDA graph.
"""

import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist
from gpu.driver import Cases, Options, run_program
from torch import Tensor

functional = torch.ops._c10d_functional
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


# Boxed by name and called alike in exchange.cpp: (x, name of the group) -> result.
COLLECTIVES: dict[str, Callable[[Tensor, str], Tensor]] = {
    "all_gather": lambda x, group: functional.all_gather_into_tensor(x, 1, group),
    "reduce_scatter": lambda x, group: functional.reduce_scatter_tensor(x, "sum", 1, group),
    "all_to_all": lambda x, group: functional.all_to_all_single(x, [1], [1], group),
    "all_reduce": lambda x, group: functional.all_reduce(x, "sum", group),
    "all_reduce_": lambda x, group: functional.all_reduce_(x, "sum", group),
    "exchange_rows": lambda x, group: functional.all_to_all_single(x.view(-1), [x.numel()], [x.numel()], group).view(
        x.shape
    ),
}


def run(name: str, dtype: torch.dtype, options: Options, group: str) -> dict:
    x = torch.randn(1, 4096, device=options.device).to(dtype)

    def exchange(given: Tensor) -> Tensor:
        return functional.wait_tensor(COLLECTIVES[name](given, group))

    got = exchange(x.clone())
    assert got.shape == x.shape and got.dtype == dtype and torch.equal(got, x)
    if options.device == "cpu":
        return {"eager": True}
    graph, given = torch.cuda.CUDAGraph(), torch.empty_like(x)
    with torch.cuda.graph(graph):
        captured = exchange(given)
    for _ in range(3):
        fresh = torch.randn(1, 4096, device=options.device).to(dtype)
        given.copy_(fresh)
        graph.replay()
        assert torch.equal(captured, fresh)
    return {"eager": True, "replayed": True}


def cases(options: Options) -> Cases:
    store = tempfile.mkdtemp() + "/store"
    device = {"device_id": torch.device("cuda", 0)} if options.device == "cuda" else {}
    backend = "nccl" if options.device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=0, world_size=1, **device)
    group = dist.group.WORLD.group_name
    # Gloo has no reduce_scatter of its own here: on the CPU exchange.cpp does not ask for it
    names = [name for name in COLLECTIVES if options.device == "cuda" or name != "reduce_scatter"]
    return {
        f"{name} {str(dtype).removeprefix('torch.')}": lambda name=name, dtype=dtype: run(name, dtype, options, group)
        for name in names
        for dtype in DTYPES
    }


if __name__ == "__main__":
    run_program("nccl", __doc__, cases)
    dist.destroy_process_group()
