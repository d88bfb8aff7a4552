"""The experiment's model: a pre-norm dense transformer of two-matrix MLPs, whole or a part of its layers.

x + attention(norm(x)), then x + mlp(norm(x)), `layers` times, and a norm. The MLP is two matrices with GELU between,
and nothing has a bias but the norms. Weights may be those of a rank's heads and columns alone.

Letters: B batch, L length, D embed_dim, d head_dim, H and K query and KV heads of this rank, T tokens in a cache.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from two_level_mha.names import Factory
from two_level_mha.operators import ops


@dataclass(frozen=True)
class Sizes:
    layers: int = 2
    heads: int = 16
    kv_heads: int = 16
    head_dim: int = 512
    mlp_hidden: int = 32768
    batch: int = 1024
    length: int = 10000

    @property
    def embed_dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def tokens(self) -> int:
        return self.batch * self.length


SEED = Sizes()
SMALL = Sizes(heads=4, kv_heads=4, head_dim=64, mlp_hidden=1024, batch=8, length=128)  # as many heads as ranks, too


class Attention(nn.Module):
    """Of the heads whose projections it has. stock: by torch's scaled_dot_product_attention, else by our kernels."""

    def __init__(self, sizes: Sizes, causal: bool, stock: bool, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.head_dim, self.causal, self.stock = sizes.head_dim, causal, stock
        D, d = sizes.embed_dim, sizes.head_dim
        factory: Factory = {"dtype": dtype, "device": device}
        self.q_proj = nn.Linear(D, sizes.heads * d, bias=False, **factory)
        self.k_proj = nn.Linear(D, sizes.kv_heads * d, bias=False, **factory)
        self.v_proj = nn.Linear(D, sizes.kv_heads * d, bias=False, **factory)
        self.o_proj = nn.Linear(sizes.heads * d, D, bias=False, **factory)

    def forward(self, x_BLD: Tensor, cache: "HeadsCache | None" = None) -> Tensor:
        heads = (linear(x_BLD).unflatten(-1, (-1, self.head_dim)) for linear in (self.q_proj, self.k_proj, self.v_proj))
        q_BHLd, k_BKLd, v_BKLd = (x.transpose(1, 2) for x in heads)
        causal = self.causal
        if cache is not None:  # new tokens see all that is kept
            k_BKLd, v_BKLd, causal = *cache.append(k_BKLd, v_BKLd), causal and x_BLD.shape[1] > 1
        if self.stock:
            y_BHLd = nn.functional.scaled_dot_product_attention(
                q_BHLd, k_BKLd, v_BKLd, is_causal=causal, enable_gqa=True
            )
        else:
            first_row = k_BKLd.shape[2] - q_BHLd.shape[2] if causal else None
            y_BHLd = ops.partial_attention(q_BHLd, k_BKLd, v_BKLd, causal=first_row)[0]
        y_BLD: Tensor = self.o_proj(y_BHLd.transpose(1, 2).flatten(2))
        return y_BLD


class HeadsCache:
    """Keys and values of one layer for the heads of this rank, in memory that is there once: (B, K, T, d)."""

    def __init__(self, k_BKTd: Tensor, v_BKTd: Tensor, length: int) -> None:
        self.memory, self.length = (k_BKTd, v_BKTd), length

    def append(self, *new: Tensor) -> list[Tensor]:
        """Takes keys and values of new tokens; gives those of all."""
        end = self.length + new[0].shape[2]
        for memory, x in zip(self.memory, new, strict=True):
            memory[:, :, self.length : end] = x
        self.length = end
        return [memory[:, :, :end] for memory in self.memory]


class Perceptron(nn.Module):
    def __init__(self, sizes: Sizes, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(sizes.embed_dim, sizes.mlp_hidden, bias=False, dtype=dtype, device=device)
        self.fc2 = nn.Linear(sizes.mlp_hidden, sizes.embed_dim, bias=False, dtype=dtype, device=device)

    def forward(self, x_BLD: Tensor) -> Tensor:
        y_BLD: Tensor = self.fc2(nn.functional.gelu(self.fc1(x_BLD)))
        return y_BLD


class Block(nn.Module):
    def __init__(self, sizes: Sizes, attention: Callable[[], nn.Module], dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(sizes.embed_dim, dtype=dtype, device=device) for _ in range(2))
        self.attention, self.mlp = attention(), Perceptron(sizes, dtype, device)

    def forward(self, x_BLD: Tensor, **cache: Any) -> Tensor:
        x_BLD = x_BLD + self.attention(self.norm1(x_BLD), **cache)
        y_BLD: Tensor = x_BLD + self.mlp(self.norm2(x_BLD))
        return y_BLD


class Transformer(nn.Module):
    """The layers `only` of the model, by their numbers in it, and the norm behind the last if they have it."""

    def __init__(
        self,
        sizes: Sizes,
        *,
        causal: bool,
        stock: bool = False,
        only: range | None = None,
        attention: Callable[[], nn.Module] | None = None,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        super().__init__()
        only = range(sizes.layers) if only is None else only
        attention = attention or partial(Attention, sizes, causal, stock, dtype, device)
        self.layers = nn.ModuleDict({str(i): Block(sizes, attention, dtype, device) for i in only})
        self.norm: nn.Module = nn.Identity()
        if only.stop == sizes.layers:
            self.norm = nn.LayerNorm(sizes.embed_dim, dtype=dtype, device=device)

    @property
    def blocks(self) -> list[Block]:
        return [block for block in self.layers.values() if isinstance(block, Block)]  # as all are

    def forward(self, x_BLD: Tensor, caches: list[Any] | None = None) -> Tensor:
        for i, layer in enumerate(self.layers.values()):
            x_BLD = layer(x_BLD) if caches is None else layer(x_BLD, cache=caches[i])
        y_BLD: Tensor = self.norm(x_BLD)
        return y_BLD
