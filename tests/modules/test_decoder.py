"""TwoLevelAttention against the unsplit reference, float64 (level T): values and every gradient, per scheme and grid.

A failure in test_one_process is in decoder.py or csrc/head; on grids only, in the pass, or in what goes with tokens.
"""

import pytest
import torch
from harness.two_level_attention import HALF, PAIRS, Decoder, off

SCHEMES = ("slices", "sequence", "batch", "heads", "weights", "auto")
FEATURES = {
    "bare": Decoder(),
    "biases, rope, B=1": Decoder(batch=1, length=9, options={"bias": True, "rope": HALF}),
    "qkv bias, interleaved and partial rope": Decoder(options={"bias": "qkv", "rope": PAIRS}),
    "norm, rope, B=5": Decoder(batch=5, options={"qk_norm": 1e-3, "rope": HALF, "bias": "out"}),
    "caller's angles, partial": Decoder(batch=3, given=6, options={"qk_norm": 1e-6}),
    "window, rope": Decoder(batch=3, length=11, options={"window": 3, "rope": HALF}),
    "softcap and scale, bias mask": Decoder(mask="bias", options={"softcap": 1.5, "scale": 0.7, "rope": HALF}),
    "documents": Decoder(mask="documents", batch=3, length=10, options={"rope": HALF, "qk_norm": 1e-6}),
    "left padding": Decoder(mask="left padding", batch=3, options={"rope": HALF, "bias": True}),
    "not causal, empty rows": Decoder(mask="empty rows", is_causal=False, options={"bias": True}),
    "dropout": Decoder(batch=3, options={"dropout": 0.4, "rope": HALF}),
    "one token": Decoder(length=1, options={"rope": HALF, "qk_norm": 1e-6}),
    "dropout in eval": Decoder(training=False, options={"dropout": 0.4}),
}
GRIDS = ((2, 2), (1, 4), (4, 2), (2, 4))
# name -> (grid, case, schemes that its heads admit)
SHAPES = {
    "28 q / 4 kv heads on 8 ranks": ((4, 2), Decoder(heads=28, kv_heads=4), ("slices", "auto")),
    "2 kv heads on 8 ranks": ((2, 4), Decoder(heads=16, kv_heads=2), ("sequence", "heads", "auto")),
    "one head of 512": ((1, 8), Decoder(heads=1, kv_heads=1, head_dim=512), ("slices", "sequence", "weights")),
    "multi-query on 8 ranks": ((1, 8), Decoder(heads=8, kv_heads=1), ("slices", "batch", "heads")),
    "more kv heads than slices": ((1, 4), Decoder(heads=16, kv_heads=8), ("heads",)),
}


def failures(grid, cases: dict[str, Decoder], schemes, combines=("reduce",)) -> list[str]:
    return [
        f"{name}, {scheme}, {combine}: {found}"
        for name, case in cases.items()
        for scheme in schemes
        for combine in combines
        if (found := off(case, grid, scheme=scheme, combine=combine))
    ]


def check(pool, grid, cases, schemes, combines=("reduce",)) -> None:
    for failed in pool.run(failures, grid[0] * grid[1], grid, cases, schemes, combines, timeout=300):
        assert not failed, "\n".join(failed)


def test_one_process():
    """T. Localises: the layer without any exchange; all schemes are one then."""
    assert not failures(None, FEATURES, ["auto"])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("grid", GRIDS[:2])
def test_features(pool, grid, scheme):
    """T. Localises: one feature under one scheme, on four ranks."""
    heads = {"heads": 8 * grid[0], "kv_heads": 2 * grid[0]} if scheme == "heads" else {}
    cases = {name: Decoder(**{**vars(case), **heads}) for name, case in FEATURES.items()}
    check(pool, grid, cases, [scheme], ["concat" if scheme in ("sequence", "heads") else "reduce"])


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("grid", GRIDS)
def test_every_feature(pool, grid, scheme):
    """T. Localises: as above, when it takes eight ranks or the other combine to fail."""
    heads = {"heads": 8 * grid[0], "kv_heads": 2 * grid[0]} if scheme == "heads" else {}
    cases = {name: Decoder(**{**vars(case), **heads}) for name, case in FEATURES.items()}
    check(pool, grid, cases, [scheme], ["reduce", "concat"])


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(pool, shape):
    """T. Localises: heads that the ranks do not divide, fewer key/value heads than ranks, one head."""
    grid, case, schemes = SHAPES[shape]
    options = {"rope": HALF, "qk_norm": 1e-6, "bias": True}
    check(pool, grid, {shape: Decoder(**{**vars(case), "options": options, "batch": 3})}, schemes)


def first_weights(grid) -> list[torch.Tensor]:
    from two_level_mha.blocks import full_tensor

    torch.manual_seed(3)
    layer = Decoder(options={"bias": True, "qk_norm": 1e-6}).layer(grid)
    return [full_tensor(p.detach()) for p in layer.parameters()]


def test_first_weights(pool):
    """E. Localises: the order of drawing: those of four nn.Linear, on every grid."""
    torch.manual_seed(3)
    sizes = ((12, 64), (12, 32), (12, 32), (64, 12))
    q, k, v, o = (torch.nn.Linear(*size, dtype=torch.float64) for size in sizes)
    ones = torch.ones(8, dtype=torch.float64)
    expected = [q.weight, k.weight, v.weight, q.bias, k.bias, v.bias, o.weight, o.bias, ones, ones]
    for found in [first_weights(None), *pool.run(first_weights, 4, (2, 2))]:
        assert len(found) == len(expected)
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x.flatten(), y.flatten())
