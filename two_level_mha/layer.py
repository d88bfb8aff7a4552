"""Attention on a grid, without a calling convention: the parameters, the agreement of ranks, the pass.

Letters: B batch, L query length, S key length, D embed_dim, h and k heads of all, H and K of a head group, d head_dim,
E its slice.
"""

import os

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from two_level_mha import _C
from two_level_mha.blocks import LAYOUTS, block, local_blocks
from two_level_mha.mesh import GridError, digest, place_on, same_on_all_ranks

SCHEMES = ("auto", *(name for name, _ in _C.schemes()))
COMBINES = ("reduce", "concat")
REDUCE_DTYPES = (None, torch.float32)

_ops = torch.ops.two_level_mha


class GridAttention(nn.Module):
    """Owns the weight blocks of rank (i, j) and runs the pass. Its subclasses bring a calling convention.

    Parameters, logical shapes: q_weight (h, d, D), k_weight (k, d, Dk), v_weight (k, d, Dv), out_weight (D, h, d),
    q_bias (h, d), k_bias and v_bias (k, d), bias_k and bias_v (k, d) or None, out_bias (D,). Without a mesh they are
    plain parameters, with one DTensors on ("head", "slice").
    """

    def __init__(
        self,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        mesh: DeviceMesh | None,
        scheme: str,
        combine: str,
        debug: bool | None,
        reduce_dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # a subclass may also inherit from the class it replaces, whose __init__ must not run
        if scheme not in SCHEMES:
            raise GridError(f"scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
        if combine not in COMBINES:
            raise GridError(f"combine must be one of {', '.join(COMBINES)}, got {combine!r}")
        if reduce_dtype not in REDUCE_DTYPES:
            raise GridError(f"reduce_dtype must be None or torch.float32, got {reduce_dtype}")
        self.place = place_on(mesh)
        self.place.grid.check(num_heads, num_kv_heads, head_dim)
        self.mesh = mesh
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.scheme, self.combine, self.debug, self.reduce_dtype = scheme, combine, debug, reduce_dtype
        self._compared = False

    def store(self, full: dict[str, Tensor | None], requires_grad: dict[str, bool] | None = None) -> None:
        """Keeps this rank's blocks of full tensors, the same on every rank, as the module's parameters."""
        for name in LAYOUTS:
            tensor = full.get(name)
            if tensor is None:
                self.register_parameter(name, None)
            else:
                kept = block(tensor, name, self.mesh, self.combine)
                self.register_parameter(name, nn.Parameter(kept, (requires_grad or {}).get(name, True)))

    def compares(self) -> bool:
        """Whether this call compares its inputs over the grid: the first one, and all with debug."""
        if torch.compiler.is_compiling() or self.place.grid.size == 1:
            return False
        debug = os.environ.get("TLM_DEBUG") == "1" if self.debug is None else self.debug
        return debug or not self._compared

    def compare(self, tensors: dict[str, Tensor | None], settings: dict[str, object]) -> None:
        """Raises GridError on every rank if a tensor or a setting differs between ranks. A collective."""
        fields = {name: value for name, value in settings.items()}
        for name, x in tensors.items():
            fields[f"shape of {name}"] = None if x is None else tuple(x.shape)
            fields[f"dtype of {name}"] = None if x is None else str(x.dtype)
            fields[f"content of {name}"] = None if x is None or x.is_meta else digest([x])
        same_on_all_ranks(fields, self.mesh, "every rank of a grid must be given the same inputs and arguments")
        self._compared = True

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
        causal: int | None = None,
        dropout_p: float = 0.0,
        batch_first: bool = True,
        add_zero_attn: bool = False,
        need_weights: bool = False,
        average_attn_weights: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Exact attention of (B, L, D) over (B, S, Dk), (B, S, Dv); (L, B, D) and so on if not batch_first.

        attn_mask: bool (True = attend) or additive, broadcastable to (B, h, L, S). causal: row l sees keys up to
        l + causal. Returns y in the layout of query, and the weights (B, h, L, S), or (B, L, S) averaged, or None.
        """
        # nn.Module finds parameters by a slow path
        p = self._parameters
        q_w, k_w, v_w, q_b, k_b, v_b, bias_k, bias_v, out_w, out_b = local_blocks([p[name] for name in LAYOUTS])
        place = self.place.args
        q, k, v = _ops.enter(
            query, key, value, q_w, k_w, v_w, q_b, k_b, v_b, bias_k, bias_v, add_zero_attn, batch_first,
            causal is not None, *place, self.scheme, self.reduce_dtype,
        )  # fmt: skip
        seed = None
        if dropout_p > 0.0:
            seed = torch.randint(2**62, (1,), device=query.device)
        batch, length = (query.shape[0], query.shape[1]) if batch_first else (query.shape[1], query.shape[0])
        arguments = (
            q, k, v, out_w, out_b, attn_mask, batch, length, scale, causal, None, 0.0, dropout_p, seed, batch_first,
            *place, self.scheme, self.combine, self.reduce_dtype,
        )  # fmt: skip
        if need_weights:
            return _ops.leave_with_weights(*arguments, average_attn_weights)
        return _ops.leave(*arguments), None
