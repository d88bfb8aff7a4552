"""What is not attention: MLPs of two linears, split over the flattened grid by torch's own tensor-parallel styles."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip

# Paths of the two linears inside the module that owns them, and the class names that have them (None: any).
_MLPS = (
    ("linear1", "linear2"),  # nn.TransformerEncoderLayer, nn.TransformerDecoderLayer
    ("intermediate.dense", "output.dense"),  # BERT, RoBERTa
    ("fc1", "fc2"),  # ViT
)


def has_hooks(module: nn.Module) -> bool:
    """Whether the user put hooks on the module."""
    return any(getattr(module, hooks) for hooks in HOOKS)


def changed_linear(module: nn.Module) -> str | None:
    """What torch.nn.utils has done to the module's weights, or None."""
    if hasattr(module, "parametrizations"):
        return "is parametrized: call torch.nn.utils.parametrize.remove_parametrizations first"
    kinds = [type(hook).__name__ for hook in module._forward_pre_hooks.values()]
    if kind := next((kind for kind in kinds if kind in ("WeightNorm", "SpectralNorm")), None):
        return f"has its weight recomputed by {kind}: remove it first"
    return None


def _is_plain(linear: nn.Module, owners: dict[int, int]) -> bool:
    tied = any(owners[id(p)] > 1 for p in linear.parameters())
    return type(linear) is nn.Linear and not has_hooks(linear) and not tied


def _linears(module: nn.Module, paths: tuple[str, str], owners: dict[int, int]) -> list[nn.Linear] | None:
    """The two linears at `paths`, if they are plain and chained."""
    try:
        first, second = (module.get_submodule(path) for path in paths)
    except AttributeError:
        return None
    plain = _is_plain(first, owners) and _is_plain(second, owners)
    return [first, second] if plain and first.out_features == second.in_features else None


def _shard_on_load(module: nn.Module, state: dict, prefix: str, *_) -> None:
    """Lets load_state_dict take full tensors."""
    for name, p in module.named_parameters(recurse=False):
        x = state.get(prefix + name)
        if x is not None and isinstance(p, DTensor) and not isinstance(x, DTensor):
            state[prefix + name] = distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None)


def _is_known(module: nn.Module, paths: tuple[str, str]) -> bool:
    """Whether second(activation(first(x))), with nothing between that mixes columns, is what the module does."""
    if paths[0] == "linear1":
        return type(module) in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    if paths[0] == "intermediate.dense":
        return type(module).__name__.endswith("Layer") and not _others(module.intermediate, "dense")
    return type(module).__name__.endswith("MLP") and not _others(module, "fc1", "fc2")


def _others(module: nn.Module, *linears: str) -> bool:
    """Whether children besides the linears have parameters: a norm between them would need the whole width."""
    return any(name not in linears and any(True for _ in child.parameters()) for name, child in module.named_children())


def split_rest(model: nn.Module, mesh: DeviceMesh) -> list[str]:
    """Splits every MLP whose width P divides; returns their names. Tied, hooked or unknown ones stay whole."""
    grid = mesh._flatten("grid")
    owners: dict[int, int] = {}
    for module in model.modules():
        for p in module._parameters.values():
            owners[id(p)] = owners.get(id(p), 0) + 1
    names = []
    for name, module in list(model.named_modules()):
        for paths in _MLPS:
            linears = _linears(module, paths, owners)
            if linears is None or not _is_known(module, paths) or linears[0].out_features % grid.size():
                continue
            styles = (ColwiseParallel(), RowwiseParallel())
            parallelize_module(module, grid, dict(zip(paths, styles, strict=True)), src_data_rank=None)
            for linear in linears:
                linear.register_load_state_dict_pre_hook(_shard_on_load)
            names.append(name)
    return names
