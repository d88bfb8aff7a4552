"""nn.MultiheadAttention's arguments: their checks, with the sentences stock has for them, and its masks as one mask."""

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from two_level_mha.errors import (
    MASK_DTYPE_NAMES,
    MASK_DTYPES,
    UsageAssertionError,
    UsageRuntimeError,
    no_tensor,
    wrong_device,
    wrong_dtype,
)

if TYPE_CHECKING:
    from two_level_mha.multihead import TwoLevelMultiheadAttention


def check_inputs(
    mha: "TwoLevelMultiheadAttention", query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None,
    attn_mask: Tensor | None, is_causal: bool,
) -> None:  # fmt: skip
    """Raises for everything nn.MultiheadAttention refuses, and for what would go wrong later. Sends nothing."""
    distinct = {"query": query}
    if key is not query:
        distinct["key"] = key
    if value is not query and value is not key:
        distinct["value"] = value
    masks = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask}
    for name, x in (distinct | {name: mask for name, mask in masks.items() if mask is not None}).items():
        if problem := no_tensor(name, x):
            raise UsageRuntimeError(problem)
    for name, x in distinct.items():
        if isinstance(x, DTensor):
            raise UsageRuntimeError(f"{name} is a DTensor: give every rank the whole tensor, {name}.full_tensor()")
        if x.is_nested:
            raise UsageRuntimeError(
                f"{name} is a nested tensor, which is not supported: pad it (torch.nested.to_padded_tensor) and pass "
                "key_padding_mask"
            )
    if query.dim() not in (2, 3):
        raise UsageAssertionError(
            f"query should be unbatched 2D or batched 3D tensor but received {query.dim()}-D query tensor"
        )
    kind = "batched (3-D)" if query.dim() == 3 else "unbatched (2-D)"
    if key.dim() != query.dim() or value.dim() != query.dim():
        raise UsageAssertionError(
            f"For {kind} `query`, expected `key` and `value` to be {query.dim()}-D"
            f" but found {key.dim()}-D and {value.dim()}-D tensors respectively"
        )
    if key_padding_mask is not None and key_padding_mask.dim() != query.dim() - 1:
        raise UsageAssertionError(
            f"For {kind} `query`, expected `key_padding_mask` to be `None` or {query.dim() - 1}-D"
            f" but found {key_padding_mask.dim()}-D tensor instead"
        )
    if attn_mask is not None and attn_mask.dim() not in (2, 3):
        raise UsageAssertionError(
            f"For {kind} `query`, expected `attn_mask` to be `None`, 2-D or 3-D"
            f" but found {attn_mask.dim()}-D tensor instead"
        )
    _check_dtypes(mha, distinct, masks)
    if is_causal and attn_mask is None:
        raise UsageRuntimeError(
            "Need attn_mask if specifying the is_causal hint. You may use the Transformer module method "
            "`generate_square_subsequent_mask` to create this mask."
        )
    _check_shapes(mha, query, key, value, key_padding_mask, attn_mask)


def _check_dtypes(
    mha: "TwoLevelMultiheadAttention", inputs: dict[str, Tensor], masks: dict[str, Tensor | None]
) -> None:
    weight, given = mha.q_weight, {name: mask for name, mask in masks.items() if mask is not None}
    for name, mask in given.items():
        if mask.dtype not in MASK_DTYPES:
            raise UsageAssertionError(
                f"only bool and floating types of {name} are supported, {MASK_DTYPE_NAMES}, got {mask.dtype}; "
                f"use {name}.bool() (True = ignore) or an additive floating mask"
            )
    for name, x in (inputs | given).items():
        if problem := wrong_device(name, x, weight):
            raise UsageRuntimeError(problem)
    for name, x in inputs.items():
        if problem := wrong_dtype(name, x, weight):
            raise UsageRuntimeError(problem)


