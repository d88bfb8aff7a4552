"""csrc/python.cpp and csrc/attend/kernels_python.h as a type checker sees them; tests/tools/test_types.py compares this
file with the library that was built.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

most_chunks: int
most_shares: int

def build_info() -> dict[str, str]: ...
def progress() -> tuple[str, str, bool, bool]: ...
def set_failure_handler(handler: Callable[[str, str], BaseException | None], /) -> None: ...
def set_seal_handlers(
    differ: Callable[[str], BaseException],
    expect: Callable[[str, str, torch.device], Tensor | None],
    sent: Callable[[str, torch.device], None],
    /,
) -> None: ...
def grid_problem(n: int, m: int, heads: int, kv_heads: int, head_dim: int, /) -> str: ...
def split_sizes(size: int, n: int, m: int, rows: bool, /) -> list[int]: ...
def has_grid(ranks: int, heads: int, kv_heads: int, head_dim: int, /) -> bool: ...
def ranked_grids(
    ranks: int, heads: int, kv_heads: int, head_dim: int, profile: Sequence[int], /
) -> list[tuple[int, int]]: ...
def grid_choices(ranks: int, heads: int, kv_heads: int, head_dim: int, /) -> str: ...
def schemes() -> list[tuple[str, bool, str]]: ...
def constant_fields() -> list[str]: ...
def size_fields() -> list[str]: ...
def cache_fields() -> list[str]: ...
def scheme_numbers() -> dict[str, int]: ...
def scalar_type(dtype: torch.dtype, /) -> int: ...
def whole_heads_fit(heads: int, kv_heads: int, m: int, /) -> bool: ...
def stores_whole_heads(heads: int, kv_heads: int, n: int, m: int, /) -> bool: ...
def resolve_scheme(scheme: str, call: Call, profile: Sequence[int], /) -> str: ...
def traffic(scheme: str, call: Call, /) -> dict[str, list[dict[str, Any]]]: ...
def profiles() -> list[tuple[str, str, list[int], str]]: ...
def plan(
    *,
    ranks: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    embed_dim: int,
    B: int,
    L: int,
    S: int,
    element_size: int,
    cached: bool,
    causal: bool,
    concat: bool,
    bias: bool,
    gated: bool,
    activations: int,
    overlap: int,
    latent: Sequence[int],
    shares: Mapping[tuple[int, int], Sequence[int]],
    profile: Sequence[int],
) -> tuple[list[dict[str, Any]], int]: ...
def kernels() -> list[dict[str, Any]]: ...
def serving(request: Request, machine: Machine) -> tuple[str, dict[str, str]]: ...
def refusals(request: Request, machine: Machine) -> dict[str, str]: ...
def unusable(machine: Machine) -> dict[str, str]: ...

class Call:
    n: int
    D: int
    element_size: int
    causal: bool
    concat: bool
    whole_heads: bool
    gated: bool
    position: int
    cycle: list[int]
    reduce_size: int
    key_dim: int
    value_dim: int
    out_dim: int
    latent: list[int]
    inputs: int
    extra_keys: int
    bias: bool
    out_bias: bool
    bias_kv: bool
    node: int
    activations: int
    overlap: int
    attention_weights: int
    mask_elements: int
    training: bool
    sealed: bool
    def __init__(self, *, B: int, L: int, S: int, H: int, K: int, d: int, m: int) -> None: ...

class Request:
    B: int
    H: int
    K: int
    L: int
    S: int
    d_qk: int
    d_v: int
    def __init__(
        self,
        *,
        dtype: str = "float32",
        mask: str = "",
        mask_rows: bool = False,
        causal: int | None = None,
        window: int | None = None,
        key_stride: int = 1,
        softcap: bool = False,
        dropout: bool = False,
        backward: bool = False,
        grad_logsumexp: bool = False,
        grad_mask: bool = False,
    ) -> None: ...

class Machine:
    def __init__(
        self,
        *,
        cuda: bool = False,
        cpu: str = "",
        arch: int = ...,
        cudnn: int = ...,
        cudnn_enabled: bool = ...,
        flash_enabled: bool = ...,
        efficient_enabled: bool = ...,
        cudnn_backward: bool = ...,
        offset_windows: bool = ...,
    ) -> None: ...
    @property
    def cpu(self) -> str: ...
