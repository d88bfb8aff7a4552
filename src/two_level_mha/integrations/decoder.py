"""transformers' attention of decoders, with a KV cache: Llama, Qwen, Gemma, GPT-2, OPT, Falcon and their kin."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import DynamicCache
from transformers.cache_utils import Cache, EncoderDecoderCache

from two_level_mha.cache_layer import NO_CACHE, CachedCall
from two_level_mha.class_like import class_like
from two_level_mha.decoder import check_dropout
from two_level_mha.errors import GridError, UsageRuntimeError
from two_level_mha.integrations import forms
from two_level_mha.integrations.cache import HYBRID, WINDOWED, put_layer, split_layer
from two_level_mha.integrations.projected import Attended, ProjectedAttention, additive, mask_for, random_arguments
from two_level_mha.mesh import Place
from two_level_mha.names import Args, CacheLayout, Kwargs


class SharedKeys(NamedTuple):
    """What a layer leaves for later ones: keys and values as it attended to them, this rank's, in the call's layout."""

    k: Tensor
    v: Tensor
    call: CachedCall
    new: int  # keys that came with the call


class DecoderAttention(ProjectedAttention):
    """A ProjectedAttention with a cache: attention, cache and output projection on the grid.

    attention_mask: None, bool with True = attend ("sdpa") or additive ("eager"), (B, 1 or h, L, S), S counting the
    cache's kept tokens. A window is in the mask. None: all keys for one query, else those up to its position.
    past_key_values (or layer_past): a DynamicCache, whose empty layer becomes one of ours, or a KVCache.
    Weights (B, h, L, S) with output_attentions, but not from a cache by position: a rank sees only some of the keys.
    Nor is there dropout with one: where it acts, a cache that transformers made is kept by batch.
    """

    def __init__(
        self,
        original: nn.Module,
        projections: dict[str, nn.Module],
        paths: dict[str, str],
        mesh: DeviceMesh | None,
        *,
        cache: CacheLayout,
        **options: Any,
    ) -> None:
        _check_options(original, options["scheme"])
        super().__init__(original, projections, paths, mesh, **options)
        self.layer_idx: Any = forms.layer_of(original)  # a number where there is a cache
        self.cache_layout = cache
        self.cache_name = forms.cache_name(original) or ""
        self.softcap = getattr(original, forms.SOFTCAP, None) or 0.0
        self.leaves_shared = getattr(original, forms.LEAVES, False)
        if self.leaves_shared or forms.takes_shared(original):
            self.layer_type = original.layer_type
            if self.scheme == "auto":  # layers that share keys must have them in one layout
                self.scheme = "heads" if self.whole_heads else "sequence"

    def forward(self, *args: Any, **kwargs: Any) -> Attended:
        given = self.given(args, kwargs)
        hidden_states, states, past = given["hidden_states"], self.states_of(given), self.cache_of(given)
        wholes = self.wholes([hidden_states, states])
        (B, L, _), new_keys = wholes[0].shape, wholes[1].shape[1]
        need_weights, dropout_p = self.needs_weights(given), self.dropout_p
        layout = "batch" if dropout_p > 0.0 else self.cache_layout  # see check_dropout
        number = given.get(forms.CALLED_AS, self.layer_idx) + (given.get(forms.SLOT) or 0)
        kept = past.get_seq_length(number) if isinstance(past, Cache) else 0
        mask = self.mask_of(given, L, kept + new_keys, kept)

        def check() -> dict[str, object]:
            self.check_arguments(given)
            settings: dict[str, object] = {"need_weights": need_weights, "dropout_p": dropout_p}
            if past is None:
                return settings
            layer = split_layer(past, number, self.cache_place, layout)
            check_dropout(layer, dropout_p)
            call = layer.next_call(B, new_keys)
            if need_weights and layer.layout == "position":
                raise UsageRuntimeError(
                    "output_attentions needs all keys of a query on one rank, which a cache by position has not: "
                    'call with use_cache=False, or parallelize with cache="batch"'
                )
            return settings | call._asdict()

        tensors = {"hidden_states": hidden_states, "attention_mask": mask}
        self.check_call(check, tensors if states is hidden_states else tensors | {"other states": states})
        layer, call = None, NO_CACHE
        if past is not None:
            layer = split_layer(past, number, self.cache_place, layout)
            put_layer(past, number, layer)
            call = layer.begin(B, new_keys)
        causal = self.masks_itself or self.causal_without_mask(given, L)
        if need_weights and mask is not None and mask.dtype == torch.bool:
            mask = additive(mask, hidden_states.dtype)  # a padded row must not become NaN
        first_row = call.position if causal else None
        options: dict[str, Any] = {"softcap": self.softcap, "call": call}
        if not self.leaves_shared:
            return self.attended(given, states, wholes, mask, first_row, cache=layer, **options)

        def leave(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            if layer is not None:
                for_gradients = q.requires_grad or (mask is not None and mask.requires_grad)
                k, v = layer.append(k, v, new_keys, for_gradients=for_gradients)
            given[forms.SHARED_STATES][self.layer_type] = SharedKeys(k, v, call, new_keys)
            return q, k, v

        return self.attended(given, states, wholes, mask, first_row, then=leave, **options)

    def states_of(self, given: dict[str, Any]) -> Tensor:
        """Those of which a call makes keys and values."""
        states: Tensor = given["hidden_states"]
        return states

    def cache_of(self, given: dict[str, Any]) -> Any:
        """The cache of a call; of an encoder-decoder's the part of self-attention."""
        past = given.get(self.cache_name)
        return past.self_attention_cache if isinstance(past, EncoderDecoderCache) else past

    def cache_place(self, layout: str) -> Place:
        """Where a cache of this layout keeps this rank's part."""
        return self.place


