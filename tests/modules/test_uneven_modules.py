"""Modules on grids whose slices do not divide head_dim, against stock and the reference in float64 (level T).

With tests/grid/test_uneven_slices.py green a failure is in the modules: how parameters are stored, gathered, loaded.
"""

import pytest
import torch
from harness import cached, two_level_attention
from harness.calls import Call, off, stock_layer
from harness.calls import mesh as mesh_of
from harness.two_level_attention import HALF, PAIRS, Decoder

import two_level_mha as tlm

GRIDS = [(1, 3), (2, 3), (1, 7)]

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


def stock_contract(grid) -> list[str]:
    return [
        f"{name}, {scheme}, {combine}: {found}"
        for name, call in CALLS.items()
        for at, scheme in enumerate(SCHEMES)
        for combine in (("reduce", "concat") if name == "causal" else (("reduce", "concat")[at % 2],))
        if (found := off(call, mesh_shape(grid, call), scheme=scheme, combine=combine))
    ]


def mesh_shape(grid, call):
    return grid


@pytest.mark.parametrize("grid", GRIDS)
def test_multihead(pool, grid):
    """T. Localises: nn.MultiheadAttention's contract with narrow and empty slices, gathered gradients among it."""
    for failed in pool.run(stock_contract, grid[0] * grid[1], grid, timeout=240):
        assert not failed, "\n".join(failed)
