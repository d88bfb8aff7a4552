"""torch.compile(fullgraph=True) of TwoLevelAttention: a handful of graphs for many lengths, and the eager numbers."""

import pytest
import torch
from harness.calls import mesh
from harness.compiled import LENGTHS, compiled_over_lengths

import two_level_mha as tlm

OPTIONS = {"bias": True, "qk_norm": 1e-6, "rope": tlm.Rotary(dim=4), "window": 4, "softcap": 2.0}


def over_lengths(grid, scheme: str, dynamic: bool | None, lengths=LENGTHS) -> tuple[int, float]:
    torch.manual_seed(0)
    layer = tlm.TwoLevelAttention(12, 8, 4, 8, dtype=torch.float64, mesh=mesh(grid), scheme=scheme, **OPTIONS)
    return compiled_over_lengths(layer, 12, dynamic, lengths=lengths)


@pytest.mark.parametrize("dynamic", [True, None])
def test_one_process(dynamic):
    """Localises: a guard on a size, or a graph break, in decoder.py or csrc/head, without any group.

    dynamic=True makes float options symbolic first, and starts again when an operator wants a number: two graphs.
    """
    graphs, error = over_lengths(None, "auto", dynamic)
    assert graphs <= 2 and error <= 1e-10


@pytest.mark.parametrize("dynamic", [True, False])
def test_layers_that_differ_in_a_float(dynamic):
    """E. Localises: a float option without a guard: compiled alone, a layer would run with another's number."""
    torch._dynamo.reset()
    base = {"softcap": 0.1, "qk_norm": 1e-6, "scale": 1.0, "rope": tlm.Rotary()}
    changes = ({}, {"softcap": 5.0}, {"qk_norm": 1.0}, {"scale": 0.1}, {"rope": tlm.Rotary(2.0)})
    for options in (base | change for change in changes):
        torch.manual_seed(0)
        layer = tlm.TwoLevelAttention(12, 8, 4, 8, dtype=torch.float64, **options)
        x = torch.randn(2, 5, 12, dtype=torch.float64)
        compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=dynamic)
        assert (compiled(x) - layer(x)).abs().max() <= 1e-12, options


def test_four_ranks(pool):
    """Localises: a graph break where angles are dealt to the rows and norms are replicated DTensors."""
    for graphs, error in pool.run(over_lengths, 4, (2, 2), "sequence", None, LENGTHS[:1], timeout=300):
        assert graphs == 1 and error <= 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["slices", "sequence", "heads", "batch"])
def test_four_ranks_over_lengths(pool, scheme):
    """Localises: a guard on a size in the same."""
    for graphs, error in pool.run(over_lengths, 4, (2, 2), scheme, True, timeout=400):
        assert graphs <= 2 and error <= 1e-10
