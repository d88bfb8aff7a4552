"""transformers' encoder attention with four plain linear projections: BERT, RoBERTa, ViT and what shares their shape."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from two_level_mha.layer import GridAttention
from two_level_mha.masks import UsageRuntimeError


class ProjectedAttention(GridAttention):
    """Called as transformers calls such a module: (hidden_states, attention_mask, **kwargs) -> (out, weights or None).

    hidden_states (B, L, D); attention_mask None, or 4-D broadcastable to (B, h, L, S): bool with True = attend ("sdpa")
    or additive ("eager"). The output projection is part of it.
    """

    def __init__(self, original: nn.Module, projections: dict[str, nn.Linear], mesh: DeviceMesh | None, **options) -> None:
        h = original.num_attention_heads
        d = projections["q"].out_features // h
        super().__init__(num_heads=h, num_kv_heads=projections["k"].out_features // d, head_dim=d, mesh=mesh, **options)
        self.scaling = original.scaling
        self.is_causal = getattr(original, "is_causal", False)
        dropout = getattr(original, "dropout", None)
        self.dropout_p = dropout.p if isinstance(dropout, nn.Dropout) else getattr(original, "attention_dropout", 0.0)
        full, trained = {}, {}
        for letter, linear in projections.items():
            for part, p in (("weight", linear.weight), ("bias", linear.bias)):
                name = f"{'out' if letter == 'o' else letter}_{part}"
                if p is not None:
                    trained[name] = p.requires_grad
                    heads_dim = 1 if name == "out_weight" else 0
                    full[name] = p.detach() if name == "out_bias" else p.detach().unflatten(heads_dim, (-1, d))
        self.store(full, trained)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, past_key_values=None, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        if past_key_values is not None:
            raise UsageRuntimeError("past_key_values is not supported by this attention: call with use_cache=False")
        if kwargs.get("encoder_hidden_states") is not None:
            raise UsageRuntimeError("encoder_hidden_states is not supported by this attention: it is self-attention")
        if self.compares():
            self.compare({"hidden_states": hidden_states, "attention_mask": attention_mask}, {"training": self.training})
        causal = 0 if self.is_causal and attention_mask is None and hidden_states.shape[1] > 1 else None
        return self.attend(
            hidden_states,
            hidden_states,
            hidden_states,
            attn_mask=attention_mask,
            scale=self.scaling,
            causal=causal,
            dropout_p=self.dropout_p if self.training else 0.0,
            need_weights=bool(kwargs.get("output_attentions")),
            average_attn_weights=False,
        )


def projected_like(original: nn.Module, projections: dict[str, nn.Linear], mesh, **options) -> ProjectedAttention:
    """A ProjectedAttention that is also an instance of the original's class, by which transformers records weights."""
    cls = type(f"TwoLevel{type(original).__name__}", (ProjectedAttention, type(original)), {})
    return cls(original, projections, mesh, **options)


def probe_inputs(original: nn.Module, dtype: torch.dtype) -> tuple[tuple, dict]:
    """A small input of a batch of two with a padding mask, as transformers would call the module."""
    projection = original.query if hasattr(original, "query") else original.q_proj
    hidden_BLD = torch.randn(2, 5, projection.in_features, dtype=dtype)
    keep_B11S = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    keep_B11S[1, ..., 3:] = False
    if original.config._attn_implementation == "eager":
        mask = torch.zeros(keep_B11S.shape, dtype=dtype).masked_fill(~keep_B11S, torch.finfo(dtype).min)
    else:
        mask = keep_B11S
    return (hidden_BLD,), {"attention_mask": mask}
