"""Modules of transformers models whose own code runs on this rank's sequences, with weights gathered for each call."""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Replicate
from transformers.cache_utils import Cache, EncoderDecoderCache

from two_level_mha.class_like import become
from two_level_mha.gathered import Sequences, like, store_split, whole_weights
from two_level_mha.integrations.dealt_cache import can_be_dealt, deal_cache
from two_level_mha.integrations.forms import is_cross, layer_of, parameters_of
from two_level_mha.integrations.lora import mark
from two_level_mha.integrations.private import private
from two_level_mha.mesh import Place, grid_mesh, place_on
from two_level_mha.names import Args, Kwargs
from two_level_mha.probe import drops, in_eval

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}  # of the trial in the first call; others 0.1


class Gathered(nn.Module):
    """A module of another class too, whose forward it runs with whole weights on this rank's sequences.

    Called as its original is, with hidden states (B, L, ..). The first call tries whether a sequence alone gets the
    numbers that it gets in the batch. Where it does not, as where hidden states are (tokens, ..), every rank runs all
    of it from then on; as in training with dropout, so that the elements that the original would drop are dropped. A
    KV cache keeps on each rank the states of its sequences.
    """

    place: Place
    crosses: bool  # whether it attends to other states alone, of which an EncoderDecoderCache has a cache of its own
    rows_first: bool  # whether it is called as fairseq's attention is, with (L, B, D)
    dealt: dict[bool, bool]  # whether sequences are dealt to the ranks, by whether a call is of one row without a cache

    @property
    def layer(self) -> int | None:
        """Of a KV cache; a part that is put in another's place may have one first."""
        return next((found for part in self.modules() if (found := layer_of(part)) is not None), None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = (kwargs.get("hidden_states"), *args, *kwargs.values())
        hidden = next(x for x in given if isinstance(x, Tensor))
        caches = [x for x in given if isinstance(x, Cache)]
        layer = self.layer if caches else None
        known = layer is not None and all(map(can_be_dealt, caches))
        if hidden.dim() < 3 or self.rows_first or (caches and not known) or self._recorded():
            return self._whole(args, kwargs)
        kind = hidden.shape[1] == 1 and not caches
        # what is dropped of a sequence depends on those before it
        if not self.dealt.get(kind, True) or (self.training and drops(self)):
            return self._whole(args, kwargs)
        sequences = Sequences(hidden.shape[0], self.place, (Cache,))
        mine = [sequences.deal(x, "") for x in args]
        named = {name: sequences.deal(x, name) for name, x in kwargs.items()}
        if kind not in self.dealt and not torch.compiler.is_compiling():
            if sequences.batch == 1:  # nothing can be told by it, and every rank would run it anyway
                return self._whole(args, kwargs)
            self.dealt[kind] = self._try(sequences, (args, kwargs), (tuple(mine), named))
            if not self.dealt[kind]:
                return self._whole(args, kwargs)
        for cache in caches:
            assert layer is not None
            own = cache.cross_attention_cache if self.crosses and isinstance(cache, EncoderDecoderCache) else cache
            deal_cache(own, layer, sequences.batch, self.place)
        with whole_weights(self, self.place, Partial()) as weights:
            output = super().forward(*mine, **named)
            return sequences.gather(output, weights)

    def _recorded(self) -> bool:
        """Whether transformers records what parts of it give, as routers for a loss, which must be of all sequences."""
        recording = bool(private("_active_collector").get())
        return recording and any(part._forward_hooks for part in self.modules() if part is not self)

    def _whole(self, args: Args, kwargs: Kwargs) -> Any:
        with whole_weights(self, self.place, Replicate()):
            return super().forward(*args, **kwargs)

    def _try(self, sequences: Sequences, whole: tuple[Args, Kwargs], own: tuple[Args, Kwargs]) -> bool:
        """Whether on all ranks their sequences get the same numbers alone and among the others, without a cache."""
        with torch.no_grad(), in_eval(self), whole_weights(self, self.place, Partial()):
            try:
                why = _difference(self._run(*whole), self._run(*own), sequences)
            except Exception as error:  # of any kind: it is another's code
                why = repr(error)
        assert self.place.control is not None
        everyone = self.place.control.gather(why, "trying whether sequences can be dealt to the ranks")
        if any(everyone) and not any(self.place.args[0][2:]):
            logging.getLogger("two_level_mha").warning(
                "every rank runs all of %s: its sequences cannot be dealt to the ranks (%s)",
                type(self).__name__,
                next(filter(None, everyone)),
            )
        return not any(everyone)

    def _run(self, args: Args, kwargs: Kwargs) -> Any:
        return super().forward(*map(_for_trial, args), **{name: _for_trial(x) for name, x in kwargs.items()})


def _difference(whole: Any, own: Any, sequences: Sequences) -> str | None:
    """How the output of a batch and that of this rank's sequences differ, or None."""
    if isinstance(whole, (list, tuple)):
        pairs = zip(whole, own, strict=True)
        return next(filter(None, (_difference(a, b, sequences) for a, b in pairs)), None)
    if isinstance(whole, dict):
        return _difference([*whole.values()], [*own.values()], sequences)
    if not isinstance(whole, Tensor):
        return None if isinstance(whole, sequences.plain) else f"a {type(whole).__name__} comes out"
    if not whole.is_floating_point():
        return None
    the_same = whole.shape == own.shape and (whole.dim() < 2 or whole.shape[0] == 1)  # for all sequences
    expected = (whole if the_same else sequences.part(whole)).nan_to_num()
    off = (expected - own.nan_to_num()).abs().max().item() if expected.shape == own.shape else float("inf")
    within = off <= TOLERANCE.get(own.dtype, 0.1) * expected.abs().max().item()
    return None if within else f"numbers differ by {off:.1e}"


def _for_trial(x: object) -> object:
    """An argument that the trial may write to."""
    if isinstance(x, Cache):
        return None
    if isinstance(x, (list, tuple)):
        return like(x, [_for_trial(one) for one in x])
    return x.clone() if isinstance(x, Tensor) else x


def gather_weights(module: nn.Module, name: str, mesh: DeviceMesh) -> None:
    """Makes a module, called `name` in its model, in place, a Gathered one."""
    store_split(module, grid_mesh(mesh))
    mark(module, {path: "gathered" for path, part in module.named_modules() if path and hasattr(part, "weight")}, mesh)
    own = {"crosses": is_cross(module, name), "rows_first": next(iter(parameters_of(module)), None) == "query"}
    become(module, Gathered, place=place_on(mesh), dealt={}, **own)
