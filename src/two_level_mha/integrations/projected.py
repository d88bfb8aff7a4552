"""transformers' attention without a KV cache, as its modules are called: BERT, ViT, CLIP, ModernBERT and their kin."""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from two_level_mha.activations import gather_part, used_apart
from two_level_mha.blocks import SHARDED_DIMS, dealt, filled
from two_level_mha.cache_layer import NO_CACHE
from two_level_mha.class_like import class_like
from two_level_mha.errors import GridError, UsageRuntimeError
from two_level_mha.integrations import forms
from two_level_mha.integrations.positions import Positioned, random_angles, takes_complex
from two_level_mha.layer import Aside, GridAttention
from two_level_mha.low_rank import features_of
from two_level_mha.names import Args, Kwargs
from two_level_mha.probe import settings
from two_level_mha.stock import StockTensor

IMPLEMENTATIONS = ("sdpa", "eager")  # whose masks are understood


Attended: TypeAlias = Tensor | tuple[Any, ...] | list[Tensor]  # as the original gives it; of several, the output first


class ProjectedAttention(Positioned, GridAttention):
    """Called as the original is, by position or by name: hidden_states (B, L, D) -> (out, weights or None).

    attention_mask None, or 4-D broadcastable to (B, h, L, S): bool with True = attend ("sdpa") or additive ("eager").
    position_embeddings: cos and sin (B or 1, L, rotary width). What is added to the scores (forms.BIASES), the output
    projection, dropout behind it and a residual are part of it. Weights (B, h, L, S) are computed only when
    output_attentions, of the call or else of the config, is true; with "sdpa" too, where the original has none.

    projections: the original's linears, by letter q, k, v or qkv, o, without v where k's gives v too; paths: where they
    are, as in StockTensor.key.
    packing: how q, k and v lie in one projection; rotates: False for a layer that leaves position_embeddings alone, as
    some of SmolLM3's and Cohere2's do; norms_last: its norms act on what was rotated; scaled: how scores are, one of
    forms.ANY_SCALE; biased: how a bias of them is added, one of forms.BIASED; gate_function: one of
    forms.GATE_FUNCTIONS; clips: it clamps queries, keys and values.
    """

    filled_up: tuple[str, ...] = ()  # parameters that are filled up to the width of the pass, in each call
    compute_bias: Callable[..., Tensor]  # of an original with forms.BIAS_TABLE

    def __init__(
        self,
        original: nn.Module,
        projections: dict[str, nn.Module],
        paths: dict[str, str],
        mesh: DeviceMesh | None,
        *,
        packing: str = "blocks",
        rotates: bool = False,
        norms_last: bool = False,
        scaled: str = forms.ANY_SCALE[0],
        biased: str = forms.BIASED[0],
        gate_function: str = "sigmoid",
        clips: bool = False,
        **options: Any,
    ) -> None:
        h, k, d, gated = self.sizes_of(original, projections)
        super().__init__(num_heads=h, num_kv_heads=k, head_dim=d, mesh=mesh, gated=gated, **options)
        self.v_dim = forms.value_dim(original, d)
        if self.v_dim < d:
            self._check_values(gated)
            self.filled_up = ("v_weight", "v_bias", "out_weight")
        self.config = getattr(original, "config", None)  # Bloom's and MPNet's attention has none: masks are additive
        self.scaling = forms.scale_of(original, d, scaled)
        self.biased, self.hides = biased, forms.hides(original)
        self.gives_bias, self.gives_list = forms.gives_bias(original), forms.is_of(original, forms.LISTING)
        self.gives_cache = forms.is_of(original, forms.WITH_CACHE)
        self.gives_alone, self.flat = forms.is_of(original, forms.ALONE), forms.is_of(original, forms.FLAT)
        self.masks_itself, self.window = forms.masks_itself(original), forms.window_of(original)
        self.is_causal = getattr(original, "is_causal", False)
        self.argument_names, self.mask_name = tuple(forms.parameters_of(original)), forms.mask_name(original)
        self.dropout_name, dropout = forms.weights_dropout(original)
        self.add_module(self.dropout_name, dropout)
        self.hidden_dropout = getattr(original, "hidden_dropout", 0.0)  # of an output that a residual is added to
        self.after = [name for name in forms.OUTPUT_DROPOUT if isinstance(getattr(original, name, None), nn.Module)]
        self.after += [forms.OUTPUT_NORM] if hasattr(original, forms.OUTPUT_NORM) else []
        for name in self.after:
            self.add_module(name, getattr(original, name))
        self.store_projections(original, projections, paths, packing)
        shift = original._parameters.get(forms.GATE_SHIFT)
        if shift is not None:
            self.store_shift(shift)
        sinks = getattr(original, forms.SINKS, None)
        if sinks is not None:
            self.register_parameter(forms.SINKS, sinks)
        if hasattr(original, forms.OUTPUT_BIAS):
            self.register_parameter(forms.OUTPUT_BIAS, getattr(original, forms.OUTPUT_BIAS))
        self.gate_function = forms.GATE_FUNCTIONS[gate_function]
        self.gate_name = None if gated else forms.gate_of(original)  # of one number for each head
        if self.gate_name is not None:
            self.add_module(self.gate_name, getattr(original, self.gate_name))
        self.makes_bias = getattr(original, forms.BIAS_TABLE, None) is not None
        known = {*self.argument_names, *(("position_bias",) if self.makes_bias else ())}
        self.biases = [name for name in forms.BIASES if name in known]
        if self.makes_bias:
            self.add_module(forms.BIAS_TABLE, getattr(original, forms.BIAS_TABLE))
            self.take_settings(original)  # of which its compute_bias, which is this class's too, makes it
        self.clip = forms.clip_of(original) if clips else None
        self.use_positions(original, rotates, norms_last)

    def take_settings(self, original: nn.Module) -> None:
        """Has the original's attributes too, where it has none of their names."""
        for name, value in settings(original):
            vars(self).setdefault(name, value)

    def sizes_of(self, original: nn.Module, projections: dict[str, nn.Module]) -> tuple[int, int, int, bool]:
        """Heads, key/value heads, head_dim, and whether every query head has a gate."""
        h, k, d = forms.heads_of(original, projections)
        return h, k, d, forms.is_gated(projections, h, d)

    def store_projections(
        self, original: nn.Module, projections: dict[str, nn.Module], paths: dict[str, str], packing: str
    ) -> None:
        """Takes over the parameters of the original's linears."""
        sizes = self.num_heads, self.num_kv_heads, self.head_dim
        names = forms.names_of(projections, paths, sizes, packing, self.v_dim)
        forms.store_projections(self, projections, paths, names)

    def store_shift(self, shift: nn.Parameter) -> None:
        """Takes over what each head adds to its gate."""
        self.stock_names["gate_shift"] = StockTensor(forms.GATE_SHIFT, tuple(shift.shape), tuple(shift.shape))
        kept = self.block(shift.detach(), "gate_shift")
        self.register_parameter("gate_shift", nn.Parameter(kept, shift.requires_grad))

    def _check_values(self, gated: bool) -> None:
        """Raises GridError where narrower values cannot be filled up, slice by slice, to the width of keys."""
        d, m = self.head_dim, self.place.grid.slices
        if gated or any(dealt(self.v_dim, m, j)[1] > dealt(d, m, j)[1] for j in range(m)):
            raise GridError(
                f"heads of values are {self.v_dim} wide and those of keys {d}: that goes with slices of which each has "
                f"at least as much of a key as of a value, and without gates as wide as heads; got {m} slices"
                + (", with gates" if gated else "")
            )

    def own_blocks(self) -> list[Tensor | None]:
        if not self.filled_up:
            return super().own_blocks()
        blocks = dict(zip(SHARDED_DIMS, super().own_blocks(), strict=True))
        width = dealt(self.head_dim, self.place.grid.slices, self.place.slice)[1]
        for name in self.filled_up:
            x, dim = blocks[name], SHARDED_DIMS[name][1]
            assert dim is not None
            if x is not None and name == "out_weight" and (self.combine == "concat" or self.whole_heads):
                blocks[name] = self.spread(x, dim)
            elif x is not None:
                blocks[name] = filled(x, dim, width)
        return list(blocks.values())

    def spread(self, x: Tensor, dim: int) -> Tensor:
        d, m, width = self.head_dim, self.place.grid.slices, x.shape[dim]
        if width == d:
            return x
        parts = [x.narrow(dim, *dealt(width, m, j)) for j in range(m)]
        return torch.cat([filled(part, dim, dealt(d, m, j)[1]) for j, part in enumerate(parts)], dim)

    def _blocks(self) -> list[Tensor | None]:
        return [] if self.v_dim % self.place.grid.slices else super()._blocks()

    @property
    def dropout_p(self) -> float:
        """Of attention weights, in this call."""
        return getattr(self, self.dropout_name).p if self.training else 0.0

    def forward(self, *args: Any, **kwargs: Any) -> Attended:
        given = self.given(args, kwargs)
        hidden_states, dropout_p = given["hidden_states"], self.dropout_p
        whole = self.wholes([hidden_states])[0]
        mask = self.mask_of(given, whole.shape[1], whole.shape[1])

        def check() -> dict[str, object]:
            self.check_arguments(given)
            if any(given.get(name) is not None for name in forms.CACHES):
                raise UsageRuntimeError("past_key_values is not supported by this attention: call with use_cache=False")
            return {"need_weights": self.needs_weights(given), "dropout_p": dropout_p}

        self.check_call(check, {"hidden_states": hidden_states, "attention_mask": mask})
        causal = self.masks_itself or self.causal_without_mask(given, whole.shape[1])
        return self.attended(given, hidden_states, [whole, whole], mask, 0 if causal else None)

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name, the hidden states and the mask by one name."""
        given = dict(zip(self.argument_names, args, strict=False)) | kwargs
        return given | {forms.INPUTS[0]: given[self.argument_names[0]], forms.MASKS[0]: given.get(self.mask_name)}

    def attended(
        self,
        given: dict[str, Any],
        states: Tensor,
        wholes: list[Tensor],
        mask: Tensor | None,
        causal: int | None,
        then: Callable[..., Any] | None = None,
        **options: Any,
    ) -> Attended:
        """What a call returns: of `attend`, which takes the options, and of what the original does behind it.

        states: of which keys and values are; then: what acts last on q, k and v before they attend.
        """
        x_BLD = given["hidden_states"]
        return self.attended_inputs((x_BLD, states, states), given, wholes, mask, causal, then, **options)

    def attended_inputs(
        self,
        inputs: tuple[Tensor, Tensor, Tensor],
        given: dict[str, Any],
        wholes: list[Tensor],
        mask: Tensor | None,
        causal: int | None,
        then: Callable[..., Any] | None = None,
        **options: Any,
    ) -> Attended:
        """The same, of what stands for query, key and value."""
        y_BLD, weights = self.attend(
            *inputs,
            wholes=wholes,
            attn_mask=mask,
            scale=self.scaling,
            causal=causal,
            window=self.window,
            dropout_p=self.dropout_p,
            need_weights=self.needs_weights(given),
            average_attn_weights=False,
            gate=self.gate_of_heads(given["hidden_states"], wholes[0]),
            **self.between_of(given, options.get("call", NO_CACHE).position, wholes[0].shape[1], then) | options,
        )
        y_BLD = self.finished(y_BLD, given)
        if self.gives_alone:
            return y_BLD
        if self.gives_list:
            return [y_BLD] if weights is None else [y_BLD, weights]
        if self.gives_bias:
            return y_BLD, given.get("position_bias"), weights
        bias = (self._parameters[forms.OUTPUT_BIAS],) if forms.OUTPUT_BIAS in self._parameters else ()
        cache = (given.get("past_key_values"),) if self.gives_cache else ()
        return y_BLD, weights, *bias, *cache

    def check_arguments(self, given: dict[str, Any]) -> None:
        """Raises where the config was changed to an implementation whose masks, or whose lack of one, mean others, and
        for arguments of cross-attention.
        """
        implementation = getattr(self.config, "_attn_implementation", "eager")
        if implementation not in IMPLEMENTATIONS:
            raise UsageRuntimeError(
                f"the model's attention implementation is now {implementation!r}, whose masks a "
                'split attention does not take: call model.set_attn_implementation("sdpa")'
            )
        for name in forms.CROSS:
            if given.get(name) is not None:
                raise UsageRuntimeError(f"{name} is not supported by this attention: it is self-attention")
        for name in forms.AGAIN:
            if name in self.argument_names and given.get(name) is not given["hidden_states"]:
                raise UsageRuntimeError(
                    f"{name} must be {self.argument_names[0]}, the same tensor: a split attention is self-attention"
                )
        if given.get(forms.PROMPT) is not None:
            raise UsageRuntimeError(
                f"{forms.PROMPT} is not supported by this attention, of a model whose config has no {forms.PROMPTED}"
            )
        for name in forms.BIASES:
            if given.get(name) is not None and name not in self.biases:
                raise UsageRuntimeError(f"{name} is not supported by this attention: it adds attention_mask only")

    def mask_of(self, given: dict[str, Any], length: int, keys: int, kept: int = 0) -> Tensor | None:
        """The mask, with what the original adds to the scores. length, keys: how many queries and keys there are; kept:
        those of a cache. A bias that is made here is given from then on.
        """
        mask: Tensor | None = given["attention_mask"]
        if mask is not None and self.hides:
            mask = ~mask
        if mask is not None and self.flat:
            mask = mask.unsqueeze(1) != 0
            mask = mask.unsqueeze(1) if mask.dim() == 3 else mask
        if self.makes_bias and given.get("position_bias") is None:
            device = given["hidden_states"].device
            given["position_bias"] = self.compute_bias(length, keys, device=device, past_seen_tokens=kept)
        for name in self.biases:
            bias = given.get(name)
            if bias is None or (self.biased == "in the mask" and not self.needs_weights(given)):
                continue
            if bias.dim() == 3:  # (B * h, 1, S), or (h, 1, any number)
                bias = bias.unflatten(0, (-1, self.num_heads))[..., -keys:]
            if self.biased != "added":
                bias = bias * self.scaling
            if mask is not None and mask.dtype == torch.bool:
                nothing = -math.inf if self.flat and not self.needs_weights(given) else None  # for a row without keys
                mask = additive(mask, bias.dtype, nothing)
            mask = bias if mask is None else mask + bias
        return mask

    def gate_of_heads(self, x_BLD: Tensor, whole: Tensor) -> Tensor | None:
        """The gates (B, L, h) of a layer with one number for each head, of all rows; whole: stands for the whole x."""
        if self.gate_name is None:
            return None
        return self.whole_rows(self.of_rows(self.gate_name, x_BLD), whole)

    def of_rows(self, name: str, x_BLD: Tensor) -> Tensor:
        """What a child that every rank holds gives for the rows that this rank has of all."""
        child: nn.Module = getattr(self, name)
        y: Tensor
        if not self.splits:
            y = child(x_BLD)
            return y
        names, weights = zip(*child.named_parameters(), strict=True)
        apart = dict(zip(names, used_apart(weights, self.place, self.reduce_dtype), strict=True))
        y = torch.func.functional_call(child, apart, (x_BLD,))
        return y

    def whole_rows(self, part: Tensor, whole: Tensor) -> Tensor:
        """All rows of what this rank has of them; whole: stands for the whole x."""
        if not self.splits:
            return part
        return gather_part(part, whole.shape[int(self.activations == "sequence")], self.activations, self.place, True)

    def between_of(
        self, given: dict[str, Any], first: int, length: int, then: Callable[..., Any] | None
    ) -> dict[str, Any]:
        """What acts on queries and keys, as arguments of `attend`; first, length: positions of the queries."""

        def between(q_BHLd: Tensor, k_BKSd: Tensor, v: Tensor, aside: Aside) -> tuple[Tensor, Tensor, Tensor]:
            found = *self.positioned(q_BHLd, k_BKSd, aside), self.normed_values(v)
            return found if then is None else then(*found)

        return {
            "rows": self.rows_of(given, first, length),
            "shared": self.norm_parameters(),
            "between": between,
            "sinks": self._parameters.get(forms.SINKS),
        }

    def finished(self, y_BLD: Tensor, given: dict[str, Any]) -> Tensor:
        """What the original does behind its output projection."""
        residual: Tensor | None = given.get("residual")
        if residual is not None:
            p = self.hidden_dropout if self.training else 0.0
            return residual + nn.functional.dropout(y_BLD, p)
        for name in self.after:
            if name == forms.OUTPUT_NORM:
                y_BLD = self.of_rows(name, given["hidden_states"] + y_BLD)
            else:
                y_BLD = getattr(self, name)(y_BLD)
        return y_BLD

    def causal_without_mask(self, given: dict[str, Any], length: int) -> bool:
        """Whether a call of `length` queries has no mask and is causal: with "eager" the mask would say so."""
        is_causal = given.get("is_causal")
        wanted = given["attention_mask"] is None and (self.is_causal if is_causal is None else is_causal)
        return wanted and getattr(self.config, "_attn_implementation", "eager") == "sdpa" and length > 1

    def needs_weights(self, given: dict[str, Any]) -> bool:
        """Whether a call, or else the config, asks for attention weights."""
        return bool(given.get("output_attentions", getattr(self.config, "output_attentions", False)))


def projected_like(original: nn.Module, *args: Any, **options: Any) -> ProjectedAttention:
    """A ProjectedAttention of the original's class too."""
    return class_like(ProjectedAttention, type(original))(original, *args, **options)


