"""torch.compile(fullgraph=True) of the layer: a handful of graphs however many lengths, and the eager numbers."""

import pytest
import torch
from harness.calls import mesh
from harness.compiled import compiled_over_lengths

import two_level_mha as tlm


def over_lengths(grid, scheme, dynamic, combine="reduce"):
    torch.manual_seed(0)
    layer = tlm.TwoLevelMultiheadAttention(
        16, 4, batch_first=True, dtype=torch.float64, mesh=mesh(grid), scheme=scheme, combine=combine
    )
    return compiled_over_lengths(layer, 16, dynamic, lambda layer, x: layer(x, x, x, need_weights=False)[0])


# None is torch.compile's default: the second length makes it dynamic.
GRAPHS = [
    ("slices", True, 1),
    ("slices", None, 2),
    ("sequence", True, 1),
    ("sequence", None, 2),
    ("auto", None, 4),
]


@pytest.mark.parametrize("scheme, dynamic, most", GRAPHS)
def test_one_process(scheme, dynamic, most):
    """Localises: a guard on a size or a graph break in the module or the ops, without any group."""
    graphs, error = over_lengths(None, scheme, dynamic)
    assert graphs <= most
    assert error <= 1e-10


@pytest.mark.parametrize(
    "scheme, dynamic, most",
    [
        # compiling on four ranks takes 10 to 25 s a row
        pytest.param(*row, marks=[] if row in (GRAPHS[0], GRAPHS[4]) else pytest.mark.slow)
        for row in GRAPHS
    ],
)
def test_four_ranks(pool, scheme, dynamic, most):
    """Localises: the same where exchanges, padding and storage as DTensor take part."""
    results = pool.run(over_lengths, 4, (2, 2), scheme, dynamic, timeout=300)
    assert [graphs <= most for graphs, _ in results] == [True] * 4, [graphs for graphs, _ in results]
    assert max(error for _, error in results) <= 1e-10


@pytest.mark.slow
def test_four_ranks_concat(pool):
    """Localises: symbolic sizes in the hierarchical all-gather."""
    results = pool.run(over_lengths, 4, (2, 2), "slices", True, "concat", timeout=300)
    assert [graphs for graphs, _ in results] == [1] * 4
    assert max(error for _, error in results) <= 1e-10
