"""TwoLevelMultiheadAttention: nn.MultiheadAttention on n x m ranks."""

import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.init import xavier_normal_, xavier_uniform_

from two_level_mha.agreement import check_same_weights
from two_level_mha.blocks import full_tensor
from two_level_mha.errors import GridError, UsageAssertionError, UsageAttributeError
from two_level_mha.layer import Drops, GridAttention
from two_level_mha.masks import check_inputs, one_mask
from two_level_mha.mesh import NoMesh, check_no_mesh, given_mesh
from two_level_mha.names import Activations, Args, Combine, Factory, Kwargs, LayerOptions, Scheme
from two_level_mha.probe import changed_linear
from two_level_mha.profile import Profile
from two_level_mha.stock import StockTensor, from_stock, put, take_stock_keys

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _Elsewhere:
    """Stands where nn.MultiheadAttention has a tensor of projections, and says where that went.

    nn.TransformerEncoder looks for those tensors. One with a __torch_function__ makes it call forward.
    """

    def __init__(self, name: str, blocks: str) -> None:
        self.name, self.blocks = name, blocks

    def __getattr__(self, attribute: str) -> object:
        known = vars(self)  # empty while a copy is made, which asks too
        raise UsageAttributeError(_elsewhere(known.get("name", ""), known.get("blocks", "")))

    @classmethod
    def __torch_function__(
        cls, func: object, types: Sequence[type], args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        one = next(x for x in args if isinstance(x, _Elsewhere))
        raise UsageAttributeError(_elsewhere(one.name, one.blocks))


def _elsewhere(name: str, blocks: str) -> str:
    return (
        f"{name} is split over the grid: this rank has its blocks, {blocks}; two_level_mha.full_state_dict(layer) "
        "gives the whole tensor on rank 0, layer.to_torch() an nn.MultiheadAttention on every rank"
    )


_IN_PROJ_BIAS = _Elsewhere("in_proj_bias", "q_bias, k_bias and v_bias")


class TwoLevelMultiheadAttention(Drops, GridAttention):
    """nn.MultiheadAttention, exactly, on the n * m ranks of a mesh; more ranks than heads are fine.

    Rank (i, j) owns the weight blocks of head group i and slice j of the head dimension. Arguments are those of
    nn.MultiheadAttention, and:

    mesh: DeviceMesh with axes ("head", "slice") (see init_mesh), or None for one process; left out, it is None, which a
        job of several ranks is warned of. head_groups must divide num_heads, else GridError.
    scheme: "auto" or one of the exact "slices", "sequence", "batch", "heads", "weights" (the same numbers, other
        costs), or "independent": the paper's literal per-slice softmax, which is another model (num_heads * m heads of
        width d / m).
    combine: "reduce" (each rank keeps 1 / P of out_weight, partial outputs are summed) or "concat" (hierarchical
        all-gather, out_weight replicated).
    debug: True compares inputs, arguments and modes over the grid at every call, in a collective; False at the first
        call alone; None, unless TLM_DEBUG is 1 or 0, at the first, and at every other what rides in its exchanges.
    reduce_dtype: dtype of the sum over the grid, None (the output's) or torch.float32.
    profile: the rates by which "auto" chooses: a Profile, the name of one, a JSON file, or None, that of the mesh's
        type of device. The same on every rank.
    activations: "replicated": every rank is given the same whole inputs and returns the whole output. "sequence",
        "batch": its part of them, as shard_activations gives it, and its part of the output; masks, and the attention
        weights that are returned, stay whole.
    overlap: chunks to cut the batch into, so that the exchange of one runs while the next is computed, forward and
        backward; 1: none, None: as many as the profile predicts to be fastest. The same on every rank.

    The same seed gives the same initial weights as nn.MultiheadAttention, on every grid.
    """

    _qkv_same_embed_dim = False  # nn.TransformerEncoderLayer's fast path reads the weights of a module that has True
    in_proj_weight = _Elsewhere("in_proj_weight", "q_weight, k_weight and v_weight")
    q_proj_weight = _Elsewhere("q_proj_weight", "q_weight")
    k_proj_weight = _Elsewhere("k_proj_weight", "k_weight")
    v_proj_weight = _Elsewhere("v_proj_weight", "v_weight")

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        mesh: DeviceMesh | None | NoMesh = NoMesh.NOT_GIVEN,
        scheme: Scheme = "auto",
        combine: Combine = "reduce",
        debug: bool | None = None,
        reduce_dtype: torch.dtype | None = None,
        profile: Profile | str | os.PathLike[str] | None = None,
        activations: Activations = "replicated",
        overlap: int | None = None,
    ) -> None:
        check_no_mesh({
            "embed_dim": embed_dim, "num_heads": num_heads, "dropout": dropout, "bias": bias,
            "add_bias_kv": add_bias_kv, "add_zero_attn": add_zero_attn, "kdim": kdim, "vdim": vdim,
            "batch_first": batch_first, "device": device, "dtype": dtype,
        })  # fmt: skip
        mesh = given_mesh(mesh)
        if embed_dim <= 0 or num_heads <= 0:
            raise GridError(
                f"embed_dim and num_heads must be greater than 0,"
                f" got embed_dim={embed_dim} and num_heads={num_heads} instead"
            )
        if embed_dim % num_heads:
            raise UsageAssertionError(
                f"embed_dim must be divisible by num_heads, got embed_dim={embed_dim} and num_heads={num_heads}"
            )
        if not 0.0 <= dropout <= 1.0:
            raise GridError(f"dropout probability has to be between 0 and 1, but got {dropout}")
        super().__init__(
            num_heads=num_heads, num_kv_heads=num_heads, head_dim=embed_dim // num_heads, mesh=mesh, scheme=scheme,
            combine=combine, debug=debug, reduce_dtype=reduce_dtype, profile=profile, activations=activations,
            overlap=overlap,
        )  # fmt: skip
        self.embed_dim = embed_dim
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.dropout = dropout
        self.batch_first = batch_first
        self.add_zero_attn = add_zero_attn
        self.stock_names = stock_names(embed_dim, num_heads, self.kdim, self.vdim)
        stock = _drawn_as_stock(embed_dim, self.kdim, self.vdim, bias, add_bias_kv, device, dtype)
        self.store(from_stock(stock, self.stock_names))
        take_stock_keys(self)

    @property
    def in_proj_bias(self) -> _Elsewhere | None:
        """As stock's attribute of that name: None without a bias."""
        return None if self._parameters["q_bias"] is None else _IN_PROJ_BIAS

    @property
    def out_proj(self) -> SimpleNamespace:
        """weight and bias of the output projection, as this rank stores them."""
        return SimpleNamespace(weight=self.out_weight, bias=self.out_bias)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "out_proj":  # nn.Module would take it, and forward would not use it
            raise GridError("out_proj cannot be replaced: its weight is split, as out_weight; change the layer first")
        super().__setattr__(name, value)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention.forward on its train-mode path, with the same result on every rank.

        query (L, B, D), key (S, B, kdim), value (S, B, vdim), dims 0 and 1 swapped if batch_first, or unbatched without
        B. key_padding_mask (B, S), attn_mask (L, S) or (B * num_heads, L, S): bool with True = ignore, or additive.
        is_causal is a hint that stock defines only together with attn_mask; here the mask rules.
        Returns the output like query, and the attention weights after dropout, (B, L, S), or (B, num_heads, L, S) if
        not average_attn_weights, or None. A row that sees no key is NaN with need_weights, else out_proj's bias.
        Raises ValueError (often also what stock raises) before anything is sent.
        """
        dropout_p = self.dropout if self.training and self._drops else 0.0
        wholes = self.wholes([query, key, value], batch_first=self.batch_first)
        whole_query, whole_key, whole_value = wholes

        def check() -> dict[str, object]:
            check_inputs(self, whole_query, whole_key, whole_value, key_padding_mask, attn_mask, is_causal)
            settings = {"need_weights": need_weights, "average_attn_weights": average_attn_weights}
            settings |= {"add_zero_attn": self.add_zero_attn, "batch_first": self.batch_first}
            return settings | {"is_causal": is_causal, "dropout_p": dropout_p}

        masks = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask}
        self.check_call(check, {"query": query, "key": key, "value": value, **masks})
        batched = query.dim() == 3
        if not batched:
            wholes = [x.unsqueeze(0) for x in wholes]
            same_key, same_value = key is query, value is key
            query = query.unsqueeze(0)
            key = query if same_key else key.unsqueeze(0)
            value = key if same_value else value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        extra_keys = (self._parameters["bias_k"] is not None) + self.add_zero_attn
        y, weights = self.attend(
            query,
            key,
            value,
            wholes=wholes,
            attn_mask=one_mask(self.num_heads, key_padding_mask, attn_mask, extra_keys),
            dropout_p=dropout_p,
            batch_first=self.batch_first or not batched,
            add_zero_attn=self.add_zero_attn,
            need_weights=need_weights,
            average_attn_weights=average_attn_weights,
        )
        if batched:
            return y, weights
        return y.squeeze(0), None if weights is None else weights.squeeze(0)

    @classmethod
    def from_torch(
        cls,
        mha: nn.MultiheadAttention,
        mesh: DeviceMesh | None | NoMesh = NoMesh.NOT_GIVEN,
        *,
        scheme: Scheme = "auto",
        combine: Combine = "reduce",
        debug: bool | None = None,
        reduce_dtype: torch.dtype | None = None,
        profile: Profile | str | os.PathLike[str] | None = None,
        activations: Activations = "replicated",
        overlap: int | None = None,
    ) -> "TwoLevelMultiheadAttention":
        """The same layer on a grid. Raises GridError on every rank if mha's weights differ between ranks.

        Weights are kept bit for bit, requires_grad and training mode too; a collective over the grid.
        """
        known = isinstance(mha, nn.MultiheadAttention)
        if known and (problem := changed_linear(mha) or changed_linear(mha.out_proj)):
            raise GridError(f"mha, or its out_proj, {problem}")
        if type(mha) is not nn.MultiheadAttention:  # a subclass may do something else
            raise GridError(f"mha must be an nn.MultiheadAttention, got {type(mha).__name__}")
        mesh = given_mesh(mesh)
        check_same_weights(mha, mesh, mha.dropout > 0.0)
        return cls.from_checked(
            mha, mesh, scheme=scheme, combine=combine, debug=debug, reduce_dtype=reduce_dtype, profile=profile,
            activations=activations, overlap=overlap,
        )  # fmt: skip

    @classmethod
    def from_checked(
        cls, mha: nn.MultiheadAttention, mesh: DeviceMesh | None, **options: "Unpack[LayerOptions]"
    ) -> "TwoLevelMultiheadAttention":
        """from_torch of a layer whose weights are known to agree; nothing is sent."""
        source = mha.out_proj.weight
        with torch.device("meta"):
            ours = cls(
                mha.embed_dim, mha.num_heads, mha.dropout, mha.in_proj_bias is not None, mha.bias_k is not None,
                mha.add_zero_attn, mha.kdim, mha.vdim, mha.batch_first, dtype=source.dtype, mesh=mesh, **options,
            )  # fmt: skip
        state = {key: p.detach() for key, p in mha.named_parameters()}
        trained = {key: p.requires_grad for key, p in mha.named_parameters()}
        trained = {name: trained[stock.key] for name, stock in ours.stock_names.items() if stock.key in trained}
        ours.store(from_stock(state, ours.stock_names), trained)
        return ours.train(mha.training)

    def to_torch(self) -> nn.MultiheadAttention:
        """An nn.MultiheadAttention with the full weights, bit for bit; a collective over the grid."""
        with torch.device("meta"):
            mha = nn.MultiheadAttention(
                self.embed_dim, self.num_heads, self.dropout, self.q_bias is not None, self.bias_k is not None,
                self.add_zero_attn, self.kdim, self.vdim, self.batch_first, dtype=self.q_weight.dtype,
            )  # fmt: skip
        mha.load_state_dict(self.stock_state(), assign=True)
        for name, stock in self.stock_names.items():
            if (own := self._parameters[name]) is not None:
                mha.get_parameter(stock.key).requires_grad_(own.requires_grad)
        return mha.train(self.training)

    def stock_state(self) -> dict[str, Tensor]:
        """nn.MultiheadAttention's state dict with full tensors; a collective over the grid."""
        state: dict[str, Tensor] = {}
        for name, p in self._parameters.items():
            if p is not None:
                put(state, self.stock_names[name].key, self.stock_names[name], full_tensor(p.detach()))
        return state

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, {super().extra_repr()}"


