"""Our KV cache where a transformers model wants one of its own."""

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
    get_layer_types_and_kwargs,
)

from two_level_mha.cache_layer import CacheLayer, Config, LayersCache
from two_level_mha.errors import GridError, UsageRuntimeError
from two_level_mha.mesh import Grid, Place, mesh_of

# type of layer -> whether it keeps a window of tokens
WINDOWED = {
    "full_attention": False,
    "indexed_attention": False,
    "sliding_attention": True,
    "chunked_attention": True,
}
HYBRID = "hybrid"  # type of a layer that has keys and values beside states
REPLACED = (DynamicLayer, DynamicIndexedLayer, DynamicSlidingWindowLayer, LinearAttentionAndFullAttentionLayer)


class ModelCacheLayer(CacheLayer, CacheLayerMixin):
    """A CacheLayer under transformers' names. It reports the lengths of the whole, which its attention knows to split;
    `keys` and `values` stay None, since no rank holds them. indexer_keys (B, S, ..): an indexer's, on every rank.
    """

    is_croppable = True
    supports_early_init = False

    def __init__(self, place: Place, layout: str, *, max_length: int | None = None, window: int | None = None) -> None:
        CacheLayerMixin.__init__(self)
        CacheLayer.__init__(self, place, layout, max_length=max_length, window=window)
        self.indexer_keys: Tensor | None = None

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        kept = [] if self.indexer_keys is None else [self.indexer_keys]
        self.indexer_keys = torch.cat([*kept, indexer_key_states], 1)
        return self.indexer_keys

    @property
    def nbytes(self) -> int:
        return super().nbytes + (0 if self.indexer_keys is None else self.indexer_keys.nbytes)

    def rewind(self, tokens: int) -> None:
        super().rewind(tokens)
        if self.indexer_keys is not None:
            self.indexer_keys = self.indexer_keys[:, : self.length]

    def select(self, index: Tensor) -> None:
        super().select(index)
        if self.indexer_keys is not None:
            self.indexer_keys = self.indexer_keys[index.to(self.indexer_keys.device)]

    @property
    def is_sliding(self) -> bool:
        return self.window is not None

    @property
    def sliding_window(self) -> int | None:
        return self.window

    @property
    def record_past(self) -> bool:
        return self.recording

    @record_past.setter
    def record_past(self, recording: bool) -> None:
        self.recording = recording

    def activate_past_recording(self) -> None:
        self.recording = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Memory is made by the first append."""

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise UsageRuntimeError(
            "this KV cache is split over a grid, and the attention that was given it is not: call parallelize(model, "
            "mesh) first"
        )

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length - self.first_key + query_length, self.first_key

    def get_max_length(self) -> int:
        known = [x for x in (self.window, self.max_length) if x is not None]
        return min(known, default=-1)

    def reset(self) -> None:
        CacheLayer.reset(self)
        self.indexer_keys = None

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise UsageRuntimeError(
                f"crop takes minus the number of tokens to remove, got {tokens_to_remove}; see transformers' Cache.crop"
            )
        self.rewind(-tokens_to_remove)
        self.trim()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.repeat_interleave(repeats)

    def offload(self) -> None:
        raise UsageRuntimeError("a KV cache that is split over a grid cannot be offloaded")


class ModelHybridLayer(ModelCacheLayer, LinearAttentionLayer):
    """A ModelCacheLayer that also has the states of the layer that it takes the place of, which are this rank's."""

    is_compileable = False
    is_croppable = LinearAttentionLayer.is_croppable  # a property: of the states that it has

    def __init__(self, place: Place, layout: str, beside: LinearAttentionAndFullAttentionLayer) -> None:
        LinearAttentionLayer.__init__(self, beside.number_of_states)
        ModelCacheLayer.__init__(self, place, layout)
        self.recording = beside.record_past
        for name in vars(LinearAttentionLayer(beside.number_of_states)).keys() - {"record_past"}:
            setattr(self, name, getattr(beside, name))

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Of the states, whose arguments have names; keys' memory is made by the first append."""
        if kwargs:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        LinearAttentionLayer.crop(self, tokens_to_remove)
        super().crop(tokens_to_remove)

    def select(self, index: Tensor) -> None:
        super().select(index)
        LinearAttentionLayer.reorder_cache(self, index)  # type: ignore[arg-type]  # LongTensor: of no GPU


