"""The collective operators alone: values and gradients by formulas of one process, and the bytes (level E).

Every rank draws all ranks' numbers, small integers, calls the operator with its own, and works out by hand what all
calls give. A gradient is that of the sum of all ranks' losses, or of one, where every rank uses the result alike.
"""

from fractions import Fraction

import pytest
import torch
from harness.calls import EMBED, HEADS, Call, mesh, stock_layer
from harness.layer import grid_arguments, place

import two_level_mha as tlm
from two_level_mha.testing import record_collectives

ops = torch.ops.two_level_mha


def integers(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randint(-4, 5, shape).to(dtype)


def all_gather(xs, dim):
    return [torch.cat(xs, dim)] * len(xs)


def reduce_scatter(xs, dim):
    return list(sum(xs).chunk(len(xs), dim))


def all_to_all(xs, split_dim, cat_dim):
    return [torch.cat([x.chunk(len(xs), split_dim)[rank] for x in xs], cat_dim) for rank in range(len(xs))]


# Formula, arguments, and elements sent forward and backward for x of N elements in a group of g, over (g - 1) N / g.
CASES = {
    "all_gather, first dim": (all_gather, (0,), lambda g: g, lambda g: g),
    "all_gather, last dim": (all_gather, (2,), lambda g: g, lambda g: g),
    "reduce_scatter, first dim": (reduce_scatter, (0,), lambda g: 1, lambda g: 1),
    "reduce_scatter, middle dim": (reduce_scatter, (1,), lambda g: 1, lambda g: 1),
    "all_to_all": (all_to_all, (1, 2), lambda g: 1, lambda g: 1),
    "all_to_all, other way": (all_to_all, (2, 0), lambda g: 1, lambda g: 1),
    "all_to_all, dims from the end": (all_to_all, (-2, -3), lambda g: 1, lambda g: 1),
    "all_to_all, one dim": (all_to_all, (1, 1), lambda g: 1, lambda g: 1),
}


def group_of(grid: tuple[int, int], axis: str) -> tuple[str, int, int]:
    """Name, size, and this rank's number in the slice group or in the whole grid."""
    at = place(*grid)
    if axis == "slice":
        return at.groups[0], at.grid.slices, at.slice
    return at.groups[2], at.grid.size, at.head_group * at.grid.slices + at.slice


def call(case: str, grid: tuple[int, int], axis: str, dtype: torch.dtype) -> list:
    formula, args, *_ = CASES[case]
    group, size, rank = group_of(grid, axis)
    xs = [integers(4, 12, 8, dtype=dtype).transpose(0, 2).requires_grad_() for _ in range(size)]
    expected = formula(xs, *args)
    weights = [integers(*y.shape, dtype=dtype) for y in expected]
    loss = sum((y * w).sum() for y, w in zip(expected, weights, strict=True))
    x = xs[rank].detach().requires_grad_()
    with record_collectives() as record:
        y = getattr(ops, formula.__name__)(x, *args, size, group)
        (y * weights[rank]).sum().backward()
    assert torch.equal(y, expected[rank])
    assert torch.equal(x.grad, torch.autograd.grad(loss, xs[rank])[0])
    return [record.sent(backward=backward) for backward in (False, True)]


@pytest.mark.parametrize(("grid", "axis"), [((2, 2), "slice"), ((2, 2), "grid"), ((1, 4), "slice"), ((2, 1), "slice")])
@pytest.mark.parametrize("case", CASES)
def test_moves(pool, case, grid, axis):
    """Localises: order of pieces, dims, the adjoint, or a collective that sends more than it must."""
    n, m = grid
    size = m if axis == "slice" else n * m
    for dtype in (torch.float64, torch.bfloat16):
        one = Fraction((size - 1) * 4 * 12 * 8 * dtype.itemsize, size)
        expected = [one * factor(size) for factor in CASES[case][2:]]
        assert pool.run(call, n * m, case, grid, axis, dtype) == [expected] * (n * m)


def written(formula: str, args: tuple) -> bool:
    """Whether the result that needs gradients can be written to, and they are right then."""
    group, size, _ = group_of((2, 1), "grid")
    x = integers(4, 12, 8).requires_grad_()
    y = getattr(ops, formula)(x * 1.0, *args, size, group)
    expected = torch.autograd.grad((3 * y).sum(), x, retain_graph=True)[0]
    y.mul_(3)
    return torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)


@pytest.mark.parametrize("case", CASES)
def test_results_are_writable(pool, case):
    """Localises: a function that returns its input, of which autograd makes a view."""
    formula, args, *_ = CASES[case]
    assert pool.run(written, 2, formula.__name__, args) == [True] * 2


def sums(grid: tuple[int, int], axis: str) -> tuple:
    group, size, rank = group_of(grid, axis)
    xs = [integers(3, 5) for _ in range(size)]
    weight, weights = integers(3, 5), [integers(3, 5) for _ in range(size)]
    x = xs[rank].requires_grad_()
    with record_collectives() as record:
        y = ops.all_reduce(x, size, group)
        (y * weight).sum().backward()
    assert torch.equal(y, sum(xs)) and torch.equal(x.grad, weight)
    same = [integers(3, 5).requires_grad_(), integers(2).requires_grad_(), integers(4)]
    with record_collectives() as entered:
        used = ops.replicated(same, size, group)
        (used[0] * weights[rank]).sum().backward()
    assert all(torch.equal(one, other) for one, other in zip(used, same, strict=True))
    assert torch.equal(same[0].grad, sum(weights)) and same[1].grad is None
    return tuple(r.sent(backward=backward) for r in (record, entered) for backward in (False, True))


