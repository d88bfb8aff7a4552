"""TwoLevelAttention: the attention of a decoder on n x m ranks: grouped heads, rotary embedding, norms, windows.

Letters: B batch, L query length, S key length, D embed_dim, h and k query and key/value heads, d head_dim, r rotary
dims.
"""

import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from two_level_mha.blocks import local_blocks
from two_level_mha.cache_layer import NO_CACHE, CacheLayer
from two_level_mha.errors import MASK_DTYPE_NAMES, MASK_DTYPES, GridError, no_tensor, wrong_device, wrong_dtype
from two_level_mha.layer import Drops, GridAttention, NormRotary
from two_level_mha.mesh import NoMesh, check_no_mesh, given_mesh
from two_level_mha.names import Activations, Combine, Factory, Scheme
from two_level_mha.profile import Profile
from two_level_mha.stock import StockTensor, from_stock, linear_names, take_stock_keys

BIASES = (False, True, "qkv", "out")
NORM_WEIGHTS = ("q_norm_weight", "k_norm_weight")


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding: pair c of a head's first `dim` dims turns by position * theta ** (-2 c / dim).

    dim: even, None: the whole head_dim; later dims pass through. Pairs are dims c and c + dim / 2 (rotate-half, as in
    Llama), or 2 c and 2 c + 1 if interleaved.
    """

    theta: float = 10000.0
    dim: int | None = None
    interleaved: bool = False

    def width(self, head_dim: int) -> int:
        """How many dims of a head of `head_dim` turn."""
        return head_dim if self.dim is None else self.dim

    def embeddings(
        self, first: int, length: int, head_dim: int, device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor]:
        """cos and sin (1, L, r), float32, of the positions from `first` on."""
        r = self.width(head_dim)
        frequency = 1.0 / self.theta ** (torch.arange(0, r, 2, dtype=torch.float32, device=device) / r)
        position = torch.arange(first, first + length, dtype=torch.float32, device=device)
        angle = position[None, :, None] * frequency
        angle = torch.repeat_interleave(angle, 2, -1) if self.interleaved else torch.cat([angle, angle], -1)
        return angle.cos(), angle.sin()


class TwoLevelAttention(Drops, GridAttention):
    """Self-attention of a decoder, exactly, on the n * m ranks of a mesh; more ranks than key/value heads are fine.

        q, k, v = x W_Q, x W_K, x W_V        q, k = rotary(norm(q)), rotary(norm(k))        y = attention(q, k, v) W_O

    embed_dim D; num_heads h; num_kv_heads k, None: h (query head x reads key/value head x // (h / k)); head_dim d,
    None: D / h.
    bias: of the projections: False, True (all four), "qkv" or "out".
    qk_norm: eps of an RMS norm of every head of q and of k, with one weight (d,) each; None: no norm.
    rope: Rotary, None: none but what position_embeddings bring.
    window: a row sees itself and the window - 1 tokens before it; needs is_causal.
    softcap: scores s become softcap * tanh(s / softcap), before the mask. scale: of the scores, None: 1 / sqrt(d).
    dropout: probability with which an attention weight is dropped in training, the same ones on every grid.
    mesh: DeviceMesh with axes ("head", "slice") (see init_mesh), or None for one process; left out, it is None, which a
        job of several ranks is warned of. head_groups must divide k.
    scheme, combine, debug, reduce_dtype, profile, activations, overlap: as for TwoLevelMultiheadAttention. scheme
        "independent" takes neither norm nor rotary, which need d whole.

    Weights are drawn as nn.Linear draws q_proj, k_proj, v_proj and o_proj in turn: the same seed gives the same ones on
    every grid. load_state_dict takes those names too (q_proj.weight, .., q_norm.weight, k_norm.weight), with full
    tensors, and full_state_dict gives them. Raises GridError, on every rank alike.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        bias: bool | str = False,
        qk_norm: float | None = None,
        rope: Rotary | None = None,
        window: int | None = None,
        softcap: float | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
        mesh: DeviceMesh | None | NoMesh = NoMesh.NOT_GIVEN,
        scheme: Scheme = "auto",
        combine: Combine = "reduce",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        debug: bool | None = None,
        reduce_dtype: torch.dtype | None = None,
        profile: Profile | str | os.PathLike[str] | None = None,
        activations: Activations = "replicated",
        overlap: int | None = None,
    ) -> None:
        check_no_mesh({
            "embed_dim": embed_dim, "num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim,
        })  # fmt: skip
        mesh = given_mesh(mesh)
        k = num_heads if num_kv_heads is None else num_kv_heads
        d = _head_dim(embed_dim, num_heads, k, head_dim)
        _check_options(bias, qk_norm, rope, window, softcap, dropout, scheme, d)
        super().__init__(
            num_heads=num_heads, num_kv_heads=k, head_dim=d, mesh=mesh, scheme=scheme, combine=combine, debug=debug,
            reduce_dtype=reduce_dtype, profile=profile, activations=activations, overlap=overlap,
        )  # fmt: skip
        self.embed_dim, self.rope, self.window, self.scale, self.dropout = embed_dim, rope, window, scale, dropout
        self.softcap, self.qk_norm = softcap, qk_norm
        factory: Factory = {"device": device, "dtype": dtype}
        state: dict[str, Tensor] = {}
        self.stock_names: dict[str, StockTensor] = {}
        for name, heads in (("q", num_heads), ("k", k), ("v", k), ("out", num_heads)):
            sizes = (heads * d, embed_dim) if name == "out" else (embed_dim, heads * d)
            linear = nn.Linear(*sizes, bias=bias in (True, "out" if name == "out" else "qkv"), **factory)
            path = f"{name[0]}_proj"
            self.stock_names |= linear_names(name, path, linear, d)
            state |= {f"{path}.{part}": p.detach() for part, p in linear.named_parameters()}
        if qk_norm is not None:
            for name in NORM_WEIGHTS:
                self.stock_names[name] = StockTensor(name.replace("_weight", ".weight"), (d,), (d,))
                state[self.stock_names[name].key] = torch.ones(d, **factory)
        self.store(from_stock(state, self.stock_names))
        take_stock_keys(self)

    def forward(
        self,
        x_BLD: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = True,
        cache: CacheLayer | None = None,
    ) -> Tensor:
        """x (B, L, D), the same on every rank -> y (B, L, D), the same on every rank.

        position_embeddings: cos and sin, (B or 1, L, r), in place of those of `rope` (whose `interleaved` counts);
            None: positions are 0 .. L - 1, after those in the cache.
        attn_mask: as in F.scaled_dot_product_attention, bool with True = attend, or additive, broadcastable to
            (B, h, L, S); S counts the kept tokens of the cache too. It applies together with is_causal.
        is_causal: a row sees itself and what came before it:   1 0 0     2 tokens in the cache:   1 1 1 0 0
                                                                1 1 0                              1 1 1 1 0
                                                                1 1 1                              1 1 1 1 1
        cache: one of the layers of a KVCache; it is read, and takes the new keys and values.
        A row that sees no key gives the bias of the output projection.
        Raises GridError, on every rank alike, before anything is sent.
        """
        cos_sin = dict(zip(("cos", "sin"), position_embeddings or (), strict=False))
        norms: list[Tensor] = []
        for name in NORM_WEIGHTS if self.qk_norm is not None else ():
            weight = self._parameters[name]
            assert weight is not None
            norms.append(weight)
        dropout_p = self.dropout if self.training and self._drops else 0.0

        whole_BLD = self.wholes([x_BLD])[0]

        def check() -> dict[str, object]:
            self._check(whole_BLD, position_embeddings, attn_mask, is_causal, cache, dropout_p)
            tokens = None if cache is None else cache.length
            return {"is_causal": is_causal, "dropout_p": dropout_p, "tokens in the cache": tokens}

        self.check_call(check, {"x": x_BLD, "attn_mask": attn_mask, **cos_sin})
        batch, length, _ = whole_BLD.shape
        call = NO_CACHE if cache is None else cache.begin(batch, length)
        if position_embeddings is None and self.rope is not None:
            position_embeddings = self.rope.embeddings(call.position, length, self.head_dim, x_BLD.device)

        interleaved = self.rope is not None and self.rope.interleaved
        return self.attend(
            x_BLD, x_BLD, x_BLD, wholes=[whole_BLD, whole_BLD], attn_mask=attn_mask,
            scale=self.scale, causal=call.position if is_causal else None,
            window=self.window, softcap=self.softcap, dropout_p=dropout_p,
            rows=None if position_embeddings is None else [x.unsqueeze(1) for x in position_embeddings],
            shared=local_blocks(norms) or None, between=NormRotary(self.qk_norm, interleaved),
            cache=cache, call=call,
        )[0]  # fmt: skip

    def _check(
        self, x: Tensor, position_embeddings: tuple[Tensor, Tensor] | None, attn_mask: Tensor | None, is_causal: bool,
        cache: CacheLayer | None, dropout_p: float,
    ) -> None:  # fmt: skip
        _check_tensor("x", x, self.q_weight)
        if x.dim() != 3 or x.shape[2] != self.embed_dim:
            raise GridError(f"x must have shape (B, L, {self.embed_dim}), got {tuple(x.shape)}")
        if self.window is not None and not is_causal:
            raise GridError(f"a window ({self.window}) needs is_causal=True: it is counted back from each row")
        B, L = x.shape[:2]
        if position_embeddings is not None:
            self._check_embeddings(position_embeddings, B, L)
        if cache is not None:
            self._check_cache(cache)
            check_dropout(cache, dropout_p)
        if attn_mask is not None:
            seen = L if cache is None else cache.length - cache.first_key + L
            _check_mask(attn_mask, (B, self.num_heads, L, seen), x)

    def _check_cache(self, cache: CacheLayer) -> None:
        if not isinstance(cache, CacheLayer):
            raise GridError(f"cache must be one of the layers of a KVCache, got {type(cache).__name__}")
        if self.scheme == "independent":
            raise GridError("scheme 'independent' takes no cache, which holds whole heads; use an exact scheme")
        if cache.place.grid != self.place.grid:
            raise GridError(
                f"the cache is of {cache.place.grid}, but the module of {self.place.grid}: give both one mesh"
            )
        if cache.window is not None and (self.window is None or self.window > cache.window):
            raise GridError(
                f"the cache keeps a window of {cache.window} tokens, but the module's window is {self.window}: make "
                "the cache with the module's"
            )

    def _check_embeddings(self, position_embeddings: tuple[Tensor, Tensor], B: int, L: int) -> None:
        if self.scheme == "independent":
            raise GridError("scheme 'independent' takes no position_embeddings: they need the whole head_dim")
        shapes = [tuple(x.shape) for x in position_embeddings]
        fits = len(shapes) == 2 and shapes[0] == shapes[1] and len(shapes[0]) == 3
        if not fits or shapes[0][0] not in (1, B) or shapes[0][1] != L or not _rotary_fits(shapes[0][2], self.head_dim):
            raise GridError(
                f"position_embeddings must be (cos, sin) of shape (1 or {B}, {L}, r), r even and at most "
                f"head_dim {self.head_dim}, got shapes {shapes}"
            )
        for name, x in zip(("cos", "sin"), position_embeddings, strict=True):
            if not x.is_floating_point() or x.device != self.q_weight.device:
                raise GridError(
                    f"{name} must be floating and on the module's device {self.q_weight.device}, got {x.dtype} on "
                    f"{x.device}"
                )

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, {super().extra_repr()}"


