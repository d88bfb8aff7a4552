"""Packing for an exchange: every number lands where the contract of csrc/comm/pack.h says (level E,
torch.equal).
"""

import itertools

import pytest
import torch

import two_level_mha  # noqa: F401 (registers the ops)

ops = torch.ops.two_level_mha

# (sizes of the tensors, dims): dealt over batch, rows, heads or width, replicated, mixed, odd, empty
CASES = {
    "rows": ([(2, 3, 8, 4)], [2]),
    "odd rows": ([(2, 3, 7, 5)], [2]),
    "fewer rows than parts": ([(1, 2, 1, 3)], [2]),
    "batch": ([(3, 2, 4, 2)], [0]),
    "heads": ([(2, 5, 3, 2)], [1]),
    "width": ([(2, 3, 4, 12)], [3]),
    "replicated": ([(2, 1, 3, 2)], [-1]),
    "mixed": ([(2, 4, 5, 3), (2, 2, 7, 3), (2, 2, 7, 1)], [2, -1, -1]),
    "everything": ([(5, 2, 3, 2), (2, 3, 9, 2), (1, 4, 3, 2), (1, 1, 1, 8)], [0, 2, 1, 3]),
    "empty": ([(2, 2, 0, 3), (2, 2, 3, 3)], [2, -1]),
}
PARTS = [1, 2, 3, 4]


def integers(shape, dtype=torch.float64):
    """Small integers: sums and products of them are exact in every dtype used here."""
    return torch.randint(-8, 9, shape).to(dtype)