def _check_shapes(
    mha: "TwoLevelMultiheadAttention", query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
) -> None:  # fmt: skip
    if query.shape[-1] != mha.embed_dim:
        raise UsageAssertionError(f"was expecting embedding dimension of {mha.embed_dim}, but got {query.shape[-1]}")
    packed = mha.kdim == mha.embed_dim == mha.vdim
    if packed:
        if key.shape != value.shape:
            raise UsageAssertionError(f"key shape {key.shape} does not match value shape {value.shape}")
    elif key.shape[:-1] != value.shape[:-1]:
        raise UsageAssertionError(
            f"key's sequence and batch dims {key.shape[:2]} do not match value's {value.shape[:2]}"
        )
    for name, x, width in (("key", key, mha.kdim), ("value", value, mha.vdim)):
        if x.shape[-1] != width and packed:
            raise UsageRuntimeError(f"{name} must have width {width}, got {x.shape[-1]} (shape {tuple(x.shape)})")
        if x.shape[-1] != width:
            raise UsageAssertionError(
                f"expecting {name} weights shape of {(mha.embed_dim, x.shape[-1])}, but got"
                f" {torch.Size((mha.embed_dim, width))}: {name} must have width {width}, got {x.shape[-1]}"
            )
    batched = query.dim() == 3
    batch_dim, length_dim = (0, 1) if mha.batch_first else (1, 0)
    B = query.shape[batch_dim] if batched else 1
    L, S = (x.shape[length_dim] if batched else x.shape[0] for x in (query, key))
    if batched and key.shape[batch_dim] != B:
        raise UsageRuntimeError(
            f"query and key must have one batch size, got {B} and {key.shape[batch_dim]} (dim {batch_dim}, "
            f"batch_first={mha.batch_first})"
        )
    if attn_mask is not None and attn_mask.dim() == 2 and attn_mask.shape != (L, S):
        raise UsageRuntimeError(f"The shape of the 2D attn_mask is {attn_mask.shape}, but should be {(L, S)}.")
    if attn_mask is not None and attn_mask.dim() == 3 and attn_mask.shape != (B * mha.num_heads, L, S):
        if not batched:
            raise UsageAssertionError(
                f"Expected `attn_mask` shape to be {(mha.num_heads, L, S)} but got {attn_mask.shape}"
            )
        raise UsageRuntimeError(
            f"The shape of the 3D attn_mask is {attn_mask.shape}, but should be {(B * mha.num_heads, L, S)}."
        )
    if key_padding_mask is not None and key_padding_mask.shape != ((B, S) if batched else (S,)):
        got = key_padding_mask.shape if batched else (1, *key_padding_mask.shape)
        dim, size = (0, B) if got[0] != B else (1, S)
        raise UsageAssertionError(
            f"Expected key_padded_mask.shape[{dim}] to be {size}, but got {got[dim]}: key_padding_mask must have shape "
            f"{(B, S) if batched else (S,)}, got {tuple(key_padding_mask.shape)}"
        )


def one_mask(
    num_heads: int, key_padding_mask_BS: Tensor | None, attn_mask: Tensor | None, extra_keys: int
) -> Tensor | None:
    """Stock's two masks as one, broadcastable to (B, h, L, S + extra_keys): bool with True = attend, or additive.

    key_padding_mask (B, S), attn_mask (L, S) or (B * h, L, S); bool with True = ignore, or additive. The extra keys
    (bias_kv, zero_attn) are always visible.
    """
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask.unflatten(0, (-1, num_heads)) if attn_mask.dim() == 3 else attn_mask[None, None])
    if key_padding_mask_BS is not None:
        masks.append(key_padding_mask_BS[:, None, None, :])
    if not masks:
        return None
    if len(masks) == 2 and masks[0].dtype != masks[1].dtype and not torch.compiler.is_compiling():
        warnings.warn(
            "Support for mismatched key_padding_mask and attn_mask is deprecated. Use same type for both instead.",
            stacklevel=3,
        )
    if all(mask.dtype == torch.bool for mask in masks):
        hidden = masks[0] if len(masks) == 1 else masks[0] | masks[1]
        return torch.nn.functional.pad(hidden, (0, extra_keys)).logical_not()
    additive = [
        torch.zeros_like(mask, dtype=_floating(masks)).masked_fill(mask, float("-inf"))
        if mask.dtype == torch.bool
        else mask
        for mask in masks
    ]
    return torch.nn.functional.pad(sum(additive[1:], additive[0]), (0, extra_keys))


def _floating(masks: list[Tensor]) -> torch.dtype:
    return next(mask.dtype for mask in masks if mask.is_floating_point())
