"""Modules on grids whose slices do not divide head_dim, against stock and the reference in float64 (level T).

With tests/grid/test_uneven_slices.py green a failure is in the modules: how parameters are stored, gathered, loaded.
"""

from dataclasses import replace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from harness import cached, two_level_attention
from harness.calls import EMBED, Call, mesh, off, stock_layer, text_of
from harness.compiled import compiled_over_lengths
from harness.two_level_attention import HALF, PAIRS, Decoder

import two_level_mha as tlm
from two_level_mha.blocks import full_tensor

GRIDS = [(1, 3), pytest.param((2, 3), marks=pytest.mark.slow), (1, 7)]

# head_dim is 4: on 3 slices 2 2 0, on 7 four of one column and three empty ones
CALLS = {
    "self, weights": Call(),
    "widths, each head's weights": Call({"kdim": 6, "vdim": 10, "batch_first": True}, keys=7, average=False),
    "both extra keys": Call({"add_bias_kv": True, "add_zero_attn": True}, keys=7, attn_mask="float3", padding="float"),
    "causal": Call(attn_mask="causal", is_causal=True, need_weights=False),
    "no bias, empty row": Call({"bias": False}, attn_mask="bool3", empty_row=True, need_weights=False),
    "no sequence": Call(batch=0),
}
SCHEMES = ("auto", "slices", "sequence", "batch", "weights")
COMBINES = ("reduce", "concat")


def stock_contract(grid) -> list[str]:
    return [
        f"{name}, {scheme}: {found}"
        for at, (name, call) in enumerate(CALLS.items())
        for number, scheme in enumerate(SCHEMES)
        if (found := off(call, grid, scheme=scheme, combine=COMBINES[(at + number) % 2]))
    ]


@pytest.mark.parametrize("grid", GRIDS)
def test_multihead(pool, grid):
    """T. Localises: nn.MultiheadAttention's contract with narrow and empty slices, gathered gradients among it."""
    for failed in pool.run(stock_contract, grid[0] * grid[1], grid, timeout=240):
        assert not failed, "\n".join(failed)


DECODERS = {
    "biases, rope": Decoder(length=9, options={"bias": True, "rope": HALF}),
    "interleaved and partial rope": Decoder(head_dim=16, options={"bias": "qkv", "rope": PAIRS, "qk_norm": 1e-3}),
    "softcap, bias mask": Decoder(mask="bias", options={"softcap": 1.5, "rope": HALF, "dropout": 0.4}),
    "window": Decoder(batch=3, length=11, options={"window": 3, "rope": HALF}),
}


def decoders_off(grid) -> list[str]:
    n, m = grid
    return [
        f"{name}, {scheme}: {found}"
        for at, (name, case) in enumerate(DECODERS.items())
        for number, scheme in enumerate((*SCHEMES, "heads"))
        if (
            found := two_level_attention.off(
                replace(case, heads=2 * m * n, kv_heads=2 * n if scheme != "heads" else n),
                grid, scheme=scheme, combine=COMBINES[(at + number) % 2],
            )
        )
    ]  # fmt: skip


@pytest.mark.parametrize("grid", GRIDS)
def test_decoder(pool, grid):
    """T. Localises: norms and rotary that see a part of a head, heads that are dealt whole beside narrow slices."""
    for failed in pool.run(decoders_off, grid[0] * grid[1], grid, timeout=240):
        assert not failed, "\n".join(failed)


PLANS = {
    "prefill, decode, chunk": cached.Plan(),
    "ranks without a position at first": cached.Plan((1, 1, 2, 1, 1, 1), combine="concat"),
    "window and padding": cached.Plan((6, 1, 3, 1), window=4, padding=True),
}


def caches_off(grid) -> list[str]:
    n, m = grid
    failed = []
    for name, plan in PLANS.items():
        for layout in ("position", "batch"):
            for scheme in ("slices", "heads"):
                plan = replace(plan, layout=layout, scheme=scheme, heads=2 * n * m, kv_heads=n)
                errors = {"values": cached.off(plan, grid), **cached.gradients_off(plan, grid)}
                failed += [f"{name}, {layout}, {scheme}: {at} {x}" for at, x in errors.items() if not x <= 1e-10]
    return failed


@pytest.mark.parametrize("grid", GRIDS)
def test_cache(pool, grid):
    """T. Localises: partial results merged in slices of other widths, or sequences that move with padded columns."""
    for failed in pool.run(caches_off, grid[0] * grid[1], grid, timeout=240):
        assert not failed, "\n".join(failed)


CALL = Call({"add_bias_kv": True, "kdim": 6, "vdim": 10, "batch_first": True})


def trained(grid, seed: int) -> tuple[tlm.TwoLevelMultiheadAttention, torch.optim.AdamW]:
    layer = tlm.TwoLevelMultiheadAttention.from_torch(stock_layer(CALL, seed), mesh(grid))
    torch.manual_seed(2)
    optimizer = torch.optim.AdamW(tlm.param_groups(layer), lr=1e-2)
    for _ in range(2):
        norms = step(layer, optimizer)
    return layer, optimizer, norms


def step(layer, optimizer) -> list[float]:
    """A step of training; the norms of its gradients."""
    q, k, v = (torch.randn(2, 5, width, dtype=torch.float64) for width in (EMBED, 6, 10))
    optimizer.zero_grad()
    layer(q, k, v)[0].square().sum().backward()
    norms = [tlm.clip_grad_norm_(layer.parameters(), 0.5, order).item() for order in (2.0, float("inf"))]
    optimizer.step()
    return norms


def values(layer, optimizer) -> dict[str, torch.Tensor]:
    """Whole parameters and whole moments by name."""
    found = {name: full_tensor(p).clone() for name, p in layer.named_parameters()}
    for name, p in layer.named_parameters():
        found |= {f"{name}/{key}": full_tensor(x).clone() for key, x in optimizer.state[p].items()}
    return found


