"""Modules of a model that are one module in several places: Zamba's attention layers, which share every parameter."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from two_level_mha.integrations.forms import CALLED_AS, parameters_of
from two_level_mha.probe import has_hooks, is_inside, settings


def copies_of(model: nn.Module) -> dict[str, nn.Module]:
    """By name the modules that hold the parameters of an earlier one of their class, and no others; that one.

    Only where a call says which layer it is of, so that one module can take the calls of both.
    """
    known: dict[tuple[object, ...], nn.Module] = {}
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        held = tuple((own, id(p)) for own, p in module.named_parameters(remove_duplicate=False))
        if not held or is_inside(name, found):
            continue
        first = known.setdefault((type(module), held), module)
        if first is not module and CALLED_AS in parameters_of(module) and _alike(first, module):
            found[name] = first
    return found


def _alike(first: nn.Module, module: nn.Module) -> bool:
    """Whether nothing but their parameters, which are the same, could tell two modules apart."""
    pairs = zip(first.modules(), module.modules(), strict=False)
    hooked = any(has_hooks(part) for part in module.modules())
    return not hooked and not list(module.buffers()) and all(settings(a) == settings(b) for a, b in pairs)


@contextmanager
def copies_as_one(model: nn.Module) -> Iterator[None]:
    """Puts one module wherever it has copies; where an error ends the context, they are as they were."""
    before: list[tuple[nn.Module, str, nn.Module]] = []
    for name, first in copies_of(model).items():
        owner, _, child = name.rpartition(".")
        parent = model.get_submodule(owner)
        before.append((parent, child, parent.get_submodule(child)))
        setattr(parent, child, first)
    try:
        yield
    except BaseException:
        for parent, child, module in before:
            setattr(parent, child, module)
        raise
