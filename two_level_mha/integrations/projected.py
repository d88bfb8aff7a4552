"""transformers' encoder attention with four plain linear projections: BERT, RoBERTa, ViT and what has their shape."""

import functools

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from two_level_mha.layer import GridAttention
from two_level_mha.masks import UsageRuntimeError
from two_level_mha.mesh import GridError

_REFUSED = {
    "past_key_values": "call with use_cache=False",
    "encoder_hidden_states": "it is self-attention",
    "position_bias": "it adds attention_mask only",
}


def heads_of(original: nn.Module, projections: dict[str, nn.Linear]) -> tuple[int, int, int]:
    """Heads, key/value heads, head_dim. Raises GridError where the projections' widths do not fit the heads."""
    h = original.num_attention_heads
    widths = {letter: projections[letter].out_features for letter in "qkv"} | {"o": projections["o"].in_features}
    d = widths["q"] // h
    if widths["q"] != h * d or widths["o"] != h * d or widths["k"] % d or widths["v"] != widths["k"]:
        raise GridError(f"widths of the projections, {widths}, do not fit num_attention_heads={h}")
    return h, widths["k"] // d, d


def _parameter(letter: str, part: str) -> str:
    return f"{'out' if letter == 'o' else letter}_{part}"


def _with_heads(x: Tensor, name: str, d: int) -> Tensor:
    """A linear's tensor with its heads apart, as GridAttention stores it; as it is if its width does not fit."""
    if name == "out_bias":
        return x
    heads_dim = 1 if name == "out_weight" else 0
    return x if x.shape[heads_dim] % d else x.unflatten(heads_dim, (-1, d))


class ProjectedAttention(GridAttention):
    """Called as transformers calls such a module: (hidden_states, attention_mask, **kwargs) -> (out, weights or None).

    hidden_states (B, L, D); attention_mask None, or 4-D broadcastable to (B, h, L, S): bool with True = attend ("sdpa")
    or additive ("eager"). The output projection is part of it. Weights (B, h, L, S) are computed only when
    output_attentions, of the call or else of the config, is true; with "sdpa" too, where the original has none.
    """

    def __init__(
        self, original: nn.Module, projections: dict[str, nn.Linear], mesh: DeviceMesh | None, **options
    ) -> None:
        h, k, d = heads_of(original, projections)
        super().__init__(num_heads=h, num_kv_heads=k, head_dim=d, mesh=mesh, **options)
        self.config = original.config
        self.scaling = original.scaling
        self.is_causal = getattr(original, "is_causal", False)
        dropout = getattr(original, "dropout", None)
        if not isinstance(dropout, nn.Dropout):
            dropout = nn.Dropout(getattr(original, "attention_dropout", 0.0))
        self.dropout = dropout  # read at each call, so that a change of its p counts
        full, trained = {}, {}
        for letter, linear in projections.items():
            for part, p in linear.named_parameters():
                name = _parameter(letter, part)
                trained[name] = p.requires_grad
                full[name] = _with_heads(p.detach(), name, d)
        self.store(full, trained)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        for name, advice in _REFUSED.items():
            if kwargs.get(name) is not None:
                raise UsageRuntimeError(f"{name} is not supported by this attention: {advice}")
        if self.compares():
            inputs = {"hidden_states": hidden_states, "attention_mask": attention_mask}
            self.compare(inputs, {"training": self.training})
        causal = None  # "eager" has its causal mask in attention_mask
        if self.config._attn_implementation == "sdpa" and attention_mask is None and hidden_states.shape[1] > 1:
            is_causal = kwargs.get("is_causal")
            causal = 0 if (self.is_causal if is_causal is None else is_causal) else None
        return self.attend(
            hidden_states,
            hidden_states,
            hidden_states,
            attn_mask=attention_mask,
            scale=self.scaling,
            causal=causal,
            dropout_p=self.dropout.p if self.training else 0.0,
            need_weights=bool(kwargs.get("output_attentions", getattr(self.config, "output_attentions", False))),
            average_attn_weights=False,
        )


@functools.cache
def _class_like(original: type) -> type:
    return type(f"TwoLevel{original.__name__}", (ProjectedAttention, original), {})


def projected_like(original: nn.Module, projections: dict[str, nn.Linear], mesh, **options) -> ProjectedAttention:
    """A ProjectedAttention that is also an instance of the original's class, by which transformers records weights."""
    return _class_like(type(original))(original, projections, mesh, **options)


def take_stock_keys(owner: nn.Module, child: str, paths: dict[str, str]) -> None:
    """Lets load_state_dict take the original's keys, and full tensors under ours.

    owner: the attention itself with child "", or, where the output projection was the parent's, the parent with the
    attention's name and a dot. paths: of the projections, o from the owner and the others from the attention.
    """
    keys = {letter: path if letter == "o" else child + path for letter, path in paths.items()}
    owner.register_load_state_dict_pre_hook(functools.partial(_take_stock_keys, child=child, keys=keys))


def _take_stock_keys(owner: nn.Module, state: dict, prefix: str, *_, child: str, keys: dict[str, str]) -> None:
    ours = owner.get_submodule(child.rstrip("."))
    for letter, key in keys.items():
        for part in ("weight", "bias"):
            name = _parameter(letter, part)
            x = state.pop(f"{prefix}{key}.{part}", None)
            x = state.get(prefix + child + name) if x is None else _with_heads(x, name, ours.head_dim)
            if x is not None:
                own = ours._parameters.get(name)
                split = isinstance(own, DTensor) and not isinstance(x, DTensor) and x.shape == own.shape
                state[prefix + child + name] = ours.block(x, name) if split else x


def probe_inputs(original: nn.Module, dtype: torch.dtype) -> list[tuple[tuple, dict]]:
    """A small batch of two with a padding mask, as transformers would call the module, and without a mask."""
    projection = original.query if hasattr(original, "query") else original.q_proj
    hidden_BLD = torch.randn(2, 5, projection.in_features, dtype=dtype)
    keep_B11S = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    keep_B11S[1, ..., 3:] = False
    if original.config._attn_implementation == "eager":
        mask = torch.zeros(keep_B11S.shape, dtype=dtype).masked_fill(~keep_B11S, torch.finfo(dtype).min)
    else:
        mask = keep_B11S
    return [((hidden_BLD,), {"attention_mask": mask}), ((hidden_BLD,), {"attention_mask": None})]
