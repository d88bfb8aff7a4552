"""What is not attention: MLPs of two linears, split over the flattened grid by torch's own tensor-parallel styles."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

# Paths of the two linears inside the module that owns them, and the class names that have them (None: any).
_MLPS = (
    ("linear1", "linear2"),  # nn.TransformerEncoderLayer, nn.TransformerDecoderLayer
    ("intermediate.dense", "output.dense"),  # BERT, RoBERTa
    ("fc1", "fc2"),  # ViT
)


def _linears(module: nn.Module, paths: tuple[str, str]) -> list[nn.Linear] | None:
    """The two linears at `paths`, if they are plain, chained, and nothing else of that name is there."""
    try:
        first, second = (module.get_submodule(path) for path in paths)
    except AttributeError:
        return None
    plain = type(first) is nn.Linear and type(second) is nn.Linear
    return [first, second] if plain and first.out_features == second.in_features else None


def _shard_on_load(module: nn.Module, state: dict, prefix: str, *_) -> None:
    """Lets load_state_dict take full tensors."""
    for name, p in module.named_parameters(recurse=False):
        x = state.get(prefix + name)
        if x is not None and isinstance(p, DTensor) and not isinstance(x, DTensor):
            state[prefix + name] = distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None)


def _has_own_forward(module: nn.Module, paths: tuple[str, str]) -> bool:
    """Whether the owner is one of the modules whose forward is known to be second(activation(first(x)))."""
    name = type(module).__name__
    if paths[0] == "linear1":
        return isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer))
    return name.endswith("Layer") if paths[0] == "intermediate.dense" else name.endswith("MLP")


def split_rest(model: nn.Module, mesh: DeviceMesh) -> list[str]:
    """Splits every MLP whose width P divides; returns their names."""
    grid = mesh._flatten("grid")
    names = []
    for name, module in list(model.named_modules()):
        for paths in _MLPS:
            linears = _linears(module, paths) if _has_own_forward(module, paths) else None
            if linears is None or linears[0].out_features % grid.size():
                continue
            styles = (ColwiseParallel(), RowwiseParallel())
            parallelize_module(module, grid, dict(zip(paths, styles, strict=True)), src_data_rank=None)
            for linear in linears:
                linear.register_load_state_dict_pre_hook(_shard_on_load)
            names.append(name)
    return names
