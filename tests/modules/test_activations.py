"""Activations that stay split over the grid: the same numbers as with whole ones, whatever the lengths, float64."""

import pytest
import torch
from harness.calls import Call, mesh, off, on_ranks, text_of
from harness.compiled import compiled_over_lengths
from harness.device import DEVICE
from harness.two_level_attention import HALF, Decoder
from harness.two_level_attention import off as decoder_off
from torch.utils.checkpoint import checkpoint

import two_level_mha as tlm
from two_level_mha import _C
from two_level_mha.testing import record_collectives

SPLIT = ("sequence", "batch")
SCHEMES = ("slices", "sequence", "batch", "weights", "independent", "auto")
CALLS = {
    "self": Call(need_weights=False),
    "cross, weights": Call({"batch_first": True}, keys=7),
    "widths, bias_kv, masks": Call(
        {"kdim": 6, "vdim": 10, "add_bias_kv": True}, batch=5, length=9, keys=11, attn_mask="float3", padding="bool"
    ),
    "no bias, causal": Call({"bias": False}, batch=8, length=16, attn_mask="causal", is_causal=True),
    "fewer rows than ranks": Call({"batch_first": True}, batch=2, length=3, need_weights=False),
    "one row": Call(batch=1, length=1, keys=5, need_weights=False),
}
DECODERS = {
    "grouped heads, rope, norm": Decoder(batch=3, length=13, options={"qk_norm": 1e-3, "rope": HALF, "bias": True}),
    "window, dropout": Decoder(batch=4, length=16, options={"window": 3, "dropout": 0.3}),
    "bias mask, softcap": Decoder(mask="bias", batch=2, length=9, options={"softcap": 1.5}),
}


def contract(grid, activations: str, scheme: str, combine: str) -> list[str]:
    options = {"activations": activations, "combine": combine, "scheme": scheme}
    if scheme == "independent":
        found = {}
    else:
        found = {name: off(call, grid, **options) for name, call in CALLS.items()}
        found["unbatched"] = off(Call(batch=None, length=7), grid, **options) if activations == "sequence" else {}
        found |= {name: decoder_off(case, grid, **options) for name, case in DECODERS.items()}
    return [f"{name}: {wrong}" for name, wrong in found.items() if wrong]


@pytest.mark.parametrize("activations", SPLIT)
@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != "independent"])
@pytest.mark.parametrize("grid", [(2, 2), (1, 4), (4, 1)])
def test_as_with_whole_activations(pool, grid, scheme, activations):
    """T, values and every gradient. Localises: the parts' order, their padding, an exchange without its adjoint."""
    for combine in ("reduce", "concat"):
        for failed in on_ranks(pool, contract, grid, activations, scheme, combine):
            assert not failed, "\n".join(failed)


@pytest.mark.slow
@pytest.mark.parametrize("grid", [(2, 1), (1, 2), (2, 4), (1, 8), (4, 4), (2, 8)])
def test_on_more_grids(pool, grid):
    """T. As test_as_with_whole_activations, when only a grid fails."""
    for activations in SPLIT:
        for failed in pool.run(grids_off, grid[0] * grid[1], grid, activations, timeout=500):
            assert not failed, failed


def grids_off(grid, activations: str) -> dict[str, dict]:
    """By scheme, of a decoder that 16 ranks split."""
    case = Decoder(batch=3, length=21, options={"qk_norm": 1e-3, "rope": HALF, "bias": True})
    found = {
        scheme: decoder_off(case, grid, activations=activations, scheme=scheme)
        for scheme in SCHEMES
        if scheme != "independent"
    }
    return {scheme: wrong for scheme, wrong in found.items() if wrong}


