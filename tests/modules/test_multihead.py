"""TwoLevelMultiheadAttention keeps nn.MultiheadAttention's whole contract: against stock's train-mode path in
float64 (level T), values and gradients, in one process and on real Gloo grids.
"""

import random
from dataclasses import replace

import pytest
import torch
from harness.calls import EMBED, FLOAT64, GRIDS, HEADS, Call, everything, make_inputs, mesh, off, on_ranks, stock_layer
from harness.device import DEVICE
from torch.utils.checkpoint import checkpoint

import two_level_mha as tlm
from two_level_mha.blocks import full_tensor

CALLS = {
    "self": Call(),
    "no weights": Call(need_weights=False),
    "each head's weights": Call(average=False),
    "batch first": Call({"batch_first": True}, keys=7),
    "cross": Call(keys=7, need_weights=False),
    "widths": Call({"kdim": 6, "vdim": 10}, keys=7),
    "width of keys": Call({"kdim": 6, "batch_first": True}, keys=7, need_weights=False),
    "no bias": Call({"bias": False}),
    "no bias, widths": Call({"bias": False, "kdim": 6, "vdim": 10, "add_bias_kv": True}, keys=7),
    "bias_kv": Call({"add_bias_kv": True}, attn_mask="bool2"),
    "zero key": Call({"add_zero_attn": True}, padding="bool", average=False),
    "both extra keys": Call({"add_bias_kv": True, "add_zero_attn": True}, keys=7, attn_mask="float3", padding="float"),
    "both extra keys, no weights": Call(
        {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True}, attn_mask="bool3", need_weights=False
    ),
    "bool masks": Call(keys=7, attn_mask="bool2", padding="bool"),
    "bool mask of each head": Call(keys=7, attn_mask="bool3", average=False),
    "float mask": Call(attn_mask="float2", need_weights=False),
    "float mask of each head": Call(keys=7, attn_mask="float3", padding="float", need_weights=False),
    "mixed masks": Call(attn_mask="float2", padding="bool"),
    "mixed masks, the other way": Call(attn_mask="bool2", padding="float", need_weights=False),
    "causal": Call(attn_mask="causal", is_causal=True),
    "causal, no weights": Call(attn_mask="causal", is_causal=True, need_weights=False),
    "causal and padding": Call(attn_mask="causal", padding="bool", is_causal=True, need_weights=False),
    "float causal": Call(attn_mask="float causal", is_causal=True),
    "unbatched": Call(batch=None),
    "unbatched, batch first, masks": Call({"batch_first": True}, None, keys=7, attn_mask="bool3", padding="bool"),
    "unbatched, no weights": Call(batch=None, keys=7, attn_mask="float2", need_weights=False),
    "empty row, weights": Call(attn_mask="bool2", empty_row=True),
    "empty row, no weights": Call(attn_mask="bool3", empty_row=True, need_weights=False),
    "no sequence in the batch": Call(batch=0),
    "no query": Call(length=0, keys=7),
    "no query, no weights": Call({"batch_first": True}, length=0, keys=7, need_weights=False),
    "one query": Call(length=1, keys=5, need_weights=False),
}


def random_call(seed: int) -> Call:
    """Any legal combination."""
    rng = random.Random(seed)
    flags = {name: rng.random() < 0.4 for name in ("batch_first", "add_bias_kv", "add_zero_attn")}
    keys = rng.choice([None, 1, 6, 9])
    widths = {"kdim": rng.choice([None, 6]), "vdim": rng.choice([None, 10])} if keys else {}
    mask = rng.choice([None, "bool2", "bool3", "float2", "float3"])
    return Call(
        {**flags, **widths, "bias": rng.random() < 0.7}, batch=rng.choice([None, 1, 4]), length=rng.choice([1, 5, 8]),
        keys=keys, attn_mask=mask, padding=rng.choice([None, "bool", "float"]) if keys != 1 else None,
        need_weights=rng.random() < 0.5, average=rng.random() < 0.5,
    )  # fmt: skip


COMBINATIONS = {f"combination {seed}": random_call(seed) for seed in range(40)}


