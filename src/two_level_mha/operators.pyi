"""What the operators take and give, by the schemas in csrc; written by tools/operator_stub.py."""

from collections.abc import Sequence

import torch
from torch import Tensor

ops: Operators

class Operators:
    def _all_gather_pairs(
        self,
        input: Tensor,
        group_size: int,
        group_name: str,
        wait: bool = True,
    ) -> Tensor: ...
    def _all_to_all_pairs(
        self,
        input: Tensor,
        output_split_sizes: Sequence[int],
        input_split_sizes: Sequence[int],
        group_name: str,
        wait: bool = True,
    ) -> Tensor: ...
    def all_gather(
        self,
        x: Tensor,
        dim: int,
        group_size: int,
        group: str,
    ) -> Tensor: ...
    def all_reduce(
        self,
        x: Tensor,
        group_size: int,
        group: str,
    ) -> Tensor: ...
    def all_to_all(
        self,
        x: Tensor,
        split_dim: int,
        cat_dim: int,
        group_size: int,
        group: str,
    ) -> Tensor: ...
    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        v_weight: Tensor,
        q_bias: Tensor | None,
        k_bias: Tensor | None,
        v_bias: Tensor | None,
        bias_k: Tensor | None,
        bias_v: Tensor | None,
        out_weight: Tensor,
        out_bias: Tensor | None,
        angles: Sequence[Tensor] | None,
        norms: Sequence[Tensor] | None,
        eps: float,
        interleaved: bool,
        attn_mask: Tensor | None,
        scale: float | None,
        causal: int | None,
        window: int | None,
        softcap: float,
        dropout_p: float,
        seed: Tensor | None,
        constants: str,
        sizes: Sequence[int],
        before: Tensor | None = None,
    ) -> Tensor: ...
    def cache_append(
        self,
        memory: Sequence[Tensor],
        cache: Sequence[int],
        k: Tensor,
        v: Tensor,
        new_tokens: int,
        for_gradients: bool = False,
    ) -> tuple[list[Tensor], list[int], Tensor, Tensor]: ...
    def cache_select(
        self,
        memory: Sequence[Tensor],
        cache: Sequence[int],
        index: Tensor,
        slice_group: str,
    ) -> tuple[list[Tensor], list[int]]: ...
    def dropout_keep_mask(
        self,
        seed: Tensor,
        p: float,
        sizes: Sequence[int],
        origin: Sequence[int] = ...,
    ) -> Tensor: ...
    def enter(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        v_weight: Tensor,
        q_bias: Tensor | None,
        k_bias: Tensor | None,
        v_bias: Tensor | None,
        bias_k: Tensor | None,
        bias_v: Tensor | None,
        rows: Sequence[Tensor] | None,
        shared: Sequence[Tensor] | None,
        constants: str,
        sizes: Sequence[int],
        before: Tensor | None = None,
    ) -> list[Tensor]: ...
    def gather_activations(
        self,
        x: Tensor,
        size: int,
        rows: bool,
        grid: Sequence[int],
        group: str,
    ) -> Tensor: ...
    def head_norm(
        self,
        x: Tensor,
        weight: Tensor,
        eps: float,
    ) -> Tensor: ...
    def hierarchical_all_gather(
        self,
        x: Tensor,
        head_dim: int,
        slice_dim: int,
        grid: Sequence[int],
        slice_group: str,
        head_group: str,
        slices_first: bool = False,
        replicated: bool = False,
    ) -> Tensor: ...
    def leave(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out_weight: Tensor,
        out_bias: Tensor | None,
        attn_mask: Tensor | None,
        scale: float | None,
        causal: int | None,
        window: int | None,
        softcap: float,
        dropout_p: float,
        seed: Tensor | None,
        constants: str,
        sizes: Sequence[int],
        seal: Tensor | None = None,
        after: Sequence[Tensor] | None = None,
        scores: Tensor | None = None,
    ) -> Tensor: ...
    def leave_with_cache(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out_weight: Tensor,
        out_bias: Tensor | None,
        attn_mask: Tensor | None,
        scale: float | None,
        causal: int | None,
        window: int | None,
        softcap: float,
        dropout_p: float,
        seed: Tensor | None,
        constants: str,
        sizes: Sequence[int],
        memory: Sequence[Tensor],
        cache: Sequence[int],
        seal: Tensor | None = None,
        after: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, list[Tensor], list[int]]: ...
    def leave_with_weights(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out_weight: Tensor,
        out_bias: Tensor | None,
        attn_mask: Tensor | None,
        scale: float | None,
        causal: int | None,
        window: int | None,
        softcap: float,
        dropout_p: float,
        seed: Tensor | None,
        constants: str,
        sizes: Sequence[int],
        average: bool = True,
        seal: Tensor | None = None,
        after: Sequence[Tensor] | None = None,
        scores: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...
    def merge_partials(
        self,
        outs: Tensor,
        logsumexps: Tensor,
    ) -> tuple[Tensor, Tensor]: ...
    def norm_rotary(
        self,
        q: Tensor,
        k: Tensor,
        weights: Sequence[Tensor],
        eps: float,
        q_angles: Sequence[Tensor],
        k_angles: Sequence[Tensor],
        interleaved: bool = False,
    ) -> tuple[Tensor, Tensor]: ...
    def opened(
        self,
        y: Tensor,
        sums: Tensor,
        seal: Tensor,
        group_size: int,
        group: str,
        layer: str,
    ) -> Tensor: ...
    def pack(
        self,
        tensors: Sequence[Tensor],
        dims: Sequence[int],
        parts: int,
        zigzag: bool = False,
    ) -> Tensor: ...
    def partial_attention(
        self,
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
        origin: Sequence[int] = ...,
        key_stride: int = 1,
        kernel_name: str = "",
    ) -> tuple[Tensor, Tensor]: ...
    def partial_attention_backward(
        self,
        grad_out: Tensor,
        grad_logsumexp: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        mask_grad: bool,
        attn_mask: Tensor | None = None,
        *,
        scale: float | None = None,
        causal: int | None = None,
        window: int | None = None,
        softcap: float = 0.0,
        dropout_p: float = 0.0,
        seed: Tensor | None = None,
        origin: Sequence[int] = ...,
        key_stride: int = 1,
        kernel_name: str = "",
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
    def project_activations(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        size: int,
        rows: bool,
        grid: Sequence[int],
        group: str,
        reduce_dtype: torch.dtype | None = None,
    ) -> list[Tensor]: ...
    def qkv_projection(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        v_weight: Tensor,
        q_bias: Tensor | None = None,
        k_bias: Tensor | None = None,
        v_bias: Tensor | None = None,
        batch_first: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]: ...
    def reduce_scatter(
        self,
        x: Tensor,
        dim: int,
        group_size: int,
        group: str,
    ) -> Tensor: ...
    def replicated(
        self,
        xs: Sequence[Tensor],
        group_size: int,
        group: str,
        reduce_dtype: torch.dtype | None = None,
    ) -> list[Tensor]: ...
    def rotary(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        interleaved: bool = False,
    ) -> Tensor: ...
    def seal(
        self,
        xs: Sequence[Tensor],
        numbers: Sequence[int],
        text: str,
        before: Tensor | None = None,
    ) -> Tensor: ...
    def seal_digits(
        self,
        seal: Tensor,
        dtype: torch.dtype,
        group_size: int,
    ) -> Tensor: ...
    def seal_verdict(
        self,
        sums: Tensor,
        seal: Tensor,
        group_size: int,
        verdict: Tensor,
    ) -> None: ...
    def shard_activations(
        self,
        x: Tensor,
        rows: bool,
        grid: Sequence[int],
        group: str,
    ) -> Tensor: ...
    def sum_activations(
        self,
        x: Tensor,
        bias: Tensor | None,
        rows: bool,
        grid: Sequence[int],
        group: str,
        reduce_dtype: torch.dtype | None = None,
    ) -> Tensor: ...
    def unpack(
        self,
        buffer: Tensor,
        sizes: Sequence[int],
        dims: Sequence[int],
        parts: int,
        zigzag: bool = False,
    ) -> list[Tensor]: ...
