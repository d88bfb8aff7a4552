"""KVCache: what a user makes and passes, for a layer of our own or for a model of transformers."""

from abc import ABC

from torch.distributed.device_mesh import DeviceMesh

from two_level_mha.cache_layer import Config, LayersCache
from two_level_mha.names import CacheLayout


class KVCache(ABC):  # noqa: B024  (names other classes, and makes one of them)
    """One CacheLayer per layer, as `layers`: given to TwoLevelAttention layer by layer, or to a transformers model
    as past_key_values (then made from its config).

    config: a transformers config, or the sizes: dict(num_layers=, num_kv_heads=, head_dim=), and window= an int for
    all layers or one int or None for each. mesh: that of the model, or None. layout: "position" or "batch", see
    two_level_mha.cache_layer. max_length: allocates once, for that many tokens; None: grows by at most doubling.
    Has length, nbytes, select, repeat_interleave, rewind and reset, those of all layers.
    Raises GridError for a size that is missing or that the grid does not fit.
    """

    def __new__(  # type: ignore[misc]  # names other classes
        cls,
        config: Config,
        mesh: DeviceMesh | None,
        *,
        layout: CacheLayout = "position",
        max_length: int | None = None,
    ) -> LayersCache:
        kind: type[LayersCache] = LayersCache
        if hasattr(config, "get_text_config"):
            from two_level_mha.integrations.cache import ModelCache  # imports transformers

            kind = ModelCache
        return kind(config, mesh, layout=layout, max_length=max_length)


KVCache.register(LayersCache)  # isinstance(cache, KVCache), also where it is one of transformers as well
