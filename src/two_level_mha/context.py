"""The integers that every rank makes of a layer and of one call of it, as the operators take them.

The pass decides everything from them, once and alike in both halves: csrc/pass/context.h says what each one is.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from two_level_mha import _C
from two_level_mha.mesh import Place
from two_level_mha.names import Activations, MaybeTensor

ACTIVATIONS: tuple[Activations, ...] = ("replicated", "sequence", "batch")  # by number
SCHEME_NUMBERS: dict[str, int] = _C.scheme_numbers()


def layer_numbers(
    place: Place,
    rates: Sequence[int],
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    embed_dim: int,
    key_dim: int,
    value_dim: int,
    out_dim: int = 0,
    bias: bool,
    out_bias: bool,
    bias_kv: bool,
    whole_heads: bool,
    concat: bool,
    gated: bool = False,
    reduce_dtype: torch.dtype | None,
    activations: str = "replicated",
    overlap: int | None = 1,
) -> list[int]:
    """The constants of a layer on this rank, in the order of the operators; rates: those of the profile. A width of 0:
    embed_dim.
    """
    grid = place.grid
    return [
        grid.head_groups, grid.slices, place.head_group, place.slice, num_heads, num_kv_heads, head_dim, embed_dim,
        key_dim, value_dim, out_dim, int(bias), int(out_bias), int(bias_kv), int(whole_heads), int(concat), int(gated),
        -1 if reduce_dtype is None else _C.scalar_type(reduce_dtype), ACTIVATIONS.index(activations),
        0 if overlap is None else overlap, *rates,
    ]  # fmt: skip


def constants(
    layer: list[int],
    groups: tuple[str, str, str],
    *,
    shares: tuple[int, ...] = (),
    scheme: str,
    causal: bool,
    element_size: int,
    zero_key: bool = False,
    batch_first: bool = True,
    in_halves: bool = False,
    name: str = "",
) -> str:
    """The constants of a call as the operators take them: the layer's numbers, how it runs, groups, name, shares."""
    how = (SCHEME_NUMBERS[scheme], int(causal), element_size, int(zero_key), int(batch_first), int(in_halves))
    dealt = (name, " ".join(map(str, shares))) if shares else (name,) if name else ()
    return "\n".join((" ".join(map(str, (*layer, *how))), *groups, *dealt))


def size_numbers(*, batch: int, length: int, keys: int, position: int = 0, first_key: int = 0) -> list[int]:
    """The sizes of one call, in the order of the operators; they may be symbolic."""
    return [batch, length, keys, position, first_key]


def element_size(x: Tensor) -> int:
    """Bytes of an element of what the projections of `x` compute in."""
    return _computed_in(x).itemsize


def cast(tensors: list[MaybeTensor]) -> list[MaybeTensor]:
    """As autocast casts what a linear is given, the first of them; what is one tensor stays one."""
    given = tensors[0]
    assert given is not None
    dtype = _computed_in(given)
    if dtype is given.dtype:
        return tensors
    found: list[MaybeTensor] = []
    for i, x in enumerate(tensors):
        same = next((found[j] for j in range(i) if tensors[j] is x), None)
        found.append(same if x is None or same is not None else x.to(dtype))
    return found


def _computed_in(x: Tensor) -> torch.dtype:
    device = x.device.type
    if x.dtype is torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)