def contract(grid, calls: dict[str, Call], options: list[dict]) -> list[str]:
    return [
        f"{name}, {option}: {found}"
        for name, call in calls.items()
        for option in options
        if (found := off(call, grid, **option))
    ]


SLICES, SEQUENCE = {"scheme": "slices"}, {"scheme": "sequence", "combine": "concat"}


@pytest.mark.parametrize(
    ("grid", "options"), [(None, [{}]), ((2, 2), [SLICES, SEQUENCE]), ((1, 4), [SEQUENCE]), ((4, 2), [SLICES])]
)
def test_stock_contract(pool, grid, options):
    """A failure names the feature; in one process it is the masks or the layouts, on a grid only the pass."""
    for failed in on_ranks(pool, contract, grid, CALLS, options):
        assert not failed, "\n".join(failed)


@pytest.mark.parametrize("grid", [None, (2, 2)])
def test_combinations(pool, grid):
    """Features that work alone and not together."""
    for failed in on_ranks(pool, contract, grid, COMBINATIONS, [{}]):
        assert not failed, "\n".join(failed)


# -- Keys that are not there, rows that see nothing


def no_keys(grid) -> list[float]:
    found = []
    for need_weights in (False, True):
        for batch_first in (False, True):
            call = Call({"batch_first": batch_first}, keys=0, need_weights=need_weights)
            stock = stock_layer(call)
            results = everything(tlm.TwoLevelMultiheadAttention.from_torch(stock, mesh(grid)), call)
            assert results["y"].shape == ((3, 5, EMBED) if batch_first else (5, 3, EMBED))
            assert not need_weights or results["weights"].shape == (3, 5, 0)
            found.append((results["y"] - stock.out_proj.bias).abs().max().item())
            found += [results[f"d {name}"].abs().sum().item() for name in ("query", "q_weight", "v_weight")]
    return found


@pytest.mark.parametrize("grid", [None, (2, 2)])
def test_no_keys_gives_the_output_bias(pool, grid):
    """E. Localises: S = 0: the shape of the weights, and gradients that would be NaN."""
    for found in on_ranks(pool, no_keys, grid):
        assert max(found) == 0.0


@pytest.mark.parametrize("training", [True, False])
def test_empty_row_without_weights_is_the_output_bias(training):
    """E. Localises: rows that see nothing: the bias alone, and NaN with weights, as stock's math path."""
    call = Call(attn_mask="bool2", empty_row=True, need_weights=False)
    stock = stock_layer(call)
    ours = tlm.TwoLevelMultiheadAttention.from_torch(stock).train(training)
    (x,), mask, _ = make_inputs(call, stock)
    with torch.no_grad():
        y, weights = ours(x, x, x, attn_mask=mask, need_weights=False)
        assert weights is None and torch.equal(y[1], stock.out_proj.bias.expand(3, EMBED))
        assert ours(x, x, x, attn_mask=mask)[0][1].isnan().all()


def test_padding_that_hides_every_key():
    """A wholly padded sequence touches only itself."""
    call = Call({"batch_first": True}, need_weights=False)
    stock = stock_layer(call)
    x = torch.randn(3, 5, EMBED, **FLOAT64)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1] = True
    ours = tlm.TwoLevelMultiheadAttention.from_torch(stock)
    for mask in (padding, torch.zeros(3, 5, **FLOAT64).masked_fill(padding, float("-inf"))):
        results = [layer(x, x, x, key_padding_mask=mask, need_weights=False)[0] for layer in (stock, ours)]
        torch.testing.assert_close(*results, rtol=0, atol=1e-10)


# -- Dropout


def dropped(grid, p: float) -> list[dict]:
    """Every result with dropout, for need_weights on and off, from one seed."""
    found = []
    for need_weights in (True, False):
        call = Call({"dropout": p}, keys=7, need_weights=need_weights, average=False)
        for scheme in ("slices", "sequence"):
            torch.manual_seed(0)
            layer = tlm.TwoLevelMultiheadAttention.from_torch(stock_layer(call), mesh(grid), scheme=scheme)
            found.append(everything(layer, call))
    return found


