"""Bytes that one of 16 ranks sends for a layer of 64 query heads on 8 key/value heads: ours and two others.

    python benchmarks/traffic.py

Nothing is computed: fake tensors of the full size go through the real code on a fake process group of 16 ranks, and
the collectives it issues are recorded. So bytes and numbers of collectives are exact, and no time is measured. The two
others are minimal implementations of what can be done with plain tensor parallelism beyond the number of KV heads:

  gathered    the QKV projection is split evenly over the ranks, its whole output is gathered on all of them, and each
              takes the heads it attends with (the way of Megatron-Core where there are fewer KV heads than ranks)
  replicated  every rank projects and caches the KV head that its query heads need, so that ranks repeat each other's

The rows called "split" are of activations that stay split by rows over the ranks. There the two others gather X and
reduce-scatter Y (Megatron's sequence parallelism), and ours takes activations="sequence".
"""

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import write_results
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

import two_level_mha as tlm
from two_level_mha.context import constants, layer_numbers, size_numbers
from two_level_mha.mesh import Place, place_on
from two_level_mha.profile import Profile
from two_level_mha.testing import CollectiveRecord, record_collectives

P, h, k, d, D = 16, 64, 8, 128, 8192
GRID = (8, 2)
B, L = 1, 8192
CONTEXTS = (1024, 4096, 16384, 65536)
DTYPE = torch.bfloat16
COMPARED = 75  # bytes of what the ranks compare, which modules add to their sum and these operators do not


