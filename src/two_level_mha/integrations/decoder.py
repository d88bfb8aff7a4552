"""transformers' decoder attention with rotary position_embeddings: Llama, Mistral, Qwen, Gemma and their shape."""

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import DynamicCache

from two_level_mha.cache_layer import NO_CACHE
from two_level_mha.class_like import class_like
from two_level_mha.decoder import check_dropout
from two_level_mha.errors import GridError, UsageRuntimeError
from two_level_mha.integrations.cache import WINDOWED, put_layer, split_layer
from two_level_mha.integrations.projected import ProjectedAttention, additive
from two_level_mha.layer import Aside

NORMS = ("q_norm", "k_norm")
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in float64 models' norms are float32's


class DecoderAttention(ProjectedAttention):
    """Called as transformers calls such a module; attention, cache and output projection on the grid.

    hidden_states (B, L, D); position_embeddings: cos and sin (B or 1, L, rotary width); attention_mask: None, bool
    with True = attend ("sdpa") or additive ("eager"), (B, 1 or h, L, S), S counting the cache's kept tokens. A window
    is in the mask. None: all keys for one query, else those up to its position. past_key_values: a DynamicCache, whose
    empty layer becomes one of ours, or a KVCache. Norms of queries and keys, and the rotary function, are the model's.
    Weights (B, h, L, S) with output_attentions, but not from a cache by position: a rank sees only some of the keys.
    Nor is there dropout with one: where it acts, a cache that transformers made is kept by batch.
    rotates: False for a layer that leaves position_embeddings alone, as some of SmolLM3's and Cohere2's do.
    """

    def __init__(
        self,
        original: nn.Module,
        projections: dict[str, nn.Linear],
        paths: dict[str, str],
        mesh: DeviceMesh | None,
        *,
        cache: str,
        rotates: bool = True,
        **options,
    ) -> None:
        super().__init__(original, projections, paths, mesh, **options)
        if self.scheme == "independent":
            raise GridError("scheme 'independent' has no KV cache, with which such a model is called; take another")
        if getattr(original.config, "clip_qkv", None) is not None:  # a trial's numbers may be too small for it
            raise GridError(f"it clips queries, keys and values (clip_qkv={original.config.clip_qkv})")
        self.layer_idx, self.cache_layout = original.layer_idx, cache
        kind = dict(enumerate(getattr(original.config, "layer_types", None) or ())).get(self.layer_idx)
        if kind is not None and kind not in WINDOWED:
            raise GridError(
                f"its layer is of type {kind!r}, whose cache is not split; supported: {', '.join(WINDOWED)}"
            )
        self.softcap = getattr(original, "attn_logit_softcapping", None) or 0.0
        self.use_positions(original, rotates)
        self.fused = self.fused_form(_rotary_width(original)) if self.rotary is not None else None

    def use_positions(self, original: nn.Module, rotates: bool) -> None:
        """Takes over what acts on single heads."""
        self.rotary = _rotary(original) if rotates else None
        for name in NORMS:
            norm = getattr(original, name, None)
            if norm is not None:
                self.add_module(name, _per_head(norm, name, self.head_dim))

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values=None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        whole = self.wholes([hidden_states])[0]
        B, L, _ = whole.shape
        need_weights, dropout_p = self.needs_weights(kwargs), self.dropout.p if self.training else 0.0
        layout = "batch" if dropout_p > 0.0 else self.cache_layout  # see check_dropout

        def check() -> dict[str, object]:
            self.check_implementation()
            settings = {"need_weights": need_weights, "dropout_p": dropout_p}
            if past_key_values is None:
                return settings
            layer = split_layer(past_key_values, self.layer_idx, self.place, layout)
            check_dropout(layer, dropout_p)
            call = layer.next_call(B, L)
            if need_weights and layer.layout == "position":
                raise UsageRuntimeError(
                    "output_attentions needs all keys of a query on one rank, which a cache by position has not: "
                    'call with use_cache=False, or parallelize with cache="batch"'
                )
            return settings | call._asdict()

        self.check_call(check, {"hidden_states": hidden_states, "attention_mask": attention_mask})
        layer, call = None, NO_CACHE
        if past_key_values is not None:
            layer = split_layer(past_key_values, self.layer_idx, self.place, layout)
            put_layer(past_key_values, self.layer_idx, layer)
            call = layer.begin(B, L)

        def between(q_BHLd: Tensor, k_BKSd: Tensor, v: Tensor, aside: Aside) -> tuple[Tensor, Tensor, Tensor]:
            return *self.positioned(q_BHLd, k_BKSd, aside), v

        causal = self.causal_without_mask(kwargs, L) if attention_mask is None else None
        unrotated = self.rotary is None or position_embeddings is None  # a model may leave them out by its config
        if need_weights and attention_mask is not None and attention_mask.dtype == torch.bool:
            attention_mask = additive(attention_mask, hidden_states.dtype)  # a padded row must not become NaN
        return self.attend(
            hidden_states,
            hidden_states,
            hidden_states,
            wholes=[whole, whole],
            attn_mask=attention_mask,
            scale=self.scaling,
            causal=call.position if causal else None,
            softcap=self.softcap,
            dropout_p=dropout_p,
            need_weights=need_weights,
            average_attn_weights=False,
            rows=None if unrotated else [x.unsqueeze(1) for x in position_embeddings],
            shared=[p for norm in self.norms() for p in norm.parameters()] or None,
            between=between,
            cache=layer,
            call=call,
        )

    def norms(self) -> list[nn.Module]:
        """Those of queries and of keys that the model has."""
        return [getattr(self, name) for name in NORMS if hasattr(self, name)]

    def positioned(self, q_BHLd: Tensor, k_BKSd: Tensor, aside: Aside) -> tuple[Tensor, Tensor]:
        """Queries and keys as attention takes them: normed and rotated. On a GPU by one kernel, where nothing is
        differentiated and the model's own functions are those that it computes.
        """
        one_kernel = self.fused is not None and aside.q_rows and q_BHLd.is_cuda and q_BHLd.dtype in FUSED_DTYPES
        if one_kernel and not (torch.is_grad_enabled() and q_BHLd.requires_grad):
            return self.by_operator(q_BHLd, k_BKSd, aside)
        return self.by_model(q_BHLd, k_BKSd, aside)

    def by_operator(self, q_BHLd: Tensor, k_BKSd: Tensor, aside: Aside) -> tuple[Tensor, Tensor]:
        eps, interleaved = self.fused
        return torch.ops.two_level_mha.norm_rotary(
            q_BHLd, k_BKSd, aside.shared, eps, aside.q_rows, aside.k_rows, interleaved
        )

    def by_model(self, q_BHLd: Tensor, k_BKSd: Tensor, aside: Aside) -> tuple[Tensor, Tensor]:
        shared, xs = iter(aside.shared), {"q_norm": q_BHLd, "k_norm": k_BKSd}
        for name in NORMS:
            if (norm := getattr(self, name, None)) is not None:
                parameters = {own: next(shared) for own, _ in norm.named_parameters()}
                xs[name] = torch.func.functional_call(norm, parameters, (xs[name],))
        q_BHLd, k_BKSd = xs.values()
        if not aside.q_rows:
            return q_BHLd, k_BKSd
        q_BHLd = self.rotary(q_BHLd, q_BHLd[:, :0], *(x.squeeze(1) for x in aside.q_rows))[0]
        k_BKSd = self.rotary(k_BKSd[:, :0], k_BKSd, *(x.squeeze(1) for x in aside.k_rows))[1]
        return q_BHLd, k_BKSd

    def fused_form(self, width: int) -> tuple[float, bool] | None:
        """(eps, interleaved) with which norm_rotary does what the model's own functions do; None: with none. width: of
        the rotary embedding. Tried, on random numbers of no generator that others draw from.
        """
        norms = self.norms()
        if len(norms) == 1 or any(len(list(norm.parameters())) != 1 for norm in norms) or self.rotary is None:
            return None
        draw = torch.Generator(device="cpu").manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw, device="cpu")

        eps = [getattr(norm, "variance_epsilon", getattr(norm, "eps", None)) for norm in norms] or [0.0]
        if not all(isinstance(each, float) and each == eps[0] for each in eps):
            return None
        q, k = random(2, 2, 3, self.head_dim), random(2, 2, 3, self.head_dim)
        angles = [random(2, 1, 3, width) for _ in ("cos", "sin")]
        aside = Aside(angles, angles, [random(self.head_dim) for _ in norms])
        with torch.no_grad():
            for interleaved in (False, True):
                self.fused = (eps[0], interleaved)
                try:
                    pairs = zip(self.by_operator(q, k, aside), self.by_model(q, k, aside), strict=True)
                except (RuntimeError, TypeError, ValueError):  # a function of other arguments
                    continue
                if all(ours.shape == own.shape and torch.allclose(ours, own, 1e-4, 1e-5) for ours, own in pairs):
                    return self.fused
        return None


