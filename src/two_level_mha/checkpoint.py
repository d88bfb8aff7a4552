"""Checkpoints in stock's format. For torch.distributed.checkpoint nothing is needed: parameters are DTensors."""

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from two_level_mha.blocks import full_tensor
from two_level_mha.stock import HoldsStock, put, resolve, stored_key


def _first_rank(model: nn.Module) -> int:
    """The rank that keeps the whole model."""
    meshes = {p.device_mesh for p in model.parameters() if isinstance(p, DTensor)}
    ranks = {rank for mesh in meshes for rank in mesh.mesh.flatten().tolist()}
    return 0 if 0 in ranks or not ranks else min(ranks)


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that `model` would have unsplit: full CPU tensors on rank 0, {} on the other ranks.

    Where rank 0 holds nothing of the model (a later stage of a pipeline) the first rank that does stands for it.

    A split attention (model itself may be one) appears under the keys and with the shapes of what it replaced; every
    other DTensor under its own key, whole. A tensor that the model holds twice (tied weights) is one tensor here too.
    What a get_extra_state gave, which is no tensor, is kept as it is.
    The unsplit model, and a parallelized one on any grid, take the result through load_state_dict, and a transformers
    model writes it by model.save_pretrained(directory, state_dict=...), called on rank 0.

    A collective: every rank of the model's meshes calls it. Ranks hold one whole parameter at a time, rank 0 keeps all.
    """
    keep = not dist.is_available() or not dist.is_initialized() or dist.get_rank() == _first_rank(model)
    ours = {
        name: module for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, HoldsStock)
    }
    done: set[object] = set()
    kept: dict[object, Tensor] = {}  # id of a tensor, or of a module and a stock key -> full tensor
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):  # of get_extra_state
            state |= {name: value} if keep else {}
            continue
        owner, _, own_name = name.rpartition(".")
        module = ours.get(owner)
        stock = module.stock_names.get(own_name) if module is not None else None
        source = id(value) if stock is None else (id(module), stock.key)
        once = source if stock is None else (source, own_name)
        if once not in done:
            done.add(once)
            full = full_tensor(value.detach())
            if keep and stock is not None:
                put(kept, source, stock, full.cpu())
            elif keep:
                kept[source] = full.cpu()
        if keep:
            key = name if module is None or stock is None else resolve(owner, stored_key(module, stock.key))
            state[key] = kept[source]
    return state
