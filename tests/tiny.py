"""Tiny decoders of transformers with random weights, for the tests of what is split, loaded and saved."""

import torch
import transformers
from torch import nn

from two_level_mha.blocks import whole
from two_level_mha.layer import GridAttention
from two_level_mha.rest import find_rest, split_rest
from two_level_mha.stock import from_stock, linear_names, put, take_stock_keys

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
    "Mixtral": ("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 4}),
}


def make_config(kind: str, **changes):
    config, _, own = CONFIGS[kind]
    return getattr(transformers, config)(**{**SIZES, **own, **changes})


def make(kind: str, dtype: torch.dtype = torch.float64, seed: int = 0, **changes) -> nn.Module:
    """A model of tests: every weight random and large enough to matter. Experts run one by one ("eager")."""
    torch.manual_seed(seed)
    config = make_config(kind, **changes)
    config._experts_implementation = "eager"
    model = getattr(transformers, CONFIGS[kind][1])(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model.to(dtype).eval()


def make_meta(kind: str, dtype: torch.dtype = torch.float64, **changes) -> nn.Module:
    """The same model without weights, in train mode, as a user makes it."""
    with torch.device("meta"):
        model = getattr(transformers, CONFIGS[kind][1])
        return model._from_config(make_config(kind, **changes), dtype=dtype, experts_implementation="eager")


class Stored(GridAttention):
    """Keeps an attention's projections as blocks; computes with the whole weights, by the original itself."""

    def __init__(self, attention: nn.Module, mesh, **options) -> None:
        config = attention.config
        sizes = {"num_heads": config.num_attention_heads, "num_kv_heads": config.num_key_value_heads}
        super().__init__(**sizes, head_dim=attention.head_dim, mesh=mesh, debug=None, **options)
        self.stock_names, state = {}, {}
        for letter in "qkvo":
            path, linear = f"{letter}_proj", getattr(attention, f"{letter}_proj")
            self.stock_names |= linear_names("out" if letter == "o" else letter, path, linear, attention.head_dim)
            state |= {f"{path}.{part}": p.detach() for part, p in linear.named_parameters()}
        self.store(from_stock(state, self.stock_names))
        for name in ("q_norm", "k_norm"):
            if hasattr(attention, name):
                setattr(self, name, getattr(attention, name))
        vars(self)["attention"] = attention
        take_stock_keys(self)

    def forward(self, *args, **kwargs):
        state = {f"{name}.weight": getattr(self, name).weight for name in ("q_norm", "k_norm") if hasattr(self, name)}
        for name, stock in self.stock_names.items():
            put(state, stock.key, stock, whole(self._parameters[name]))
        return torch.func.functional_call(self.attention, state, args, kwargs)


def store(model: nn.Module, mesh, **options) -> nn.Module:
    """As parallelize, with attention that only stores its weights in blocks."""
    options = {"scheme": "slices", "combine": "reduce", **options}
    names = [name for name, _ in model.named_modules() if name.endswith("self_attn")]
    rest = find_rest(model, mesh.size(), set(names))
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Stored(model.get_submodule(name), mesh, **options))
    split_rest(rest, mesh)
    return model
