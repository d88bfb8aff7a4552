"""What a whole model of transformers costs a rank: its layers' plan, and the bytes of all of it.

Read from its config.json, of which the model is made without memory; nothing of the weights is needed.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from two_level_mha.errors import GridError
from two_level_mha.integrations.forms import is_latent
from two_level_mha.planner import LATENT, UNITS, Plan, plan
from two_level_mha.pretrained import on_meta


@dataclass(frozen=True)
class ModelPlan:
    """A layer's plan, and bytes of one rank for the whole model on the grid and scheme that it picks.

    attention_bytes: weights of attention; other_bytes: 1 / P of all others, which parallelize(rest=True) splits but for
    norms and what its report names; cache_bytes: keys and values of all layers; logits_bytes: of all positions, or with
    decode of one, whole; activation_bytes: what attention keeps of a forward pass for the backward pass.
    """

    name: str
    layers: int
    parameters: int
    layer: Plan
    attention_bytes: int
    other_bytes: int
    cache_bytes: int
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
    ranks: int,
    batch: int,
    seq: int,
    decode: bool = False,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> ModelPlan:
    """Prices the transformers model of a folder with a config.json on `ranks` ranks: see plan, whose options it takes.

    dtype: of weights, activations and cache; None: as config.json says, of the weights before they were quantised.
    Layers with a sliding window keep so much. Multi-head latent attention is priced by the sizes that its config has,
    its cache as one of latents.
    Raises GridError for a folder without a config.json, for a model without heads of queries, keys and values in its
    config, for one whose layers are not all latent attention alike, and as plan does.
    """
    model = on_meta(Path(folder), dtype, quantised=True)
    config = model.config.get_text_config()
    heads, layers = getattr(config, "num_attention_heads", None), getattr(config, "num_hidden_layers", None)
    latent = getattr(config, LATENT[0], None) is not None
    alike = sum(is_latent(m, None) and getattr(m, "indexer", None) is None for m in model.modules()) == layers
    if not (isinstance(heads, int) and isinstance(layers, int)) or (latent and not alike):
        raise GridError(
            f"{type(model).__name__} has no heads of queries, keys and values that its config counts: plan one of its "
            "layers by its sizes, without --model"
        )
    own = LATENT if latent else ("head_dim", "num_key_value_heads")
    sizes: dict[str, Any] = {name.replace("key_value", "kv"): getattr(config, name, None) for name in own} | {
        "embed_dim": config.hidden_size, "num_heads": heads, "ranks": ranks, "batch": batch, "decode": decode,
        "dtype": model.dtype, **options,
    }  # fmt: skip
    if latent and getattr(config, "attention_bias", False):
        sizes["bias"] = True
    found = plan(seq=seq, **sizes)
    window = getattr(config, "sliding_window", None) or seq
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers  # of Mistral, all or none
    windowed = sum(kind == "sliding_attention" for kind in kinds) if window < seq else 0
    cached = [(layers - windowed, found.pick)]
    if windowed:
        short = plan(seq=window, **sizes)
        same = (found.pick.grid, found.pick.scheme)
        cached.append((windowed, next(option for option in short.options if (option.grid, option.scheme) == same)))
    parameters = sum(p.numel() for p in model.parameters())
    attention = plan(seq=seq, **sizes | {"ranks": 1}).pick.weight_bytes if latent else found.pick.weight_bytes * ranks
    return ModelPlan(
        name=type(model).__name__,
        layers=layers,
        parameters=parameters,
        layer=found,
        attention_bytes=layers * found.pick.weight_bytes,
        other_bytes=max(0, parameters * model.dtype.itemsize - layers * attention) // ranks,
        cache_bytes=sum(count * option.cache_bytes for count, option in cached),
        logits_bytes=batch * (1 if decode else seq) * config.vocab_size * model.dtype.itemsize,
        activation_bytes=layers * found.pick.activation_bytes,
    )
