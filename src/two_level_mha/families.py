"""The kinds of attention that the package itself splits: a table of adapters."""

import importlib
import inspect
from collections.abc import Callable

import torch
from torch import nn

from two_level_mha.adapters import Adapter
from two_level_mha.integrations.projected import probe_inputs, projected_like
from two_level_mha.multihead import TwoLevelMultiheadAttention


def _has(module: nn.Module, *names: str) -> bool:
    return all(hasattr(module, name) for name in names)


def _is_bert(module: nn.Module, parent: nn.Module | None) -> bool:
    known = _has(module, "query", "key", "value", "scaling", "num_attention_heads")
    return known and hasattr(getattr(parent, "output", None), "dense")


def _is_vit(module: nn.Module, parent: nn.Module | None) -> bool:
    return _has(module, "q_proj", "k_proj", "v_proj", "o_proj", "scaling", "num_attention_heads")


def _is_decoder(module: nn.Module, parent: nn.Module | None) -> bool:
    known = _has(module, "q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "scaling", "layer_idx", "config")
    return known and {"position_embeddings", "past_key_values"} <= inspect.signature(module.forward).parameters.keys()


def _is_gpt2(module: nn.Module, parent: nn.Module | None) -> bool:
    return _has(
        module, "c_attn", "c_proj", "attn_dropout", "resid_dropout", "num_heads", "head_dim", "scaling", "layer_idx",
        "is_cross_attention", "reorder_and_upcast_attn",
    )  # fmt: skip


def later(module: str, name: str) -> Callable:
    """A function of integrations.`module`, which imports transformers: imported when it is called."""

    def call(*args, **options):
        return getattr(importlib.import_module(f"two_level_mha.integrations.{module}"), name)(*args, **options)

    return call


def _torch_inputs(mha: nn.MultiheadAttention, dtype: torch.dtype) -> list[tuple[tuple, dict]]:
    widths = (mha.embed_dim, mha.kdim, mha.vdim)
    query, key, value = (torch.randn(*((2, n) if mha.batch_first else (n, 2)), w, dtype=dtype)
                         for n, w in zip((4, 5, 5), widths, strict=True))  # fmt: skip
    hidden_BS = torch.zeros(2, 5, dtype=torch.bool)
    hidden_BS[1, 3:] = True
    return [((query, key, value), {"key_padding_mask": hidden_BS})]


def _replace_mha(mha: nn.MultiheadAttention, projections, paths, mesh, **options) -> TwoLevelMultiheadAttention:
    return TwoLevelMultiheadAttention.from_checked(mha, mesh, **options)


FAMILIES = (
    Adapter(
        "nn.MultiheadAttention",
        lambda module, parent: isinstance(module, nn.MultiheadAttention),
        {"o": "out_proj"},
        _replace_mha,
        _torch_inputs,
        ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "bias_k", "bias_v"),
        sizes=lambda mha, projections: (mha.num_heads, mha.num_heads, mha.head_dim),
    ),
    Adapter(
        "BERT",
        _is_bert,
        {"q": "query", "k": "key", "v": "value", "o": "../output.dense"},
        projected_like,
        probe_inputs,
    ),
    Adapter(
        "Llama",
        _is_decoder,
        {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"},
        later("decoder", "decoder_like"),
        later("decoder", "decoder_inputs"),
        ("q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias"),
        cached=True,
        variants=({}, {"rotates": False}),
    ),
    Adapter(
        "ViT",
        _is_vit,
        {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"},
        projected_like,
        probe_inputs,
    ),
    Adapter(
        "GPT-2",
        _is_gpt2,
        {"qkv": "c_attn", "o": "c_proj"},
        later("gpt2", "gpt2_like"),
        later("gpt2", "gpt2_inputs"),
        cached=True,
        sizes=later("gpt2", "heads_of"),
        linear="Conv1D",
        problem=later("gpt2", "problem"),
    ),
)
