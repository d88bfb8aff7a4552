"""The head of a language model in training: the loss on vocabulary shards, so that no rank has all logits.

In a call with labels, split hidden states go through the head's own columns of every rank (SplitHead), and the model's
loss function sees logits that are a DTensor, sharded by the vocabulary (SplitLoss). All other calls are as before.
"""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import implicit_replication
from torch.distributed.tensor.parallel import loss_parallel

from two_level_mha.class_like import become
from two_level_mha.mesh import grid_mesh
from two_level_mha.stream import InStream, Stream
from two_level_mha.vocabulary import ColumnHead

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SplitHead(InStream, ColumnHead):
    """A head whose weight is split by columns, or whole."""

    def forward(self, x: Tensor) -> Tensor:
        if self.stream.to_loss:
            weight, bias = self.own(self.weight), None if self.bias is None else self.own(self.bias)
            x = x if self.stream.passes else self.stream.keep(x)
            return self.sharded(self.stream.project_by(x, [weight], [bias])[0])
        if not isinstance(self.weight, DTensor):
            return nn.Linear.forward(self, x)
        return super().forward(x)

    def summed(self, xs: list[Tensor]) -> list[Tensor]:
        return self.stream.summed(xs)


class SplitLoss:
    """A loss function of logits and labels that also takes logits sharded by the vocabulary."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function

    def __call__(self, logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(logits, DTensor):
            return self.function(logits, *args, **kwargs)
        loss: Tensor = _Loss.apply(logits, lambda logits: self.function(logits, *args, **kwargs))
        return loss


class _Loss(torch.autograd.Function):
    """The gradient of the logits is made with the loss: torch's loss_parallel must be on where it is."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.enable_grad(), loss_parallel(), implicit_replication():
            logits = logits.detach().requires_grad_()
            loss = function(logits)
            (gradient,) = torch.autograd.grad(loss, logits)
        ctx.gradient = gradient
        return loss.full_tensor().detach() if isinstance(loss, DTensor) else loss.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[DTensor, None]:
        gradient = ctx.gradient
        local = gradient.to_local() * grad
        return DTensor.from_local(
            local, gradient.device_mesh, gradient.placements, run_check=False, shape=gradient.shape,
            stride=gradient.stride(),
        ), None  # fmt: skip


def head_of(model: "PreTrainedModel") -> nn.Linear | None:
    """The head of a transformers model that computes its loss by loss_function, where it is a plain linear."""
    if "loss_function" not in _names_in(model) or not hasattr(model, "get_output_embeddings"):
        return None
    head = model.get_output_embeddings()
    return head if isinstance(head, nn.Linear) and type(head) is nn.Linear else None


def _names_in(module: nn.Module) -> tuple[str, ...]:
    """What a module's forward calls."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return () if code is None else code.co_names


def split_head(model: "PreTrainedModel", head: nn.Linear, owner: nn.Module, stream: Stream, mesh: DeviceMesh) -> None:
    """Lets calls of a model with labels compute the loss on vocabulary shards; owner: the module with the layers."""
    stream.passes = {"view", "reshape"}.isdisjoint(_names_in(owner))  # to a shape of the whole
    become(head, SplitHead, stream=stream, mesh=grid_mesh(mesh), place=stream.place)
    model.loss_function = SplitLoss(model.loss_function)
    model.register_forward_pre_hook(stream.begin_model, with_kwargs=True)
    model.register_forward_hook(stream.end_model, always_call=True)
