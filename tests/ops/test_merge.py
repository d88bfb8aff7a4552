"""merge_partials: what attention over parts of the keys, and decode with a split cache, rest on."""

import math

import pytest
import torch
from harness.device import DEVICE

import two_level_mha  # noqa: F401  registers the ops

merge = torch.ops.two_level_mha.merge_partials


def parts(dtype=torch.float64, size=(3, 2, 4, 5, 7)):
    """Outputs and logsumexps of three parts; part 1 sees nothing for head 2, no part for row 3 of (1, 1)."""
    generator = torch.Generator("cpu").manual_seed(0)
    outs = torch.randn(size, dtype=torch.float64, device="cpu", generator=generator)
    lses = torch.randn(size[:-1], dtype=torch.float64, device="cpu", generator=generator) * 5
    lses[1, 0, 2] = -math.inf
    lses[:, 1, 1, 3] = -math.inf
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return outs.to(DEVICE, dtype), lses.to(DEVICE, wide)


def reference(outs, lses):
    lse = torch.logsumexp(lses, 0)
    weight = torch.where(lses == -math.inf, 0.0, torch.exp(lses - lse))
    return (weight.unsqueeze(-1) * outs).sum(0), lse


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_merge_equals_formula(dtype):
    """Localises weights, accumulation or the empty rows."""
    outs, lses = parts(dtype)
    out, lse = merge(outs, lses)
    want_out, want_lse = reference(outs.double(), lses.double())
    tolerance = 1e-13 if dtype == torch.float64 else max(torch.finfo(dtype).eps, 2e-6)
    torch.testing.assert_close(out.double(), want_out, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-6, rtol=1e-6)
    assert out.dtype == dtype
    assert torch.equal(out[1, 1, 3], torch.zeros(7, dtype=dtype))
    assert lse[1, 1, 3] == -math.inf


def test_merge_of_one_part_is_that_part():
    """E: nothing is computed when there is nothing to merge."""
    outs, lses = parts()
    out, lse = merge(outs[:1], lses[:1])
    seen = lses[0] != -math.inf
    assert torch.equal(out[seen], outs[0][seen])
    assert torch.equal(lse, lses[0])


def test_part_that_saw_nothing_may_hold_anything():
    """A NaN in a part without keys reaches neither the output nor a gradient."""
    outs, lses = parts()
    outs[1, 0, 2] = math.nan
    outs.requires_grad_(), lses.requires_grad_()
    out, lse = merge(outs, lses)
    out.sum().backward()
    assert not out.isnan().any()
    assert not outs.grad.isnan().any()
    assert not lses.grad.isnan().any()


def test_merge_gradients():
    """Localises the backward formula."""
    generator = torch.Generator("cpu").manual_seed(0)
    outs = torch.randn(3, 1, 2, 3, 4, dtype=torch.float64, device="cpu", generator=generator)
    lses = torch.randn(3, 1, 2, 3, dtype=torch.float64, device="cpu", generator=generator)
    outs, lses = (x.to(DEVICE).requires_grad_() for x in (outs, lses))
    assert torch.autograd.gradcheck(lambda o, s: merge(o, s), (outs, lses))


@pytest.mark.parametrize(
    "outs, lses, sentence",
    [
        (
            (3, 1, 2, 4),
            (3, 1, 2),
            r"outs must be \(parts, B, H, L, Dv\) and .*, got 4-D and 3-D",
        ),
        ((3, 1, 2, 4, 5), (3, 1, 2, 3), "outs and logsumexps must agree in"),
        ((0, 1, 2, 4, 5), (0, 1, 2, 4), "there must be at least one part"),
    ],
)
def test_merge_refuses_wrong_shapes(outs, lses, sentence):
    """User errors are ValueErrors that name the argument."""
    with pytest.raises(ValueError, match=sentence):
        merge(torch.zeros(outs), torch.zeros(lses))
