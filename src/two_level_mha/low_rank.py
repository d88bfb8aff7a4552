"""Low-rank terms (LoRA) of a split attention's projections: y = W x + scale * B A x.

A takes, and B gives, whole features. Both are whole and the same on every rank, as is A's product with x; of B's a rank
adds what it has of q, k and v where attention runs. The output projection gets A's rows as outputs more, which are
summed over the grid with its own; B takes them from there.

Letters: as in layer.py, and r the rank of a term.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from two_level_mha.activations import used_apart
from two_level_mha.blocks import dealt
from two_level_mha.errors import UsageRuntimeError
from two_level_mha.mesh import Place

if TYPE_CHECKING:
    from two_level_mha.layer import Aside, Between, GridAttention

_INPUTS = ("q", "k", "v", "qkv", "kv")  # projections of an input, by letters of what they give


class Term(NamedTuple):
    """One term of a projection; dropout acts on its input."""

    a: Tensor  # (r, in)
    b: Tensor  # (out, r)
    scale: float
    dropout: nn.Module

    @property
    def drops(self) -> bool:
        return self.dropout.training and getattr(self.dropout, "p", 0.0) > 0.0


class Projection(nn.Module):
    """Stands where the original had a projection, so that adapters find it; the attention has its weights.

    layer, letters: that attention, and which of its projections this is; original: what it was.
    """

    def __init__(self, layer: "GridAttention", letters: str, original: nn.Module) -> None:
        super().__init__()
        self.whose = (layer, letters)  # in a tuple: the attention is no child of its projection
        self.blank = (blank_like(original),)
        self.in_features, self.out_features = features_of(original)

    def whole(self) -> nn.Module:
        """One like the original, on "meta"."""
        return blank_like(self.blank[0])

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        raise UsageRuntimeError("the projections of a split attention are not called by themselves: call the attention")

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, split; adapters: inside two_level_mha.adaptable(model)"


def is_linear(module: object) -> TypeGuard[nn.Module]:
    """Whether it is an nn.Linear, or transformers' Conv1D, which stores (in, out)."""
    return isinstance(module, nn.Linear) or is_conv(module)


def blank_like(module: nn.Module) -> nn.Module:
    """A linear, or Conv1D, of the same features, on "meta"."""
    inside, outside = features_of(module)
    with torch.device("meta"):
        if is_conv(module):
            return type(module)(outside, inside)
        return nn.Linear(inside, outside, module.bias is not None)


def is_conv(module: object) -> bool:
    return hasattr(module, "nx") and hasattr(module, "nf")


def features_of(module: nn.Module) -> tuple[int, int]:
    """In and out, of an nn.Linear or a Conv1D."""
    names = ("nx", "nf") if is_conv(module) else ("in_features", "out_features")
    inside, outside = (getattr(module, name) for name in names)
    return inside, outside


def own_heads(x: Tensor, place: Place, dim: int, heads: int, width: int | None = None) -> Tensor:
    """This rank's of x, which has all heads along `dim`, and all entries of each along the next: so many of both."""
    total = x.shape[dim]
    share = total // place.grid.head_groups
    first = 0 if heads == total else place.head_group * share
    if heads < share:
        first += place.slice * share // place.grid.slices
    x = x.narrow(dim, first, heads)
    if width is None or width == x.shape[dim + 1]:
        return x
    return x.narrow(dim + 1, dealt(x.shape[dim + 1], place.grid.slices, place.slice)[0], width)


