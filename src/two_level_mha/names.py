"""The words that arguments take, as types: a typo is found before the program runs; and what many signatures say."""

import os
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from two_level_mha.profile import Profile

Model = TypeVar("Model", bound=nn.Module)  # what goes in comes out
MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)  # out of a function come as many None as went in

Scheme: TypeAlias = Literal["auto", "independent", "slices", "sequence", "batch", "heads", "weights"]
Combine: TypeAlias = Literal["reduce", "concat"]
Activations: TypeAlias = Literal["replicated", "sequence", "batch"]
CacheLayout: TypeAlias = Literal["position", "batch"]

Args: TypeAlias = tuple[Any, ...]  # of a call of a module, which may take anything
Kwargs: TypeAlias = dict[str, Any]


class Factory(TypedDict):
    """What a new tensor is made with."""

    device: torch.device | str | None
    dtype: torch.dtype | None


class LayerOptions(TypedDict, total=False):
    """Those of every layer, as TwoLevelMultiheadAttention has them."""

    scheme: Scheme
    combine: Combine
    debug: bool | None
    reduce_dtype: torch.dtype | None
    profile: "Profile | str | os.PathLike[str] | None"
    activations: Activations
    overlap: int | None


class CachedOptions(LayerOptions, total=False):
    """And of those that have a KV cache."""

    cache: CacheLayout


class ModelOptions(CachedOptions, total=False):
    """Those of parallelize."""

    rest: bool
    skip: Collection[str]
    only: Collection[str]
