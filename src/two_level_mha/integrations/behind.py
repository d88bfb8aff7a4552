"""transformers' attention of decoders that does something with the outputs of all heads before it projects them: a norm
over all of them (BitNet), or the difference of two softmaxes and a norm of that (DiffLlama).

The pass gives every rank what all heads give: its output projection puts a rank's columns where they are among all.
Then the model's part acts, and each rank projects its own columns of what comes of it, which is summed over the grid.
"""

from typing import Any

import torch
from torch import Tensor, nn

from two_level_mha.activations import used_apart
from two_level_mha.blocks import SHARDED_DIMS, local_blocks
from two_level_mha.class_like import class_like
from two_level_mha.errors import GridError
from two_level_mha.integrations import forms
from two_level_mha.integrations.decoder import DecoderAttention, decoder_inputs
from two_level_mha.integrations.projected import Attended
from two_level_mha.low_rank import own_heads
from two_level_mha.names import Args, Kwargs
from two_level_mha.operators import ops as _ops


class BehindAttention(DecoderAttention):
    """A DecoderAttention whose subclasses say in `behind` what acts between its heads and its output projection."""

    passes = 1  # how many heads of the pass are one of the output projection

    def __init__(self, original: nn.Module, *args: Any, **options: Any) -> None:
        super().__init__(original, *args, **options)
        if self.combine == "concat" or self.filled_up:
            raise GridError('what acts on all heads together needs combine="reduce", and values as wide as keys')

    def behind(self, heads_BLO: Tensor) -> Tensor:
        """(B, L, h d), of what all heads of the pass give, one behind the other; the same on every rank."""
        raise NotImplementedError

    def own_blocks(self) -> list[Tensor | None]:
        *others, out_weight, _ = super().own_blocks()
        assert out_weight is not None
        h, d, heads, width = self.num_heads, self.head_dim, out_weight.shape[1] * self.passes, out_weight.shape[2]
        rows = torch.arange(h * d, device=out_weight.device)
        places = out_weight.new_zeros(h * d, heads * width)
        places[self._own(rows.view(h, d), 0, heads, width).flatten(), rows[: heads * width]] = 1.0
        return [*others, places.view(h * d, heads, width), None]

    def finished(self, y_BLD: Tensor, given: dict[str, Any]) -> Tensor:
        """Of what all heads give."""
        out_weight, out_bias = local_blocks([self._parameters["out_weight"], self._parameters["out_bias"]])
        assert out_weight is not None
        place, (heads, width) = self.place, out_weight.shape[1:]
        whole_BLO = used_apart([self.behind(y_BLD)], place, self.reduce_dtype)[0]
        own_BLHE = self._own(whole_BLO.unflatten(-1, (-1, self.head_dim)), 2, heads, width)
        y_BLD = nn.functional.linear(own_BLHE.flatten(2), out_weight.flatten(1))
        if place.grid.size > 1:
            dtype = self.reduce_dtype or y_BLD.dtype
            y_BLD = _ops.all_reduce(y_BLD.to(dtype), place.grid.size, place.groups[2]).to(y_BLD.dtype)
        y_BLD = y_BLD if out_bias is None else y_BLD + out_bias.to(y_BLD.dtype)
        return super().finished(y_BLD, given)

    def _own(self, x: Tensor, dim: int, heads: int, width: int) -> Tensor:
        """This rank's of all heads, along `dim`, and of all columns of each, along the next."""
        return own_heads(x, self.place, dim, heads, width)


class NormedAttention(BehindAttention):
    """BitNet's: a norm over all heads."""

    def __init__(self, original: nn.Module, *args: Any, **options: Any) -> None:
        super().__init__(original, *args, **options)
        self.heads_norm = forms.heads_norm_of(original) or ""
        self.add_module(self.heads_norm, getattr(original, self.heads_norm))

    def behind(self, heads_BLO: Tensor) -> Tensor:
        normed: Tensor = getattr(self, self.heads_norm)(heads_BLO)
        return normed


class DifferentialAttention(BehindAttention):
    """DiffLlama's: every head attends to a value of each half of the key/value heads, and a head of the first half less
    lambda times one of the second is normed.

    In the pass there are twice the heads: all queries and keys with the values of the first half, and again with those
    of the second. Head groups would lack values of others, so it takes the ranks as one row.
    """

    passes = 2
    lambda_init: float

    def __init__(self, original: nn.Module, *args: Any, scheme: str, **options: Any) -> None:
        # with whole heads, which "auto" may store, a rank would have others of both
        super().__init__(original, *args, scheme="sequence" if scheme == "auto" else scheme, **options)
        if self.whole_heads or self.place.grid.head_groups > 1:
            raise GridError("differential attention takes one head group, and no scheme of whole heads")
        self.lambda_init = getattr(original, forms.LAMBDA_INIT)
        self.add_module(forms.GROUP_NORM, getattr(original, forms.GROUP_NORM))
        for name in forms.LAMBDAS:
            self.register_parameter(name, getattr(original, name))

    def sizes_of(self, original: nn.Module, projections: dict[str, nn.Module]) -> tuple[int, int, int, bool]:
        h, k, d, gated = super().sizes_of(original, projections)
        return 2 * h, 2 * k, d, gated

    def own_blocks(self) -> list[Tensor | None]:
        blocks = dict(zip(SHARDED_DIMS, super().own_blocks(), strict=True))
        for name in ("q_weight", "q_bias", "k_weight", "k_bias"):
            x = blocks[name]
            blocks[name] = None if x is None else torch.cat([x, x])
        for name in ("v_weight", "v_bias"):
            x = blocks[name]
            halves = () if x is None else x.chunk(2)
            blocks[name] = torch.cat([half for half in halves for _ in range(2)]) if halves else None
        return list(blocks.values())

    def behind(self, heads_BLO: Tensor) -> Tensor:
        heads_BLhv = heads_BLO.unflatten(-1, (2, -1, self.head_dim)).movedim(2, 3).flatten(3)
        first, second = heads_BLhv.chunk(2, 2)
        rates = [
            torch.exp(torch.sum(getattr(self, q) * getattr(self, k), -1, dtype=torch.float32)).to(first.dtype)
            for q, k in (forms.LAMBDAS[:2], forms.LAMBDAS[2:])
        ]
        normed: Tensor = getattr(self, forms.GROUP_NORM)(first - (rates[0] - rates[1] + self.lambda_init) * second)
        return (1.0 - self.lambda_init) * normed.flatten(2)

    def attended_inputs(self, *args: Any, **options: Any) -> Attended:
        y_BLD, weights = super().attended_inputs(*args, **options)
        return y_BLD, None if weights is None else weights[:, : self.num_heads // 2]


def normed_like(original: nn.Module, *args: Any, **options: Any) -> NormedAttention:
    """A NormedAttention of the original's class too."""
    return class_like(NormedAttention, type(original))(original, *args, **options)


def differential_like(original: nn.Module, *args: Any, **options: Any) -> DifferentialAttention:
    """A DifferentialAttention of the original's class too."""
    return class_like(DifferentialAttention, type(original))(original, *args, **options)


def differential_inputs(original: nn.Module, dtype: torch.dtype) -> list[tuple[Args, Kwargs]]:
    """decoder_inputs, for a copy whose lambdas, which are exponents, are made small."""
    for name in forms.LAMBDAS:
        getattr(original, name).clamp_(-0.5, 0.5)
    return decoder_inputs(original, dtype)