def _head_dim(embed_dim: int, num_heads: int, num_kv_heads: int, head_dim: int | None) -> int:
    sizes = {"embed_dim": embed_dim, "num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim or 1}
    for name, size in sizes.items():
        if size <= 0:
            raise GridError(f"{name} must be greater than 0, got {size}")
    if num_heads % num_kv_heads:
        raise GridError(f"num_kv_heads must divide num_heads, got num_kv_heads={num_kv_heads}, num_heads={num_heads}")
    if head_dim is None and embed_dim % num_heads:
        raise GridError(
            f"num_heads must divide embed_dim, or head_dim be given, got embed_dim={embed_dim}, num_heads={num_heads}"
        )
    return embed_dim // num_heads if head_dim is None else head_dim


def _check_options(
    bias: bool | str, qk_norm: float | None, rope: Rotary | None, window: int | None, softcap: float | None,
    dropout: float, scheme: str, head_dim: int,
) -> None:  # fmt: skip
    if bias not in BIASES:
        raise GridError(f"bias must be one of {BIASES}, got {bias!r}")
    if qk_norm is not None and (isinstance(qk_norm, bool) or qk_norm < 0.0):
        raise GridError(f"qk_norm must be the eps of a norm, such as 1e-6, or None, got {qk_norm!r}")
    if rope is not None and not isinstance(rope, Rotary):
        raise GridError(f"rope must be a Rotary or None, got {type(rope).__name__}")
    if rope is not None and not _rotary_fits(rope.width(head_dim), head_dim):
        raise GridError(f"rope.dim must be even and at most head_dim {head_dim}, got {rope.width(head_dim)}")
    if scheme == "independent" and (rope is not None or qk_norm is not None):
        raise GridError(
            "scheme 'independent' takes neither rope nor qk_norm: they need the whole head_dim; use an exact scheme"
        )
    if window is not None and window < 1:
        raise GridError(f"window must be at least 1 (the row itself), or None, got {window}")
    if softcap is not None and softcap <= 0.0:
        raise GridError(f"softcap must be greater than 0, or None, got {softcap}")
    if not 0.0 <= dropout <= 1.0:
        raise GridError(f"dropout must be between 0 and 1, got {dropout}")


def check_dropout(cache: CacheLayer, dropout_p: float) -> None:
    """Raises GridError for dropout with a cache by position: it is drawn by the index of a key among all."""
    if dropout_p > 0.0 and cache.layout == "position" and cache.place.grid.slices > 1:
        raise GridError(
            f"dropout of attention weights ({dropout_p}) needs all keys of a query on one rank, which a cache by "
            'position has not: call without a cache (use_cache=False), or with one of layout "batch"'
        )


def _rotary_fits(r: int, head_dim: int) -> bool:
    return r % 2 == 0 and 0 < r <= head_dim


def _check_tensor(name: str, x: Tensor, weight: Tensor) -> None:
    if problem := no_tensor(name, x):
        raise GridError(problem)
    if x.is_nested:
        raise GridError(f"{name} is a nested tensor, which is not supported: pad it, and pass attn_mask")
    if isinstance(x, DTensor):
        raise GridError(f"{name} is a DTensor: give every rank the whole tensor, {name}.full_tensor()")
    if problem := wrong_device(name, x, weight) or wrong_dtype(name, x, weight):
        raise GridError(problem)


def _check_mask(mask: Tensor, full: tuple[int, int, int, int], x: Tensor) -> None:
    if problem := no_tensor("attn_mask", mask):
        raise GridError(problem)
    if mask.dtype not in MASK_DTYPES:
        raise GridError(f"attn_mask must be {MASK_DTYPE_NAMES}, got {mask.dtype}: convert it, bool is True = attend")
    if mask.device != x.device:
        raise GridError(f"attn_mask is on {mask.device}, but x is on {x.device}: move one of them")
    shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if len(shape) != 4 or any(size not in (1, whole) for size, whole in zip(shape, full, strict=True)):
        raise GridError(f"attn_mask must be broadcastable to (B, h, L, S) = {full}, got {tuple(mask.shape)}")