class LowRank:
    """The terms of one call of a layer, by projection."""

    def __init__(self, layer: "GridAttention", terms: dict[str, list[Term]]) -> None:
        self.layer, self.terms = layer, terms
        self.outs = terms.get("o", [])
        if any(term.drops for term in self.outs):
            raise UsageRuntimeError(
                "lora_dropout > 0 on the output projection of a split attention is not supported in training: no rank "
                "has all of that projection's input; set it to 0, or leave that projection out of target_modules"
            )

    def around(
        self,
        inputs: tuple[Tensor, Tensor, Tensor],
        batch_first: bool,
        rows: list[Tensor] | None,
        shared: list[Tensor] | None,
        between: "Between",
    ) -> tuple[list[Tensor], list[Tensor], "Between"]:
        """`rows`, `shared` and `between` of the call with those of the terms of q, k and v."""
        rows, shared = rows or [], shared or []
        own, weights, targets = [], [], []
        for letters in _INPUTS:
            for term in self.terms.get(letters, ()):
                x = inputs["qkv".index(letters[0])]
                a = linear(term.dropout(x).to(term.a.dtype), term.a) * term.scale
                own.append((a if batch_first else a.transpose(0, 1)).unsqueeze(1))  # (B, 1, L, r)
                for letter in letters:
                    b = self.layer.stock_names[f"{letter}_weight"].features(term.b)
                    weights.append(self.layer.spread(b, 1))
                targets += [("qkv".index(letter), len(rows) + len(own) - 1) for letter in letters]

        def add(q: Tensor, k: Tensor, v: Tensor, aside: "Aside") -> tuple[Tensor, ...]:
            found = [q, k, v]
            for (which, at), b in zip(targets, aside.shared[len(shared) :], strict=True):
                a_B1Lr = (aside.k_rows if which else aside.q_rows)[at]
                found[which] = self._added(found[which], a_B1Lr.squeeze(1), b)
            kept = aside._replace(
                q_rows=aside.q_rows[: len(rows)], k_rows=aside.k_rows[: len(rows)], shared=aside.shared[: len(shared)]
            )
            q, k, v = found
            return between(q, k, v, kept)

        return [*rows, *self._everywhere(own)], [*shared, *weights], add

    def of_block(self, letter: str, x: Tensor, heads: int, width: int) -> list[Tensor]:
        """What each term of projection `letter` gives for x (rows, in), the same on every rank, in a block of the whole
        (h, d, rows) with so many heads and entries.
        """
        found = []
        for term in self._of_input(letter):
            a = linear(term.dropout(x).to(term.a.dtype), term.a) * term.scale
            a, b = self._everywhere([a, self.layer.stock_names[f"{letter}_weight"].features(term.b)])
            found.append(own_heads(b, self.layer.place, 0, heads, width) @ a.t())
        return found

    def own(self, letter: str, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
        """For who projects outside of the pass: of each term of q, k or v A (r, in), and scale * B (heads, width, r) of
        this rank, whose weight is (heads, width, in).
        """
        found = []
        for term in self._of_input(letter):
            if term.drops:
                raise UsageRuntimeError(
                    "lora_dropout > 0 in training is not supported in a call with earlier tokens in a cache by "
                    "position, which keeps latents as no adapter was given them: call with use_cache=False, or take "
                    'cache="batch"'
                )
            a, b = self._everywhere([term.a, term.b])
            all_hdr = self.layer.stock_names[f"{letter}_weight"].features(b)
            found.append((a, own_heads(all_hdr, self.layer.place, 0, *weight.shape[:2]) * term.scale))
        return found

    def widened(
        self, out_weight: Tensor, out_bias: Tensor | None, in_pass: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """The output projection with the terms' A as further rows; out_weight (D, heads, width) of this rank, in_pass:
        of as many columns as a head has in the pass.
        """
        if not self.outs:
            return out_weight, out_bias
        heads, width = out_weight.shape[1:]
        wholes = [term.a for term in self.outs]
        if not in_pass or heads < self.layer.num_heads or width < self.layer.head_dim:
            wholes = self._everywhere(wholes)
        by_heads = [a.unflatten(1, (self.layer.num_heads, -1)) for a in wholes]
        by_heads = [self.layer.spread(a, 2) for a in by_heads] if in_pass else by_heads
        more = [own_heads(a, self.layer.place, 1, heads, width) for a in by_heads]
        weight = torch.cat([out_weight, *(a.to(out_weight.dtype) for a in more)])
        if out_bias is not None:
            out_bias = torch.cat([out_bias, out_bias.new_zeros(weight.shape[0] - out_bias.shape[0])])
        return weight, out_bias

    def finished(self, y: Tensor) -> Tensor:
        """The output of a call whose output projection was widened."""
        if not self.outs:
            return y
        ranks = [term.a.shape[0] for term in self.outs]
        found: Tensor
        found, *inner = y.split([y.shape[-1] - sum(ranks), *ranks], -1)
        for term, a in zip(self.outs, inner, strict=True):
            found = found + linear(a.to(term.b.dtype), term.b) * term.scale
        return found.to(y.dtype)

    def _of_input(self, letter: str) -> list[Term]:
        """The terms of q, k or v, of a projection of its own or of one with others."""
        return [term for letters in _INPUTS if letter in letters for term in self.terms.get(letters, ())]

    def _added(self, x: Tensor, a_BLr: Tensor, b: Tensor) -> Tensor:
        """x (B, heads, L, width), this rank's part of q, k or v, with that of b's product; b (heads, d, r)."""
        heads, width = x.shape[1], x.shape[3]
        own = own_heads(b, self.layer.place, 0, heads, width)
        y: Tensor = linear(a_BLr.to(own.dtype), own.flatten(0, 1)).unflatten(-1, (heads, width))
        return (x + y.transpose(1, 2)).to(x.dtype)

    def _everywhere(self, xs: list[Tensor]) -> list[Tensor]:
        return used_apart(xs, self.layer.place, self.layer.reduce_dtype)


def low_rank(layer: "GridAttention") -> LowRank | None:
    """The terms of the layer's adapters that are active now; None if there are none."""
    terms: dict[str, list[Term]] = {}
    for letter, name in layer.projection_names.items():
        child = layer._modules[name]
        if type(child) is Projection:
            continue
        terms_of: Callable[[], list[Term]] | None = getattr(child, "terms", None)
        if terms_of is None:
            raise UsageRuntimeError(
                f"{name} of a split attention is now a {type(child).__name__}, which it does not call: put adapters "
                "there inside two_level_mha.adaptable(model), or before parallelize"
            )
        if found := terms_of():
            terms[letter] = found
    return LowRank(layer, terms) if terms else None
