"""PEFT's LoRA layers around what is split: they stay PEFT's, with what they compute and merge ours.

The adapters A (r, in) and B (out, r) are whole and the same on every rank, as PEFT makes them. A rank computes with the
rows of B, or the columns of A, that go with its part.
"""

import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.functional import linear

from two_level_mha.activations import dropped, used_apart
from two_level_mha.errors import UsageRuntimeError
from two_level_mha.integrations.state_forms import ALL
from two_level_mha.low_rank import Term, own_heads
from two_level_mha.mesh import Place
from two_level_mha.operators import ops as _ops
from two_level_mha.probe import has_hooks

STATES = "states"  # the kind of linears in layers that keep states
PLAIN_ONLY = (
    "only plain LoRA is supported on what is split (no DoRA or other variant, no lora_bias, no init_lora_weights that "
    "reads the weights, no modules_to_save): merge it before parallelize, or leave those modules out"
)


class Adapted(nn.Module):
    """A LoRA layer of PEFT around what is split: made of one by `become`. Below, what PEFT's own would do otherwise."""

    compared: set[str]  # names of adapters of which the ranks hold the same
    # PEFT's
    base_layer: Any
    lora_A: Mapping[str, nn.Linear]
    lora_B: Mapping[str, nn.Linear]
    lora_embedding_A: Mapping[str, Tensor]
    lora_embedding_B: Mapping[str, Tensor]
    lora_dropout: Mapping[str, nn.Module]
    lora_bias: Mapping[str, bool]
    lora_variant: Mapping[str, object]
    scaling: Mapping[str, float]
    active_adapters: list[str]
    merged_adapters: list[str]
    disable_adapters: bool
    merged: bool

    def terms(self) -> list[Term]:
        """Those of the active adapters; none of merged ones."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return []
        return [] if self.merged else [self.known(name) for name in self.active_adapters if name in self.names]

    @property
    def names(self) -> Collection[str]:
        """Of its adapters."""
        return self.lora_A.keys()

    def known(self, name: str) -> Term:
        """An adapter that the ranks have compared. Raises UsageRuntimeError for another."""
        if name not in self.compared:
            raise UsageRuntimeError(
                f"adapter {name!r} was added to a split model outside two_level_mha.adaptable(model), where nobody has "
                "compared what the ranks hold: add or load it inside"
            )
        return self.term(name)

    def term(self, name: str) -> Term:
        if self.lora_variant.get(name) is not None or self.lora_bias[name]:
            raise UsageRuntimeError(f"adapter {name!r}: {PLAIN_ONLY}")
        return Term(self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name], self.lora_dropout[name])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As PEFT's, into this rank's part of the weight."""
        for name in sys.modules["peft.tuners.tuners_utils"].check_adapters_to_merge(self, adapter_names):
            if name not in self.names:
                continue
            term = self.known(name)
            if safe_merge and not all(torch.isfinite(x).all() for x in (term.a, term.b)):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            with torch.no_grad():
                self.add(term, term.scale)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """As PEFT's."""
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.names:
                with torch.no_grad():
                    self.add(self.term(name), -self.scaling[name])

    def add(self, term: Term, scale: float) -> None:
        """Adds this rank's part of scale * B A to its part of the weight."""
        raise NotImplementedError

    def alone(self, adapter_names: object) -> None:
        """Raises for a call with an adapter for each sequence."""
        if adapter_names is not None:
            raise UsageRuntimeError("adapter_names= is not supported on what is split: call with one set of adapters")


