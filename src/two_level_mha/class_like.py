"""Modules that are of a class of ours and still of their original's."""

import functools
from collections.abc import Callable
from typing import TypeVar

from torch import nn

Ours = TypeVar("Ours")


def class_like(ours: type[Ours], original: type) -> type[Ours]:
    """A class of ours whose instances are also the original's, by which transformers finds what to record."""
    bases: tuple[type, ...] = (ours, original)
    return _class_of(bases)


@functools.cache
def _class_of(bases: tuple[type, ...]) -> type:
    return type(f"TwoLevel{bases[1].__name__}", bases, {"__reduce__": _reduce})


def _reduce(module: nn.Module) -> tuple[Callable[..., nn.Module], tuple[type, ...], dict[str, object]]:
    """How to pickle an instance: its class has no place in a module, but can be made again."""
    return _blank, type(module).__bases__, vars(module)


def _blank(ours: type[nn.Module], original: type[nn.Module]) -> nn.Module:
    made = class_like(ours, original)
    return made.__new__(made)


def become(module: nn.Module, ours: type[nn.Module], **attributes: object) -> None:
    """Makes a module, in place, one of `ours` that is still of its class."""
    module.__class__ = class_like(ours, type(module))
    for name, value in attributes.items():
        setattr(module, name, value)
