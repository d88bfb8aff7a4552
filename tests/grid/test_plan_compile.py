"""scheme="auto" under torch.compile, over lengths at which its choice changes."""

import pytest
import torch
from harness.device import DEVICE
from torch._dynamo.testing import CompileCounterWithBackend

import two_level_mha as tlm

SIZES = {"embed_dim": 64, "num_heads": 4, "batch": 4}
LENGTHS = (5, 12, 33, 64, 100, 256, 1024)


def chosen(length):
    plan = tlm.plan(**SIZES, devices=4, seq=length, causal=False, dtype=torch.float32, device_type=DEVICE)
    return next(option.scheme for option in plan.options if option.grid == (2, 2) and option.auto)


def compiled_over_lengths():
    """Graphs, and the largest difference from eager, for a module with scheme="auto"."""
    torch._dynamo.reset()
    mesh = tlm.init_mesh(DEVICE, (2, 2))
    layer = tlm.TwoLevelMultiheadAttention(64, 4, batch_first=True, mesh=mesh).eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    error = 0.0
    with torch.no_grad():
        for length in LENGTHS:
            x = torch.randn(4, length, 64)
            ours, eager = (call(x, x, x, need_weights=False)[0] for call in (compiled, layer))
            error = max(error, (ours - eager).abs().max().item())
    return counter.frame_count, error


@pytest.mark.slow
def test_auto_compiles_a_graph_for_each_choice(pool):
    """Localises: a price that guards on a length more often than the choice changes."""
    assert len({chosen(length) for length in LENGTHS}) >= 2
    for graphs, error in pool.run(compiled_over_lengths, 4, timeout=400):
        assert graphs <= 4
        assert error <= 1e-5