def _rotary(original: nn.Module):
    """The rotary function of the model's own module."""
    module = sys.modules[type(original).__module__]
    found = getattr(module, "apply_rotary_pos_emb", None)
    if found is None:
        raise GridError(f"{module.__name__} has no apply_rotary_pos_emb, which its attention would be rotated by")
    return found


def _per_head(norm: nn.Module, name: str, head_dim: int) -> nn.Module:
    for part, p in norm.named_parameters():
        if tuple(p.shape) != (head_dim,):
            raise GridError(
                f"{name}.{part} has shape {tuple(p.shape)}: only norms of each head, ({head_dim},), are supported"
            )
    return norm


def decoder_like(original: nn.Module, *args, **options) -> DecoderAttention:
    """A DecoderAttention of the original's class too."""
    return class_like(DecoderAttention, type(original))(original, *args, **options)


def decoder_inputs(original: nn.Module, dtype: torch.dtype) -> list[tuple[tuple, dict]]:
    """Calls with rotary embedding."""
    x_BLD = torch.randn(2, 6, original.q_proj.in_features, dtype=dtype)
    cos_BLd, sin_BLd = torch.randn(2, 2, 6, _rotary_width(original), dtype=dtype)
    return calls_with_cache(original, x_BLD, lambda rows: {"position_embeddings": (cos_BLd[:, rows], sin_BLd[:, rows])})


def calls_with_cache(
    original: nn.Module, x_BLD: Tensor, others: Callable[[slice], dict[str, object]]
) -> list[tuple[tuple, dict]]:
    """Two sequences of 6, one padded on the left: all at once, then with a cache in two steps, then without a mask.

    others: the other arguments of a call with these rows.
    """
    keep = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 1, 6, 6).clone()
    keep[1, ..., :2] = False
    keep[1, :, :2, 0] = True  # no row without a key: what it gives is not defined
    cache = DynamicCache()

    def call(first: int, end: int, mask: Tensor | None, past) -> tuple[tuple, dict]:
        rows = slice(first, end)
        if mask is not None:
            mask = mask[:, :, rows, :end]
            if original.config._attn_implementation == "eager":
                mask = additive(mask, x_BLD.dtype)
        return (x_BLD[:, rows].contiguous(),), {"attention_mask": mask, "past_key_values": past, **others(rows)}

    return [call(0, 6, keep, None), call(0, 4, keep, cache), call(4, 6, keep, cache), call(0, 6, None, None)]


def _rotary_width(original: nn.Module) -> int:
    config = original.config
    parameters = getattr(config, "rope_parameters", None) or {}
    share = parameters.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    return int(original.head_dim * share)
