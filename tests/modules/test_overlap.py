"""Chunks of the batch whose exchanges run while the next is computed: the same numbers as in one, float64."""

from contextlib import closing

import pytest
import torch
from harness.calls import Call, difference, everything, mesh, off, on_ranks, stock_layer, text_of
from harness.compiled import compiled_over_lengths
from harness.device import DEVICE
from harness.pool import Pool
from harness.two_level_attention import HALF, Decoder
from harness.two_level_attention import off as decoder_off
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import two_level_mha as tlm
from two_level_mha.testing import record_collectives

GRIDS = [(2, 2), (1, 4), (4, 1)]
SCHEMES = ("slices", "sequence", "batch", "heads", "weights")
CALLS = {
    "self": Call({"batch_first": True}, batch=8, need_weights=False),
    "uneven chunks, masks of each sequence": Call(
        {"kdim": 6, "vdim": 10, "add_bias_kv": True}, batch=5, length=9, keys=11, attn_mask="float3", padding="bool",
        need_weights=False,
    ),
    "one mask for all, no bias": Call(
        {"bias": False}, batch=8, length=8, attn_mask="causal", is_causal=True, need_weights=False
    ),
    "attention weights": Call(batch=8, keys=7),
    "one sequence": Call(batch=1, length=6, need_weights=False),
}  # fmt: skip
DECODERS = {
    "grouped heads, rope, norm": Decoder(batch=5, length=13, options={"qk_norm": 1e-3, "rope": HALF, "bias": True}),
    "angles and a mask of each sequence": Decoder(
        batch=8, length=9, given=8, mask="documents", options={"qk_norm": 1e-3, "rope": HALF}
    ),
    "window, dropout": Decoder(batch=8, length=16, options={"window": 3, "dropout": 0.3}),
    "trained mask, softcap": Decoder(mask="bias", batch=8, length=9, options={"softcap": 1.5}),
}


def contract(grid, scheme: str, activations: str) -> list[str]:
    """What differs from the unsplit layer."""
    wrong = []
    for combine, overlap in (("reduce", 2), ("reduce", 3), ("concat", 2)):
        options = {"scheme": scheme, "combine": combine, "activations": activations, "overlap": overlap}
        found = {name: off(call, grid, **options) for name, call in CALLS.items()}
        found |= {name: decoder_off(case, grid, **options) for name, case in DECODERS.items()}
        wrong += [f"{name}, {combine}, {overlap} chunks: {errors}" for name, errors in found.items() if errors]
    return wrong


