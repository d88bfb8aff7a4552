"""The kinds of attention that the package itself splits: a table of adapters."""

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from two_level_mha.adapters import Adapter
from two_level_mha.integrations import forms, relative, titan
from two_level_mha.integrations.packed import is_packed, packed_inputs, packed_like, packed_problem, packed_variants
from two_level_mha.integrations.projected import probe_inputs, projected_like
from two_level_mha.mesh import Grid
from two_level_mha.multihead import TwoLevelMultiheadAttention
from two_level_mha.names import Args, Kwargs, LayerOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


def later(module: str, name: str) -> Callable[..., Any]:
    """A function of integrations.`module`, which imports transformers: imported when it is called."""

    def call(*args: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(f"two_level_mha.integrations.{module}"), name)(*args, **options)

    return call


def _torch_inputs(mha: nn.MultiheadAttention, dtype: torch.dtype) -> list[tuple[Args, Kwargs]]:
    widths = (mha.embed_dim, mha.kdim, mha.vdim)
    query, key, value = (torch.randn(*((2, n) if mha.batch_first else (n, 2)), w, dtype=dtype)
                         for n, w in zip((4, 5, 5), widths, strict=True))  # fmt: skip
    hidden_BS = torch.zeros(2, 5, dtype=torch.bool)
    hidden_BS[1, 3:] = True
    return [((query, key, value), {"key_padding_mask": hidden_BS})]


def _replace_mha(
    mha: nn.MultiheadAttention,
    projections: dict[str, nn.Module],
    paths: dict[str, str],
    mesh: DeviceMesh | None,
    **options: "Unpack[LayerOptions]",
) -> TwoLevelMultiheadAttention:
    return TwoLevelMultiheadAttention.from_checked(mha, mesh, **options)


# Parameters of transformers' modules besides those of projections.
_PARTS = (
    forms.SINKS,
    forms.OUTPUT_BIAS,
    forms.GATE_SHIFT,
    *(f"{name}.{part}" for name in (*sum(forms.NORMS.values(), ()), forms.OUTPUT_NORM) for part in ("weight", "bias")),
    *(f"{name}.weight" for name in (*forms.GATES, forms.BIAS_TABLE)),
    *(f"{name}.norms.*.weight" for name in sum(forms.NORMS.values(), ())),
)

_LATENT_PARTS = (
    *(f"{name}.*" for part in forms.LATENT_NORMS.items() for name in part),
    *(f"{name}.*" for name in (forms.ROTARY_KEY_NORM, forms.INDEXER)),
    *(f"{name}.weight" for name in forms.GATES),
)

_DECODER = Adapter(
    "decoder",
    forms.is_decoder,
    forms.paths_of,
    later("decoder", "decoder_like"),
    later("decoder", "decoder_inputs"),
    _PARTS,
    cached=True,
    variants=forms.variants_of,
    problem=later("decoder", "problem"),
)

FAMILIES = (
    Adapter(
        "nn.MultiheadAttention",
        lambda module, parent: isinstance(module, nn.MultiheadAttention),
        {"o": "out_proj"},
        _replace_mha,
        _torch_inputs,
        ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "bias_k", "bias_v"),
        sizes=lambda mha, projections: (mha.num_heads, mha.num_heads, mha.head_dim),
        crosses=None,
    ),
    Adapter(
        "cross",
        forms.is_cross_attention,
        forms.paths_of,
        later("cross", "cross_like"),
        later("cross", "cross_inputs"),
        _PARTS,
        cached=True,
        crosses=True,
        variants=forms.variants_of,
        problem=forms.unknown_argument,
    ),
    replace(
        _DECODER,
        name="normed over heads",
        matches=forms.is_normed,
        replace=later("behind", "normed_like"),
        parameters=(*_PARTS, *(f"{name}.weight" for name in forms.HEADS_NORMS)),
    ),
    replace(
        _DECODER,
        name="differential",
        matches=forms.is_differential,
        replace=later("behind", "differential_like"),
        inputs=later("behind", "differential_inputs"),
        parameters=(*_PARTS, *forms.LAMBDAS),
        grid=lambda grid, k: Grid(1, grid.size),
    ),
    _DECODER,
    Adapter(
        "disentangled",
        relative.is_disentangled,
        relative.paths_of,
        relative.disentangled_like,
        relative.disentangled_inputs,
        relative.DISENTANGLED_PARTS,
    ),
    Adapter(
        "conformer",
        relative.is_conformer,
        relative.paths_of,
        relative.conformer_like,
        relative.conformer_inputs,
        relative.CONFORMER_PARTS,
        problem=relative.conformer_problem,
    ),
    Adapter(
        "gated bias",
        relative.is_gated_bias,
        forms.paths_of,
        relative.gated_bias_like,
        relative.gated_bias_inputs,
        relative.GATED_BIAS_PARTS,
    ),
    Adapter(
        "packed",
        is_packed,
        forms.paths_of,
        packed_like,
        packed_inputs,
        _PARTS,
        variants=packed_variants,
        problem=packed_problem,
    ),
    Adapter(
        "encoder",
        forms.is_encoder,
        forms.paths_of,
        projected_like,
        probe_inputs,
        _PARTS,
        variants=forms.variants_of,
        problem=forms.unknown_argument,
    ),
    Adapter(
        "latent",
        forms.is_latent,
        forms.latent_paths,
        later("latent", "latent_like"),
        later("decoder", "decoder_inputs"),
        _LATENT_PARTS,
        cached=True,
        variants=forms.latent_variants,
        sizes=forms.latent_sizes,
        problem=later("decoder", "problem"),
        grid=Grid.for_whole_heads,
    ),
    Adapter(
        "torchtitan's",
        titan.is_titan,
        titan.PATHS,
        titan.titan_like,
        titan.titan_inputs,
        _PARTS,
        problem=titan.problem,
    ),
)
