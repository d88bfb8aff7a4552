"""What the package computes, written down in one process and in whole tensors: slow, short and for any dtype.

Tests compare against it in float64. B batch, L queries, S keys, D embed_dim, h heads, k KV heads, d head_dim.
"""

from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Unpack

NEG_INF = float("-inf")


class Options(TypedDict, total=False):
    """Those of `attention`."""

    causal: int | None
    window: int | None
    softcap: float
    scale: float | None
    dropout_p: float
    keep_BHLS: Tensor | None
    key_stride: int
    empty_rows: str


def visible(
    num_queries: int,
    num_keys: int,
    causal: int | None,
    window: int | None,
    device: torch.device | str | None = None,
    key_stride: int = 1,
) -> Tensor:
    """(L, S) bool, True = attend: row l sees key s, which stands at p = s * key_stride, if p <= l + causal and,
    windowed, p > l + causal - window.

    causal=0 and causal=1 for L = 3, S = 4:   1 0 0 0    1 1 0 0
                                              1 1 0 0    1 1 1 0
                                              1 1 1 0    1 1 1 1
    """
    row_L1 = torch.arange(num_queries, device=device)[:, None]
    key_1S = key_stride * torch.arange(num_keys, device=device)[None, :]
    if causal is None:
        return torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    seen_LS = key_1S <= row_L1 + causal
    if window is not None:
        seen_LS = seen_LS & (key_1S > row_L1 + causal - window)
    return seen_LS


