"""Training with a mix of DTensor parameters on several meshes and plain ones, which stock utilities refuse."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


def _kind(p: Tensor) -> object:
    """Parameters of one kind can be handled together: plain ones, or DTensors of one mesh."""
    return p.device_mesh if isinstance(p, DTensor) else None


def _kinds(params: Iterable[Tensor]) -> list[list[Tensor]]:
    kinds: dict[object, list[Tensor]] = {}
    for p in params:
        kinds.setdefault(_kind(p), []).append(p)
    return list(kinds.values())


def param_groups(model: nn.Module) -> list[dict[str, list[nn.Parameter]]]:
    """The model's trainable parameters as optimizer groups, one per kind (plain, or DTensors of one mesh).

    Foreach and fused optimizers refuse a group of mixed kinds: torch.optim.AdamW(tlm.param_groups(model)).
    """
    return [{"params": kind} for kind in _kinds(p for p in model.parameters() if p.requires_grad)]


@torch.no_grad()
def clip_grad_norm_(
    params: Iterable[Tensor] | Tensor, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> Tensor:
    """torch.nn.utils.clip_grad_norm_ for parameters of mixed kinds: scales gradients in place, returns the norm.

    The norm is that of the unsplit model's gradients, a plain tensor on every rank; gradients of replicated parameters
    count once. error_if_nonfinite: RuntimeError, on every rank and before anything is scaled, if it is infinite or NaN.
    A collective where there are DTensors.
    """
    params = [params] if isinstance(params, Tensor) else list(params)
    kinds = _kinds(p for p in params if p.grad is not None)
    if not kinds:
        return torch.tensor(0.0)
    norms = [get_total_norm([p.grad for p in kind], norm_type) for kind in kinds]
    full = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = torch.linalg.vector_norm(torch.stack([norm.to(full[0].device) for norm in full]), norm_type)
    if error_if_nonfinite and not torch.isfinite(total):
        raise RuntimeError(
            f"the norm of order {norm_type} of the gradients is non-finite ({total.item()}), so they cannot be clipped "
            "(error_if_nonfinite=False scales them by it anyway)"
        )
    for kind in kinds:
        clip_grads_with_norm_(kind, max_norm, total)
    return total