class ModelCache(LayersCache, Cache):  # type: ignore[misc]  # whose layers are those of both
    """A LayersCache that transformers takes as past_key_values; made by KVCache(config, mesh)."""

    layer_class = ModelCacheLayer

    def __init__(self, config: PreTrainedConfig, mesh: DeviceMesh | None, **options: Any) -> None:
        own = mesh_of(mesh, lambda grid: _cache_grid(config, grid, options.get("layout")))
        LayersCache.__init__(self, config, own, **options)
        layers: Any = self.layers
        Cache.__init__(self, layers=layers)

    def windows_of(self, config: Config, place: Place) -> list[int | None]:
        assert not isinstance(config, Mapping)
        config = config.get_text_config(decoder=True)
        kinds, options = get_layer_types_and_kwargs(config)
        for layer, kind in enumerate(kinds):
            if kind not in WINDOWED:
                raise GridError(
                    f"layer {layer} of {type(config).__name__} is of type {kind!r}, which a KV cache on a grid does "
                    f"not keep; supported: {', '.join(WINDOWED)}"
                )
        heads = _kv_heads(config)
        place.grid.check(heads, heads, _head_dim(config))
        return [options[i].get("sliding_window") if WINDOWED[kind] else None for i, kind in enumerate(kinds)]

    reset = Cache.reset


def _cache_grid(config: PreTrainedConfig, grid: Grid, layout: str | None) -> Grid:
    """As which attention takes the ranks for a cache: latents by position in one row, of one head."""
    text: Any = config.get_text_config(decoder=True)
    if getattr(text, "kv_lora_rank", None) is None:
        return grid.for_kv_heads(_kv_heads(config))
    return grid.for_whole_heads(text.num_attention_heads) if layout == "batch" else Grid(1, grid.size)


def _kv_heads(config: PreTrainedConfig) -> int:
    text: Any = config.get_text_config(decoder=True)
    heads: int = getattr(text, "num_key_value_heads", text.num_attention_heads)
    return heads


def _head_dim(config: Any) -> int:
    width: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return width


def split_layer(cache: Cache, index: int, place_of: Callable[[str], Place], layout: str) -> ModelCacheLayer:
    """Layer `index` for the cache that attention was called with: ours, or a new one for transformers' own empty one,
    which put_layer puts there. place_of: where attention keeps a layout. Changes nothing.

    Raises GridError for a cache of another kind, one that was filled elsewhere, or one of another grid.
    """
    known = isinstance(cache, Cache)
    layer: Any = cache.layers[index] if known and index < len(cache.layers) else None
    if layer is None and known and _grows(cache):
        layer = DynamicLayer()
    if isinstance(layer, ModelCacheLayer):
        place = place_of(layer.layout)
        if layer.place != place:
            (made, own), shares = (layer.place.grid, place.grid), (layer.place.cache_shares, place.cache_shares)
            dealt = [f" with cache_shares={list(s) or None}" if shares[0] != shares[1] else "" for s in shares]
            raise GridError(f"the KV cache was made for {made}{dealt[0]}, the attention keeps it on {own}{dealt[1]}")
        return layer
    if type(layer) not in REPLACED or cache.offloading:
        kind = type(cache).__name__ if layer is None else f"{type(cache).__name__} with {type(layer).__name__}"
        raise GridError(
            "past_key_values must be None, a DynamicCache or a two_level_mha.KVCache, whose max_length= allocates "
            f"once, got a {kind}" + (" that offloads" if getattr(cache, "offloading", False) else "")
        )
    if layer.get_seq_length():
        raise GridError("past_key_values was filled by a model that is not split: fill it again by this one")
    if type(layer) is LinearAttentionAndFullAttentionLayer:
        return ModelHybridLayer(place_of(layout), layout, layer)
    ours = ModelCacheLayer(place_of(layout), layout, window=layer.sliding_window if layer.is_sliding else None)
    ours.recording = getattr(layer, "record_past", False)
    return ours


def put_layer(cache: Cache, index: int, layer: ModelCacheLayer) -> None:
    """Makes what split_layer gave layer `index` of the cache, which it may be already."""
    while len(cache.layers) <= index:
        cache.layers.append(DynamicLayer())
    cache.layers[index] = layer


def _grows(cache: Cache) -> bool:
    """Whether transformers would append plain layers to the cache as they are called for."""
    return cache.layer_class_to_replicate is DynamicLayer and not cache.offloading
