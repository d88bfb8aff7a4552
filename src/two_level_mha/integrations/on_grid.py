"""A transformers model that was split: methods of it that know of the grid. Its class becomes one of its own."""

import functools
import os
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig, StoppingCriteriaList

from two_level_mha.cache import KVCache
from two_level_mha.checkpoint import full_state_dict
from two_level_mha.control import Control, same_in
from two_level_mha.errors import UsageRuntimeError
from two_level_mha.integrations.decoder import DecoderAttention
from two_level_mha.integrations.generate import FirstRanksTokens
from two_level_mha.integrations.private import private
from two_level_mha.mesh import control_on

if TYPE_CHECKING:

    class _Original(nn.Module):
        """What a transformers model has."""

        config: Any

        def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> StoppingCriteriaList: ...
        def save_pretrained(self, *args: Any, **kwargs: Any) -> None: ...
        def get_input_embeddings(self) -> nn.Module: ...
        def get_output_embeddings(self) -> nn.Module | None: ...
        def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module: ...

else:
    _Original = object


class OnGrid(_Original):
    """Of a model whose ranks act together. What else it is, is its original's class."""

    grid_control: Control | None  # None: one rank, or unpickled in another job

    @property
    def tp_size(self) -> int | None:
        """What Trainer and accelerate read: this many ranks are given the same batches. PEFT reads `_tp_size`, where
        saving adapters would be a collective. None where the grid is not the whole job: of other ranks it says nothing.
        """
        ranks = 1 if self.grid_control is None else len(self.grid_control.ranks)
        return ranks if 1 < ranks == dist.get_world_size() else None

    @property
    def is_distributed_loading_by_transformers(self) -> bool:
        """What Trainer reads: nothing wraps the model, every rank calls save_pretrained, optimizers are not saved."""
        return self.tp_size is not None

    def _get_stopping_criteria(
        self, generation_config: GenerationConfig, *args: Any, **kwargs: Any
    ) -> StoppingCriteriaList:
        criteria = super()._get_stopping_criteria(generation_config, *args, **kwargs)
        if generation_config.num_beams > 1 or self.grid_control is None:  # beams: the column is a copy
            return criteria
        return FirstRanksTokens(criteria, self.grid_control)

    def _prepare_static_cache(self, cache_implementation: str, *args: Any, max_cache_len: int, **kwargs: Any) -> Any:
        """A cache whose memory is made once, for generate(cache_implementation="static")."""
        split = next((x for x in self.modules() if isinstance(x, DecoderAttention) and x.cache_name), None)
        if split is None or "offloaded" in cache_implementation:
            raise UsageRuntimeError(
                f"cache_implementation={cache_implementation!r} is not supported by this split model: leave it out"
            )
        kept = KVCache(self.config, split.mesh, layout=split.cache_layout, max_length=max_cache_len)
        return EncoderDecoderCache(kept, DynamicCache()) if self.config.is_encoder_decoder else kept

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """transformers', of whole tensors: called on every rank, the first of which writes, while the others go on.

        With a state_dict, that of two_level_mha.full_state_dict, only ranks that have one write.
        """
        if state_dict is None:
            if self.grid_control is not None:
                what = "saving a model by save_pretrained, which every rank must call"
                same_in(self.grid_control, {"save_directory": str(save_directory)}, "give every rank the same", what)
            state_dict = full_state_dict(self)
        if state_dict:
            super().save_pretrained(save_directory, is_main_process, state_dict, **options)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args: Any, **kwargs: Any
    ) -> nn.Module:
        """transformers', where neither embedding nor head is split. Raises UsageRuntimeError where one is."""
        changes = new_num_tokens is not None or pad_to_multiple_of is not None
        for module in (self.get_input_embeddings(), self.get_output_embeddings()) if changes else ():
            if isinstance(getattr(module, "weight", None), DTensor):
                raise UsageRuntimeError(
                    "resize_token_embeddings cannot change an embedding or a head that is split over the grid: resize "
                    "the model first, then call parallelize"
                )
        return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, *args, **kwargs)

    def __reduce__(self) -> tuple[object, ...]:  # its class has no place in a module
        return _blank, (type(self).__bases__[1],), vars(self)


def _on_grid(original: type) -> type[OnGrid]:
    """Under the original's name, which save_pretrained writes into a config."""
    return _class_of(original)


@functools.cache
def _class_of(original: type) -> type:
    return type(original.__name__, (OnGrid, original), {"__module__": original.__module__})


def _blank(original: type) -> nn.Module:
    made = _on_grid(original)
    return made.__new__(made)


def put_on_grid(model: nn.Module, mesh: DeviceMesh | None) -> None:
    """Lets the methods of a transformers model know that it is split."""
    if not isinstance(model, OnGrid):
        vars(model)["grid_control"] = None if mesh is None or mesh.size() == 1 else control_on(mesh)
        model.__class__ = _on_grid(type(model))
        if model.tp_size is not None:  # Trainer asks for the size of data parallelism then
            vars(model.config)["distributed_config"] = private("DistributedConfig")(tp_size=1, fsdp_size=1)
