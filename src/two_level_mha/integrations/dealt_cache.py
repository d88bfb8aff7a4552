"""transformers' own KV caches, of which each rank holds its sequences: for modules whose weights are gathered."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

from two_level_mha.class_like import class_like
from two_level_mha.errors import GridError
from two_level_mha.gathered import Sequences
from two_level_mha.integrations.cache import ModelCache, ModelCacheLayer
from two_level_mha.mesh import Place

if TYPE_CHECKING:
    _Original = DynamicLayer  # for instance
else:
    _Original = object


class DealtLayer(_Original):
    """Of a layer of a cache of another class too: what picks sequences of the batch picks among those of all ranks."""

    sequences: Sequences

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._together(super().reorder_cache, beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._together(super().batch_select_indices, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._together(super().batch_repeat_interleave, repeats)

    def _together(self, pick: Callable[[Any], None], argument: object) -> None:
        def each(change: Callable[[Tensor], Tensor]) -> None:
            for name, state in list(vars(self).items()):
                if isinstance(state, Tensor) and state.dim() > 1:
                    setattr(self, name, change(state))
                elif isinstance(state, dict):
                    state.update({key: change(x) for key, x in state.items() if isinstance(x, Tensor) and x.dim() > 1})

        each(self.sequences.whole)
        pick(argument)
        sizes: list[int] = []

        def note(x: Tensor) -> Tensor:
            sizes.append(x.shape[0])
            return x

        each(note)
        if sizes:
            self.sequences = Sequences(sizes[0], self.sequences.place)
            each(self.sequences.part)


def can_be_dealt(cache: Cache) -> bool:
    """Whether all that a cache holds is in its layers: those of single models may have more."""
    return type(cache) in (DynamicCache, EncoderDecoderCache, ModelCache)


def deal_cache(cache: Cache, index: int, batch: int, place: Place) -> None:
    """Makes layer `index` of a cache, unless it is, one that holds this rank's sequences.

    Raises GridError for a layer that was filled elsewhere, or for a batch of another size than before.
    """
    if isinstance(cache, EncoderDecoderCache):
        deal_cache(cache.cross_attention_cache, index, batch, place)
        if not _is_split(cache.self_attention_cache, index):  # by self-attention, while this is cross-attention
            deal_cache(cache.self_attention_cache, index, batch, place)
        return
    while len(cache.layers) <= index and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    if isinstance(layer, DealtLayer):
        if layer.sequences.batch != batch:
            raise GridError(f"the KV cache holds {layer.sequences.batch} sequences, this call has {batch}")
        return
    layer = own_layer(cache, index)
    made = class_like(DealtLayer, type(layer))
    cache.layers[index] = made.__new__(made)  # a change of class is not for every layout
    vars(cache.layers[index]).update(vars(layer), sequences=Sequences(batch, place))


def own_layer(cache: Cache, index: int) -> Any:
    """Layer `index` as transformers has it; GridError for one that was filled elsewhere."""
    layer = cache.layers[index]
    if isinstance(layer, ModelCacheLayer) and not layer.length:
        layer = DynamicLayer() if layer.window is None else DynamicSlidingWindowLayer(layer.window)
        cache.layers[index] = layer
    if isinstance(layer, ModelCacheLayer) or _filled(layer):
        raise GridError("past_key_values was filled by a model that is not split so: fill it again by this one")
    return layer


def _is_split(cache: Cache, index: int) -> bool:
    """Whether layer `index` holds what a split attention put there."""
    layer = cache.layers[index] if index < len(cache.layers) else None
    return isinstance(layer, ModelCacheLayer) and bool(layer.length)


def _filled(layer: object) -> bool:
    states = [x for value in vars(layer).values() for x in (value.values() if isinstance(value, dict) else [value])]
    return any(isinstance(x, Tensor) and x.dim() > 1 and x.numel() for x in states)
