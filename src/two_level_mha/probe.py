"""Looking at a module before it is replaced: what the user did to it, what tells it from others, a copy to run."""

import copy
import inspect
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


def has_hooks(module: nn.Module) -> bool:
    """Whether the user put hooks on the module."""
    return any(getattr(module, hooks) for hooks in HOOKS)


def is_inside(name: str, owners: Collection[str]) -> bool:
    """Whether a module or parameter is one of `owners` or in one of them, by its name."""
    return any(name == owner or name.startswith(f"{owner}.") for owner in owners)


def named_layers(model: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """The layers of a model that is called `prefix`, by name: the entries of its nn.ModuleLists."""
    for name, layers in model.named_modules(prefix=prefix):
        for number, layer in layers._modules.items() if isinstance(layers, nn.ModuleList) else ():
            yield f"{name}.{number}", layer


def owners_of(model: nn.Module) -> dict[int, list[str]]:
    """Parameter -> modules that own it; a module used in several places is one."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for p in module._parameters.values():
            if p is not None:
                owners.setdefault(id(p), []).append(name)
    return owners


def random_copy(modules: list[nn.Module], gain: float = 1.0, dtype: torch.dtype = torch.float64) -> list[nn.Module]:
    """Copies to probe, with what they share: on the CPU, in eval mode, without hooks.

    Random weights, whatever the originals have (meta ones too): zeros or tiny weights would hide a difference. A linear
    gives about `gain` times what it gets. Buffers of meta modules are random too; those of bools, or 4-D, causal masks.
    """
    copies = copy.deepcopy(modules)
    for module in copies:
        for part in module.modules():
            for hooks in HOOKS:
                getattr(part, hooks).clear()
        if any(p.is_meta for p in module.parameters()):
            module.to_empty(device="cpu")
            _fill_buffers(module)
        module.cpu().to(dtype).eval()
        for p in module.parameters():
            with torch.no_grad():
                p.normal_(std=gain * p.shape[-1] ** -0.5)
    return copies


def _fill_buffers(module: nn.Module) -> None:
    for x in module.buffers():
        if x.dim() == 4 or (x.dtype == torch.bool and x.dim() > 1):
            x.fill_(1).tril_()
        elif x.is_floating_point():
            x.normal_()
        else:
            x.zero_()


def drops(module: nn.Module) -> bool:
    """Whether a part of the module has a probability of dropout."""
    names = ("p", "dropout", "attention_dropout")
    values = [getattr(part, name, 0.0) for part in module.modules() for name in names]
    return any(isinstance(value, float) and value > 0.0 for value in values)


@contextmanager
def in_eval(module: nn.Module) -> Iterator[None]:
    """The module in eval mode, each part of it."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def first_output(output: Any) -> Tensor:
    """The tensor that a module gave, or the first of them."""
    first: Tensor = output if isinstance(output, Tensor) else output[0]
    return first


def settings(module: nn.Module) -> tuple[tuple[str, object], ...]:
    """The plain attributes that make two modules of one class behave differently."""
    plain = (int, float, bool, str)
    found = [
        (name, value)
        for name, value in vars(module).items()
        if not name.startswith("_")
        and name not in ("layer_idx", "layer_id")
        and (isinstance(value, plain) or inspect.isroutine(value))
    ]
    return tuple(sorted(found, key=lambda item: item[0]))


def layer_settings(config: object, layer: int | None) -> tuple[object, ...]:
    """What a config says of one layer: entry `layer` of its lists, such as layer_types. () without a layer."""
    if layer is None or config is None:
        return ()
    lists = {name: value for name, value in vars(config).items() if isinstance(value, list)}
    return tuple((name, repr(value[layer])) for name, value in lists.items() if layer < len(value))


def changed_linear(module: nn.Module) -> str | None:
    """What torch.nn.utils has done to the module's weights, or None."""
    if hasattr(module, "parametrizations"):
        return "is parametrized: call torch.nn.utils.parametrize.remove_parametrizations first"
    kinds = [type(hook).__name__ for hook in module._forward_pre_hooks.values()]
    if kind := next((kind for kind in kinds if kind in ("WeightNorm", "SpectralNorm")), None):
        return f"has its weight recomputed by {kind}: remove it first"
    return None
