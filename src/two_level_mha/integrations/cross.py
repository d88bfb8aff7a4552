"""transformers' cross-attention of decoders: BART, Marian, Whisper, T5, BERT beside an encoder and their kin."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import EncoderDecoderCache

from two_level_mha.class_like import class_like
from two_level_mha.errors import UsageRuntimeError
from two_level_mha.integrations import forms
from two_level_mha.integrations.decoder import DecoderAttention
from two_level_mha.integrations.projected import Attended, mask_for, random_arguments
from two_level_mha.low_rank import features_of


class CrossAttention(DecoderAttention):
    """A DecoderAttention whose keys and values are of other states (B, S, Dk), such as an encoder's.

    attention_mask is (B, 1 or h, L, S), and no row is hidden from a query without one. An EncoderDecoderCache keeps
    keys and values of the first call, as it keeps self-attention's; later ones do not look at the states.
    """

    def __init__(self, original: nn.Module, *args: Any, **options: Any) -> None:
        super().__init__(original, *args, **options)
        self.states_name = forms.states_name(original) or ""

    def forward(self, *args: Any, **kwargs: Any) -> Attended:
        output = super().forward(*args, **kwargs)
        past = self.given(args, kwargs).get(self.cache_name)
        if past is not None:
            past.is_updated[self.layer_idx] = True
        return output

    def states_of(self, given: dict[str, Any]) -> Tensor:
        states, x_BLD = given.get(self.states_name), given["hidden_states"]
        if states is None or self.keeps(given):
            assert self.k_weight is not None
            none: Tensor = x_BLD.new_empty(x_BLD.shape[0], 0, self.k_weight.shape[2])
            return none
        found: Tensor = states
        return found

    def cache_of(self, given: dict[str, Any]) -> Any:
        past = given.get(self.cache_name)
        return past.cross_attention_cache if isinstance(past, EncoderDecoderCache) else past

    def keeps(self, given: dict[str, Any]) -> bool:
        """Whether the cache of a call has its keys and values."""
        past = given.get(self.cache_name)
        return isinstance(past, EncoderDecoderCache) and bool(past.is_updated.get(self.layer_idx))

    def check_arguments(self, given: dict[str, Any]) -> None:
        states, past = given.get(self.states_name), given.get(self.cache_name)
        super().check_arguments({name: x for name, x in given.items() if name != self.states_name})
        if states is None and not self.keeps(given):
            raise UsageRuntimeError(f"cross-attention attends to {self.states_name}: give it, got None")
        if past is not None and not isinstance(past, EncoderDecoderCache):
            raise UsageRuntimeError(
                "cross-attention keeps its keys and values in an EncoderDecoderCache, got a "
                f"{type(past).__name__}: call with EncoderDecoderCache(DynamicCache(), DynamicCache())"
            )

    def causal_without_mask(self, given: dict[str, Any], length: int) -> bool:
        return False


def cross_like(original: nn.Module, *args: Any, **options: Any) -> CrossAttention:
    """A CrossAttention of the original's class too."""
    return class_like(CrossAttention, type(original))(original, *args, **options)


def cross_inputs(original: nn.Module, dtype: torch.dtype) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Two sequences of 6 queries to 5 states, of which one has 3: all at once, with a cache in two steps, without a
    mask.
    """
    keep = torch.ones(2, 1, 6, 5, dtype=torch.bool)
    keep[1, ..., 3:] = False
    whole = random_arguments(original, 6, dtype)
    x_BLD = whole.pop("hidden_states")
    key = forms.first_of(original, forms.PROJECTIONS["k"])
    states_name = forms.states_name(original)
    assert states_name is not None
    whole[states_name] = torch.randn(2, 5, features_of(key)[0], dtype=dtype)

    def call(first: int, end: int, mask: Tensor | None, **cached: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        mask = mask if mask is None else mask_for(original, mask[:, :, first:end], dtype)
        given = whole | {forms.mask_name(original): mask} | cached
        if whole.get("position_bias") is not None:
            given["position_bias"] = whole["position_bias"][..., first:end, :5]
        return (x_BLD[:, first:end].contiguous(),), given

    calls = [call(0, 6, keep), call(0, 6, None)]
    if (name := forms.cache_name(original)) is not None:
        past = {name: EncoderDecoderCache(DynamicCache(), DynamicCache())}
        calls += [call(0, 4, keep, **past), call(4, 6, keep, **past)]
    return calls