def saved(grid, directory: str) -> tuple:
    layer, optimizer, norms = trained(grid, 0)
    found = values(layer, optimizer)
    if grid is not None:
        dcp.save({"model": layer.state_dict()}, checkpoint_id=f"{directory}/dcp")
        tlm.save(f"{directory}/ours", layer, optimizer, step=3)
        stock = tlm.full_state_dict(layer)
        assert not stock or stock["out_proj.weight"].shape == (EMBED, EMBED)
    return found, norms


def loaded(grid, directory: str) -> list[dict[str, torch.Tensor]]:
    found = []
    for how in ("dcp", "ours"):
        layer, optimizer, _ = trained(grid, 7)
        if how == "ours":
            assert tlm.load(f"{directory}/ours", layer, optimizer).step == 3
            found.append(values(layer, optimizer))
        else:
            state = {"model": layer.state_dict()}
            dcp.load(state, checkpoint_id=f"{directory}/dcp")
            layer.load_state_dict(state["model"])
            found.append({name: full_tensor(p).clone() for name, p in layer.named_parameters()})
        step(layer, optimizer)  # its ranks have read in one piece, in several or in none
    return found


@pytest.mark.parametrize("grids", [((2, 3), (2, 2)), ((1, 7), (2, 3)), ((2, 2), (1, 7))])
def test_training_and_checkpoints(pool, tmp_path, grids):
    """T: two steps as in one process, norms of the gradients among them; E: all of it on another grid.

    Localises: AdamW or clipping on empty blocks; shards of other widths, or none, in a checkpoint.
    """
    first, second = grids
    expected, norms = saved(None, "")
    results = pool.run(saved, first[0] * first[1], first, str(tmp_path), timeout=120)
    for found, own in results:
        assert own == pytest.approx(norms, rel=1e-10)
        assert all((found[name] - x).abs().max() <= 1e-10 for name, x in expected.items())
    for both in pool.run(loaded, second[0] * second[1], second, str(tmp_path), timeout=120):
        for found in both:
            assert "q_weight" in found
            assert all(torch.equal(x, results[0][0][name]) for name, x in found.items())


def split_activations(grid) -> list[str]:
    case = Decoder(batch=3, length=13, options={"qk_norm": 1e-3, "rope": HALF, "bias": True})
    cases = [
        (activations, scheme, combine)
        for activations in ("sequence", "batch")
        for scheme in SCHEMES
        for combine in COMBINES
    ]
    names = ("activations", "scheme", "combine")
    return [
        f"{options}: {found}"
        for options in cases
        if (found := two_level_attention.off(case, grid, **dict(zip(names, options, strict=True))))
    ]


@pytest.mark.parametrize("grid", GRIDS)
def test_split_activations(pool, grid):
    """T. Localises: parts of X and Y beside narrow slices, chunks of the batch among them."""
    for failed in pool.run(split_activations, grid[0] * grid[1], grid, timeout=240):
        assert not failed, "\n".join(failed)


def overlapped(grid) -> list[str]:
    case = Decoder(batch=12, length=9, options={"rope": HALF, "bias": True})
    return [
        f"{scheme}, {overlap}: {found}"
        for scheme in SCHEMES
        for overlap in (2, 3)
        if (found := two_level_attention.off(case, grid, scheme=scheme, overlap=overlap))
    ]


def test_overlap(pool):
    """T. Localises: chunks of the batch whose exchanges are filled up."""
    for failed in pool.run(overlapped, 3, (1, 3), timeout=240):
        assert not failed, "\n".join(failed)


def compiled(grid, scheme: str) -> tuple[int, float]:
    torch.manual_seed(0)
    layer = tlm.TwoLevelAttention(12, 8, 4, 8, dtype=torch.float64, mesh=mesh(grid), scheme=scheme, rope=tlm.Rotary())
    return compiled_over_lengths(layer, 12, True, lengths=(16, 24, 33))  # two rows a chunk or more


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["slices", "sequence"])
def test_compile(pool, scheme):
    """T. Localises: a guard on the width of a slice, a graph break, an empty block while tracing."""
    for graphs, error in pool.run(compiled, 7, (1, 7), scheme, timeout=400):
        assert graphs <= 2 and error <= 1e-10


def watched(grid) -> int:
    torch.manual_seed(0)
    layer = tlm.TwoLevelMultiheadAttention(16, 4, batch_first=True, mesh=mesh(grid))
    optimizer = torch.optim.AdamW(tlm.param_groups(layer), lr=1e-2)
    with tlm.verify(layer, optimizer, every=1) as handle:
        for _ in range(3):
            optimizer.zero_grad()
            x = torch.randn(2, 5, 16)
            layer(x, x, x)[0].square().sum().backward()
            optimizer.step()
    return handle.step


def test_verify(pool):
    """Localises: checksums of blocks that have nothing."""
    assert pool.run(watched, 7, (1, 7)) == [3] * 7


def sharded(grid) -> list[str]:
    layer = tlm.TwoLevelMultiheadAttention(32, 4, mesh=mesh(grid))
    return [text_of(tlm.shard_embed_dim, p) for p in (layer.q_weight, layer.out_weight, layer.out_bias)]


def test_fully_shard_of_nothing(pool):
    """Localises: ranks with an empty slice that fail in torch while the others wait."""
    for texts in pool.run(sharded, 7, (1, 7)):
        assert all("7 slices of 8 columns leave some without any" in text for text in texts[:2])
        assert texts[2] == "no error"
    assert pool.run(sharded, 3, (1, 3)) == [["no error"] * 3] * 3
