"""Tiny decoders of transformers with random weights, for the tests of what is split, loaded and saved."""

import torch
import transformers
from torch import nn

from .decoders import Norm

SIZES = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
    "intermediate_size": 24, "vocab_size": 32, "max_position_embeddings": 32, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 8, "num_experts_per_tok": 2}
CONFIGS = {
    "Llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "tied Llama": ("LlamaConfig", "LlamaForCausalLM", {"tie_word_embeddings": True}),
    "biased Llama": ("LlamaConfig", "LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {"tie_word_embeddings": True, "sliding_window": 4}),
    "Qwen3-MoE": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**EXPERTS, "num_experts": 4}),
    "Apertus": ("ApertusConfig", "ApertusForCausalLM", {}),
    "Mixtral": ("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 4}),
}


def make_config(kind: str, **changes):
    config, _, own = CONFIGS[kind]
    return getattr(transformers, config)(**{**SIZES, **own, **changes})


def make(kind: str, dtype: torch.dtype = torch.float64, seed: int = 0, exact: bool = False, **changes) -> nn.Module:
    """Every weight random and large enough to matter; experts run one by one; exact: norms do not round to float32."""
    torch.manual_seed(seed)
    config = make_config(kind, **changes)
    config._experts_implementation = "eager"
    model = getattr(transformers, CONFIGS[kind][1])(config)
    for parent in list(model.modules()) if exact else []:
        for name, norm in list(parent.named_children()):
            if type(norm).__name__.endswith("RMSNorm"):
                setattr(parent, name, Norm(norm))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model.to(dtype).eval()


def make_meta(kind: str, dtype: torch.dtype = torch.float64, **changes) -> nn.Module:
    """The same model without weights, in train mode, as a user makes it."""
    with torch.device("meta"):
        model = getattr(transformers, CONFIGS[kind][1])
        return model._from_config(make_config(kind, **changes), dtype=dtype, experts_implementation="eager")
