"""What ATen's CUDA operators for attention ask for and answer, on the CPU, for test_aten_cuda.py.

Each checks what the kernel would read wrongly or refuse (alignment, widths, heads, the corner of a causal mask),
computes in float64, and answers in the kernel's own form: padded, strided or transposed, and without a meaning where
the kernel gives none. What they claim was read in ATen's sources, not run on a GPU.
"""

import torch
from torch import Tensor

NAN = float("nan")


def check_aligned(**tensors: Tensor) -> None:
    """16-byte aligned bases and strides, the last dim contiguous, nothing expanded."""
    for name, x in tensors.items():
        assert x.data_ptr() % 16 == 0 and x.stride(-1) == 1, (name, x.stride())
        for dim in range(x.dim() - 1):
            assert x.stride(dim) * x.element_size() % 16 == 0, (name, x.stride())
            assert x.stride(dim) != 0 or x.size(dim) <= 1, (name, x.stride())


def weights(q: Tensor, k: Tensor, scale: float, hidden: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scores in float64 of (B, H, L, D) and (B, K, S, D), heads of k repeated, and their logsumexp."""
    k = k.repeat_interleave(q.size(1) // k.size(1), 1)
    scores = scale * q.double() @ k.double().mT
    if bias is not None:
        scores = scores + bias.double()
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores, scores.logsumexp(-1)


def hidden_from(corner: str, L: int, S: int, window: int | None = None) -> Tensor:
    """Keys that a row does not see, causal from the top-left or the bottom-right corner, or of a window there."""
    last = torch.arange(L)[:, None] + (0 if corner == "top left" else S - L)
    hidden = torch.arange(S) > last
    if window is not None:
        hidden = hidden | (torch.arange(S) <= last - window)
    assert not hidden.all(-1).any(), "a row that sees no key: each kernel has its own values there"
    return hidden


def attended(q: Tensor, k: Tensor, v: Tensor, scale: float, hidden: Tensor | None, bias: Tensor | None = None):
    scores, logsumexp = weights(q, k, scale, hidden, bias)
    v = v.repeat_interleave(q.size(1) // v.size(1), 1)
    out = (scores - logsumexp[..., None]).exp() @ v.double()
    return out, logsumexp


def gradients(grad_out, q, k, v, out, logsumexp, scale, hidden, bias=None):
    """dq, dk, dv from a logsumexp, +inf for a row that passes nothing, and delta from out and grad_out."""
    scores, _ = weights(q, k, scale, hidden, bias)
    p = (scores - logsumexp.double()[..., None]).exp()
    group = q.size(1) // k.size(1)
    wide_v, wide_k = (x.repeat_interleave(group, 1).double() for x in (v, k))
    delta = (out.double() * grad_out.double()).sum(-1, keepdim=True)
    ds = p * (grad_out.double() @ wide_v.mT - delta)
    dq = scale * ds @ wide_k
    dk, dv = scale * ds.mT @ q.double(), p.mT @ grad_out.double()
    return [dq, *(x.unflatten(1, (k.size(1), group)).sum(2) for x in (dk, dv))]


def in_memory_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, H, L, D) in memory (B, L, H, D), as flash and cuDNN answer."""
    return x.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)


def flash_sees(q: Tensor, k: Tensor, v: Tensor, causal: bool, left: int | None, right: int | None) -> Tensor | None:
    """Checks (B, length, H, D) and gives the keys that flash hides; causal is a window that is open to the left."""
    check_aligned(q=q, k=k, v=v)
    assert q.dtype in (torch.float16, torch.bfloat16) and q.size(3) == k.size(3) == v.size(3) <= 256
    assert q.size(3) % 8 == 0 and q.size(2) % k.size(2) == 0 and k.shape == v.shape and k.size(1) > 0
    L, S = q.size(1), k.size(1)
    assert (left is None) == (right is None) and (left is None or (causal and left >= 0 and right == 0))
    assert not causal or L <= S, "rows above the first key"
    return hidden_from("bottom right", L, S, None if left is None else left + 1) if causal else None