def attention(
    q_BHLD: Tensor,
    k_BKSD: Tensor,
    v_BKSE: Tensor,
    *,
    mask: Tensor | None = None,
    causal: int | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    dropout_p: float = 0.0,
    keep_BHLS: Tensor | None = None,
    key_stride: int = 1,
    empty_rows: str = "zero",
) -> tuple[Tensor, Tensor, Tensor]:
    """Exact attention: out (B, H, L, E), logsumexp (B, H, L) and the weights after dropout (B, H, L, S).

    scores = softcap * tanh(scale * q k^T / softcap) + mask;  out = dropout(softmax(scores)) v

    mask: bool (True = attend) or additive, broadcastable to (B, H, L, S).
    keep_BHLS: the dropout mask, True = kept; kept weights are divided by 1 - dropout_p.
    key_stride: causal and window count positions, of which the keys are every key_stride-th.
    empty_rows: a row that sees no key gives "zero" (no gradient, logsumexp -inf) or "nan", as softmax does.
    GQA: query head x reads KV head x // (H / K).
    """
    num_queries, num_keys = q_BHLD.shape[2], k_BKSD.shape[2]
    repeats = q_BHLD.shape[1] // k_BKSD.shape[1]
    k_BHSD, v_BHSE = k_BKSD.repeat_interleave(repeats, 1), v_BKSE.repeat_interleave(repeats, 1)
    scores_BHLS = (q_BHLD @ k_BHSD.mT) * (q_BHLD.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores_BHLS = softcap * torch.tanh(scores_BHLS / softcap)
    if mask is not None and mask.dtype == torch.bool:
        scores_BHLS = scores_BHLS.masked_fill(~mask, NEG_INF)
    elif mask is not None:
        scores_BHLS = scores_BHLS + mask
    seen_LS = visible(num_queries, num_keys, causal, window, q_BHLD.device, key_stride)
    scores_BHLS = scores_BHLS.masked_fill(~seen_LS, NEG_INF)
    if empty_rows == "zero":
        empty_BHL1 = (scores_BHLS == NEG_INF).all(-1, keepdim=True)
        scores_BHLS = scores_BHLS.masked_fill(empty_BHL1, 0.0)
        weights_BHLS = torch.softmax(scores_BHLS, -1).masked_fill(empty_BHL1, 0.0)
        logsumexp_BHL = torch.logsumexp(scores_BHLS, -1).masked_fill(empty_BHL1.squeeze(-1), NEG_INF)
    else:
        weights_BHLS = torch.softmax(scores_BHLS, -1)
        logsumexp_BHL = torch.logsumexp(scores_BHLS, -1)
    if keep_BHLS is not None:
        weights_BHLS = weights_BHLS * keep_BHLS / (1.0 - dropout_p)
    return weights_BHLS @ v_BHSE, logsumexp_BHL, weights_BHLS


def project(x_BLD: Tensor, weight_hdD: Tensor, bias_hd: Tensor | None = None) -> Tensor:
    """x (B, L, D) through weights (h, d, D) to heads (B, h, L, d)."""
    y_BhLd = torch.einsum("bld,hed->bhle", x_BLD, weight_hdD)
    return y_BhLd if bias_hd is None else y_BhLd + bias_hd[:, None, :]


def project_out(o_BhLd: Tensor, weight_Dhd: Tensor, bias_D: Tensor | None = None) -> Tensor:
    """Heads (B, h, L, d) through weights (D, h, d) to y (B, L, D)."""
    y_BLD = torch.einsum("bhle,dhe->bld", o_BhLd, weight_Dhd)
    return y_BLD if bias_D is None else y_BLD + bias_D


def multihead_attention(
    query_BLD: Tensor,
    key_BSD: Tensor,
    value_BSD: Tensor,
    *,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    out_weight: Tensor,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
    out_bias: Tensor | None = None,
    bias_k: Tensor | None = None,
    bias_v: Tensor | None = None,
    add_zero_attn: bool = False,
    mask: Tensor | None = None,
    slices: int = 1,
    **options: "Unpack[Options]",
) -> tuple[Tensor, Tensor]:
    """A whole layer on unsplit weights; returns y (B, L, D) and the weights after dropout (B, h, L, S').

    Weights are q (h, d, D), k and v (k, d, D), out (D, h, d); biases (h or k, d); bias_k, bias_v (k, d).
    mask is True = attend or additive (nn.MultiheadAttention's bool masks are its negation), over the S given
    keys: the columns that bias_k / bias_v and add_zero_attn append are visible to every row. `options` go to
    `attention`: empty_rows="nan" is nn.MultiheadAttention with need_weights=True, "zero" with
    need_weights=False.

    slices=m is the model of scheme "independent" instead: every rank runs softmax on its own slice of d,
    which is exact attention with h * m heads of width d / m and scale 1 / sqrt(d / m). With m = 1 nothing
    changes.
    """
    if slices > 1:
        q_weight, k_weight, v_weight = (_slice_heads(w, slices) for w in (q_weight, k_weight, v_weight))
        q_bias, k_bias, v_bias, bias_k, bias_v = (
            None if b is None else _slice_heads(b, slices) for b in (q_bias, k_bias, v_bias, bias_k, bias_v)
        )
        out_weight = out_weight.unflatten(2, (slices, -1)).flatten(1, 2)
    q_BHLE = project(query_BLD, q_weight, q_bias)
    k_BKSE = project(key_BSD, k_weight, k_bias)
    v_BKSE = project(value_BSD, v_weight, v_bias)
    repeats = q_BHLE.shape[1] // k_BKSE.shape[1]
    if slices > 1:  # head (x, j) reads KV head (x // repeats, j): spell the heads out
        owner = torch.arange(q_BHLE.shape[1], device=q_BHLE.device)
        owner = owner // slices // repeats * slices + owner % slices
        k_BKSE, v_BKSE = k_BKSE[:, owner], v_BKSE[:, owner]
        bias_k, bias_v = (None if b is None else b[owner] for b in (bias_k, bias_v))
        if mask is not None and mask.dim() == 4 and mask.shape[1] > 1:
            mask = mask.repeat_interleave(slices, 1)
    extra = 0
    if bias_k is not None:
        assert bias_v is not None
        k_BKSE, v_BKSE = (_append(x, b) for x, b in ((k_BKSE, bias_k), (v_BKSE, bias_v)))
        extra += 1
    if add_zero_attn:
        k_BKSE, v_BKSE = (_append(x, x.new_zeros(x.shape[1], x.shape[3])) for x in (k_BKSE, v_BKSE))
        extra += 1
    if mask is not None and extra:
        columns = mask.expand(*mask.shape[:-1], key_BSD.shape[1])
        mask = torch.nn.functional.pad(columns, (0, extra), value=True if mask.dtype == torch.bool else 0.0)
    o_BHLE, _, weights_BHLS = attention(q_BHLE, k_BKSE, v_BKSE, mask=mask, **options)
    return project_out(o_BHLE, out_weight, out_bias), weights_BHLS


def rms_norm(x: Tensor, weight_d: Tensor, eps: float) -> Tensor:
    """Over the last dim: weight * x / sqrt(mean(x^2) + eps)."""
    return weight_d * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def rotary(x_BHLd: Tensor, cos_B1Lr: Tensor, sin_B1Lr: Tensor, interleaved: bool = False) -> Tensor:
    """The first r dims turned in pairs, (a, b) -> (a cos - b sin, b cos + a sin); the others pass through.

    Pairs are dims c and c + r / 2, or 2 c and 2 c + 1 if interleaved.
    """
    r = cos_B1Lr.shape[-1]
    x_BHLr, rest = x_BHLd[..., :r], x_BHLd[..., r:]
    first, second = torch.arange(r // 2), torch.arange(r // 2) + r // 2
    if interleaved:
        first, second = torch.arange(0, r, 2), torch.arange(1, r, 2)
    turned_BHLr = torch.empty_like(x_BHLr)
    turned_BHLr[..., first] = -x_BHLr[..., second]
    turned_BHLr[..., second] = x_BHLr[..., first]
    return torch.cat([x_BHLr * cos_B1Lr + turned_BHLr * sin_B1Lr, rest], -1)


def decoder_attention(
    x_BLD: Tensor,
    *,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    out_weight: Tensor,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
    out_bias: Tensor | None = None,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    qk_norm: float | None = None,
    cos_sin: tuple[Tensor, Tensor] | None = None,
    interleaved: bool = False,
    **options: "Unpack[Options]",
) -> Tensor:
    """TwoLevelAttention's layer on unsplit weights, as `multihead_attention` takes them; y (B, L, D).

    q_norm_weight, k_norm_weight (d,) with qk_norm as eps; cos_sin (B or 1, 1, L, r). `options` go to `attention`.
    """
    q_BHLd = project(x_BLD, q_weight, q_bias)
    k_BKLd = project(x_BLD, k_weight, k_bias)
    v_BKLd = project(x_BLD, v_weight, v_bias)
    if qk_norm is not None:
        assert q_norm_weight is not None and k_norm_weight is not None
        q_BHLd, k_BKLd = rms_norm(q_BHLd, q_norm_weight, qk_norm), rms_norm(k_BKLd, k_norm_weight, qk_norm)
    if cos_sin is not None:
        q_BHLd, k_BKLd = rotary(q_BHLd, *cos_sin, interleaved), rotary(k_BKLd, *cos_sin, interleaved)
    o_BHLd = attention(q_BHLd, k_BKLd, v_BKLd, **options)[0]
    return project_out(o_BHLd, out_weight, out_bias)


def stock_parameters(mha: torch.nn.MultiheadAttention) -> dict[str, Tensor]:
    """The parameters of an nn.MultiheadAttention under the names and shapes of `multihead_attention`.

    Views, so that gradients reach the module's own parameters.
    """
    heads, width = mha.num_heads, mha.head_dim
    if mha._qkv_same_embed_dim:
        q, k, v = mha.in_proj_weight.chunk(3)
    else:
        q, k, v = mha.q_proj_weight, mha.k_proj_weight, mha.v_proj_weight
    found = {
        "q_weight": q.unflatten(0, (heads, width)),
        "k_weight": k.unflatten(0, (heads, width)),
        "v_weight": v.unflatten(0, (heads, width)),
        "out_weight": mha.out_proj.weight.unflatten(1, (heads, width)),
    }
    if mha.in_proj_bias is not None:
        for name, bias in zip(("q_bias", "k_bias", "v_bias"), mha.in_proj_bias.chunk(3), strict=True):
            found[name] = bias.view(heads, width)
        found["out_bias"] = mha.out_proj.bias
    if mha.bias_k is not None:
        assert mha.bias_v is not None
        found["bias_k"], found["bias_v"] = mha.bias_k.view(heads, width), mha.bias_v.view(heads, width)
    return found


def _slice_heads(weight: Tensor, slices: int) -> Tensor:
    """(h, d, ...) to (h * m, d / m, ...): head x's slice j becomes head x * m + j."""
    if weight.shape[1] % slices:
        raise ValueError(f"slices must divide head_dim: {slices} does not divide {weight.shape[1]}")
    apart: Tensor = weight.unflatten(1, (slices, weight.shape[1] // slices))
    return apart.flatten(0, 1)


def _append(x_BKSE: Tensor, column_KE: Tensor) -> Tensor:
    return torch.cat([x_BKSE, column_KE[None, :, None].expand(x_BKSE.shape[0], -1, 1, -1)], 2)