def rows_of(size, dim, parts, part, zigzag):
    """The indices along `dim` that go to `part`, padding as None, in order."""
    two = zigzag and dim == 2
    chunk = -(-size // (2 * parts if two else parts))
    chunks = [part, 2 * parts - 1 - part] if two else [part]
    indices = [c * chunk + i for c in chunks for i in range(chunk)]
    return [i if i < size else None for i in indices]


def pack_by_hand(tensors, dims, parts, zigzag):
    """pack.h in words: part t holds each tensor's t-th piece, zeros beyond its end, or all of it."""
    buffer = []
    for part in range(parts):
        pieces = []
        for x, dim in zip(tensors, dims, strict=True):
            if dim >= 0:
                zero = torch.zeros_like(x.select(dim, 0)) if x.shape[dim] else None
                rows = rows_of(x.shape[dim], dim, parts, part, zigzag)
                columns = [zero if i is None else x.select(dim, i) for i in rows]
                x = torch.stack(columns, dim) if columns else x
            pieces.append(x.reshape(-1))
        buffer.append(torch.cat(pieces))
    return torch.stack(buffer)


@pytest.mark.parametrize("zigzag", [False, True])
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("case", CASES)
def test_pack_is_the_contract(case, parts, zigzag):
    """E. Localises: the index arithmetic of pack (chunks, padding, order of tensors, zigzag)."""
    sizes, dims = CASES[case]
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        tensors = [integers(size, dtype) for size in sizes]
        assert torch.equal(ops.pack(tensors, dims, parts, zigzag), pack_by_hand(tensors, dims, parts, zigzag))


@pytest.mark.parametrize("zigzag", [False, True])
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("case", CASES)
def test_unpack_is_the_adjoint_of_pack(case, parts, zigzag):
    """E. Localises: unpack (pieces put back, replicated parts summed): <pack(x), b> = <x,
    unpack(b)> in integers.
    """
    sizes, dims = CASES[case]
    tensors = [integers(size).requires_grad_() for size in sizes]
    packed = ops.pack(tensors, dims, parts, zigzag)
    buffer = integers(packed.shape)
    unpacked = ops.unpack(buffer, list(itertools.chain(*sizes)), dims, parts, zigzag)
    inner = sum((x * y).sum() for x, y in zip(tensors, unpacked, strict=True))
    assert torch.equal((packed * buffer).sum(), inner)
    by_autograd = torch.autograd.grad(packed, tensors, buffer)
    for mine, theirs in zip(by_autograd, unpacked, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("zigzag", [False, True])
@pytest.mark.parametrize("case", ["rows", "odd rows", "batch", "heads", "width"])
def test_round_trip(case, zigzag):
    """E. Localises: pack and unpack disagree; dealt tensors come back as they went, gradients included."""
    sizes, dims = CASES[case]
    for parts in PARTS:
        tensors = [integers(size).requires_grad_() for size in sizes]
        packed = ops.pack(tensors, dims, parts, zigzag)
        back = ops.unpack(packed, list(itertools.chain(*sizes)), dims, parts, zigzag)
        weights = [integers(size) for size in sizes]
        grads = torch.autograd.grad(back, tensors, weights)
        for x, y, grad, weight in zip(tensors, back, grads, weights, strict=True):
            assert torch.equal(x, y) and torch.equal(grad, weight)


@pytest.mark.parametrize("zigzag", [False, True])
def test_a_whole_move_in_one_process(zigzag):
    """E. Localises: the composition the pass uses: rows dealt out, width gathered,
    among m simulated ranks.
    """
    m, length, width = 3, 8, 2
    x_BHLD = integers((2, 2, length, m * width))
    sent = [ops.pack([x_BHLD[..., j * width : (j + 1) * width].contiguous()], [2], m, zigzag) for j in range(m)]
    padded = len(rows_of(length, 2, m, 0, zigzag))
    for t in range(m):
        received = torch.stack([buffer[t] for buffer in sent])
        (mine,) = ops.unpack(received, [2, 2, padded, m * width], [3], m, False)
        for at, row in enumerate(rows_of(length, 2, m, t, zigzag)):
            expected = torch.zeros_like(x_BHLD[:, :, 0]) if row is None else x_BHLD[:, :, row]
            assert torch.equal(mine[:, :, at], expected)


def test_non_contiguous_inputs():
    """E. Localises: a kernel that trusts strides."""
    x = integers((2, 6, 3, 4)).transpose(1, 2)
    assert torch.equal(ops.pack([x], [2], 2, False), ops.pack([x.contiguous()], [2], 2, False))
    buffer = integers((24, 2)).t()
    size = [2, 3, 2, 4]
    assert torch.equal(
        ops.unpack(buffer, size, [2], 2, False)[0], ops.unpack(buffer.contiguous(), size, [2], 2, False)[0]
    )


def test_replicated_parts_are_summed_in_float32():
    """E. Localises: accumulation of unpack in bf16, where 256 + 1 = 256."""
    buffer = torch.tensor([[256.0], [1.0], [1.0], [1.0], [1.0]], dtype=torch.bfloat16)
    assert ops.unpack(buffer, [1, 1, 1, 1], [-1], 5, False)[0].item() == 260.0


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ops.pack([torch.ones(1, 1, 2, 1)], [2, 2], 2), "dims must have one entry per tensor"),
        (lambda: ops.pack([torch.ones(1, 1, 2, 1)], [2], 0), "parts must be positive"),
        (lambda: ops.pack([torch.ones(1, 1, 2, 1)], [4], 2), "dims must be 0 .. 3"),
        (lambda: ops.pack([torch.ones(1, 2, 1)], [2], 2), "4-D tensors of one dtype"),
        (lambda: ops.pack([torch.ones(1, 1, 2, 1), torch.ones(1, 1, 2, 1).half()], [2, 2], 2), "of one dtype"),
        (lambda: ops.unpack(torch.ones(2, 2), [], [], 2), "at least one tensor"),
        (lambda: ops.unpack(torch.ones(2, 2), [1, 1, 5, 1], [2], 2), r"must be \(2, 3\)"),
        (lambda: ops.unpack(torch.ones(2, 2), [1, 2, 2], [2], 2), "four numbers per tensor"),
    ],
)
def test_errors(call, message):
    """Localises: argument checks of pack and unpack."""
    with pytest.raises(ValueError, match=message):
        call()