def flash(
    query, key, value, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
    window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None, block_table=None, num_splits=None,
):  # fmt: skip
    hidden = flash_sees(query, key, value, is_causal, window_size_left, window_size_right)
    assert cu_q is cu_k is seqused_k is alibi_slopes is block_table is num_splits is None
    assert dropout_p == 0.0 and scale is not None and (max_q, max_k) == (query.size(1), key.size(1))
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out, logsumexp = attended(q, k, v, scale, hidden)
    none = torch.empty(0)
    return in_memory_of(out, q.dtype).transpose(1, 2), logsumexp.float(), none, none, none


def flash_backward(
    grad_out, query, key, value, out, logsumexp, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, rng_state, unused, *,
    scale=None, window_size_left=None, window_size_right=None,
):  # fmt: skip
    hidden = flash_sees(query, key, value, is_causal, window_size_left, window_size_right)
    check_aligned(grad_out=grad_out, out=out)
    q, k, v, o, g = (x.transpose(1, 2) for x in (query, key, value, out, grad_out))
    assert logsumexp.is_contiguous() and logsumexp.dtype is torch.float32 and logsumexp.shape == q.shape[:3]
    assert (max_q, max_k) == (q.size(2), k.size(2)) and g.shape == o.shape == q.shape
    found = gradients(g, q, k, v, o, logsumexp, scale, hidden)
    return tuple(in_memory_of(x, q.dtype).transpose(1, 2) for x in found)