@pytest.mark.parametrize(("grid", "axis"), [((2, 2), "slice"), ((2, 2), "grid"), ((1, 4), "slice")])
def test_sums(pool, grid, axis):
    """all_reduce, whose gradient is what every rank has already, and `replicated`, which is the other way round."""
    n, m = grid
    size = m if axis == "slice" else n * m
    sent = 2 * (size - 1) * 15 * 8 // size
    assert pool.run(sums, n * m, grid, axis) == [(sent, 0, 0, sent)] * (n * m)


def gather_twice(grid: tuple[int, int], slices_first: bool, replicated: bool) -> tuple[int, int]:
    at = place(*grid)
    n, m = grid
    xs = [[integers(2, 3, 5).requires_grad_() for _ in range(m)] for _ in range(n)]
    whole = torch.cat([torch.cat(row, 2) for row in xs], 0)
    weights = [[integers(*whole.shape) for _ in range(m)] for _ in range(n)]
    weight = weights[0][0] if replicated else weights[at.head_group][at.slice]
    loss = (whole * (weight if replicated else sum(w for row in weights for w in row))).sum()
    x = xs[at.head_group][at.slice].detach().requires_grad_()
    with record_collectives() as record:
        y = ops.hierarchical_all_gather(x, 0, -1, *grid_arguments(at), slices_first, replicated)
        (y * weight).sum().backward()
    assert torch.equal(y, whole)
    assert torch.equal(x.grad, torch.autograd.grad(loss, xs[at.head_group][at.slice])[0])
    return record.sent(backward=False), record.sent(backward=True)


@pytest.mark.parametrize("replicated", [False, True])
@pytest.mark.parametrize("slices_first", [False, True])
@pytest.mark.parametrize("grid", [(2, 2), (2, 4), (1, 4), (4, 1)])
def test_hierarchical_all_gather(pool, grid, slices_first, replicated):
    """Both orders, and both uses of the result: alike on every rank, or each in its own way."""
    n, m = grid
    first, second = (m, n) if slices_first else (n, m)
    sent = 8 * 30 * ((first - 1) + (second - 1) * first)
    expected = (sent, 0 if replicated else sent)
    assert pool.run(gather_twice, n * m, grid, slices_first, replicated) == [expected] * (n * m)


def ceil_to(size: int, m: int) -> int:
    return -(-size // m) * m


def gathered(scheme: str, grid: tuple[int, int], call: Call, average: bool) -> Fraction:
    """Elements that the weights of a call send, forward: (B, h, L, S), or their mean over the heads."""
    n, m = grid
    B, L, S, H, P = call.batch, call.length, call.keys, HEADS // n, n * m
    if scheme == "independent" or scheme == "heads":  # heads of one rank alone: over the whole grid
        local = B * L * S * (H if scheme == "independent" else H // m)
        return Fraction(2 * (P - 1) * B * L * S, P) if average else Fraction((n - 1) * local + (m - 1) * n * local)
    tokens = {"slices": 0, "sequence": B * ceil_to(L, m), "batch": ceil_to(B, m) * L}
    tokens["weights"] = tokens["batch" if B % m == 0 else "sequence"]
    sent = Fraction((m - 1) * H * S * tokens[scheme], m)  # of the slice group: every rank's tokens
    heads = Fraction(2 * (n - 1), n) * B * L * S if average else (n - 1) * B * H * L * S
    return sent + heads


def weights_sent(scheme: str, grid: tuple[int, int], case: Call, average: bool) -> list[int]:
    """Bytes forward and backward of a call with the weights, over those of one without."""
    layer = tlm.TwoLevelMultiheadAttention.from_torch(stock_layer(case), mesh(grid), scheme=scheme)
    q, k, v = (
        torch.randn(length, case.batch, EMBED, dtype=torch.float64) for length in (case.length, *[case.keys] * 2)
    )
    totals = []
    for need_weights in (True, False):
        with record_collectives() as record:
            y, weights = layer(q, k, v, need_weights=need_weights, average_attn_weights=average)
            loss = y.sum() if weights is None else y.sum() + weights.square().sum()
            loss.backward()
        totals.append([record.sent(backward=backward) for backward in (False, True)])
    return [more - less for more, less in zip(*totals, strict=True)]


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize(
    ("scheme", "grid"),
    [
        (scheme, grid)
        for scheme in ("independent", "slices", "sequence", "batch", "heads", "weights")
        for grid in ((2, 2), (4, 2), (1, 4))
        if scheme != "heads" or HEADS // grid[0] % grid[1] == 0
    ],
)
def test_bytes_of_the_weights(pool, grid, scheme, average):
    """Localises: weights gathered where all ranks have them, whole where the mean would do, or in backward too."""
    n, m = grid
    for case in (Call(batch=3, length=5, keys=7), Call(batch=4, length=5, keys=7)):
        expected = [8 * gathered(scheme, grid, case, average), 0]
        assert pool.run(weights_sent, n * m, scheme, grid, case, average) == [expected] * (n * m), case
