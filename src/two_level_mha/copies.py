"""Modules of a model that are one module in several places: Zamba's attention layers, which share every parameter."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from two_level_mha.integrations.forms import CALLED_AS, parameters_of
from two_level_mha.probe import has_hooks, is_inside, settings

TIES = "all_tied_weights_keys"  # of a transformers model: name of a parameter -> whose tensor it is given


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


def _ties(part: nn.Module, before: dict[str, str]) -> dict[str, str]:
    """Those of `before` whose parameters there are, and the further names of what is in several places."""
    named = dict(part.named_parameters(remove_duplicate=False))
    first: dict[nn.Parameter, str] = {}
    for name, p in named.items():
        first.setdefault(p, name)
    further = {name: first[p] for name, p in named.items() if first[p] != name}
    return further | {tied: of for tied, of in before.items() if {tied, of} <= named.keys()}


@contextmanager
def copies_as_one(model: nn.Module) -> Iterator[None]:
    """Puts one module wherever it has copies, for good; what a model ties is then what was split in the context has.

    Where an error ends it, all is as it was.
    """
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
    for part in model.modules() if before else ():
        if TIES in vars(part):
            setattr(part, TIES, _ties(part, getattr(part, TIES)))
