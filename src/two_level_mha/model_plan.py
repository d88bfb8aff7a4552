"""What a whole model of transformers costs a rank: its layers' plan, and the bytes of all of it.

Read from its config.json, of which the model is made without memory; nothing of the weights is needed.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer

from two_level_mha.attentions import Found, by_structure
from two_level_mha.errors import GridError
from two_level_mha.integrations.forms import is_gated, is_latent, layer_of
from two_level_mha.integrations.state_forms import has_form
from two_level_mha.memory_shares import checked_memory
from two_level_mha.mesh import Grid
from two_level_mha.plan_text import LATENT, UNITS
from two_level_mha.planner import Option, Plan, plan, with_memory
from two_level_mha.pretrained import on_meta
from two_level_mha.state_trial import held_by_first

_Sizes = tuple[tuple[str, Any], ...]  # of an attention: options of plan, by name


@dataclass(frozen=True)
class ModelPlan:
    """A layer's plan, and bytes of one rank for the whole model on the grid and scheme that it picks.

    attention_bytes: weights of attention, and of layers that keep a state in its place; other_bytes: 1 / P of all
    others, which parallelize(rest=True) splits but for norms and what its report names; cache_bytes: keys and values of
    all layers that have them; state_bytes: the states of those that have one, for any length; logits_bytes: of all
    positions, or with decode of one, whole; activation_bytes: what attention keeps of a forward pass for the backward
    pass.
    """

    name: str
    layers: int
    parameters: int
    layer: Plan
    attention_bytes: int
    other_bytes: int
    cache_bytes: int
    state_bytes: int
    logits_bytes: int
    activation_bytes: int

    def to_dict(self) -> dict[str, object]:
        """All of it as numbers, strings, lists and dicts, for JSON; "layer" is the layer's plan."""
        return vars(self) | {"layer": self.layer.to_dict()}

    def __str__(self) -> str:
        rows = {
            "attention weights": self.attention_bytes,
            "other weights, split over all ranks": self.other_bytes,
            "KV cache": self.cache_bytes,
            **({"states": self.state_bytes} if self.state_bytes else {}),
            "logits": self.logits_bytes,
            "kept by attention for a backward pass": self.activation_bytes,
        }
        ranks, pick = self.layer.call["devices"], self.layer.pick
        lines = [
            f"model    {self.name}: {self.layers} layers, {self.parameters / 1e9:.2f} B parameters, "
            f"{self.layer.layer['dtype']}",
            f"         one of {ranks} ranks, {pick.name}, for the call below:",
            *(f"         {what:40}{size / UNITS['B']['GB']:9.2f} GB" for what, size in rows.items()),
            "         one layer of attention:",
            str(self.layer),
        ]
        return "\n".join(lines)


