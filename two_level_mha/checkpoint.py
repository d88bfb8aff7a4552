"""Checkpoints in stock's format. For torch.distributed.checkpoint nothing is needed: parameters are DTensors."""

import torch.distributed as dist
from torch import Tensor, nn

from two_level_mha.blocks import whole
from two_level_mha.multihead import TwoLevelMultiheadAttention


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that `model` would have unsplit: full CPU tensors on rank 0, {} on the other ranks.

    A TwoLevelMultiheadAttention (model itself may be one) appears under nn.MultiheadAttention's keys, with its shapes;
    every other DTensor under its own key, whole. A tensor that the model holds twice (tied weights) is one tensor here
    too. The unsplit model, and a parallelized one on any grid, take the result through load_state_dict.

    A collective: every rank of the model's meshes calls it. Ranks hold one whole tensor at a time, rank 0 keeps all.
    """
    keep = not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0
    ours = {
        f"{name}." if name else "": module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, TwoLevelMultiheadAttention)
    }
    kept: dict[int, dict[str, Tensor]] = {}  # id of a module or a tensor -> its full tensors
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        prefix = name.rpartition(".")[0]
        prefix = f"{prefix}." if prefix else ""
        module = ours.get(prefix)
        source = value if module is None else module
        if id(source) not in kept:
            full = {"": whole(value)} if module is None else module.stock_state()
            kept[id(source)] = {key: x.detach().cpu() for key, x in full.items()} if keep else {}
        state |= {(name if module is None else prefix + key): x for key, x in kept[id(source)].items()}
    return state
