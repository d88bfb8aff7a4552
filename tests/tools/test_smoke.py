"""A minute's check that an installation works: the module against nn.MultiheadAttention, forward and
backward, in one process and on four ranks. Run on the oldest supported torch too.
"""

import pytest
import torch
from harness.device import DEVICE

import two_level_mha as tlm

pytestmark = pytest.mark.smoke


def compare(grid: tuple[int, int] | None) -> tuple[float, float]:
    """Largest difference of the output and of the input's gradient from stock, in float64."""
    mesh = tlm.init_mesh(DEVICE, grid) if grid else None
    torch.manual_seed(0)
    stock = torch.nn.MultiheadAttention(16, 4, batch_first=True, dtype=torch.float64)
    ours = tlm.TwoLevelMultiheadAttention.from_torch(stock, mesh)
    x_BLD = torch.randn(2, 6, 16, dtype=torch.float64)
    results = []
    for layer in (stock, ours):
        leaf_BLD = x_BLD.clone().requires_grad_()
        y_BLD, _ = layer(leaf_BLD, leaf_BLD, leaf_BLD, need_weights=False)
        y_BLD.square().sum().backward()
        results.append((y_BLD.detach(), leaf_BLD.grad))
    (y_BLD, dx_BLD), (our_y_BLD, our_dx_BLD) = results
    return (y_BLD - our_y_BLD).abs().max().item(), (dx_BLD - our_dx_BLD).abs().max().item()


def test_one_process():
    """T. Localises: the built libraries, or the module itself."""
    assert max(compare(None)) <= 1e-10


@pytest.mark.parametrize("grid", [(2, 2), (1, 4), (4, 1)])
def test_four_ranks(pool, grid):
    """T. Localises, with the above green: Gloo, DTensor, or functional collectives of this torch."""
    for differences in pool.run(compare, 4, grid):
        assert max(differences) <= 1e-10