def plan_model(
    folder: str | os.PathLike[str],
    *,
    ranks: int | None = None,
    batch: int,
    seq: int,
    decode: bool = False,
    dtype: torch.dtype | None = None,
    memory: Sequence[float] | None = None,
    **options: Any,
) -> ModelPlan:
    """Prices the transformers model of a folder with a config.json on `ranks` ranks: see plan, whose options it takes.

    dtype: of weights, activations and cache; None: as config.json says, of the weights before they were quantised.
    memory: as plan has it, for weights, states and cache of the whole model.
    Layers with a sliding window keep so much, those that reuse another's keys none. Multi-head latent attention is
    priced by the sizes that its config has, its cache as one of latents; layers that keep a state by what they keep in
    a call.
    Raises GridError for a folder without a config.json, for a model without an attention that parallelize knows by its
    structure, for one whose layers are not all latent attention alike, or keep states elsewhere than in a
    cache of transformers, and as plan does.
    """
    ranks = checked_memory(memory, ranks, decode)
    model = on_meta(Path(folder), dtype, quantised=True)
    config = model.config.get_text_config()
    layers: int = getattr(config, "num_hidden_layers", 0)
    latent = getattr(config, LATENT[0], None) is not None
    parts = set(model.modules()) - {model}
    alike = sum(is_latent(part, None) and getattr(part, "indexer", None) is None for part in parts) == layers
    attentions = by_structure(model, parts) if alike or not latent else []
    if not attentions:
        raise GridError(
            f"{type(model).__name__} has no heads of queries, keys and values that are known: plan one of its layers "
            "by its sizes, without --model"
        )
    call: dict[str, Any] = {
        "embed_dim": config.hidden_size, "ranks": ranks, "batch": batch, "decode": decode, "dtype": model.dtype,
        **options,
    }  # fmt: skip
    sizes = [_sizes(one, config, latent) for one in attentions]
    of_layer = dict(zip([layer_of(one.module) for one in attentions], sizes, strict=True))
    usual = max(sizes, key=sizes.count)
    found = plan(seq=seq, **call | dict(usual))
    windows = [
        (of_layer.get(index, usual), min(getattr(layer, "sliding_window", None) or seq, seq))
        for index, layer in enumerate(DynamicCache(config=config).layers)
        if isinstance(layer, DynamicLayer) and model.can_generate()
    ]
    states = [module for module in model.modules() if has_form(module)]
    parameters = sum(p.numel() for p in model.parameters())
    inside = sum(p.numel() for module in (*states, *(one.module for one in attentions)) for p in module.parameters())

    @cache
    def priced(own: _Sizes, length: int) -> tuple[Option, ...]:
        """A layer of other sizes, or that keeps fewer tokens."""
        return plan(seq=length, **call | dict(own)).options

    def held(pick: Option) -> _Held:
        """On the same grid with the same scheme."""

        def same(options: tuple[Option, ...]) -> Option:
            return next(one for one in options if (one.grid, one.scheme) == (pick.grid, pick.scheme))

        costs = [same(priced(own, seq)) for own in sizes]
        state_weights, state_bytes = held_by_first(states, Grid(*pick.grid), batch)
        return _Held(
            attention_bytes=sum(cost.weight_bytes for cost in costs) + state_weights,
            other_bytes=(parameters - inside) * model.dtype.itemsize // found.call["devices"],
            cache_bytes=sum(same(priced(own, length)).cache_bytes for own, length in windows),
            state_bytes=state_bytes,
            activation_bytes=sum(cost.activation_bytes for cost in costs),
        )

    if memory is None:
        ours = held(found.pick)
    else:
        of_grids = {option.grid: held(option) for option in found.kept()}
        shares = {o.grid: found.shared(memory, o, *of_grids[o.grid].equal_and_dealt()) for o in found.kept()}
        found = with_memory(found, shares)
        ours = of_grids[found.pick.grid]
        assert found.shares is not None
        most = max(found.shares.rank_bytes) - ours.equal_and_dealt()[0]
        ours = ours._replace(cache_bytes=most)
    return ModelPlan(
        name=type(model).__name__,
        layers=layers,
        parameters=parameters,
        layer=found,
        logits_bytes=batch * (1 if decode else seq) * getattr(config, "vocab_size", 0) * model.dtype.itemsize,
        **ours._asdict(),
    )


class _Held(NamedTuple):
    """Of ModelPlan what depends on the grid."""

    attention_bytes: int
    other_bytes: int
    cache_bytes: int
    state_bytes: int
    activation_bytes: int

    def equal_and_dealt(self) -> tuple[int, int]:
        """What every rank has alike for decoding, and a cache's tokens."""
        return self.attention_bytes + self.other_bytes + self.state_bytes, self.cache_bytes


def _sizes(one: Found, config: PreTrainedConfig, latent: bool) -> _Sizes:
    """Of an attention, as plan takes them."""
    if latent:
        bias = bool(getattr(config, "attention_bias", False))
        own = tuple((name, getattr(config, name, None)) for name in LATENT)
        return (("num_heads", config.num_attention_heads), ("bias", bias), *own)
    num_heads, num_kv_heads, head_dim = one.sizes()
    return (
        ("num_heads", num_heads), ("num_kv_heads", num_kv_heads), ("head_dim", head_dim),
        ("gated", is_gated(one.projections, num_heads, head_dim)),
        ("bias", all(getattr(linear, "bias", None) is not None for linear in one.projections.values())),
    )  # fmt: skip
