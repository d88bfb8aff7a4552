"""A small decoder of torchtitan's shape: its own attention and rotation, a table of rotations given layer by layer."""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu


def apply_rotary_emb(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
    """torchtitan's: pairs of neighbours as complex numbers."""
    turned = []
    for x in (xq, xk):
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        turns = freqs_cis[: x.shape[1]].view(1, x.shape[1], 1, -1)
        turned.append(torch.view_as_real(pairs * turns).flatten(3).type_as(x))
    return turned[0], turned[1]


class Attention(nn.Module):
    def __init__(self, dim: int, n_heads: int, n_kv_heads: int) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, dim // n_heads
        self.wq = nn.Linear(dim, n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(n_heads * self.head_dim, dim, bias=False)

    def forward(self, x: Tensor, freqs_cis: Tensor, attention_masks: Tensor | None = None) -> Tensor:
        bs, seqlen, _ = x.shape
        q, k, v = (linear(x).view(bs, seqlen, -1, self.head_dim) for linear in (self.wq, self.wk, self.wv))
        q, k = apply_rotary_emb(q, k, freqs_cis=freqs_cis)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        o = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.wo(o.transpose(1, 2).contiguous().view(bs, seqlen, -1))


class FeedForward(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(dim, 2 * dim, bias=False), nn.Linear(2 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(silu(self.w1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, n_heads: int, n_kv_heads: int) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(dim, n_heads, n_kv_heads), FeedForward(dim)
        self.attention_norm, self.ffn_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)

    def forward(self, x: Tensor, freqs_cis: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), freqs_cis)
        return x + self.feed_forward(self.ffn_norm(x))


class Decoder(nn.Module):
    def __init__(self, dim: int = 32, n_heads: int = 4, n_kv_heads: int = 2, n_layers: int = 2) -> None:
        super().__init__()
        d = dim // n_heads
        self.layers = nn.ModuleDict({str(i): Block(dim, n_heads, n_kv_heads) for i in range(n_layers)})
        angles = torch.arange(64.0)[:, None] * 10000.0 ** (-torch.arange(0, d, 2) / d)
        self.register_buffer("freqs_cis", torch.polar(torch.ones_like(angles), angles), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x, self.freqs_cis)
        return x
