"""The structures of attention that parallelize knows: a table."""

import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from two_level_mha.integrations.projected import heads_of, probe_inputs, projected_like
from two_level_mha.multihead import TwoLevelMultiheadAttention


@dataclass(frozen=True)
class Family:
    """One structure of attention: how to recognise it, where its projections are, how to replace and to call it."""

    name: str
    matches: Callable[[nn.Module, nn.Module | None], bool]  # (module, parent)
    paths: dict[str, str]  # projections that are linears of their own: q, k, v or qkv, o -> path as in StockTensor.key
    replace: Callable[..., nn.Module]  # (module, projections, paths, mesh, **options), gives a module with stock_names
    inputs: Callable[[nn.Module, torch.dtype], list[tuple[tuple, dict]]]
    parameters: tuple[str, ...] = ()  # that it may have besides those of the projections
    cached: bool = False  # replace takes cache=, the layout of its KV cache
    variants: tuple[dict[str, object], ...] = ({},)  # options of replace, of which the probe takes the first that fits
    sizes: Callable[[nn.Module, dict], tuple[int, int, int]] = heads_of  # heads, key/value heads, head_dim
    linear: str = "nn.Linear"  # what a projection must be
    problem: Callable[[nn.Module], str | None] = lambda module: None  # a feature that is not supported

    @property
    def out_in_parent(self) -> bool:
        return self.paths["o"].startswith("../")

    def is_plain(self, projection: nn.Module) -> bool:
        """Whether a projection is of the class that is known, and not of a subclass."""
        if self.linear == "nn.Linear":
            return type(projection) in (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
        known = sys.modules.get("transformers.pytorch_utils")
        return known is not None and type(projection) is known.Conv1D

    def new(
        self, module: nn.Module, projections: dict[str, nn.Module], mesh: DeviceMesh | None, options: dict[str, object]
    ) -> nn.Module:
        """The replacement; it takes of the options of parallelize what it has."""
        options = {name: value for name, value in options.items() if name != "cache" or self.cached}
        return self.replace(module, projections, self.paths, mesh, **options)

    def projections(self, module: nn.Module, parent: nn.Module) -> dict[str, nn.Module]:
        return {
            letter: (parent if path.startswith("../") else module).get_submodule(path.removeprefix("../"))
            for letter, path in self.paths.items()
        }


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


def _later(module: str, name: str) -> Callable:
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
    Family(
        "nn.MultiheadAttention",
        lambda module, parent: isinstance(module, nn.MultiheadAttention),
        {"o": "out_proj"},
        _replace_mha,
        _torch_inputs,
        ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "bias_k", "bias_v"),
        sizes=lambda mha, projections: (mha.num_heads, mha.num_heads, mha.head_dim),
    ),
    Family(
        "BERT",
        _is_bert,
        {"q": "query", "k": "key", "v": "value", "o": "../output.dense"},
        projected_like,
        probe_inputs,
    ),
    Family(
        "Llama",
        _is_decoder,
        {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"},
        _later("decoder", "decoder_like"),
        _later("decoder", "decoder_inputs"),
        ("q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias"),
        cached=True,
        variants=({}, {"rotates": False}),
    ),
    Family(
        "ViT",
        _is_vit,
        {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"},
        projected_like,
        probe_inputs,
    ),
    Family(
        "GPT-2",
        _is_gpt2,
        {"qkv": "c_attn", "o": "c_proj"},
        _later("gpt2", "gpt2_like"),
        _later("gpt2", "gpt2_inputs"),
        cached=True,
        sizes=_later("gpt2", "heads_of"),
        linear="Conv1D",
        problem=_later("gpt2", "problem"),
    ),
)
