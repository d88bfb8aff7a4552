"""torch.compile(fullgraph=True) of the layer: a handful of graphs however many lengths, and the eager numbers."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import two_level_mha as tlm

LENGTHS = (5, 8, 12, 17, 24, 33, 64)


def compiled_over_lengths(n, m, scheme, dynamic, combine="reduce"):
    """Graphs compiled for the seven lengths, and the largest difference from eager in y and in the gradients."""
    torch._dynamo.reset()
    mesh = None if n * m == 1 else tlm.init_mesh("cpu", (n, m))
    torch.manual_seed(0)
    layer = tlm.TwoLevelMultiheadAttention(
        16, 4, batch_first=True, dtype=torch.float64, mesh=mesh, scheme=scheme, combine=combine
    )
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=counter)
    error = 0.0
    for length in LENGTHS:
        x = torch.randn(2, length, 16, dtype=torch.float64)
        results = []
        for call in (layer, compiled):
            leaf = x.clone().requires_grad_()
            y = call(leaf, leaf, leaf, need_weights=False)[0]
            layer.zero_grad()
            y.square().sum().backward()
            weight = layer.q_weight.grad
            weight = weight.to_local() if hasattr(weight, "to_local") else weight
            results.append((y.detach(), leaf.grad, weight.clone()))
        for mine, theirs in zip(*results, strict=True):
            error = max(error, (mine - theirs).abs().max().item())
    return counter.frame_count, error


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
    graphs, error = compiled_over_lengths(1, 1, scheme, dynamic)
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
    results = pool.run(compiled_over_lengths, 4, 2, 2, scheme, dynamic, timeout=300)
    assert [graphs <= most for graphs, _ in results] == [True] * 4, [graphs for graphs, _ in results]
    assert max(error for _, error in results) <= 1e-10


@pytest.mark.slow
def test_four_ranks_concat(pool):
    """Localises: symbolic sizes in the hierarchical all-gather."""
    results = pool.run(compiled_over_lengths, 4, 2, 2, "slices", True, "concat", timeout=300)
    assert [graphs for graphs, _ in results] == [1] * 4
    assert max(error for _, error in results) <= 1e-10
