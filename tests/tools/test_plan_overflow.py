"""Sizes that do not fit the planner's integers are refused by the price itself, whichever number is too large."""

import itertools

import pytest
import torch

import two_level_mha as tlm

LAYERS = (
    {"embed_dim": 4096, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "devices": 16},
    {"embed_dim": 2**20, "num_heads": 4, "head_dim": 16, "devices": 64, "dtype": torch.float64},
    {"embed_dim": 64, "num_heads": 4, "head_dim": 16, "devices": 1},
)


def numbers(option) -> list[int]:
    sent = [row.bytes + row.bias_bytes for row in option.forward + option.backward]
    return [option.flops, option.weight_bytes, option.activation_bytes, option.cache_bytes, *sent]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: f"{layer['devices']} devices")
@pytest.mark.parametrize("decode", [False, True])
def test_what_is_not_refused_is_right(layer, decode):
    """E. Localises: a product of csrc/plan/ that wraps around at the largest batch that is priced: numbers are linear
    in the batch, so that the last half of it adds as much as the two quarters before it.
    """
    for combine, kind in itertools.product(("reduce", "concat"), ("cuda", "cpu")):

        def options(batch, combine=combine, kind=kind):
            call = {"batch": batch, "seq": 256, "decode": decode, "combine": combine, "device_type": kind}
            return tlm.plan(**layer, **call).options

        most = 1
        with pytest.raises(tlm.GridError, match="too large to price"):
            while True:
                options(2 * most)
                most *= 2
        assert most >= 2**18
        for full, half, quarter in zip(options(most), options(most // 2), options(most // 4), strict=True):
            for f, h, q in zip(numbers(full), numbers(half), numbers(quarter), strict=True):
                assert f - h == 2 * (h - q) >= 0, (most, full)
            seconds = [option.predicted_seconds["total"] for option in (full, half, quarter)]
            assert seconds[0] - seconds[1] == pytest.approx(2 * (seconds[1] - seconds[2])) and seconds[2] > 0


@pytest.mark.parametrize("name", ["embed_dim", "num_heads", "batch", "seq"])
def test_a_layer_of_absurd_sizes(name):
    """Localises: constants of a layer whose product wraps around before anything is multiplied by tokens."""
    sizes = {"embed_dim": 64, "num_heads": 4, "num_kv_heads": 4, "head_dim": 16, "devices": 4, "batch": 1, "seq": 1}
    for size in (2**61, 2**63, 2**70):
        with pytest.raises(tlm.GridError, match="too large to price"):
            tlm.plan(**sizes | {name: size})


def test_grids_of_absurd_layers():
    """Localises: Grid.candidates ordered by prices that wrapped around."""
    with pytest.raises(tlm.GridError, match="ranks=4 with num_heads=4611686018427387904 .* too large to price"):
        tlm.Grid.candidates(4, 2**62, 4, 16)
