"""GPT-2's attention: q, k, v of one fused Conv1D, which stores (in, out); dropout of the output inside; no rotary."""

import torch
from torch import Tensor, nn

from two_level_mha.class_like import class_like
from two_level_mha.errors import GridError
from two_level_mha.integrations.decoder import DecoderAttention, calls_with_cache
from two_level_mha.layer import Aside
from two_level_mha.stock import StockTensor


def heads_of(original: nn.Module, projections: dict[str, nn.Module]) -> tuple[int, int, int]:
    """Heads, key/value heads, head_dim. Raises GridError where the projections' widths do not fit the heads."""
    h, d = original.num_heads, original.head_dim
    widths = {"c_attn": projections["qkv"].nf, "c_proj": projections["o"].nx}
    if widths != {"c_attn": 3 * h * d, "c_proj": h * d}:
        raise GridError(f"widths of the projections, {widths}, do not fit {h} heads of {d}")
    return h, h, d


def names_of(projections: dict[str, nn.Module], paths: dict[str, str], head_dim: int) -> dict[str, StockTensor]:
    """Which part of which Conv1D each parameter is."""
    fused, out = (tuple(projections[letter].weight.shape) for letter in ("qkv", "o"))
    width = fused[1] // 3
    h, D = width // head_dim, out[1]
    qkv, o = paths["qkv"], paths["o"]
    names = {
        "out_weight": StockTensor(f"{o}.weight", out, (D, h, head_dim), transposed=True),
        "out_bias": StockTensor(f"{o}.bias", (D,), (D,)),
    }
    for i, letter in enumerate("qkv"):
        own = (h, head_dim, fused[0])
        names[f"{letter}_weight"] = StockTensor(f"{qkv}.weight", fused, own, 1, i * width, transposed=True)
        names[f"{letter}_bias"] = StockTensor(f"{qkv}.bias", fused[1:], own[:2], 0, i * width)
    return names


def problem(original: nn.Module) -> str | None:
    """A feature of GPT-2's attention that is not supported, or None."""
    if original.is_cross_attention:
        return "it is cross-attention"
    if original.reorder_and_upcast_attn and original.config._attn_implementation == "eager":
        return 'reorder_and_upcast_attn acts with "eager": call model.set_attn_implementation("sdpa") first'
    return None


class GPT2Attention(DecoderAttention):
    """A DecoderAttention without norms and rotary embedding; drops out entries of its output as the original does."""

    heads_of = staticmethod(heads_of)
    names_of = staticmethod(names_of)

    def __init__(self, original: nn.Module, *args, **options) -> None:
        super().__init__(original, *args, **options)
        self.dropout, self.resid_dropout = original.attn_dropout, original.resid_dropout

    def use_positions(self, original: nn.Module, rotates: bool) -> None:
        """Positions are in hidden_states."""
        self.rotary = None

    def positioned(self, q_BHLd: Tensor, k_BKSd: Tensor, aside: Aside) -> tuple[Tensor, Tensor]:
        return q_BHLd, k_BKSd

    def forward(self, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
        y_BLD, weights = super().forward(*args, **kwargs)
        return self.resid_dropout(y_BLD), weights


def gpt2_like(original: nn.Module, *args, **options) -> GPT2Attention:
    """A GPT2Attention of the original's class too."""
    return class_like(GPT2Attention, type(original))(original, *args, **options)


def gpt2_inputs(original: nn.Module, dtype: torch.dtype) -> list[tuple[tuple, dict]]:
    """As of a decoder, without rotary embedding."""
    return calls_with_cache(original, torch.randn(2, 6, original.embed_dim, dtype=dtype), lambda rows: {})
