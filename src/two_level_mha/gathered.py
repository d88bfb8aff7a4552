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
from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from two_level_mha.activations import gather_part, keep_part, used_apart
from two_level_mha.errors import UsageRuntimeError
from two_level_mha.mesh import Place
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

    def gather(self, output: object, weights: Container[int]) -> object:
        """The module's output for the batch; weights: storages of its weights, which it may return as well.

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
        # the same for all sequences: its gradient must come from one rank
        if output.untyped_storage()._cdata in weights:
            return self.whole(output.expand(self.own, *output.shape))[0]
        if output.dim() > 2 and output.shape[0] == 1 < self.own:
            return self.whole(output.expand(self.own, *output.shape[1:]))[:1]
        if output.dim() < 2 or output.shape[0] % self.own:
            raise UsageRuntimeError(
                f"a module with gathered weights gave a tensor of shape {tuple(output.shape)}, but got {self.own} "
                f"sequences: {LEAVE}"
            )
        return self.whole(output)


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


@contextmanager
def whole_weights(module: nn.Module, place: Place, gradient: Partial | Replicate) -> Iterator[Container[int]]:
    """The module with its parameters whole, and their storages. Autograd keeps their parts, and gathers in backward.

    gradient: Partial() where each rank has its part of it, Replicate() where all have the same.
    """
    owners = [(part, name, p) for part in module.modules() for name, p in part._parameters.items() if p is not None]
    split = {p: p.full_tensor(grad_placements=[gradient]) for _, _, p in owners if isinstance(p, DTensor)}
    # what was added since, adapters for example, is whole on every rank
    added = list({p: None for _, _, p in owners if p not in split})
    apart = used_apart(added, place) if isinstance(gradient, Partial) else added
    parts = {whole.untyped_storage()._cdata: (p, p._version) for p, whole in split.items()}

    def pack(x: Tensor) -> object:
        if x.untyped_storage()._cdata not in parts:
            return x
        return *parts[x.untyped_storage()._cdata], x.shape, x.stride(), x.storage_offset()

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        p, version, *view = kept
        if p._version != version:
            raise RuntimeError("a weight that a gradient needs was changed in place since the forward pass")
        whole: Tensor = p.detach().full_tensor().as_strided(*view)
        return whole

    wholes = split | dict(zip(added, apart, strict=True))
    for part, name, p in owners:
        part._parameters[name] = wholes[p]  # type: ignore[assignment]  # a plain tensor, for the call
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield parts.keys()
    finally:
        for part, name, p in owners:
            part._parameters[name] = p
