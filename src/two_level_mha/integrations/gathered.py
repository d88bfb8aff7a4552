"""Modules of transformers models whose own code runs on this rank's sequences, with weights gathered for each call."""

import logging

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Replicate
from transformers.cache_utils import Cache

from two_level_mha.class_like import become
from two_level_mha.gathered import Sequences, store_split, whole_weights
from two_level_mha.integrations.dealt_cache import deal_cache
from two_level_mha.mesh import Place, grid_mesh, place_on

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}  # of the trial in the first call; others 0.1


class Gathered(nn.Module):
    """A module of another class too, whose forward it runs with whole weights on this rank's sequences.

    Called as its original is, with hidden states (B, L, ..). The first call tries whether a sequence alone gets the
    numbers that it gets in the batch. Where it does not, as where hidden states are (tokens, ..), every rank runs all
    of it from then on. A KV cache keeps on each rank the states of its sequences.
    """

    place: Place
    mesh: DeviceMesh  # the flattened grid
    dealt: bool | None  # whether sequences are dealt to the ranks; None: not tried yet

    def forward(self, *args, **kwargs):
        given = (kwargs.get("hidden_states"), *args, *kwargs.values())
        hidden = next(x for x in given if isinstance(x, Tensor))
        caches = [x for x in given if isinstance(x, Cache)]
        if hidden.dim() < 3 or self.dealt is False:
            return self._whole(args, kwargs)
        sequences = Sequences(hidden.shape[0], self.place)
        mine = [sequences.deal(x, "", self.mesh) for x in args]
        named = {name: sequences.deal(x, name, self.mesh) for name, x in kwargs.items()}
        if self.dealt is None and not torch.compiler.is_compiling():
            self._try(sequences, (args, kwargs), (mine, named))
            if not self.dealt:
                return self._whole(args, kwargs)
        for cache in caches:
            deal_cache(cache, self.layer_index(), sequences.batch, self.place)
        with whole_weights(self, Partial()) as weights:
            output = super().forward(*mine, **named)
            return sequences.gather(output, weights)

    def layer_index(self) -> int:
        return next(part.layer_idx for part in self.modules() if getattr(part, "layer_idx", None) is not None)

    def _whole(self, args: tuple, kwargs: dict):
        with whole_weights(self, Replicate()):
            return super().forward(*args, **kwargs)

    def _try(self, sequences: Sequences, whole: tuple, own: tuple) -> None:
        """Runs this rank's sequences alone and among the others, without a cache, and tells the other ranks."""
        training = [part for part in self.modules() if part.training]
        self.eval()
        with torch.no_grad(), whole_weights(self, Partial()):
            try:
                expected, got = sequences.part(self._first(*whole)), self._first(*own)
                off = (expected - got).abs().max().item() if expected.shape == got.shape else float("inf")
                why = f"numbers differ by {off:.1e}"
                alike = off <= TOLERANCE.get(got.dtype, 0.1) * expected.abs().max().item()
            except Exception as error:  # of any kind: it is another's code
                alike, why = False, repr(error)
        for part in training:
            part.training = True
        everyone = self.place.control.gather(alike, "trying whether sequences can be dealt to the ranks")
        self.dealt = all(everyone)
        if not self.dealt and not any(self.place.args[0][2:]):
            logging.getLogger("two_level_mha").warning(
                "every rank runs all of %s: its sequences cannot be dealt to the ranks (%s)", type(self).__name__, why
            )

    def _first(self, args: tuple, kwargs: dict) -> Tensor:
        args = [None if isinstance(x, Cache) else x for x in args]
        kwargs = {name: None if isinstance(x, Cache) else x for name, x in kwargs.items()}
        output = super().forward(*args, **kwargs)
        return output[0] if isinstance(output, (list, tuple)) else output


def gather_weights(module: nn.Module, mesh: DeviceMesh) -> None:
    """Makes a module, in place, a Gathered one."""
    store_split(module, grid_mesh(mesh))
    become(module, Gathered, place=place_on(mesh), mesh=grid_mesh(mesh), dealt=None)
