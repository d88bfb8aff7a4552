"""Compiled and eager calls of one layer over many lengths, for test_compile.py and test_decoder_compile.py."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from two_level_mha.blocks import full_tensor

LENGTHS = (5, 8, 12, 17, 24, 33, 64)


def compiled_over_lengths(
    layer: nn.Module,
    width: int,
    dynamic: bool | None,
    call: Callable[[nn.Module, Tensor], Tensor] = lambda layer, x: layer(x),
    lengths: tuple[int, ...] = LENGTHS,
) -> tuple[int, float]:
    """Graphs compiled for inputs (2, length, width), and the largest difference from eager in y and every gradient."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=counter)
    error = 0.0
    for length in lengths:
        x = torch.randn(2, length, width, dtype=torch.float64)
        results = []
        for module in (layer, compiled):
            layer.zero_grad()
            leaf = x.clone().requires_grad_()
            y = call(module, leaf)
            y.square().sum().backward()
            results.append([y.detach(), leaf.grad, *(full_tensor(p.grad) for p in layer.parameters())])
        for mine, theirs in zip(*results, strict=True):
            error = max(error, (mine - theirs).abs().max().item())
    return counter.frame_count, error