def cudnn_sees(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor | None:
    """Checks (B, H, L, D) and gives the keys that cuDNN hides."""
    check_aligned(q=q, k=k, v=v)
    assert q.dtype in (torch.float16, torch.bfloat16) and q.size(3) == k.size(3) == v.size(3) <= 256
    assert q.size(2) > 1 and k.size(2) > 1 and q.size(1) % k.size(1) == 0 and q.size(3) % 8 == 0
    return hidden_from("top left", q.size(2), k.size(2)) if causal else None


def cudnn(
    q, k, v, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None
):
    hidden = cudnn_sees(q, k, v, is_causal)
    assert attn_bias is None and compute_log_sumexp and dropout_p == 0.0 and scale is not None
    out, logsumexp = attended(q, k, v, scale, hidden)
    none = torch.empty(0)
    strided = torch.full((*logsumexp.shape, 3), NAN)[..., :1].copy_(logsumexp[..., None])
    return in_memory_of(out, q.dtype), strided, none, none, q.size(2), k.size(2), none, none, none


def cudnn_backward(
    grad_out, q, k, v, out, logsumexp, philox_seed, philox_offset, attn_bias, cum_q, cum_k, max_q, max_k, dropout_p,
    is_causal, *, scale=None,
):  # fmt: skip
    """The statistics are (B, H, L, 1) since torch 2.9 and, but for nested tensors, packed; a mask gives NaN."""
    hidden = cudnn_sees(q, k, v, is_causal)
    check_aligned(grad_out=grad_out, out=out)
    assert attn_bias is cum_q is cum_k is None and dropout_p == 0.0 and scale is not None
    assert logsumexp.is_contiguous() and logsumexp.dtype is torch.float32 and logsumexp.shape == (*q.shape[:3], 1)
    assert (max_q, max_k) == (q.size(2), k.size(2)) and grad_out.shape == out.shape == q.shape
    found = gradients(grad_out, q, k, v, out, logsumexp.squeeze(3), scale, hidden)
    return tuple(torch.empty_like(like).copy_(x) for x, like in zip(found, (q, k, v), strict=True))


def check_efficient(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> None:
    """All (B, length, H, D)."""
    check_aligned(q=q, k=k, v=v)
    assert q.size(2) == k.size(2) == v.size(2) and q.size(3) == k.size(3) and k.size(1) == v.size(1) > 0
    assert q.size(3) * q.element_size() % 16 == 0 and v.size(3) * v.element_size() % 16 == 0
    if bias is None:
        return
    assert bias.dtype == q.dtype and bias.shape == (q.size(0), q.size(2), q.size(1), k.size(1))
    assert bias.data_ptr() % 16 == 0 and bias.stride(3) == 1
    assert all(bias.stride(dim) * bias.element_size() % 16 == 0 for dim in range(3)), bias.stride()


def hidden_of_type(mask_type: int, L: int, S: int, window: int | None) -> Tensor | None:
    assert window is None or (mask_type != 0 and window > 0), "0 is no window to the kernel"
    return None if mask_type == 0 else hidden_from({1: "top left", 2: "bottom right"}[mask_type], L, S, window)


def efficient(
    query, key, value, bias, cu_q, cu_k, max_q, max_k, dropout_p, custom_mask_type, compute_log_sumexp=False, *,
    scale=None, seqlen_k=None, window_size=None,
):  # fmt: skip
    check_efficient(query, key, value, bias)
    assert cu_q is cu_k is seqlen_k is None and dropout_p == 0.0 and compute_log_sumexp
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    L, S = q.size(2), k.size(2)
    # scores times log2(e), in float32
    biased = None if bias is None else (bias.float() * 1.4426950408889634).div(1.4426950408889634)
    out, logsumexp = attended(q, k, v, scale, hidden_of_type(custom_mask_type, L, S, window_size), biased)
    empty = logsumexp.isneginf()
    out, logsumexp = out.masked_fill(empty[..., None], NAN), logsumexp.masked_fill(empty, NAN)
    padded = torch.full((*logsumexp.shape[:2], -(-L // 32) * 32), NAN)
    padded[..., :L] = logsumexp
    none = torch.empty((), dtype=torch.int64)
    return out.to(q.dtype).transpose(1, 2).contiguous(), padded, none, none, L, S


def efficient_backward(
    grad_out_, query, key, value, bias, out, cu_q, cu_k, max_q, max_k, logsumexp, dropout_p, seed, offset,
    custom_mask_type, bias_requires_grad, *, scale=None, num_splits_key=None, window_size=None,
    shared_storage_dqdkdv=False, offset_windows=True,
):  # fmt: skip
    """Without offset_windows, as before torch 2.15: a window ends where it would with as many keys as rows."""
    check_efficient(query, key, value, bias)
    check_aligned(grad_out=grad_out_, out=out)
    L, S = query.size(1), key.size(1)
    assert (max_q, max_k) == (L, S) and not bias_requires_grad and grad_out_.is_contiguous() and out.is_contiguous()
    assert logsumexp.shape == (query.size(0), query.size(2), -(-L // 32) * 32) and logsumexp.dtype is torch.float32
    assert logsumexp[..., L:].isposinf().all(), "rows of the padding would add to the gradients"
    tensors = (grad_out_, query, key, value, out)
    grad_out, q, k, v, out = (x.transpose(1, 2) for x in tensors)
    of_window = window_size if offset_windows else None
    hidden = hidden_of_type(custom_mask_type, L, S, of_window)
    if window_size is not None and not offset_windows:
        hidden = hidden | (torch.arange(S) <= torch.arange(L)[:, None] - window_size)
    found = gradients(grad_out, q, k, v, out, logsumexp[..., :L], scale, hidden, bias)
    return (*(x.to(q.dtype).transpose(1, 2).contiguous() for x in found), torch.empty(0))


def bmm(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    assert a.dtype is b.dtype and a.dtype in (torch.float16, torch.bfloat16) and out_dtype is torch.float32
    return a.float() @ b.float()


KERNELS = {
    "bmm.dtype": bmm,
    "_flash_attention_forward": flash,
    "_flash_attention_backward": flash_backward,
    "_scaled_dot_product_cudnn_attention": cudnn,
    "_scaled_dot_product_cudnn_attention_backward": cudnn_backward,
    "_efficient_attention_forward": efficient,
    "_efficient_attention_backward": efficient_backward,
}
