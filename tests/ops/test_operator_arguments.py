"""Arguments that the modules never give, but a program that calls the operators may."""

import pytest
import torch
from harness.layer import Case, decided, place

import two_level_mha as tlm

ops = torch.ops.two_level_mha


@pytest.mark.parametrize("tokens", [3, 300])
@pytest.mark.parametrize("names", [(), ("q",), ("k",), ("q", "v"), ("q", "k", "v")])
def test_some_biases(names, tokens):
    """Localises: the one GEMM of many tokens, which has no bias or all three."""
    x = torch.randn(1, tokens, 6, dtype=torch.float64)
    weights = [torch.randn(heads, 4, 6, dtype=torch.float64) for heads in (4, 2, 2)]
    biases = [torch.randn_like(w[..., 0]) if n in names else None for n, w in zip("qkv", weights, strict=True)]
    for y, w, b in zip(ops.qkv_projection(x, x, x, *weights, *biases), weights, biases, strict=True):
        expected = torch.einsum("bld,hed->bhle", x, w)
        torch.testing.assert_close(y, expected if b is None else expected + b[:, None], rtol=1e-10, atol=1e-10)


def test_float64_bias_of_float32_scores():
    """Localises: the dtype of the chunked path's scores, which a wider mask must not change."""
    q, k, v = (torch.randn(1, 2, length, 8) for length in (5, 7, 7))
    bias = torch.randn(5, 7)
    masks = [bias.to(dtype).requires_grad_() for dtype in (torch.float64, torch.float32)]
    grads = [torch.autograd.grad(ops.partial_attention(q, k, v, mask)[0].sum(), mask)[0] for mask in masks]
    assert grads[0].dtype == torch.float64
    torch.testing.assert_close(grads[0].float(), grads[1])


def test_nothing_is_sent_of_nothing():
    """Localises: empty tensors, which no group is needed for."""
    assert ops.all_gather(torch.ones(3, 0, 5), 0, 2, "no group").shape == (6, 0, 5)
    assert ops.all_gather(torch.ones(3, 0, 5), 1, 2, "no group").shape == (3, 0, 5)
    assert ops.reduce_scatter(torch.ones(4, 0), 0, 2, "no group").shape == (2, 0)
    assert ops.all_to_all(torch.ones(4, 0), 0, 1, 2, "no group").shape == (2, 0)


@pytest.mark.parametrize("sizes", [(0, 0, 0), (8, 0, 4), (8, 4, 0)])
def test_sizes_of_zero_have_no_grid(sizes):
    """Localises: divisions in the choice of a grid, before anything has checked the sizes."""
    assert tlm._C.ranked_grids(4, *sizes, tlm.Profile.named("cpu").numbers) == []
    assert "must be positive" in tlm._C.grid_problem(1, 2, *sizes)


def test_dropout_mask_is_four_dimensional():
    """Localises: sizes read beyond the end of the argument."""
    for seed, sizes, origin in ((1, [2, 3], [0, 0, 0]), (1, [1, 2, 3, 4], [0]), (2, [1, 2, 3, 4], [0, 0, 0])):
        with pytest.raises(ValueError, match="seed must be|sizes must be"):
            ops.dropout_keep_mask(torch.ones(seed, dtype=torch.int64), 0.5, sizes, origin)


def enter_on(numbers: list[int], x: torch.Tensor, weight: torch.Tensor) -> None:
    """`enter` on a grid (n, m, i, j) that perhaps is none."""
    case = Case(heads=2, kv_heads=2, head_dim=4, embed_dim=8, batch=2, length=3, dtype=torch.float32)
    text, sizes = decided(case, place(1, 1))
    text = " ".join([*map(str, numbers), *text.split(" ")[4:]])
    ops.enter(x, x, x, *[weight] * 3, *[None] * 5, None, None, text, sizes)


def test_what_the_operators_refuse():
    """Localises: a division by zero, or memory read that is not there, where only the modules checked."""
    x, weight = torch.ones(2, 3, 8), torch.ones(2, 4, 8)
    for numbers in ([0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 5], [2, 1, 2, 0]):
        with pytest.raises(ValueError, match="grid must be"):
            enter_on(numbers, x, weight)
    for call in (lambda: ops.all_gather(x, 0, 0, ""), lambda: ops.reduce_scatter(x, 0, 0, ""),
                 lambda: ops.all_to_all(x, 0, 1, 0, ""), lambda: ops.all_reduce(x, 0, "")):  # fmt: skip
        with pytest.raises(ValueError, match="group_size must be positive, got 0"):
            call()
    q = torch.ones(1, 2, 3, 4)
    with pytest.raises(ValueError, match="int64 tensor of one element on cpu"):
        ops.partial_attention(q, q, q, dropout_p=0.5, seed=torch.ones(1, dtype=torch.int64, device="meta"))
    with pytest.raises(ValueError, match="pack takes 4-D tensors of one dtype and device"):
        ops.pack([q, q.to("meta")], [1, 1], 2)
    for p in (-1.0, 2.0, float("nan")):
        with pytest.raises(ValueError, match="p must be in"):
            ops.dropout_keep_mask(torch.ones(1, dtype=torch.int64), p, [1, 2, 3, 4], [0, 0, 0])
    for wrong in ({"out": q[:, :1]}, {"logsumexp": q[0, 0, 0]}, {"grad_out": q[:, :, :1]}, {"v": q[:, :, :1]}):
        sizes = {"grad_out": q, "grad_logsumexp": None, "q": q, "k": q, "v": q, "out": q, "logsumexp": q[..., 0]}
        with pytest.raises(ValueError, match="must have shape|must have one length"):
            ops.partial_attention_backward(**sizes | wrong, mask_grad=False)


def refused_masks(grid: tuple[int, int], scheme: str) -> dict[str, str]:
    """What `leave` says to masks that fit no call, or that fit only what this rank holds."""
    at = place(*grid)
    B, h, L, d, D = 4, 4, 6, 4, 5
    case = Case(
        scheme, heads=h, kv_heads=h, head_dim=d, embed_dim=D, batch=B, length=L, bias=False, dtype=torch.float32
    )
    call = decided(case, at)
    x = torch.ones(B, L, D)
    weight = torch.ones(h // grid[0], d // grid[1], D)
    q, k, v, *_ = ops.enter(x, x, x, weight, weight, weight, *[None] * 5, None, None, *call)
    found = {}
    for sizes in ((3, 1, L, L), (B + 1, 1, L, L), (1, h + 1, L, L), (1, 1, L - 1, L), (1, 1, 2 * L, L), (L, L - 1)):
        mask, out_weight = torch.ones(sizes, dtype=torch.bool), weight.permute(2, 0, 1)
        try:
            ops.leave(q, k, v, out_weight, None, mask, None, None, None, 0.0, 0.0, None, *call)
            found[str(sizes)] = ""
        except ValueError as error:
            found[str(sizes)] = str(error)
    return found


@pytest.mark.parametrize("scheme", ["slices", "sequence", "batch", "weights", "position"])
def test_masks_that_do_not_fit(pool, scheme):
    """Every rank refuses them alike. Localises: a part of a mask that fits a rank although the whole does not."""
    found = pool.run(refused_masks, 4, (2, 2), scheme)
    assert all(one == found[0] for one in found)
    assert all("broadcastable to (B, h, L, S) = (4, 4, 6, 6)" in text for text in found[0].values()), found[0]