def additive(mask: Tensor, dtype: torch.dtype, hidden: float | None = None) -> Tensor:
    """A bool mask (True = attend) as "eager" attention has it; hidden: for the others, by default the least number."""
    hidden = torch.finfo(dtype).min if hidden is None else hidden
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, hidden)


def mask_for(original: nn.Module, keep: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask (True = attend) as the original takes it."""
    if forms.hides(original):
        return ~keep
    if forms.is_of(original, forms.FLAT):
        return keep.squeeze(1)
    eager = getattr(getattr(original, "config", None), "_attn_implementation", "eager") == "eager"
    return additive(keep, dtype) if eager else keep


def random_arguments(original: nn.Module, rows: int, dtype: torch.dtype) -> dict[str, Any]:
    """hidden_states of two sequences of `rows` rows, and what else the original takes with them."""
    names = (forms.LATENT, *forms.PROJECTIONS["q"], *forms.PROJECTIONS["qkv"])
    projection = forms.first_of(original, names)
    projection = getattr(projection, forms.INNER, projection)
    x_BLD = torch.randn(2, rows, features_of(projection)[0], dtype=dtype)
    named = forms.parameters_of(original)
    given: dict[str, Any] = {"hidden_states": x_BLD}
    h, d = (forms.first_of(original, names) for names in (forms.HEADS, forms.HEAD_DIMS))
    if "position_embeddings" in named:
        given["position_embeddings"] = random_angles(original, d, rows, dtype)
        if takes_complex(original):
            given["position_embeddings"] = torch.complex(*given["position_embeddings"])
        if forms.is_of(original, forms.OF_ONE):
            given["position_embeddings"] = tuple(x[0] for x in given["position_embeddings"])
    if forms.SINUSOIDS in named:
        given[forms.SINUSOIDS] = torch.randn(1, 1, rows, d, dtype=dtype)
    if "alibi" in named:  # where it is a choice of the config, angles are given all the same
        alibi = "position_embeddings" not in named or getattr(original.config, "alibi", False)
        given["alibi"] = torch.randn(2 * h, 1, rows, dtype=dtype) if alibi else None
    if "position_bias" in named:
        shape = (h, 1, 2 * rows) if forms.hides(original) else (1, h, rows, rows)
        made = getattr(original, forms.BIAS_TABLE, None) is not None
        given["position_bias"] = None if made else torch.randn(shape, dtype=dtype)
    if "position_ids" in named:  # big ones: who makes anything of them will show it
        first = 0 if hasattr(original, forms.ANGLES) else 1 << 20
        given["position_ids"] = first + torch.arange(rows).expand(2, rows)
    if forms.CHOSEN in named and getattr(original, forms.INDEXER, None) is None:
        before = torch.arange(rows).unsqueeze(1) - torch.arange(3)
        given[forms.CHOSEN] = before.clamp(min=0).expand(2, rows, 3)
    if forms.SHARED_STATES in named:
        given[forms.SHARED_STATES] = {}
        if forms.takes_shared(original):
            shape = (2, features_of(projection)[1] // d // original.num_key_value_groups, rows, d)
            given[forms.SHARED_STATES] = {original.layer_type: tuple(torch.randn(2, *shape, dtype=dtype))}
    if forms.QUERY_SCALES in named:
        given[forms.QUERY_SCALES] = torch.rand(2, 1, rows, 1, dtype=dtype) + 0.5
    if forms.CALLED_AS in named:
        given[forms.CALLED_AS] = 0
    if "residual" in named:
        given["residual"] = torch.randn_like(x_BLD)
    return given


def probe_inputs(original: nn.Module, dtype: torch.dtype) -> list[tuple[Args, Kwargs]]:
    """A small batch of two with a padding mask, if the module takes one, as transformers would call it, and without."""
    given = random_arguments(original, 5, dtype)
    hidden = (given.pop("hidden_states"),)
    keep_B1LS = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    keep_B1LS[1, ..., 3:] = False
    mask, name = mask_for(original, keep_B1LS, dtype), forms.mask_name(original)
    if name not in forms.parameters_of(original):
        return [(hidden, given)]
    return [(hidden, given | {name: mask}), (hidden, given | {name: None})]
