"""`loss.backward()` inside torch.autocast: not what torch recommends, but it works with stock attention."""

import pytest
import torch
from harness.attention_op import attend, qkv, relative
from harness.device import DEVICE, of_device

LOWEST = torch.finfo(torch.float32).min


def mask_of(kind: str, rows: int, keys: int) -> torch.Tensor:
    if kind == "padded rows":
        return torch.zeros(rows, keys).index_fill(0, torch.arange(3), LOWEST)
    return torch.randn(rows, keys) + float(kind)


@pytest.mark.parametrize("kind", ["padded rows", "3e4", "-3e4"])
@pytest.mark.parametrize("trained", [False, True])
def test_inside_is_as_outside(kind, trained):
    """E. Localises: products of the backward kernels that autocast runs, and rounds a bias for, in bfloat16."""
    q, k, v = qkv((1, 2, 2, 33, 40, 16, 16), torch.float32)
    mask = mask_of(kind, 33, 40).requires_grad_(trained)
    inputs = [q, k, v, mask] if trained else [q, k, v]

    def gradients(inside: bool) -> tuple[torch.Tensor, ...]:
        with torch.autocast(DEVICE, torch.bfloat16):
            out = attend(q, k, v, mask)[0]
            loss = out.float().square().sum()
            if inside:
                return torch.autograd.grad(loss, inputs)
        return torch.autograd.grad(loss, inputs)

    for inside, outside in zip(gradients(True), gradients(False), strict=True):
        assert outside.isfinite().all()
        if of_device("the same bits in backward"):
            assert torch.equal(inside, outside)
        else:
            assert relative(inside, outside) <= of_device("fp32 by another way")
