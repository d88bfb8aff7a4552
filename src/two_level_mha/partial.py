"""partial_attention: the operator under every layer, for programs of one's own."""

from torch import Tensor

from two_level_mha.operators import ops


def partial_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: int | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    origin: tuple[int, int, int] = (0, 0, 0),
    key_stride: int = 1,
    kernel_name: str = "",
) -> tuple[Tensor, Tensor]:
    """Attention of some of the rows with some of the keys, and what it takes to merge it with the others.

    q (B, H, L, D), k (B, K, S, D), v (B, K, S, Dv): K divides H, query head x reads KV head x / (H / K), Dv may differ
    from D. Returns out (B, H, L, Dv) = dropout(softmax(x)) v of the scores x = softcap(scale q k^T) + mask, and
    logsumexp (B, H, L), the natural log(sum(exp(x))), float32, or float64 of float64. Both have gradients. A row that
    sees no key gives out = 0 and logsumexp = -inf. Parts over different keys merge with weights
    softmax(logsumexp of the parts): two_level_mha's operator merge_partials does it.

    attn_mask: bool (True = attend) or additive, broadcastable to (B, H, L, S). scale: None is 1 / sqrt(D).
    causal: row l sees keys up to position l + causal; window: only those after l + causal - window. Key s has the
    position s * key_stride. softcap: c > 0 makes scores c * tanh(x / c). dropout_p, with seed, one int64 on q's device,
    drops by the counters of (batch, head, row, key), of which q's first has `origin`.
    kernel_name: the kernel that must serve the call (`two-level-mha info` lists them), else ValueError says why not.

        >>> q, k, v = (torch.randn(2, 8, 64, 32) for _ in range(3))
        >>> out, logsumexp = tlm.partial_attention(q, k, v, causal=0)
    """
    return ops.partial_attention(

        q, k, v, attn_mask, scale=scale, causal=causal, window=window, softcap=softcap, dropout_p=dropout_p, seed=seed,
        origin=origin, key_stride=key_stride, kernel_name=kernel_name,
    )  # fmt: skip