@pytest.mark.parametrize("activations", ["replicated", "sequence"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("grid", GRIDS)
def test_as_without_overlap(pool, grid, scheme, activations):
    """T, values and every gradient. Localises: sequences of a chunk that are others in its mask, its dropout or its
    sum; a chunk whose adjoint is another's.
    """
    for wrong in on_ranks(pool, contract, grid, scheme, activations):
        assert not wrong, "\n".join(wrong)


def largest_difference(grid) -> float:
    stock, call = stock_layer(CALLS["self"]), CALLS["self"]
    layers = [
        tlm.TwoLevelMultiheadAttention.from_torch(stock, mesh(grid), scheme="slices", overlap=overlap)
        for overlap in (1, 4)
    ]
    return max(difference(*(everything(layer, call) for layer in layers)).values())


def test_difference_from_one_chunk(pool):
    """No more than the order of sums. Localises: a result that chunks round otherwise."""
    assert max(on_ranks(pool, largest_difference, (2, 2))) <= 1e-13


class Order(TorchDispatchMode):
    """In order: collectives begun ("start"), waited for ("wait"), products ("compute"), and attention
    ("attend").
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func._schema.name.partition("::")
        out = func(*args, **(kwargs or {}))
        if namespace == "_c10d_functional" or name in ("_all_to_all_pairs", "_all_gather_pairs"):
            self.seen.append("wait" if name == "wait_tensor" else "start")
        elif name in ("linear", "mm", "addmm", "bmm"):
            self.seen.append("compute")
        elif name.startswith("partial_attention"):
            self.seen.append("attend")
        return out

    def hidden(self, beside: tuple[str, ...] = ("compute", "attend")) -> int:
        """Exchanges that were under way while something was computed."""
        open_, used = [], []
        for what in self.seen:
            if what == "start":
                open_.append(False)
            elif what in beside:
                open_ = [True] * len(open_)
            elif what == "wait" and open_:
                used.append(open_.pop(0))
        return sum(used)


def hidden(grid, scheme: str, activations: str) -> dict[int, tuple[int, int, list[int], list]]:
    """By number of chunks: exchanges under way beside computing, forward and backward, both beside attention alone, and
    the order of all.
    """
    found = {}
    for overlap in (1, 4):
        torch.manual_seed(0)
        options = {"scheme": scheme, "activations": activations, "overlap": overlap}
        layer = tlm.TwoLevelMultiheadAttention(32, 8, bias=False, batch_first=True, mesh=mesh(grid), **options)
        x = torch.randn(16, 8, 32)
        part = tlm.shard_activations(x, activations, mesh(grid)).requires_grad_()
        layer(part, part, part, need_weights=False)[0].sum().backward()  # in the first call ranks compare their inputs
        with record_collectives() as record:
            with Order() as forward:
                y = layer(part, part, part, need_weights=False)[0]
            with Order() as backward:
                y.sum().backward()
        order = [(call.name, call.elements) for call in record.calls]
        beside = [each.hidden(("attend",)) for each in (forward, backward)]
        found[overlap] = forward.hidden(), backward.hidden(), beside, order
    return found


@pytest.mark.parametrize("activations", ["replicated", "sequence"])
@pytest.mark.parametrize("scheme", ["slices", "sequence", "batch"])
def test_exchanges_are_under_way(pool, scheme, activations):
    """E. Localises: a wait that comes before the next chunk is computed; ranks that exchange in another order."""
    every = pool.run(hidden, 4, (2, 2), scheme, activations)
    assert all(found == every[0] for found in every)
    (forward, backward, _, _), (forward_4, backward_4, beside, order) = every[0][1], every[0][4]
    assert forward == 0 and backward >= 1  # the sum of dX, beside the weights' gradients
    # of 4 chunks all but the first come in while another is attended to, and all but the last go out
    assert forward_4 >= 6 and backward_4 >= 6 and len(order) >= 4 * 4
    # in backward the sum of dX begins two chunks of attention behind
    assert beside[0] >= 6 and beside[1] >= 5


def sent(grid, activations: str, combine: str) -> list[tuple]:
    found = []
    for scheme in ("slices", "sequence", "batch", "weights") if grid[1] > 1 else ("slices",):
        for overlap, batch, seq in ((2, 8, 16), (3, 5, 13), (4, 2, 64)):
            options = {"scheme": scheme, "combine": combine, "activations": activations, "overlap": overlap}
            layer = tlm.TwoLevelMultiheadAttention(32, 8, bias=False, batch_first=True, mesh=mesh(grid), **options)
            x = torch.randn(batch, seq, 32)
            part = tlm.shard_activations(x, activations, mesh(grid)).requires_grad_()
            for _ in range(2):  # the ranks compare their inputs in the first call
                with record_collectives() as record:
                    layer(part, part, part, need_weights=False)[0].sum().backward()
            plan = tlm.plan(
                embed_dim=32, num_heads=8, devices=grid[0] * grid[1], batch=batch, seq=seq, causal=False,
                dtype=torch.float32, combine=combine, activations=activations, overlap=overlap, device_type=DEVICE,
            )  # fmt: skip
            option = next(option for option in plan.options if (option.grid, option.scheme) == (grid, scheme))
            seen = (record.sent(backward=False), record.sent(backward=True), len(record.calls))
            collectives = option.collectives() + option.collectives(backward=True)
            found.append((options, seen, (option.sent_bytes(), option.sent_bytes(backward=True), collectives)))
    return found


@pytest.mark.parametrize("activations", ["replicated", "sequence", "batch"])
@pytest.mark.parametrize("combine", ["reduce", "concat"])
@pytest.mark.parametrize("grid", GRIDS)
def test_bytes(pool, grid, combine, activations):
    """E. Localises: the chunks of csrc/plan/schemes.h against those that the pass makes."""
    for per_rank in pool.run(sent, 4, grid, activations, combine):
        for options, seen, planned in per_rank:
            assert seen == planned, options


def other_ways(grid, scheme: str) -> dict[str, bool]:
    """Of a layer in chunks and one without: checkpointed, in autocast, inference mode, with part of the gradients."""
    layers = []
    for overlap in (1, 2):
        torch.manual_seed(0)
        options = {"mesh": mesh(grid), "scheme": scheme, "rope": HALF, "dropout": 0.1, "overlap": overlap}
        layers.append(tlm.TwoLevelAttention(32, 8, 4, **options))
    one, two = layers
    x = torch.randn(8, 16, 32)

    def gradients(function, layer, of=None) -> list[torch.Tensor]:
        torch.manual_seed(1)
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        leaves = {"x": [leaf], "weights": list(layer.parameters()), None: [leaf, *layer.parameters()]}[of]
        return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    def close(ours: list[torch.Tensor], others: list[torch.Tensor], error: float) -> bool:
        pairs = [[getattr(t, "_local_tensor", t) for t in pair] for pair in zip(ours, others, strict=True)]
        return all((a - b).abs().max() <= error * b.abs().max() and a.dtype == b.dtype for a, b in pairs)

    plain = gradients(two, two)
    right = {"plain": close(plain, gradients(one, one), 1e-5)}
    right["checkpointed"] = close(gradients(lambda t: checkpoint(two, t, use_reentrant=False), two), plain, 0.0)
    right["only x"] = close(gradients(two, two, "x"), plain[:2], 0.0)
    right["only weights"] = close(gradients(two, two, "weights"), [plain[0], *plain[2:]], 0.0)
    y = two(leaf := x.clone().requires_grad_())
    found = [torch.autograd.grad(y.sum(), [leaf, *two.parameters()], retain_graph=again) for again in (True, False)]
    right["twice"] = close(*found, 0.0)
    with torch.autocast(DEVICE, torch.bfloat16):
        right["autocast"] = close(gradients(two, two), gradients(one, one), 2e-2)
    one.eval(), two.eval()
    with torch.inference_mode():
        right["inference mode"] = close([two(x)], [one(x)], 1e-5)
    frozen = two.requires_grad_(False)
    right["frozen weights"] = close(gradients(frozen, two, "x")[1:], gradients(one, one, "x")[1:], 1e-5)
    for layout in ("position", "batch"):
        found = []
        for layer in (one, two):
            cache = tlm.KVCache({"num_layers": 1, "num_kv_heads": 4, "head_dim": 4}, mesh(grid), layout=layout)
            with torch.no_grad():
                found.append([layer(x[:, rows], cache=cache.layers[0]) for rows in (slice(0, 9), slice(9, 16))])
        right[f"cache by {layout}"] = close(found[1], found[0], 1e-5)
    return right


@pytest.mark.parametrize("scheme", ["slices", "sequence", "batch"])
def test_other_ways_of_use(pool, scheme):
    """E. Localises: chunks where a call is made again, in another dtype, for part of its gradients, or with a cache."""
    for right in pool.run(other_ways, 4, (2, 2), scheme, timeout=120):
        assert all(right.values()), right


def compiled(grid, scheme: str, overlap: int, dynamic: bool | None) -> tuple[int, float]:
    torch.manual_seed(0)
    options = {"mesh": mesh(grid), "scheme": scheme, "rope": HALF, "overlap": overlap}
    layer = tlm.TwoLevelAttention(32, 8, 4, dtype=torch.float64, **options)
    return compiled_over_lengths(layer, 32, dynamic, lengths=(4, 8, 12, 24))


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheme, dynamic",
    [("sequence", None), ("slices", None), ("slices", True), ("sequence", True)],
)
def test_compiled(pool, scheme, dynamic):
    """E. Localises: chunks that cannot be traced, or that make graphs of their own."""
    without = pool.run(compiled, 4, (2, 2), scheme, 1, dynamic, timeout=180)
    chunked = pool.run(compiled, 4, (2, 2), scheme, 2, dynamic, timeout=180)
    for (count, _), (count_2, error) in zip(without, chunked, strict=True):
        assert count_2 <= count and error <= 1e-10


def refusals(grid) -> list[str]:
    build = {"embed_dim": 16, "num_heads": 4, "batch_first": True, "mesh": mesh(grid)}
    other = tlm.TwoLevelMultiheadAttention(**build, overlap=2 if torch.distributed.get_rank() == 1 else 1)
    x = torch.randn(2, 8, 16)
    encoder = torch.nn.TransformerEncoderLayer(16, 4)
    return [
        *(text_of(tlm.TwoLevelMultiheadAttention, **build, overlap=overlap) for overlap in (0, -1, 2.0, True)),
        text_of(tlm.TwoLevelAttention, 16, 4, mesh=mesh(grid), overlap=0),
        text_of(tlm.parallelize, encoder, mesh(grid), overlap=0),
        text_of(tlm.plan, embed_dim=16, num_heads=4, devices=4, batch=1, seq=1, overlap=0),
        text_of(other, x, x, x),
    ]


def test_refusals(pool):
    """Bad use gets one sentence, the same on every rank. Localises: a check that one rank alone makes."""
    every = pool.run(refusals, 4, (2, 2))
    for texts in every:
        assert texts == every[0]
    *wrong, differs = every[0]
    for text, given in zip(wrong, ("0", "-1", "2.0", "True", "0", "0", "0"), strict=True):
        assert f"overlap must be a number of chunks from 1 (off) to 1024, or None (as predicted), got {given}" in text
    assert "overlap differs between ranks of the grid: 1 on rank 0, 2 on rank 1" in differs


def fast(**other) -> tlm.Profile:
    """Hardware that computes for as long as it sends."""
    rates = {"flops": 10**12, "memory": 10**12, "link": 10**10, "network": 10**10, "latency_ns": 10_000}
    rates |= {"node_ranks": 1, "padded_head_dim": 0, "source": "made up", "hidden_percent": 100}
    return tlm.Profile(name="fast", **(rates | other))


SIZES = {"embed_dim": 1024, "num_heads": 16, "devices": 4, "batch": 8, "seq": 128, "dtype": torch.float32}


def test_predicted_time():
    """Localises: what is taken for hidden: n chunks hide (n - 1) / n of the shorter of computing and sending."""
    times = {}
    for overlap in (1, 2, 4):
        plan = tlm.plan(**SIZES, overlap=overlap, profile=fast())
        times[overlap] = next(o for o in plan.options if (o.grid, o.scheme) == ((1, 4), "slices")).predicted_seconds
    assert times[1]["hidden"] == 0
    assert times[2]["hidden"] > 0 and times[4]["hidden"] == pytest.approx(times[2]["hidden"] * 1.5, rel=1e-3)
    assert times[4]["latency"] == pytest.approx(4 * times[1]["latency"])
    for seconds in times.values():
        parts = sum(seconds[name] for name in ("compute", "memory", "sending", "latency"))
        assert seconds["total"] == pytest.approx(parts - seconds["hidden"])


def test_the_planner_picks():
    """Localises: overlap=None: off without gain, else the fastest number of chunks, said with its reason; what scheme
    "auto" decides by.
    """
    gains = tlm.plan(**SIZES, profile=fast())
    assert gains.pick.overlap > 1 and f"{gains.pick.overlap} chunks of the batch overlap" in gains.why
    assert "chunks" in str(gains) and gains.to_dict()["options"][0]["overlap"] >= 1
    totals = [
        tlm.plan(**SIZES, profile=fast(), overlap=overlap).pick.predicted_seconds["total"] for overlap in (1, 2, 4, 8)
    ]
    assert gains.pick.predicted_seconds["total"] == pytest.approx(min(totals))
    for profile in (fast(hidden_percent=0), fast(latency_ns=10**8)):
        off_ = tlm.plan(**SIZES, profile=profile)
        assert all(option.overlap == 1 for option in off_.options)
        assert "Nothing overlaps: no number of chunks is predicted to be faster" in off_.why
    assert tlm.plan(**SIZES, decode=True, profile=fast()).pick.overlap == 1  # one exchange of one token


def counted(grid, profile) -> int:
    layer = tlm.TwoLevelMultiheadAttention(64, 8, batch_first=True, mesh=mesh(grid), profile=profile, scheme="slices")
    x = torch.randn(8, 64, 64)
    with torch.no_grad():
        for _ in range(2):
            with record_collectives() as record:
                layer(x, x, x, need_weights=False)
    return len(record.calls)


def test_a_layer_overlaps_as_predicted(pool):
    """Localises: a layer that takes another number of chunks than the planner names for it."""
    for profile in (fast(latency_ns=0), fast(latency_ns=10**8), None):
        rates = profile or tlm.Profile.for_device(DEVICE)
        plan = tlm.plan(
            embed_dim=64, num_heads=8, devices=4, batch=8, seq=64, causal=False, bias=True, dtype=torch.float32,
            profile=rates,
        )  # fmt: skip
        option = next(one for one in plan.options if (one.grid, one.scheme) == ((1, 4), "slices"))
        assert (option.overlap > 1) == (profile is not None and profile.latency_ns == 0)
        assert set(pool.run(counted, 4, (1, 4), profile)) == {option.collectives()}


def gathered_often(count: int) -> int:
    """Calls in which several all-gathers of a group are under way at once."""
    layer = tlm.TwoLevelMultiheadAttention(
        256, 4, bias=False, batch_first=True, mesh=mesh((2, 2)), scheme="slices", overlap=8
    )
    x = torch.randn(16, 16, 256)
    with torch.no_grad():
        for _ in range(count):
            layer(x, x, x, need_weights=False)
    return count


@pytest.mark.slow
def test_gathers_at_once():
    """In ranks of their own, which it may end. Localises: an all-gather by an operator of which Gloo cannot run two at
    once: memory is written to after it was freed, and one of some hundred calls aborts.
    """
    with closing(Pool()) as ranks:
        assert set(ranks.run(gathered_often, 4, 1500, timeout=240)) == {1500}
