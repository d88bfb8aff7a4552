"""One rank of 1, 4 and 16: time and launches of a layer, prefill and decode, without the wire.

    python -m gpu.one_rank [--device cuda|cpu] [--case TEXT] [--out FOLDER]        in benchmarks/

The rank is real, tensors and kernels and packing, but its process group is fake: an exchange gives back at once what
is in memory. So nothing is checked, and what is timed is all that a rank does beside sending. `launches` counts kernels
and copies on the GPU, by torch.profiler.

A layer of 64 query heads on 8 KV heads, d=128, D=8192, bf16, with rotary embedding, as the operators run it: what
Python adds around them is not in it.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from common import device_ms, graph_ms
from gpu.driver import Cases, Options, run_program
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

import two_level_mha as tlm
from two_level_mha.context import constants, layer_numbers, size_numbers
from two_level_mha.mesh import place_on
from two_level_mha.profile import Profile

ops = torch.ops.two_level_mha
GRIDS = ((1, 1), (4, 1), (2, 2), (8, 2), (4, 4))
DTYPE = torch.bfloat16


class Sizes(NamedTuple):
    h: int = 64
    k: int = 8
    d: int = 128
    D: int = 8192
    B: int = 8  # of a decode; a prefill has one sequence
    prefill: int = 8192
    contexts: tuple[int, ...] = (4096, 32768)


TINY = Sizes(16, 8, 16, 64, 2, 64, (64,))


class Rank:
    """A layer's blocks on rank 0 of a grid, its query side stored by whole heads, as scheme="auto" does."""

    def __init__(self, grid: tuple[int, int], sizes: Sizes, device: str) -> None:
        ranks = grid[0] * grid[1]
        dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
        self.mesh: DeviceMesh = tlm.init_mesh(device, grid)
        self.sizes, self.device, self.place = sizes, device, place_on(self.mesh)
        n, m = grid
        key = (sizes.k // n, sizes.d // m, sizes.D)
        shapes = [(sizes.h // ranks, sizes.d, sizes.D), key, key]
        self.weights = [self.random(*shape) for shape in shapes]
        self.out_weight = self.random(sizes.D, sizes.h // ranks, sizes.d)

    def random(self, *shape: int) -> Tensor:
        return (0.05 * torch.randn(shape, device=self.device)).to(DTYPE)

    def decided(self, B: int, L: int, position: int, scheme: str) -> tuple[str, list[int]]:
        s = self.sizes
        layer = layer_numbers(
            self.place, Profile.for_device("cuda").numbers, num_heads=s.h, num_kv_heads=s.k, head_dim=s.d,
            embed_dim=s.D, key_dim=s.D, value_dim=s.D, bias=False, out_bias=False, bias_kv=False,
            whole_heads=True, concat=False, reduce_dtype=None,
        )  # fmt: skip
        how = {"scheme": scheme, "causal": True, "element_size": DTYPE.itemsize}
        return constants(layer, self.place.groups, **how), size_numbers(batch=B, length=L, keys=L, position=position)

    def step(self, position: int, scheme: str, cache=None):
        """A call of the layer as a function of x (B, L, D), after `position` tokens."""

        def call(x_BLD: Tensor) -> Tensor:
            B, L, _ = x_BLD.shape
            decided = self.decided(B, L, position, scheme)
            q, k, v, *_ = ops.enter(x_BLD, x_BLD, x_BLD, *self.weights, *[None] * 5, None, None, *decided)
            q, k = (ops.rotary(x, *(a[:, :, : x.size(2)] for a in angles)) for x in (q, k))
            options = (self.out_weight, None, None, None, position, None, 0.0, 0.0, None)
            if cache is None:
                return ops.leave(q, k, v, *options, *decided)
            return ops.leave_with_cache(q, k, v, *options, *decided, cache.memory, cache.numbers())[0]

        angles = [self.random(1, 1, self.sizes.prefill, self.sizes.d).float() for _ in range(2)]
        return call

    def cache(self, context: int):
        """A layer of a cache of layout "position" with all but one of `context` tokens."""
        s, grid = self.sizes, self.place.grid
        layer = tlm.KVCache(
            {"num_layers": 1, "num_kv_heads": s.k, "head_dim": s.d}, self.mesh, max_length=context
        ).layers[0]
        layer.begin(s.B, context - 1)
        own = len(range(self.place.slice, context - 1, grid.slices))
        layer.append(*(self.random(s.B, s.k // grid.head_groups, own, s.d) for _ in range(2)), context - 1)
        layer.begin(s.B, 1)
        return layer


def launches(call, x: Tensor) -> dict:
    """Operators that the call runs, one inside another too, and what it launches on the GPU."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if x.is_cuda else [])
    with profile(activities=activities) as recorded:
        call(x)
        if x.is_cuda:
            torch.cuda.synchronize()
    events = recorded.events()
    on_gpu = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    operators = [event for event in events if event.name.startswith(("aten::", "two_level_mha::", "_c10d"))]
    return {"operators": len(operators)} | ({"launches": len(on_gpu)} if x.is_cuda else {})


def run(grid: tuple[int, int], kind: str, context: int, options: Options) -> dict:
    rank = Rank(grid, TINY if options.tiny else Sizes(), options.device)
    try:
        with torch.no_grad():
            if kind == "prefill":
                call, x = rank.step(0, "heads"), rank.random(1, context, rank.sizes.D)
            else:
                call = rank.step(context - 1, "position", rank.cache(context))
                x = rank.random(rank.sizes.B, 1, rank.sizes.D)
            row = {"ms": round(device_ms({"layer": call}, [(x,)], options.repeats)["layer"], 4)}
            if options.device == "cuda" and kind == "decode":
                row["graph_ms"] = round(graph_ms(call, [(x,)], options.repeats), 4)
            return row | launches(call, x)
    finally:
        dist.destroy_process_group()


def cases(options: Options) -> Cases:
    sizes = TINY if options.tiny else Sizes()
    calls = [("prefill", sizes.prefill), *(("decode", context) for context in sizes.contexts)]
    return {
        f"{kind} {context} on ({grid[0]}, {grid[1]})": lambda grid=grid, kind=kind, context=context: run(
            grid, kind, context, options
        )
        for grid in GRIDS
        for kind, context in calls
    }


if __name__ == "__main__":
    run_program("one_rank", __doc__, cases)
