"""Attention of torchtitan's shape: forward(x, table), causal, with wq, wk, wv, wo, rotated by apply_rotary_emb.

Letters: as in layer.py, and r the numbers that the table has for a position.
"""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from two_level_mha.class_like import class_like
from two_level_mha.errors import GridError, UsageRuntimeError
from two_level_mha.integrations import forms
from two_level_mha.integrations.positions import Positioned
from two_level_mha.layer import Aside, GridAttention

PATHS = {"q": "wq", "k": "wk", "v": "wv", "o": "wo"}
ROTATE = "apply_rotary_emb"  # beside the class: of q, k (B, L, heads, d) and the table it gives both


class TitanAttention(Positioned, GridAttention):
    """Called as the original is: x (B, L, D) and the table of its rotations, (at least L, r), real or complex.

    Its norms of heads act before it rotates. Other arguments must be None.
    """

    def __init__(
        self, original: nn.Module, projections: dict[str, nn.Module], paths: dict[str, str], mesh: DeviceMesh | None,
        **options: Any,
    ) -> None:  # fmt: skip
        h, k, d = forms.heads_of(original, projections)
        super().__init__(num_heads=h, num_kv_heads=k, head_dim=d, mesh=mesh, **options)
        self.argument_names = tuple(forms.parameters_of(original))
        self.rotate = rotation_of(original)
        forms.store_projections(self, projections, paths, forms.names_of(projections, paths, (h, k, d), "blocks", d))
        self.use_positions(original, rotates=False, norms_last=False)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        given = dict(zip(self.argument_names, args, strict=False)) | kwargs
        x_BLD, table = (given.pop(name, None) for name in self.argument_names[:2])
        whole = self.wholes([x_BLD])[0]
        length = whole.shape[1]

        def check() -> dict[str, object]:
            for name, value in given.items():
                if value is not None:
                    raise UsageRuntimeError(f"{name} is not supported by this attention, which is causal: leave it out")
            if not isinstance(table, Tensor) or table.dim() != 2 or table.shape[0] < length:
                got = tuple(table.shape) if isinstance(table, Tensor) else type(table).__name__
                name = self.argument_names[1]
                raise GridError(f"{name} must be (positions, r), with a row for each of {length} positions, got {got}")
            return {}

        self.check_call(check, {"x": x_BLD})
        own = table[:length]
        numbers = torch.view_as_real(own).flatten(1) if own.is_complex() else own

        def rotated(x_BHLd: Tensor, rows_11Lr: Tensor) -> Tensor:
            rows = rows_11Lr[0, 0]
            rows = torch.view_as_complex(rows.unflatten(1, (-1, 2)).contiguous()) if own.is_complex() else rows
            x_BLHd = x_BHLd.transpose(1, 2)
            turned_BLHd: Tensor = self.rotate(x_BLHd, x_BLHd[:, :, :1], rows)[0]
            return turned_BLHd.transpose(1, 2)

        def between(q_BHLd: Tensor, k_BKSd: Tensor, v: Tensor, aside: Aside) -> tuple[Tensor, Tensor, Tensor]:
            q, k = self.positioned(q_BHLd, k_BKSd, aside._replace(q_rows=[], k_rows=[]))
            return rotated(q, aside.q_rows[0]), rotated(k, aside.k_rows[0]), v

        return self.attend(
            x_BLD, x_BLD, x_BLD, wholes=[whole, whole], causal=0, rows=[numbers[None, None]],
            shared=self.norm_parameters(), between=between,
        )[0]  # fmt: skip


def titan_like(original: nn.Module, *args: Any, **options: Any) -> TitanAttention:
    """A TitanAttention of the original's class too."""
    return class_like(TitanAttention, type(original))(original, *args, **options)


def is_titan(module: nn.Module, parent: nn.Module | None) -> bool:
    """Whether a module is of that shape by its names."""
    return all(isinstance(getattr(module, name, None), nn.Linear) for name in PATHS.values())


def problem(module: nn.Module) -> str | None:
    """A feature that is not supported, or None."""
    named = list(forms.parameters_of(module).values())
    required = [p.name for p in named if p.default is inspect.Parameter.empty]
    if len(named) < 2 or len(required) > 2:
        return f"it is called with {', '.join(p.name for p in named)}: only x and a table of rotations are known"
    beside = sys.modules[type(module).__module__]
    return None if hasattr(beside, ROTATE) else f"{beside.__name__} has no {ROTATE}, which it would be rotated by"


def rotation_of(module: nn.Module) -> Callable[..., Any]:
    """The function by which the module rotates."""
    rotate: Callable[..., Any] = getattr(sys.modules[type(module).__module__], ROTATE)
    return rotate


def titan_inputs(original: Any, dtype: torch.dtype) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Two sequences of 5 rows, and the table that the function beside the class takes: complex, or real."""
    d = forms.first_of(original, forms.HEAD_DIMS)
    x_BLD = torch.randn(2, 5, original.wq.in_features, dtype=dtype)
    turned = torch.polar(torch.ones(5, d // 2, dtype=dtype), torch.randn(5, d // 2, dtype=dtype))
    x_BLHd = torch.randn(2, 5, 1, d, dtype=dtype)
    for table in (turned, torch.randn(5, 2 * d, dtype=dtype), torch.randn(5, d, dtype=dtype)):
        try:
            if rotation_of(original)(x_BLHd, x_BLHd, table)[0].shape == x_BLHd.shape:
                break
        except (AssertionError, RuntimeError, TypeError, ValueError):  # of another; the trial will say what it takes
            continue
    return [((x_BLD, table), {})]
