"""Training with a mix of DTensor parameters on several meshes and plain ones, which stock utilities refuse."""

from collections.abc import Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from two_level_mha.blocks import dealt
from two_level_mha.errors import GridError

AnyTensor = TypeVar("AnyTensor", bound=Tensor)


def _kind(p: Tensor) -> object:
    """Parameters of one kind can be handled together: plain ones, or DTensors of one mesh."""
    return p.device_mesh if isinstance(p, DTensor) else None


def _kinds(params: Iterable[AnyTensor]) -> list[list[AnyTensor]]:
    kinds: dict[object, list[AnyTensor]] = {}
    for p in params:
        kinds.setdefault(_kind(p), []).append(p)
    return list(kinds.values())


def _replicated_axes(p: Tensor) -> int:
    return sum(placement.is_replicate() for placement in p.placements) if isinstance(p, DTensor) else 0


def param_groups(model: nn.Module) -> list[dict[str, list[nn.Parameter]]]:
    """The model's trainable parameters as optimizer groups, one per kind (plain, or DTensors of one mesh).

    Foreach and fused optimizers refuse a group of mixed kinds: torch.optim.AdamW(tlm.param_groups(model)). What is
    split comes first in a group: torch's GradScaler spreads the news of an inf over the axes that shard the first
    gradient.
    """
    kinds = _kinds(p for p in model.parameters() if p.requires_grad)
    return [{"params": sorted(kind, key=_replicated_axes)} for kind in kinds]


def shard_embed_dim(p: nn.Parameter) -> Shard | None:
    """For fully_shard(.., shard_placement_fn=shard_embed_dim): weight blocks are sharded along embed_dim.

    The default, the first dim, is that of the heads, and nothing is saved where a rank has one. Shard of the dim, or
    None (the default) for what is no weight block. fully_shard wants its mesh to divide embed_dim. Raises GridError, on
    every rank, where a slice has no columns: fully_shard would fail on its rank, and the others would wait.
    """
    if not isinstance(p, DTensor):
        return None
    states = p.dim() == 4 and p.device_mesh.ndim == 2  # heads of keys, of these, head_dim, D
    if not (p.dim() == 3 or states):
        return None
    sharded = [(dim, axis) for axis, one in enumerate(p.placements) for dim in range(p.dim()) if one.is_shard(dim)]
    if not sharded:
        return None
    for dim, axis in sharded:
        parts = p.device_mesh.size(axis)
        if dealt(p.shape[dim], parts, parts - 1)[1] == 0:
            raise GridError(
                f"fully_shard takes no empty blocks, and {parts} slices of {p.shape[dim]} columns leave some "
                "without any: take a grid of fewer slices"
            )
    return Shard(p.dim() - 1 if any(dim == 0 for dim, _ in sharded) else 0)  # (h, d, D), or out_weight's (D, h, d)


@torch.no_grad()
def unscale_(scaler: torch.amp.GradScaler, optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """scaler.unscale_ of every optimizer of a model, which then make or skip their steps together.

    An inf or NaN in any gradient, on any rank, skips the step of all, as one optimizer of the unsplit model would.
    Clipping after it is safe: a norm that is not finite reaches the gradients of no step that is made. A collective.
    Raises GridError for an optimizer of plain parameters and DTensors both, which torch's scaler does not take.
    """
    optimizers = list(optimizers)
    for number, optimizer in enumerate(optimizers):
        if len(kinds := _kinds(p for group in optimizer.param_groups for p in group["params"])) > 1:
            raise GridError(
                f"optimizer {number} has parameters of {len(kinds)} kinds, plain ones and DTensors of a mesh, which a "
                "GradScaler does not take: make one of each kind, [AdamW([group]) for group in tlm.param_groups(model)]"
            )
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    if not scaler.is_enabled():
        return
    found = [x for optimizer in optimizers for x in scaler._found_inf_per_device(optimizer).values()]
    worst = torch.stack([x.to(found[0].device) for x in found]).amax()
    params = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    for mesh in dict.fromkeys(p.device_mesh for p in params if isinstance(p, DTensor)):
        for axis in range(mesh.ndim):
            dist.all_reduce(worst, dist.ReduceOp.MAX, group=mesh.get_group(axis))
    for x in found:
        x.copy_(worst)


def _total_norm(gradients: list[Tensor], norm_type: float) -> Tensor:
    """get_total_norm of one kind; torch knows no largest of none, and the block of an empty slice has none."""
    if float(norm_type) != float("inf") or not isinstance(gradients[0], DTensor):
        return get_total_norm(gradients, norm_type)
    local = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]  # as all are
    largest = get_total_norm([x if x.numel() else x.new_zeros(1) for x in local], norm_type)
    mesh = gradients[0].device_mesh
    return DTensor.from_local(largest, mesh, [Partial("max")] * mesh.ndim, run_check=False)


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
    norms = [_total_norm([p.grad for p in kind if p.grad is not None], norm_type) for kind in kinds]
    full = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(full[0].device) for norm in full]), norm_type)
    if error_if_nonfinite and not torch.isfinite(total):
        raise RuntimeError(
            f"the norm of order {norm_type} of the gradients is non-finite ({total.item()}), so they cannot be clipped "
            "(error_if_nonfinite=False scales them by it anyway)"
        )
    for kind in kinds:
        clip_grads_with_norm_(kind, max_norm, total)
    return total