def moved_there_and_back(grid) -> list[bool]:
    """Parts against those of the order as it is written down, the whole again, and gradients, for many sizes."""
    n, m = grid
    P, rank = n * m, torch.distributed.get_rank()
    part = rank % m * n + rank // m
    right = []
    for B, L in ((1, 1), (2, 5), (8, 16), (3, 2 * P), (5, 4 * P + 3), (0, 3)):
        x = torch.arange(B * L * 6.0).view(B, L, 2, 3).requires_grad_()
        chunk = -(-L // (2 * P))
        rows = [t * chunk + r for t in (part, 2 * P - 1 - part) for r in range(chunk) if t * chunk + r < L]
        mine = -(-B // P)
        expected = {"sequence": x[:, rows], "batch": x[part * mine : (part + 1) * mine], "replicated": x}
        for activations, of_rank in expected.items():
            for batch_first in (True, False):
                whole = x if batch_first else x.transpose(0, 1)
                own = tlm.shard_activations(whole, activations, mesh(grid), batch_first=batch_first)
                again = tlm.gather_activations(own, activations, mesh(grid), batch_first=batch_first)
                found = own if batch_first else own.transpose(0, 1)
                (dx,) = torch.autograd.grad((again * whole.detach()).sum(), x)
                right += [torch.equal(found, of_rank), torch.equal(again, whole), torch.equal(dx, x.detach())]
                counts = _C.split_sizes(B if activations == "batch" else L, n, m, activations == "sequence")
                dim = 0 if activations == "batch" else 1
                right.append(activations == "replicated" or counts[rank] == of_rank.shape[dim])
    return right


@pytest.mark.parametrize("grid", [(2, 2), (4, 1), (2, 4)])
def test_there_and_back(pool, grid):
    """E. Localises: which rank has which rows or sequences; a gradient that is summed over ranks that have it alike."""
    for right in pool.run(moved_there_and_back, grid[0] * grid[1], grid):
        assert len(right) == 6 * 3 * 2 * 4 and all(right)


def sent(grid, activations: str, combine: str, schemes) -> list[tuple]:
    """Bytes and collectives of a call, forward and backward, and those planned."""
    found = []
    for scheme in schemes:
        options = {"batch_first": True, "scheme": scheme, "combine": combine, "activations": activations}
        layer = tlm.TwoLevelMultiheadAttention(32, 8, bias=False, mesh=mesh(grid), **options)
        for batch, seq in ((8, 16), (3, 13)):
            x = torch.randn(batch, seq, 32)
            part = tlm.shard_activations(x, activations, mesh(grid)).requires_grad_()
            for _ in range(2):  # the ranks compare their inputs in the first call
                with record_collectives() as record:
                    layer(part, part, part, need_weights=False)[0].sum().backward()
            sizes = {"embed_dim": 32, "num_heads": 8, "devices": grid[0] * grid[1], "batch": batch, "seq": seq}
            plan = tlm.plan(
                **sizes, causal=False, dtype=torch.float32, combine=combine, activations=activations, device_type=DEVICE
            )
            option = next(option for option in plan.options if (option.grid, option.scheme) == (grid, scheme))
            seen = (record.sent(backward=False), record.sent(backward=True), len(record.calls))
            collectives = option.collectives() + option.collectives(backward=True)
            found.append((scheme, seen, (option.sent_bytes(), option.sent_bytes(backward=True), collectives)))
    return found


@pytest.mark.parametrize("activations", SPLIT)
@pytest.mark.parametrize("combine", ["reduce", "concat"])
@pytest.mark.parametrize("grid", [(2, 2), (1, 4), (4, 1)])
def test_bytes(pool, grid, combine, activations):
    """E. Localises: a row of the table of csrc/plan/traffic.h for split activations, or what the pass sends."""
    schemes = ("slices", "sequence", "batch", "weights", "independent") if grid[1] > 1 else ("slices",)
    for per_rank in pool.run(sent, 4, grid, activations, combine, schemes):
        for scheme, seen, planned in per_rank:
            assert seen == planned, scheme


def test_tokens_that_stay_where_they_are():
    """Localises: scheme weights moving activations that a rank of one head group has already."""
    sizes = {"embed_dim": 64, "num_heads": 4, "num_kv_heads": 1, "devices": 4, "batch": 8, "seq": 16}
    for activations, moved in (("batch", set()), ("sequence", {"move in"}), ("replicated", {"combine", "dX"})):
        plan = tlm.plan(**sizes, activations=activations, bias=True)
        option = next(one for one in plan.options if (one.grid, one.scheme) == ((1, 4), "weights"))
        found = {row.what for row in option.forward + option.backward}
        # keys and values of all rows; weights, and what is small: the hash, the gradient of a bias
        assert found - {"weights", "output weights", "compared", "output bias gradient"} == moved


def refusals(grid) -> list[str]:
    rank = torch.distributed.get_rank()
    build = {"embed_dim": 16, "num_heads": 4, "batch_first": True, "mesh": mesh(grid)}
    layer = tlm.TwoLevelMultiheadAttention(**build, activations="sequence")
    x = torch.randn(2, 8, 16)
    part = tlm.shard_activations(x, "sequence", mesh(grid))
    longer = torch.cat([part, part[:, :1]], 1) if rank == 2 else part
    other = tlm.TwoLevelMultiheadAttention(**build, activations="batch" if rank == 1 else "sequence")
    mixed = tlm.TwoLevelMultiheadAttention(**build, activations="sequence" if rank == 3 else "replicated")
    by_batch = tlm.TwoLevelMultiheadAttention(**build, activations="batch")
    mask = torch.zeros(part.shape[1], part.shape[1], dtype=torch.bool)
    texts = [
        text_of(tlm.TwoLevelMultiheadAttention, **build, activations="rows"),
        text_of(tlm.shard_activations, x, "rows", mesh(grid)),
        text_of(tlm.shard_activations, x[0, 0], "sequence", mesh(grid)),
        text_of(tlm.gather_activations, longer, "sequence", mesh(grid)),
        text_of(layer, longer, longer, longer),
        text_of(other, part, part, part),
        text_of(mixed, *[part if rank == 3 else x] * 3),
        text_of(by_batch, part[0], part[0], part[0]),
    ]
    try:
        layer(part, part, part, attn_mask=mask)
    except RuntimeError as error:
        texts.append(str(error))
    return texts


def test_refusals(pool):
    """Bad use gets one sentence, the same on every rank. Localises: a check that one rank alone makes."""
    every = pool.run(refusals, 4, (2, 2))
    for texts in every:
        assert texts == every[0]
    name, of_part, dims, gathered, length, other, mixed, unbatched, mask = every[0]
    assert name == of_part == "activations must be one of replicated, sequence, batch, got 'rows'"
    assert dims == "x must have dims for sequences and rows, (B, L, ..), got 1"
    for text in (gathered, length):
        assert "rank 2 of the grid gave (2, 3, 16), where dim 1 of 9 in all must be 2 there" in text
    assert "activations differs between ranks of the grid: sequence on rank 0, batch on rank 1" in other
    assert "activations differs between ranks of the grid: replicated on rank 0, sequence on rank 3" in mixed
    assert "activations='batch' splits sequences, and an unbatched query is one" in unbatched
    assert "attn_mask" in mask and "should be (8, 8)" in mask  # masks are whole


def decoder_pair(grid, activations: str) -> tuple[tlm.TwoLevelAttention, tlm.TwoLevelAttention]:
    """The same layer with whole activations and with split ones."""
    layers = []
    for how in ("replicated", activations):
        torch.manual_seed(0)
        layers.append(tlm.TwoLevelAttention(32, 8, 4, mesh=mesh(grid), activations=how, rope=HALF, dropout=0.1))
    return layers[0], layers[1]


def other_ways(grid, activations: str) -> dict[str, bool]:
    """Of a split layer and a whole one: checkpointed, in bf16 autocast, compiled, decoding with each cache."""
    whole, split = decoder_pair(grid, activations)
    x = torch.randn(8, 32, 32)
    part = tlm.shard_activations(x, activations, mesh(grid))

    def gradients(function, given: torch.Tensor, layer) -> list[torch.Tensor]:
        torch.manual_seed(1)
        given = given.clone().requires_grad_()
        y = function(given)
        torch.autograd.backward(y, torch.ones_like(y))
        grads = [p.grad.full_tensor() for p in layer.parameters()]
        layer.zero_grad()
        found = [y.detach(), given.grad]
        if layer is split:
            found = [tlm.gather_activations(t, activations, mesh(grid)) for t in found]
        return [*found, *grads]

    def close(ours: list[torch.Tensor], others: list[torch.Tensor], error: float) -> bool:
        pairs = zip(ours, others, strict=True)
        return all((a - b).abs().max() <= error * b.abs().max() and a.dtype == b.dtype for a, b in pairs)

    plain = gradients(split, part, split)
    checkpointed = gradients(lambda t: checkpoint(split, t, use_reentrant=False), part, split)
    right = {"plain": close(plain, gradients(whole, x, whole), 1e-5)}
    right["checkpointed"] = all(map(torch.equal, checkpointed, plain))
    with torch.autocast(DEVICE, torch.bfloat16):
        half = gradients(split, part, split), gradients(whole, x, whole)
    right["autocast"] = close(*half, 2e-2) and half[0][0].dtype == torch.bfloat16
    with torch.no_grad(), record_collectives() as single:
        split(part)
    with torch.autocast(DEVICE, torch.bfloat16), torch.no_grad(), record_collectives() as of_halves:
        split(part)
    right["autocast's bytes"] = of_halves.sent(backward=False) < 0.55 * single.sent(backward=False)
    split.eval(), whole.eval()
    with torch.inference_mode():
        right["inference mode"] = close(
            [tlm.gather_activations(split(part), activations, mesh(grid))], [whole(x)], 1e-5
        )
    for layout in ("position", "batch"):
        found = []
        for layer in (whole, split):
            cache = tlm.KVCache({"num_layers": 1, "num_kv_heads": 4, "head_dim": 4}, mesh(grid), layout=layout)
            steps = []
            for rows in (slice(0, 16), slice(16, 17), slice(17, 32)):
                given = x[:, rows] if layer is whole else tlm.shard_activations(x[:, rows], activations, mesh(grid))
                with torch.no_grad():
                    y = layer(given, cache=cache.layers[0])
                steps.append(y if layer is whole else tlm.gather_activations(y, activations, mesh(grid)))
            found.append(torch.cat(steps, 1))
        right[f"cache by {layout}"] = close([found[1]], [found[0]], 1e-5)
    return right


@pytest.mark.parametrize("activations", SPLIT)
def test_other_ways_of_use(pool, activations):
    """E. Localises: split activations where a call is made again, in another dtype, or after others."""
    for right in pool.run(other_ways, 4, (2, 2), activations, timeout=120):
        assert all(right.values()), right


def compiled(grid, activations: str, dynamic: bool | None) -> tuple[int, float]:
    torch.manual_seed(torch.distributed.get_rank())
    options = {"mesh": mesh(grid), "scheme": "slices", "activations": activations, "rope": HALF}
    layer = tlm.TwoLevelAttention(32, 8, 4, dtype=torch.float64, **options)
    return compiled_over_lengths(layer, 32, dynamic, lengths=(4, 8, 12, 16, 24, 64))


@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("activations", SPLIT)
def test_compiled(pool, activations, dynamic):
    """E. Localises: an exchange of parts that cannot be traced, or that is traced for one length. As with whole
    activations dynamic=True starts again where an operator wants a float's number.
    """
    for count, error in pool.run(compiled, 4, (2, 2), activations, dynamic, timeout=180):
        assert count <= 2 and error <= 1e-10
