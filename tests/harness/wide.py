"""A transformers model that computes in float64 what its code says in float32."""

import sys
from contextlib import contextmanager
from inspect import isfunction
from types import ModuleType

import pytest
import torch


class Wide(ModuleType):
    """torch for a model's module, whose float32 is float64."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@contextmanager
def in_float64(model):
    """Lets a model compute in float64 what it would in float32."""
    modules = {sys.modules[kind.__module__] for part in model.modules() for kind in type(part).__mro__}
    modules = [module for module in modules if module.__name__.startswith("transformers.models.")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        for module in modules:
            patch.setattr(module, "torch", Wide("torch"))
        for function in (f for part in model.modules() for f in vars(type(part)).values() if isfunction(f)):
            if torch.float32 in (function.__defaults__ or ()):
                wide = [torch.float64 if x is torch.float32 else x for x in function.__defaults__]
                patch.setattr(function, "__defaults__", tuple(wide))
        yield