@pytest.mark.parametrize("grid", GRIDS[1:])
def test_dropout_is_the_same_on_every_grid(pool, grid):
    """The mask belongs to (batch, head, row, column), not to the rank."""
    expected = dropped(None, 0.5)
    assert (expected[0]["weights"] == 0).any()
    for found in on_ranks(pool, dropped, grid, 0.5):
        for ours, one in zip(found, expected, strict=True):
            for name in one:
                torch.testing.assert_close(ours[name], one[name], rtol=0, atol=1e-10, msg=name)


def test_dropout_statistics():
    """Half of the weights survive, doubled; another call drops others; eval drops none."""
    torch.manual_seed(0)
    layer = tlm.TwoLevelMultiheadAttention(EMBED, HEADS, dropout=0.5, **FLOAT64)
    x = torch.randn(64, 8, EMBED, **FLOAT64)
    first, second = (layer(x, x, x, average_attn_weights=False)[1] for _ in range(2))
    kept = layer.eval()(x, x, x, average_attn_weights=False)[1]
    for weights in (first, second):
        alive = weights != 0
        assert abs(alive.double().mean().item() - 0.5) < 5 * 0.5 / weights.numel() ** 0.5
        torch.testing.assert_close(weights[alive], 2 * kept[alive])
    assert 0.45 < ((first != 0) == (second != 0)).double().mean().item() < 0.55
    assert (kept != 0).all()


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_of_everything(need_weights):
    """p = 1 is the output bias, with finite gradients."""
    layer = tlm.TwoLevelMultiheadAttention(EMBED, HEADS, dropout=1.0, **FLOAT64)
    x = torch.randn(5, 3, EMBED, **FLOAT64, requires_grad=True)
    y, _ = layer(x, x, x, need_weights=need_weights)
    y.sum().backward()
    assert torch.equal(y, layer.out_bias.expand_as(y)) and torch.equal(x.grad, torch.zeros_like(x))


def recomputed(grid) -> list[float]:
    call = Call({"dropout": 0.5})
    layer = tlm.TwoLevelMultiheadAttention.from_torch(stock_layer(call), mesh(grid))
    results = []
    for recompute in (False, True):
        torch.manual_seed(3)
        x = torch.randn(5, 3, EMBED, **FLOAT64, requires_grad=True)
        layer.zero_grad()
        y, _ = checkpoint(layer, x, x, x, use_reentrant=False) if recompute else layer(x, x, x)
        y.square().sum().backward()
        results.append([y, x.grad, full_tensor(layer.q_weight.grad), full_tensor(layer.out_weight.grad)])
    return [(a - b).abs().max().item() for a, b in zip(*results, strict=True)]


@pytest.mark.parametrize("grid", [None, (2, 2)])
def test_activation_checkpointing_redraws_the_same_dropout(pool, grid):
    """E. Localises: a dropout seed that is not drawn from torch's generator, which checkpointing restores."""
    for found in on_ranks(pool, recomputed, grid):
        assert max(found) == 0.0


# -- Low precision


def rounding(grid, dtype, need_weights, autocast) -> list[tuple[str, float, float]]:
    """Relative L2 errors of ours and of stock against float64, and whether dtypes agree."""
    exact_call = Call(length=33, need_weights=need_weights)
    call = exact_call if autocast else replace(exact_call, dtype=dtype)
    if autocast:
        call = replace(call, dtype=torch.float32)
    exact = everything(stock_layer(exact_call), exact_call)
    stock = stock_layer(call)
    ours = tlm.TwoLevelMultiheadAttention.from_torch(stock, mesh(grid))
    with torch.autocast(DEVICE, dtype, enabled=autocast):
        found = [everything(layer, call) for layer in (ours, stock)]
    errors = []
    for name, x in exact.items():
        assert found[0][name].dtype == found[1][name].dtype, name
        if name != "d k_bias":  # zero but for rounding
            errors.append((name, *(((y[name].double() - x).norm() / x.norm()).item() for y in found)))
    return errors


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", [None, (2, 2)])
def test_low_precision(pool, grid, dtype, autocast):
    """Level R, as a module's dtype and under autocast; the dtype of every result is stock's."""
    for need_weights in (True, False):
        for errors in on_ranks(pool, rounding, grid, dtype, need_weights, autocast):
            bad = [error for error in errors if not error[1] <= 2 * error[2]]
            assert not bad, bad
