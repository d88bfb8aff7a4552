"""transformers' encoder attention with four plain linear projections: BERT, RoBERTa, ViT and what has their shape."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from two_level_mha.class_like import class_like
from two_level_mha.errors import GridError, UsageRuntimeError
from two_level_mha.layer import GridAttention
from two_level_mha.stock import StockTensor, from_stock, linear_names, take_stock_keys

IMPLEMENTATIONS = ("sdpa", "eager")  # whose masks are understood

_REFUSED = {
    "past_key_values": "call with use_cache=False",
    "encoder_hidden_states": "it is self-attention",
    "position_bias": "it adds attention_mask only",
}


def heads_of(original: nn.Module, projections: dict[str, nn.Linear]) -> tuple[int, int, int]:
    """Heads, key/value heads, head_dim. Raises GridError where the projections' widths do not fit the heads."""
    widths = {letter: projections[letter].out_features for letter in "qkv"} | {"o": projections["o"].in_features}
    counted = hasattr(original, "num_attention_heads")  # decoders tell head_dim instead
    h = original.num_attention_heads if counted else widths["q"] // original.head_dim
    d = widths["q"] // h if counted else original.head_dim
    if widths["q"] != h * d or widths["o"] != h * d or widths["k"] % d or widths["v"] != widths["k"]:
        raise GridError(f"widths of the projections, {widths}, do not fit {h} heads of {d}")
    return h, widths["k"] // d, d


def names_of(projections: dict[str, nn.Linear], paths: dict[str, str], head_dim: int) -> dict[str, StockTensor]:
    """Which tensor of which linear each parameter is."""
    names: dict[str, StockTensor] = {}
    for letter, linear in projections.items():
        names |= linear_names("out" if letter == "o" else letter, paths[letter], linear, head_dim)
    return names


class ProjectedAttention(GridAttention):
    """Called as transformers calls such a module: (hidden_states, attention_mask, **kwargs) -> (out, weights or None).

    hidden_states (B, L, D); attention_mask None, or 4-D broadcastable to (B, h, L, S): bool with True = attend ("sdpa")
    or additive ("eager"). The output projection is part of it. Weights (B, h, L, S) are computed only when
    output_attentions, of the call or else of the config, is true; with "sdpa" too, where the original has none.

    projections: the original's linears, by letter q, k, v, o; paths: where they are, as in StockTensor.key.
    """

    heads_of = staticmethod(heads_of)
    names_of = staticmethod(names_of)

    def __init__(
        self,
        original: nn.Module,
        projections: dict[str, nn.Linear],
        paths: dict[str, str],
        mesh: DeviceMesh | None,
        **options,
    ) -> None:
        h, k, d = self.heads_of(original, projections)
        super().__init__(num_heads=h, num_kv_heads=k, head_dim=d, mesh=mesh, **options)
        self.config = original.config
        self.scaling = original.scaling
        self.is_causal = getattr(original, "is_causal", False)
        dropout = getattr(original, "dropout", None)
        if not isinstance(dropout, nn.Dropout):
            dropout = nn.Dropout(getattr(original, "attention_dropout", 0.0))
        self.dropout = dropout  # read at each call, so that a change of its p counts
        self.stock_names, state = self.names_of(projections, paths, d), {}
        for letter, linear in projections.items():
            state |= {f"{paths[letter]}.{part}": p for part, p in linear.named_parameters()}
        trained = {name: state[stock.key].requires_grad for name, stock in self.stock_names.items()}
        self.store(from_stock({key: p.detach() for key, p in state.items()}, self.stock_names), trained)
        take_stock_keys(self)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        dropout_p = self.dropout.p if self.training else 0.0
        whole = self.wholes([hidden_states])[0]

        def check() -> dict[str, object]:
            self.check_implementation()
            for name, advice in _REFUSED.items():
                if kwargs.get(name) is not None:
                    raise UsageRuntimeError(f"{name} is not supported by this attention: {advice}")
            return {"need_weights": self.needs_weights(kwargs), "dropout_p": dropout_p}

        self.check_call(check, {"hidden_states": hidden_states, "attention_mask": attention_mask})
        causal = attention_mask is None and self.causal_without_mask(kwargs, whole.shape[1])
        return self.attend(
            hidden_states,
            hidden_states,
            hidden_states,
            wholes=[whole, whole],
            attn_mask=attention_mask,
            scale=self.scaling,
            causal=0 if causal else None,
            dropout_p=dropout_p,
            need_weights=self.needs_weights(kwargs),
            average_attn_weights=False,
        )

    def check_implementation(self) -> None:
        """Raises where the config was changed to an implementation whose masks, or whose lack of one, mean others."""
        if self.config._attn_implementation not in IMPLEMENTATIONS:
            raise UsageRuntimeError(
                f"the model's attention implementation is now {self.config._attn_implementation!r}, whose masks a "
                'split attention does not take: call model.set_attn_implementation("sdpa")'
            )

    def causal_without_mask(self, kwargs: dict, length: int) -> bool:
        """Whether a call of `length` queries without a mask is causal: with "eager" the mask would say so."""
        is_causal = kwargs.get("is_causal")
        wanted = self.is_causal if is_causal is None else is_causal
        return wanted and self.config._attn_implementation == "sdpa" and length > 1

    def needs_weights(self, kwargs: dict) -> bool:
        """Whether a call, or else the config, asks for attention weights."""
        return bool(kwargs.get("output_attentions", getattr(self.config, "output_attentions", False)))


def projected_like(original: nn.Module, *args, **options) -> ProjectedAttention:
    """A ProjectedAttention of the original's class too."""
    return class_like(ProjectedAttention, type(original))(original, *args, **options)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask (True = attend) as "eager" attention has it."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def probe_inputs(original: nn.Module, dtype: torch.dtype) -> list[tuple[tuple, dict]]:
    """A small batch of two with a padding mask, as transformers would call the module, and without a mask."""
    projection = original.query if hasattr(original, "query") else original.q_proj
    hidden_BLD = torch.randn(2, 5, projection.in_features, dtype=dtype)
    keep_B11S = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    keep_B11S[1, ..., 3:] = False
    mask = additive(keep_B11S, dtype) if original.config._attn_implementation == "eager" else keep_B11S
    return [((hidden_BLD,), {"attention_mask": mask}), ((hidden_BLD,), {"attention_mask": None})]