def stock_names(embed_dim: int, num_heads: int, kdim: int, vdim: int) -> dict[str, StockTensor]:
    """Where nn.MultiheadAttention keeps each of our parameters."""
    E, heads = embed_dim, (num_heads, embed_dim // num_heads)
    names = {}
    for number, (letter, width) in enumerate((("q", E), ("k", kdim), ("v", vdim))):
        if kdim == vdim == E:
            weight = StockTensor("in_proj_weight", (3 * E, E), (*heads, E), start=number * E)
        else:
            weight = StockTensor(f"{letter}_proj_weight", (E, width), (*heads, width))
        names[f"{letter}_weight"] = weight
        names[f"{letter}_bias"] = StockTensor("in_proj_bias", (3 * E,), heads, start=number * E)
    names |= {name: StockTensor(name, (1, 1, E), heads) for name in ("bias_k", "bias_v")}
    names["out_weight"] = StockTensor("out_proj.weight", (E, E), (E, *heads))
    names["out_bias"] = StockTensor("out_proj.bias", (E,), (E,))
    return names


def _drawn_as_stock(
    E: int, kdim: int, vdim: int, bias: bool, bias_kv: bool, device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:  # fmt: skip
    """The tensors nn.MultiheadAttention would draw, in its order."""
    factory: Factory = {"device": device, "dtype": dtype}
    out_proj = nn.Linear(E, E, bias=bias, **factory)
    state: dict[str, Tensor] = {"out_proj.weight": out_proj.weight.detach()}
    with torch.no_grad():
        if kdim == vdim == E:
            state["in_proj_weight"] = xavier_uniform_(torch.empty(3 * E, E, **factory))
        else:
            for name, width in (("q", E), ("k", kdim), ("v", vdim)):
                state[f"{name}_proj_weight"] = xavier_uniform_(torch.empty(E, width, **factory))
        if bias:
            state["in_proj_bias"] = torch.zeros(3 * E, **factory)
            state["out_proj.bias"] = torch.zeros(E, **factory)
        if bias_kv:
            state["bias_k"] = xavier_normal_(torch.empty(1, 1, E, **factory))
            state["bias_v"] = xavier_normal_(torch.empty(1, 1, E, **factory))
    return state
