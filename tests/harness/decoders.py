"""Tiny random decoders of transformers, in float64: the stock model, a split copy, and what they are compared by."""

import copy
from functools import lru_cache

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

import two_level_mha as tlm
from two_level_mha.blocks import full_tensor
from two_level_mha.stock import put, resolve

from .calls import mesh

BASE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None,
}  # fmt: skip
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}

# name -> (config class, what it has beyond BASE)
MODELS = {
    "llama": ("LlamaConfig", {"attention_bias": True}),
    "mistral": ("MistralConfig", {"sliding_window": 8}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "qwen3 moe": ("Qwen3MoeConfig", {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
                                     "moe_intermediate_size": 16}),
    "gemma": ("GemmaConfig", {"head_dim": 16}),
    "gemma2": ("Gemma2Config", _GEMMA),
    "gemma3": ("Gemma3TextConfig", _GEMMA | {"layer_types": ["sliding_attention", "full_attention",
                                                             "sliding_attention"]}),
    "granite": ("GraniteConfig", {}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0, 1]}),
    "exaone4": ("Exaone4Config", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention",
                                                                       "sliding_attention"]}),
    "28 heads": ("Qwen2Config", {"num_attention_heads": 28, "num_key_value_heads": 4, "hidden_size": 56,
                                 "head_dim": 8}),
    "2 kv heads": ("Qwen2Config", {"num_attention_heads": 14, "hidden_size": 56, "head_dim": 8}),
    "apertus": ("ApertusConfig", {}),
    "head_dim 512": ("Qwen3Config", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 512}),
}  # fmt: skip


class Norm(nn.Module):
    """A model's RMSNorm without its rounding to float32, which would hide what differs."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.shift = norm.weight, float("Gemma" in type(norm).__name__)
        self.eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (self.shift + self.weight)


def make_config(name: str, **changes) -> transformers.PretrainedConfig:
    kind, options = MODELS[name]
    return getattr(transformers, kind)(**(BASE | options | changes))


def make(
    name: str,
    dtype: torch.dtype = torch.float64,
    implementation: str = "sdpa",
    exact: bool = False,
    seed: int = 0,
    **changes,
) -> nn.Module:
    """The stock model, the same on every rank, in eval mode; changes: of its config.

    exact: its norms do not round to float32.
    """
    config = make_config(name, **changes)
    config._experts_implementation = "eager"  # the default takes no float64
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).to(dtype).eval()
    for p in model.parameters():
        p.data.normal_(1.0 if p.ndim == 1 else 0.0, 0.15)
    for module in list(model.modules()) if exact else []:
        for child, norm in list(module.named_children()):
            if type(norm).__name__.endswith("RMSNorm"):
                setattr(module, child, Norm(norm))
    return model


def make_meta(name: str, dtype: torch.dtype = torch.float64, **changes) -> nn.Module:
    """The same model without weights, in train mode, as a user makes it."""
    config = make_config(name, **changes)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="eager")


@lru_cache(maxsize=2)
def pair(name: str, grid: tuple[int, int], make_options: tuple = (), rest=False, **options) -> tuple[nn.Module, ...]:
    """The stock model and a split copy, by default of its attention only; make_options: of make, as items."""
    stock = make(name, **dict(make_options))
    return stock, tlm.parallelize(copy.deepcopy(stock), mesh(grid), rest=rest, **options)


def prompt(rows: int = 2, length: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (rows, length) and their attention mask: the first row is padded on the left by 4."""
    torch.manual_seed(1)
    ids = torch.randint(2, 64, (rows, length))
    keep = torch.ones_like(ids)
    if rows > 1:
        keep[0, :4] = 0
        ids[0, :4] = 0
    return ids, keep


def full_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """By stock's names and shapes."""
    found = {}
    for name, p in model.named_parameters():
        owner, _, own = name.rpartition(".")
        names = getattr(model.get_submodule(owner), "stock_names", {})
        if own in names:
            put(found, resolve(owner, names[own].key), names[own], full_tensor(p.grad))
        else:
            found[name] = full_tensor(p.grad)
    return found
