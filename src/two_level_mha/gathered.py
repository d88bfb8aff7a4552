"""Modules of which no structure is known: their weights are stored split over all ranks and gathered for each call, in
which every rank runs the module's own code on its sequences (integrations/gathered.py).

This is the scheme `weights` without anything that it knows of attention: exact where a module treats the sequences of a
batch apart, with gradients. Every rank has as many sequences: those that fill up the batch are copies of the last one,
whose output is dropped, so that no gradient comes of them. Of a call's arguments each rank takes its part of tensors
that begin with B or a multiple of B: (B, L, D), (B, h, L, S), (B h, 1, S); if of two dims, only of integers, bools, and
what is called a mask, since others are tables. Lists and tuples, and dicts of positions or masks, count entry by entry.
All else every rank takes as it is, and the gradients of such tensors are summed over the ranks.
"""

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from two_level_mha.activations import gather_part, keep_part, used_apart
from two_level_mha.blocks import full_tensor
from two_level_mha.errors import UsageRuntimeError
from two_level_mha.mesh import Place
from two_level_mha.operators import ops as _ops
from two_level_mha.stock import take_full_tensors

LEAVE = "leave it whole by parallelize(..., skip=[..])"


class Sequences:
    """A batch of sequences, of which every rank has as many. plain: classes of what is alike for all sequences."""

    def __init__(self, batch: int, place: Place, plain: tuple[type, ...] = ()) -> None:
        self.batch, self.place, self.plain = batch, place, (type(None), bool, int, float, str, *plain)
        self.own = -(-batch // place.grid.size)
        self.padded = self.own * place.grid.size

    def part(self, x: Tensor) -> Tensor:
        """Of a tensor of B entries, or of a multiple, those of this rank's sequences."""
        by_sequence = x.unflatten(0, (self.batch, -1))
        if self.padded > self.batch:
            filled = torch.arange(self.padded, device=x.device).clamp(max=self.batch - 1)
            by_sequence = by_sequence.index_select(0, filled)
        return keep_part(by_sequence.contiguous(), "batch", self.place, True).flatten(0, 1)

    def whole(self, part: Tensor) -> Tensor:
        """What `part` gave a part of."""
        by_sequence = part.unflatten(0, (self.own, -1)).contiguous()
        return gather_part(by_sequence, self.padded, "batch", self.place, True)[: self.batch].flatten(0, 1)

    def deal(self, x: object, name: str) -> object:
        """What this rank's call is given for an argument called `name`."""
        if isinstance(x, (list, tuple)):
            return like(x, [self.deal(one, name) for one in x])
        if isinstance(x, dict) and ("position" in name or "mask" in name):  # others are where layers leave states
            return {key: self.deal(one, name) for key, one in x.items()}
        if not isinstance(x, Tensor):
            return x
        table = x.dim() == 2 and x.is_floating_point() and "mask" not in name
        if x.dim() >= 2 and x.shape[0] and x.shape[0] % self.batch == 0 and not table:
            return self.part(x)
        return used_apart([x], self.place)[0] if x.requires_grad else x

    def gather(self, output: object, weights: "Weights") -> object:
        """The module's output for the batch; weights: its own, which it may return as well.

        Raises UsageRuntimeError for a tensor that is neither of sequences nor a weight, and for what is no output.
        """
        if isinstance(output, (list, tuple)):
            return like(output, [self.gather(one, weights) for one in output])
        if isinstance(output, dict):
            whole = copy.copy(output)  # of its class, which may keep its entries as attributes too
            for key, one in output.items():
                whole[key] = self.gather(one, weights)
            return whole
        if isinstance(output, self.plain):
            return output
        if not isinstance(output, Tensor):
            raise UsageRuntimeError(f"a module with gathered weights gave a {type(output).__name__}: {LEAVE}")
        out = weights.outgoing(output)
        # the same for all sequences: its gradient must come from one rank
        if output.untyped_storage()._cdata in weights:
            return self.whole(out.expand(self.own, *output.shape))[0]
        if output.dim() > 2 and output.shape[0] == 1 < self.own:
            return self.whole(out.expand(self.own, *output.shape[1:]))[:1]
        if output.dim() < 2 or output.shape[0] % self.own:
            raise UsageRuntimeError(
                f"a module with gathered weights gave a tensor of shape {tuple(output.shape)}, but got {self.own} "
                f"sequences: {LEAVE}"
            )
        return self.whole(out)


def like(x: list[Any] | tuple[object, ...], entries: list[Any]) -> list[Any] | tuple[object, ...]:
    return type(x)(*entries) if hasattr(x, "_fields") else type(x)(entries)


def store_split(module: nn.Module, mesh: DeviceMesh) -> None:
    """Makes the module's parameters, in place, DTensors on the flattened grid."""
    for part in module.modules():
        for name, p in list(part.named_parameters(recurse=False)):
            kept = distribute_tensor(p.detach(), mesh, [_placement(p, mesh.size())], src_data_rank=None)
            part.register_parameter(name, nn.Parameter(kept, p.requires_grad))
        take_full_tensors(part)


def _placement(p: Tensor, ranks: int) -> Shard | Replicate:
    """Along the first dim, or else the longest, that has a row for every rank."""
    dims = [dim for dim, size in enumerate(p.shape) if size >= ranks]
    if not dims:
        return Replicate()
    return Shard(0 if dims[0] == 0 else max(dims, key=lambda dim: p.shape[dim]))


class Kept:
    """What autograd keeps of a call's whole weights: whose they are; and in backward, as long as it keeps anything of
    the call, the wholes that were gathered again.
    """

    def __init__(self, split: dict[DTensor, Tensor]) -> None:
        self.parts = {whole.untyped_storage()._cdata: (p, p._version) for p, whole in split.items()}
        self.wholes: dict[DTensor, Tensor] = {}

    def pack(self, x: Tensor) -> object:
        if x.untyped_storage()._cdata not in self.parts:
            return x
        return *self.parts[x.untyped_storage()._cdata], x.shape, x.stride(), x.storage_offset()

    def unpack(self, kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        p, version, *view = kept
        if p._version != version:
            raise RuntimeError("a weight that a gradient needs was changed in place since the forward pass")
        whole = self.wholes.get(p)  # without it: the gradient came past the call's output
        whole = full_tensor(p.detach()) if whole is None else whole
        return whole.as_strided(*view)


class Weights:
    """A call's whole weights; contains their storages. some: one that is trained, or None."""

    def __init__(self, split: dict[DTensor, Tensor], some: Tensor | None, kept: Kept) -> None:
        self.split, self.some = list(split), some
        self.storages = kept.parts.keys()
        self.kept = weakref.ref(kept)  # strongly it is autograd's alone, which lets it go node by node
        self.gathered = False

    def __contains__(self, storage: int) -> bool:
        return storage in self.storages

    def outgoing(self, y: Tensor) -> Tensor:
        """An output of the call, which goes on to all ranks."""
        if not torch.is_grad_enabled():
            return y
        output: Tensor = _Outgoing.apply(self, y, self.some)
        return output

    def gather(self) -> None:
        """Begins the call's backward: once, on every rank."""
        if not self.gathered:
            self.gathered = True
            wholes = {p: full_tensor(p.detach()) for p in self.split}
            if (kept := self.kept()) is not None:
                kept.wholes = wholes


class _Incoming(torch.autograd.Function):
    """Weights, whole. The gradient of one is the sum over all ranks, and None where none has any.

    Which weights a rank has gradients of may hang on its sequences: of experts it runs those that its tokens are sent
    to. So the ranks tell each other, and one that has none gives zeros.
    """

    @staticmethod
    def forward(ctx: Any, place: Place, gradient: Partial | Replicate, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.place, ctx.gradient, ctx.weights = place, gradient, weights
        wholes = tuple(p.view_as(p) if not isinstance(p, DTensor) else full_tensor(p) for p in weights)
        ctx.mark_non_differentiable(*(x for x, p in zip(wholes, weights, strict=True) if not p.requires_grad))
        return wholes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grid, groups = ctx.place.grid, ctx.place.groups
        apart = isinstance(ctx.gradient, Partial)
        used = [float(grad is not None) for grad in grads]
        if apart:
            used = _ops.all_reduce(torch.tensor(used, device=ctx.weights[0].device), grid.size, groups[2]).tolist()
        found: list[Tensor | None] = [None, None]
        for p, grad, any_has in zip(ctx.weights, grads, used, strict=True):
            if not any_has:
                found.append(None)
                continue
            grad = torch.zeros(p.shape, dtype=p.dtype, device=p.device) if grad is None else grad
            if isinstance(p, DTensor):
                whole = DTensor.from_local(grad, p.device_mesh, [ctx.gradient], run_check=False)
                found.append(whole.redistribute(placements=p.placements))
            else:
                found.append(_ops.all_reduce(grad, grid.size, groups[2]) if apart else grad)
        return tuple(found)


class _Outgoing(torch.autograd.Function):
    """Makes all ranks gather all weights first in backward, whichever they need, and come to _Incoming's at its end."""

    @staticmethod
    def forward(ctx: Any, weights: Weights, y: Tensor, some: Tensor | None) -> Tensor:
        ctx.weights = weights
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        ctx.weights.gather()
        return None, grad, None


@contextmanager
def whole_weights(module: nn.Module, place: Place, gradient: Partial | Replicate) -> Iterator[Weights]:
    """The module with its parameters whole. Autograd keeps their parts, and gathers in backward.

    gradient: Partial() where each rank has its part of it, Replicate() where all have the same.
    """
    owners = [(part, name, p) for part in module.modules() for name, p in part._parameters.items() if p is not None]
    weights = list({p: None for _, _, p in owners})  # what was added since, adapters for example, is no DTensor
    wholes = dict(zip(weights, _Incoming.apply(place, gradient, *weights), strict=True)) if weights else {}
    split: dict[DTensor, Tensor] = {p: whole for p, whole in wholes.items() if isinstance(p, DTensor)}
    kept = Kept(split)
    for part, name, p in owners:
        part._parameters[name] = wholes[p]  # a plain tensor, for the call
    try:
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
            yield Weights(split, next((x for x in wholes.values() if x.requires_grad), None), kept)
    finally:
        for part, name, p in owners:
            part._parameters[name] = p