class TakingAttention(DecoderAttention):
    """A DecoderAttention without keys and values of its own: it attends to those that another layer has left."""

    def forward(self, *args: Any, **kwargs: Any) -> Attended:
        given = self.given(args, kwargs)
        x_BLD, left = given["hidden_states"], given[forms.SHARED_STATES].get(self.layer_type)
        B, L, D = x_BLD.shape
        if isinstance(left, tuple) and not isinstance(left, SharedKeys) and self.place.grid.size == 1:
            k, v = left
            left = SharedKeys(k, v, NO_CACHE._replace(position=k.shape[2] - L), L)  # all of them
        mask = self.mask_of(given, L, L)

        def check() -> dict[str, object]:
            self.check_arguments(given)
            if not isinstance(left, SharedKeys):
                raise UsageRuntimeError(
                    f"{forms.SHARED_STATES} has no keys and values of a split attention for {self.layer_type!r}: split "
                    "the layer that leaves them too"
                )
            settings: dict[str, object] = {"need_weights": self.needs_weights(given), "dropout_p": self.dropout_p}
            return settings | left.call._asdict()

        self.check_call(check, {"hidden_states": x_BLD, "attention_mask": mask})
        if self.needs_weights(given) and mask is not None and mask.dtype == torch.bool:
            mask = additive(mask, x_BLD.dtype)
        none, call = x_BLD.new_empty(B, 0, D), left.call._replace(position=left.call.position + left.new)
        causal = left.call.position if self.masks_itself or self.causal_without_mask(given, L) else None

        def take(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return q, left.k, left.v

        return self.attended(given, none, [x_BLD, none], mask, causal, then=take, softcap=self.softcap, call=call)


def _check_options(original: nn.Module, scheme: str) -> None:
    """Raises GridError for what the config says and a split attention has not."""
    config = getattr(original, "config", None)
    if scheme == "independent":
        raise GridError("scheme 'independent' has no KV cache, with which such a model is called; take another")
    kinds: dict[int | None, str] = dict(enumerate(getattr(config, "layer_types", None) or ()))
    kind = kinds.get(forms.layer_of(original))
    supported = (*WINDOWED, HYBRID)
    if kind is not None and kind not in supported:
        raise GridError(f"its layer is of type {kind!r}, whose cache is not split; supported: {', '.join(supported)}")


def decoder_like(original: nn.Module, *args: Any, **options: Any) -> DecoderAttention:
    """A DecoderAttention of the original's class too."""
    kind = TakingAttention if forms.takes_shared(original) else DecoderAttention
    return class_like(kind, type(original))(original, *args, **options)


def problem(original: nn.Module) -> str | None:
    """A feature of a decoder's attention that is not supported, or None."""
    config: Any = getattr(original, "config", None)
    if getattr(original, "reorder_and_upcast_attn", False) and config._attn_implementation == "eager":
        return 'reorder_and_upcast_attn acts with "eager": call model.set_attn_implementation("sdpa") first'
    return forms.unknown_argument(original)


def decoder_inputs(original: nn.Module, dtype: torch.dtype) -> list[tuple[Args, Kwargs]]:
    """Two sequences of 6, one padded on the left: all at once, then with a cache in two steps, then without a mask."""
    keep = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 1, 6, 6).clone()
    keep[1, ..., :2] = False
    keep[1, :, :2, 0] = True  # no row without a key: what it gives is not defined
    indexed = getattr(original, forms.INDEXER, None) is not None  # with keys of its own in the cache
    config: Any = original.config if indexed else None
    cache, whole = DynamicCache(config=config), random_arguments(original, 6, dtype)

    def of_rows(name: str, x: Any, first: int, end: int) -> Any:
        if isinstance(x, tuple):
            return tuple(angles[:, first:end] for angles in x)
        if name == forms.SINUSOIDS:
            return x[:, :, first:end]
        if name == forms.SHARED_STATES:
            return {kind: tuple(one[:, :, :end] for one in pair) for kind, pair in x.items()}
        if name == forms.QUERY_SCALES:
            return x[:, :, first:end]
        if name in forms.BIASES:
            if x is None or forms.hides(original):
                return x
            return x[..., :end] if x.shape[-2] == 1 else x[..., first:end, :end]
        if name == forms.CALLED_AS:
            return x
        return x[:, first:end].contiguous()

    cache_name = forms.cache_name(original)
    assert cache_name is not None

    def call(first: int, end: int, mask: Tensor | None, past: DynamicCache | None) -> tuple[Args, Kwargs]:
        if mask is not None:
            mask = mask_for(original, mask[:, :, first:end, :end], dtype)
        given = {name: of_rows(name, x, first, end) for name, x in whole.items()}
        x_BLD = given.pop("hidden_states")
        return (x_BLD,), given | forms.again(original, x_BLD) | {
            forms.mask_name(original): mask,
            cache_name: past,
        }

    return [call(0, 6, keep, None), call(0, 4, keep, cache), call(4, 6, keep, cache), call(0, 6, None, None)]