def gathered(x_BLD: torch.Tensor, group: str) -> tuple[torch.Tensor, ...]:
    """q, k, v of rank 0, from the whole QKV gathered over all ranks."""
    qkv = F.linear(x_BLD, x_BLD.new_empty((h + 2 * k) * d // P, D))
    qkv = torch.ops.two_level_mha.all_gather(qkv, 2, P, group)
    group = qkv.unflatten(2, (k, h // k + 2, d))[:, :, 0].transpose(1, 2)  # a KV head and its query heads
    return group[:, : h // P], group[:, -2:-1], group[:, -1:]


def replicated(x_BLD: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """q, k, v of a rank that projects the KV head it needs itself."""
    qkv = F.linear(x_BLD, x_BLD.new_empty((h // P + 2) * d, D)).unflatten(2, (-1, d)).transpose(1, 2)
    return qkv[:, : h // P], qkv[:, -2:-1], qkv[:, -1:]


def summed(q: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: str) -> torch.Tensor:
    """Attention, the rank's part of the output projection, and its sum: y (B, L, D)."""
    o_BHLd = F.scaled_dot_product_attention(q, key, value, is_causal=True, enable_gqa=True)
    y_BLD = F.linear(o_BHLd.transpose(1, 2).flatten(2), o_BHLd.new_empty(D, h // P * d))
    return torch.ops.two_level_mha.all_reduce(y_BLD, P, group)


def scattered(q: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: str) -> torch.Tensor:
    """The same for split activations: this rank's rows of y."""
    o_BHLd = F.scaled_dot_product_attention(q, key, value, is_causal=True, enable_gqa=True)
    y_BLD = F.linear(o_BHLd.transpose(1, 2).flatten(2), o_BHLd.new_empty(D, h // P * d))
    return torch.ops.two_level_mha.reduce_scatter(y_BLD, 1, P, group)


def of_rows(project, x_BLD: torch.Tensor, group: str) -> tuple[torch.Tensor, ...]:
    """q, k, v of the other ways, from this rank's rows of x."""
    return project(torch.ops.two_level_mha.all_gather(x_BLD[:, : L // P], 1, P, group))


@dataclass(frozen=True)
class Ours:
    """One layer, with whole query heads where the scheme is that of scheme="auto" for them."""

    place: Place
    scheme: str = "heads"
    position: int = 0  # tokens in the cache
    activations: str = "replicated"
    kv_heads: int = k

    @property
    def whole_heads(self) -> bool:
        return self.scheme in ("heads", "position")

    def decided(self, x_BLD: torch.Tensor) -> tuple:
        """constants and sizes of the operators."""
        layer = layer_numbers(
            self.place, Profile.for_device("cuda").numbers, num_heads=h, num_kv_heads=self.kv_heads, head_dim=d,
            embed_dim=D, key_dim=D, value_dim=D, bias=False, out_bias=False, bias_kv=False,
            whole_heads=self.whole_heads, concat=False, reduce_dtype=None, activations=self.activations,
        )  # fmt: skip
        how = {"scheme": self.scheme, "causal": True, "element_size": DTYPE.itemsize}
        length = x_BLD.shape[1]
        sizes = size_numbers(batch=B, length=length, keys=length, position=self.position)
        return constants(layer, self.place.groups, **how), sizes

    @property
    def q_shape(self) -> tuple[int, int]:
        """Heads and their width of the query side's block."""
        n, m = self.place.grid.head_groups, self.place.grid.slices
        return (h // P, d) if self.whole_heads else (h // n, d // m)

    def enter(self, x_BLD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        n, m = self.place.grid.head_groups, self.place.grid.slices
        kv = (self.kv_heads // n, d // m, D)
        weights = [x_BLD.new_empty(shape) for shape in ((*self.q_shape, D), kv, kv)]
        call = self.decided(x_BLD)
        mine = x_BLD if self.activations == "replicated" else x_BLD[:, : L // P].clone()
        q, key, value, *_ = torch.ops.two_level_mha.enter(*[mine] * 3, *weights, *[None] * 5, None, None, *call)
        if not self.position:
            return q, key, value, x_BLD
        old = key.new_empty(*key.shape[:2], -(-self.position // m), d)  # rank 0 has every m-th, from the first on
        return q, torch.cat([old, key], 2), torch.cat([old, value], 2), x_BLD

    def leave(self, q: torch.Tensor, key: torch.Tensor, value: torch.Tensor, x_BLD: torch.Tensor) -> torch.Tensor:
        return torch.ops.two_level_mha.leave(
            q, key, value, q.new_empty(D, *self.q_shape), None, None, None, self.position, None, 0.0, 0.0, None,
            *self.decided(x_BLD),
        )  # fmt: skip


def record(enter, leave, length: int) -> tuple[CollectiveRecord, CollectiveRecord]:
    """What is sent before attention, and after it."""
    with FakeTensorMode(), torch.no_grad():
        x_BLD = torch.empty(B, length, D, dtype=DTYPE)
        with record_collectives() as before:
            qkv = enter(x_BLD)
        with record_collectives() as after:
            leave(*qkv)
    return before, after


def row(name: str, enter, leave, length: int, cache_bytes: int) -> dict:
    before, after = record(enter, leave, length)
    return {
        "case": name,
        "how": "recorded, 16 ranks of a fake process group",
        "exchange_bytes": before.sent(),
        "layer_bytes": before.sent() + after.sent(),
        "collectives": len(before.calls) + len(after.calls),
        "cache_bytes_per_rank": cache_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the results; default: benchmarks/results")
    args = parser.parse_args()
    dist.init_process_group("fake", rank=0, world_size=P, store=FakeStore())
    place = place_on(tlm.init_mesh("cpu", GRID))
    group = place.groups[2]
    token = 2 * B * k * d * DTYPE.itemsize  # bytes of all keys and values of one position
    layer = Ours(place)
    rows = [
        row("ours", layer.enter, layer.leave, L, L * token // P),
        row("gathered", partial(gathered, group=group), partial(summed, group=group), L, L * token // k),
        row("replicated", replicated, partial(summed, group=group), L, L * token // k),
    ]
    for other in rows[1:]:
        for key in ("exchange_bytes", "layer_bytes", "cache_bytes_per_rank"):
            other[f"{key}_over_ours"] = round(other[key] / rows[0][key], 4)
    for context in CONTEXTS:
        step = Ours(place, "position", context - 1)
        rows.append(row(f"ours, decode, context {context}", step.enter, step.leave, 1, context * token // P))
    check_plan(rows)
    rows += split_rows(place)
    for found in rows:
        print("  ".join(f"{key}={value}" for key, value in found.items() if key != "how"))
    print(write_results("traffic", rows, folder=args.out))


def split_rows(place: Place) -> list[dict]:
    """Activations split by rows: our schemes with 8 KV heads, the others, and both with a KV head on every rank."""
    group, cache = place.groups[2], 2 * B * d * L * DTYPE.itemsize
    alone = Place(tlm.Grid(P, 1), 0, 0, ("", group, group), place.control)
    ours = {f"split, ours, {scheme}": Ours(place, scheme, activations="sequence") for scheme in ("heads", "weights")}
    one_each = "split, 16 KV heads, ours on (16, 1)"
    ours[one_each] = Ours(alone, "heads", activations="sequence", kv_heads=P)
    rows = [row(name, one.enter, one.leave, L, one.kv_heads * cache // P) for name, one in ours.items()]
    ways = {"split, gathered": partial(gathered, group=group), "split, replicated": replicated}
    ways["split, 16 KV heads, tensor and sequence parallelism"] = replicated
    leave = partial(scattered, group=group)
    rows += [row(name, partial(of_rows, way, group=group), leave, L, cache) for name, way in ways.items()]
    for option, found in (
        (("heads", GRID, k), rows[0]),
        (("weights", GRID, k), rows[1]),
        (("heads", (P, 1), P), rows[2]),
    ):
        scheme, grid, kv_heads = option
        plan = tlm.plan(
            embed_dim=D, num_heads=h, num_kv_heads=kv_heads, head_dim=d, devices=P, batch=B, seq=L, dtype=DTYPE,
            activations="sequence",
        )  # fmt: skip
        predicted = next(one for one in plan.options if (one.grid, one.scheme) == (grid, scheme))
        compared = predicted.sent_bytes() - found["layer_bytes"]  # rides in every part of the sum, or alone
        assert 0 <= compared <= P * COMPARED, (predicted.sent_bytes(), found)
    return rows


def check_plan(rows: list[dict]) -> None:
    """The planner's table says what was recorded, for the prefill and for each context of the decode."""
    sizes = {"embed_dim": D, "num_heads": h, "num_kv_heads": k, "head_dim": d, "devices": P, "batch": B, "dtype": DTYPE}
    plans = [("heads", tlm.plan(**sizes, seq=L), rows[0])]
    plans += [
        ("position", tlm.plan(**sizes, seq=context, decode=True), found)
        for context, found in zip(CONTEXTS, rows[3:], strict=True)
    ]
    for scheme, plan, found in plans:
        option = next(option for option in plan.options if option.grid == GRID and option.scheme == scheme)
        expected = (found["layer_bytes"] + COMPARED, found["collectives"], found["cache_bytes_per_rank"])
        assert (option.sent_bytes(), option.collectives(), option.cache_bytes) == expected, (option, found)


if __name__ == "__main__":
    main()