class AdaptedProjection(Adapted):
    """Of a split attention, which asks for the terms."""

    def terms(self) -> list[Term]:
        if has_hooks(self):  # as those by which PEFT passes adapter_names
            raise UsageRuntimeError(
                "a LoRA layer of a split attention has hooks, which would not run (adapter_names= of a call are such): "
                "remove them, or call with one set of active adapters"
            )
        return super().terms()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = self.base_layer(*args, **kwargs)  # says what is wrong
        return y

    def add(self, term: Term, scale: float) -> None:
        layer, letters = self.base_layer.whose
        if letters == "o":
            own = _local(layer.out_weight)  # (D, heads, width)
            all_rhd = term.a.unflatten(1, (layer.num_heads, -1))
            a = own_heads(all_rhd, layer.place, 1, *own.shape[1:])
            own.add_(torch.einsum("or,rhd->ohd", term.b.to(own.dtype), a.to(own.dtype)), alpha=scale)
            return
        for letter in letters:
            own = _local(getattr(layer, f"{letter}_weight"))  # (heads, width, D)
            all_hdr = layer.stock_names[f"{letter}_weight"].features(term.b)
            b = own_heads(all_hdr, layer.place, 0, *own.shape[:2])
            own.add_(torch.einsum("hdr,ri->hdi", b.to(own.dtype), term.a.to(own.dtype)), alpha=scale)


class AdaptedRest(Adapted):
    """Of what is split besides attention."""

    place: Place


