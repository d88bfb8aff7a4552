"""The words that arguments take, as types: a typo is found before the program runs."""

from typing import Literal, TypeAlias, TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)  # what goes in comes out

Scheme: TypeAlias = Literal["auto", "independent", "slices", "sequence", "batch", "heads", "weights"]
Combine: TypeAlias = Literal["reduce", "concat"]
Activations: TypeAlias = Literal["replicated", "sequence", "batch"]
CacheLayout: TypeAlias = Literal["position", "batch"]
