"""transformers' attention to sequences that are packed one after the other: vision towers of Qwen-VL, GLM-V and their
kin, audio towers of the omni models.

Every sequence attends to itself alone. Here they are a batch, filled up to the longest: windows of a tower are as long,
but for those at the edges.

Letters: as in layer.py, and T tokens of all sequences.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from two_level_mha.class_like import class_like
from two_level_mha.errors import UsageRuntimeError
from two_level_mha.integrations import forms
from two_level_mha.integrations.projected import Attended, ProjectedAttention, random_arguments
from two_level_mha.names import Args, Kwargs
from two_level_mha.probe import first_output


class PackedAttention(ProjectedAttention):
    """Called as the original is: hidden_states (T, D), or (1, T, D) -> the same, alone or with None for the weights.

    cu_seqlens: (sequences + 1,), sequence i is from row cu_seqlens[i] to before cu_seqlens[i + 1]. position_embeddings:
    cos and sin (T, rotary width). alone: whether it gives the output alone.
    """

    def __init__(self, original: nn.Module, *args: Any, alone: bool, **options: Any) -> None:
        super().__init__(original, *args, **options)
        self.gives_alone = alone

    def forward(self, *args: Any, **kwargs: Any) -> Attended:
        given = self.given(args, kwargs)
        x, bounds = given["hidden_states"], given[forms.PACKED]

        def check() -> dict[str, object]:
            self.check_arguments(given)
            if given["attention_mask"] is not None:
                raise UsageRuntimeError("attention_mask is not supported by this attention beside cu_seqlens")
            return {"dropout_p": self.dropout_p}

        self.check_call(check, {"hidden_states": x, "cu_seqlens": bounds})
        lengths = [end - first for first, end in pairwise(bounds.tolist()) if end > first]
        x_BLD = as_batch(x.view(-1, x.shape[-1]), lengths)
        batch: dict[str, Any] = {"hidden_states": x_BLD, "attention_mask": None, "output_attentions": False}
        angles = given.get("position_embeddings")
        if angles is not None:
            batch["position_embeddings"] = tuple(as_batch(one, lengths) for one in angles)
        own = mask = None
        if min(lengths) < x_BLD.shape[1]:
            counts = torch.tensor(lengths, device=x.device).unsqueeze(1)
            own = torch.arange(x_BLD.shape[1], device=x.device) < counts
            mask = own[:, None, None]
        y_BLD = first_output(self.attended(batch, x_BLD, [x_BLD, x_BLD], mask, None))
        y = (y_BLD.flatten(0, 1) if own is None else y_BLD[own]).view(x.shape)
        return y if self.gives_alone else (y, None)


def as_batch(x: Tensor, lengths: list[int]) -> Tensor:
    """Sequences (T, ..), of these lengths one after the other, as (B, L, ..), the shorter with zeros behind them."""
    equal = min(lengths) == max(lengths)
    batch: Tensor = x.unflatten(0, (len(lengths), -1)) if equal else pad_sequence(x.split(lengths), batch_first=True)
    return batch


def is_packed(module: nn.Module, parent: nn.Module | None = None) -> bool:
    """Whether a module is attention to sequences that are packed one after the other."""
    return forms.PACKED in forms.parameters_of(module) and forms.is_encoder(module, parent)


def packed_problem(module: nn.Module) -> str | None:
    """Why it may be called with what is not known here, or None."""
    known = {forms.INPUTS[0], forms.MASKS[0], forms.PACKED, forms.LONGEST, "position_embeddings"}
    unknown = forms.parameters_of(module).keys() - known
    return f"it takes an argument that is not known: {min(unknown)}" if unknown else None


def packed_like(original: nn.Module, *args: Any, **options: Any) -> PackedAttention:
    """A PackedAttention of the original's class too."""
    return class_like(PackedAttention, type(original))(original, *args, **options)


def packed_variants(module: nn.Module, paths: Mapping[str, str]) -> list[dict[str, object]]:
    """What the names leave open, as options of PackedAttention, the likelier first."""
    return [variant | {"alone": alone} for variant in forms.variants_of(module, paths) for alone in (True, False)]


def packed_inputs(original: nn.Module, dtype: torch.dtype) -> list[tuple[Args, Kwargs]]:
    """Sequences of other lengths, and such of one."""
    calls: list[tuple[Args, Kwargs]] = []
    for bounds in ((0, 3, 4, 10), (0, 5, 10)):
        given = random_arguments(original, 5, dtype)
        given = {name: _flat(x) for name, x in given.items()}
        if {forms.MASKS[0], "position_embeddings"} & forms.parameters_of(original).keys() == {forms.MASKS[0]}:
            given["hidden_states"] = given["hidden_states"].unsqueeze(0)  # these are called with a batch of one
        hidden = given.pop("hidden_states")
        lengths = torch.tensor(bounds, dtype=torch.int32)
        calls.append(((hidden,), given | {forms.PACKED: lengths, forms.LONGEST: int(lengths.diff().max())}))
    return calls


def _flat(x: Any) -> Any:
    """Of two sequences one."""
    return tuple(_flat(one) for one in x) if isinstance(x, tuple) else x.flatten(0, 1)