class AdaptedLinear(AdaptedRest):
    """Of a linear that takes and gives whole features, whose weight is split."""

    own: tuple[tuple[int, int], tuple[int, int]]  # rows and columns of the weight that this rank has: first, count
    fan_in_fan_out: bool

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        self.alone(adapter_names)
        y: Tensor = self.base_layer(x, *args, **kwargs)
        result = y
        for term in self.terms():
            result = result + self.product(x, term) * term.scale
        return result.to(y.dtype)

    def product(self, x: Tensor, term: Term) -> Tensor:
        """What is added to the linear's output."""
        return linear(linear(term.dropout(x).to(term.a.dtype), term.a), term.b)

    def add(self, term: Term, scale: float) -> None:
        own = _local(self.base_layer.weight)
        delta = term.b.to(own.dtype), term.a.to(own.dtype)
        first, second = (delta[1].t(), delta[0].t()) if self.fan_in_fan_out else delta
        own.add_(first.narrow(0, *self.own[0]) @ second.narrow(1, *self.own[1]), alpha=scale)

    @property
    def own_features(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of its outputs and of its inputs: first, count."""
        rows, columns = self.own
        return (columns, rows) if self.fan_in_fan_out else (rows, columns)


class AdaptedColumns(AdaptedLinear):
    """Gives this rank's columns."""

    def product(self, x: Tensor, term: Term) -> Tensor:
        a, b = used_apart([linear(term.dropout(x).to(term.a.dtype), term.a), term.b], self.place)
        return linear(a, b.narrow(0, *self.own_features[0]))


class AdaptedRows(AdaptedLinear):
    """Takes this rank's columns of its input, gives the sum."""

    def product(self, x: Tensor, term: Term) -> Tensor:
        (a,) = used_apart([term.a], self.place)
        own = self.own_features[1]
        x = _dropped(x, term, lambda kept: kept.narrow(-1, *own))
        inner = linear(x.to(a.dtype), a.narrow(1, *own))
        return linear(_ops.all_reduce(inner, self.place.grid.size, self.place.groups[2]), term.b)


class AdaptedStates(AdaptedLinear):
    """Of a linear in a layer that keeps states."""

    within: Any  # of integrations.states

    def product(self, x: Tensor, term: Term) -> Tensor:
        layer, text, dim = self.within
        if dim == 1:  # takes this rank's columns, gives the sum
            apart = self.base_layer.apart
            (a,) = layer.exchange.apart([term.a], ALL)
            x = _dropped(x, term, lambda kept: layer.cut.take(kept, text, kept.dim() - 1))
            inner = layer.exchange.sum(linear(x.to(a.dtype), layer.cut.take(a, text, 1)), ALL, apart)
            return linear(inner, *(layer.exchange.apart([term.b], ALL) if apart else [term.b]))
        a, b = layer.exchange.apart([term.a, term.b], ALL)
        return linear(linear(term.dropout(x).to(a.dtype), a), layer.cut.take(b, text, 0))

    def add(self, term: Term, scale: float) -> None:
        layer, delta = self.within.layer, term.b @ term.a
        stored = layer.stored.get(self.base_layer)
        if stored is None:  # every rank has it whole
            self.base_layer.weight.add_(delta.to(self.base_layer.weight.dtype), alpha=scale)
            return
        for name in stored["weight"]:
            own = _local(layer.get_parameter(name))
            own.add_(_local(layer.block(layer.stock_names[name].read(delta), name)).to(own.dtype), alpha=scale)


class AdaptedEmbedding(AdaptedRest):
    """Of an embedding whose weight (vocabulary, D) is split; it gives whole features: PEFT's own forward is right."""

    own: tuple[tuple[int, int], tuple[int, int]]

    @property
    def names(self) -> Collection[str]:
        return self.lora_embedding_A.keys()

    def term(self, name: str) -> Term:
        return Term(self.lora_embedding_A[name], self.lora_embedding_B[name], self.scaling[name], nn.Identity())

    def add(self, term: Term, scale: float) -> None:
        own = _local(self.base_layer.weight)
        a, b = term.a.narrow(1, *self.own[0]), term.b.narrow(0, *self.own[1])
        own.add_(a.t().to(own.dtype) @ b.t().to(own.dtype), alpha=scale)


class AdaptedExperts(AdaptedRest):
    """Of one parameter of experts (experts, out, in) or (experts, in, out), each of whose experts is split."""

    get_base_layer: Callable[[], nn.Module]
    parameter_name: str
    num_experts: int
    _did_swap_in_out_features: bool

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        self.alone(adapter_names)
        experts = self.get_base_layer()
        weight: Tensor | None = None
        stored = experts._parameters[self.parameter_name]
        for term in self.terms():
            assert isinstance(stored, DTensor)
            before = stored.to_local() if weight is None else weight
            a, b = used_apart([term.a, term.b], self.place)
            parts = self.parts(stored, a, b)
            weight = torch.baddbmm(before, *(x.to(before.dtype) for x in parts), alpha=term.scale)
        y: Tensor
        if weight is None:
            y = self.base_layer(x, *args, **kwargs)
            return y
        experts._parameters[self.parameter_name] = weight  # type: ignore[assignment]  # plain, for the call
        try:
            y = self.base_layer(x, *args, **kwargs)
            return y
        finally:
            experts._parameters[self.parameter_name] = stored

    def add(self, term: Term, scale: float) -> None:
        stored = self.get_base_layer()._parameters[self.parameter_name]
        assert isinstance(stored, DTensor)
        own = _local(stored)
        own.baddbmm_(*(x.to(own.dtype) for x in self.parts(stored, term.a, term.b)), alpha=scale)

    def parts(self, stored: DTensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """What of A (r * experts, in) and B (out, r * experts) this rank's part of the weight is the product of."""
        a = a.unflatten(0, (self.num_experts, -1))  # (experts, r, in)
        b = b.unflatten(1, (-1, self.num_experts)).permute(2, 0, 1)  # (experts, out, r)
        first, second = (b, a) if self._did_swap_in_out_features else (a.transpose(1, 2), b.transpose(1, 2))
        layout: Any = stored.placements[-1]  # a Shard, or a strided one
        if layout.dim % 3 == 1:
            return first.index_select(1, _entries(stored, layout)), second
        return first, second.index_select(2, _entries(stored, layout))


def _dropped(x: Tensor, term: Term, part: Callable[[Tensor], Tensor]) -> Tensor:
    """x, this rank's part of what is whole, without the elements that would be dropped of the whole."""
    if not term.drops:
        return x
    p: Any = term.dropout.p
    return dropped(x, p, (*x.shape[:-1], term.a.shape[1]), part)


def _entries(stored: DTensor, layout: Any) -> Tensor:
    """Which entries of the split dim this rank has."""
    size = stored.shape[layout.dim]
    dealt = Shard(0) if layout.is_shard() else type(layout)(0, split_factor=layout.split_factor)
    mesh = stored.device_mesh
    numbers = torch.arange(size, device=stored.device)
    own: Tensor = distribute_tensor(numbers, mesh, [dealt], src_data_rank=None).to_local()
    return own


def _local(p: Tensor) -> Tensor:
    return p.to_local() if isinstance(p, DTensor) else p


ADAPTED = {
    "columns": AdaptedColumns, "rows": AdaptedRows, "whole": AdaptedLinear, "embedding": AdaptedEmbedding,
    "experts": AdaptedExperts, STATES: AdaptedStates,
}  # fmt: skip
