"""`x += layer(x)`: inputs that are written to between forward and backward, where every rank holds the same ones."""

import pytest
import torch
from harness.calls import EMBED, HEADS, Call, mesh, stock_layer
from harness.layer import place

import two_level_mha as tlm
from two_level_mha.blocks import full_tensor

SCHEMES = ("auto", "independent", "slices", "sequence", "batch", "heads", "weights")


def outcome(changed, kept, parameters) -> str:
    """raises, right or wrong: gradients of a loss whose input was changed, against those where it was not."""
    try:
        ours = torch.autograd.grad(changed(), parameters)
    except RuntimeError as error:
        return "raises" if "modified by an inplace operation" in str(error) else str(error)
    theirs = torch.autograd.grad(kept(), parameters)
    ours, theirs = ([full_tensor(x) for x in xs] for xs in (ours, theirs))
    return "right" if all(torch.allclose(a, b) for a, b in zip(ours, theirs, strict=True)) else "wrong"


def of_input(grid, scheme: str) -> str:
    stock = stock_layer(Call(batch=2, length=6))
    layer = tlm.TwoLevelMultiheadAttention.from_torch(stock, mesh(grid), scheme=scheme)
    h = torch.randn(6, 2, EMBED, dtype=torch.float64, requires_grad=True)

    def loss(in_place: bool) -> torch.Tensor:
        x = h * 1.0
        y = layer(x, x, x, need_weights=False)[0]
        if in_place:
            x += y
            return x.square().sum()
        return (x + y).square().sum()

    return outcome(lambda: loss(True), lambda: loss(False), [h, *layer.parameters()])


@pytest.mark.parametrize("grid", [(2, 1), (1, 2)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_changed_input(pool, scheme, grid):
    """Localises: what enters the pass with a version counter of its own. Tokens that are sharded are copied."""
    expected = "right" if scheme == "weights" and grid[1] > 1 else "raises"
    assert of_input(None, "auto") == "raises"
    assert pool.run(of_input, 2, grid, scheme) == [expected] * 2


def of_mask(grid, scheme: str) -> str:
    layer = tlm.TwoLevelAttention(
        EMBED, HEADS, HEADS, EMBED // HEADS, dtype=torch.float64, mesh=mesh(grid), scheme=scheme
    )
    x = torch.randn(2, 6, EMBED, dtype=torch.float64)
    bias = torch.randn(1, HEADS, 6, 6, dtype=torch.float64, requires_grad=True)

    def loss(in_place: bool) -> torch.Tensor:
        mask = bias * 1.0
        y = layer(x, attn_mask=mask)
        if in_place:
            mask += 1
        return y.square().sum()

    return outcome(lambda: loss(True), lambda: loss(False), [bias, *layer.parameters()])


@pytest.mark.parametrize("grid", [(2, 1), (1, 2)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_changed_mask(pool, scheme, grid):
    """Localises: the mask's way into the pass. A rank that copies its part of it has the right gradients."""
    assert of_mask(None, "auto") == "raises"
    found = pool.run(of_mask, 2, grid, scheme)
    assert set(found) <= {"raises", "right"} and ("raises" in found or scheme == "sequence"), found


def of_replicated() -> str:
    h = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def loss(in_place: bool) -> torch.Tensor:
        x = h * 1.0
        y = torch.ops.two_level_mha.replicated([x], 2, place(2, 1).groups[2])[0].square()
        if in_place:
            x += 1
        return y.sum()

    return outcome(lambda: loss(True), lambda: loss(False), [h])


def test_the_operator(pool):
    assert pool.run(of_replicated, 2) == ["raises"] * 2
