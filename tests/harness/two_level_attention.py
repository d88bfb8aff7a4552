"""One call of TwoLevelAttention and of the reference on whole tensors: everything that comes back, by name."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

import two_level_mha as tlm
from two_level_mha import reference
from two_level_mha.blocks import full_tensor
from two_level_mha.stock import from_stock

from .calls import mesh

HALF, PAIRS = tlm.Rotary(theta=100.0), tlm.Rotary(theta=100.0, dim=4, interleaved=True)


@dataclass(frozen=True)
class Decoder:
    """Sizes, constructor options, and the mask by name."""

    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 8
    embed_dim: int = 12
    options: dict = field(default_factory=dict)
    batch: int = 2
    length: int = 7
    mask: str | None = None  # bias, documents, left padding, empty rows
    is_causal: bool = True
    given: int | None = None  # width of the caller's own cos and sin, different for every sequence
    training: bool = True

    def layer(self, grid: tuple[int, int] | None, **options) -> tlm.TwoLevelAttention:
        layer = tlm.TwoLevelAttention(
            self.embed_dim, self.heads, self.kv_heads, self.head_dim, dtype=torch.float64, mesh=mesh(grid),
            **self.options, **options,
        )  # fmt: skip
        return layer.train(self.training)


def make_mask(case: Decoder) -> Tensor | None:
    B, L = case.batch, case.length
    rows = torch.arange(L)
    match case.mask:
        case None:
            return None
        case "bias":
            return torch.randn(1, case.heads, L, L, dtype=torch.float64)
        case "documents":  # packed: a token sees its own document only
            document_BL = (torch.rand(B, L) < 0.4).cumsum(1)
            return (document_BL[:, :, None] == document_BL[:, None, :])[:, None]
        case "left padding":  # sequence b begins with b unused tokens
            return (rows >= torch.arange(B)[:, None])[:, None, None, :]
        case "empty rows":
            seen_LL = torch.rand(L, L) < 0.6
            seen_LL[L // 2] = False
            return seen_LL
    raise ValueError(case.mask)


def make(case: Decoder, names: dict, seed: int = 0) -> tuple[dict, Tensor, Tensor | None, tuple | None, Tensor]:
    """Stock's state dict, x, the mask, the caller's cos and sin, and the loss's weight: the same on every rank."""
    torch.manual_seed(seed)
    state = {
        stock.key: torch.randn(stock.shape, dtype=torch.float64) / stock.shape[-1] ** 0.5 for stock in names.values()
    }
    shape = (case.batch, case.length, case.embed_dim)
    x_BLD, weight_BLD = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    given = None
    if case.given is not None:
        given = torch.randn(2, case.batch, case.length, case.given, dtype=torch.float64).unbind(0)
    return state, x_BLD, make_mask(case), given, weight_BLD


def finish(y: Tensor, weight: Tensor, leaf: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output, and the gradient of every leaf."""
    grads = torch.autograd.grad((y * weight).sum(), list(leaf.values()))
    return {"y": y.detach(), **{f"d {name}": full_tensor(grad) for name, grad in zip(leaf, grads, strict=True)}}


def inputs_as_leaves(x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    leaf = {"x": x.clone().requires_grad_()}
    if mask is not None and mask.is_floating_point():
        leaf["attn_mask"] = mask.clone().requires_grad_()
    return leaf


def by_reference(case: Decoder, names: dict, seed: int = 0) -> dict[str, Tensor]:
    state, x, mask, given, weight = make(case, names, seed)
    leaf = {name: p.clone().requires_grad_() for name, p in from_stock(state, names).items()}
    inputs = inputs_as_leaves(x, mask)
    options = dict(case.options)
    rope, dropout, _ = options.pop("rope", None), options.pop("dropout", 0.0), options.pop("bias", None)
    if given is None and rope is not None:
        given = rope.embeddings(0, case.length, case.head_dim)
    keep, dropout = None, dropout if case.training else 0.0
    if dropout:
        torch.manual_seed(seed)
        sizes = [case.batch, case.heads, case.length, case.length]
        keep = torch.ops.two_level_mha.dropout_keep_mask(torch.randint(2**62, (1,)), dropout, sizes)
    y = reference.decoder_attention(
        inputs["x"], **leaf, mask=inputs.get("attn_mask", mask), causal=0 if case.is_causal else None,
        cos_sin=None if given is None else [part[:, None] for part in given],
        interleaved=rope is not None and rope.interleaved, dropout_p=dropout, keep_BHLS=keep,
        **options,
    )  # fmt: skip
    return finish(y, weight, inputs | leaf)


def by_layer(case: Decoder, layer: tlm.TwoLevelAttention, seed: int = 0) -> dict[str, Tensor]:
    state, x, mask, given, weight = make(case, layer.stock_names, seed)
    layer.load_state_dict(state)
    inputs = inputs_as_leaves(x, mask)
    torch.manual_seed(seed)
    x = tlm.shard_activations(inputs["x"], layer.activations, layer.mesh)
    y = layer(x, position_embeddings=given, attn_mask=inputs.get("attn_mask", mask), is_causal=case.is_causal)
    y = tlm.gather_activations(y, layer.activations, layer.mesh)
    return finish(y, weight, inputs | dict(layer.named_parameters()))


def off(case: Decoder, grid: tuple[int, int] | None, seed: int = 0, **options) -> dict[str, float]:
    """What differs from the reference by more than 1e-10, with the difference."""
    layer = case.layer(grid, **options)
    ours, expected = by_layer(case, layer, seed), by_reference(case, layer.stock_names, seed)
    assert ours.keys() == expected.keys()
    found = {name: (ours[name] - expected[name]).abs().max().item() for name in ours}
    return {name: error for name, error in found.items() if not error <= 1e-10}
