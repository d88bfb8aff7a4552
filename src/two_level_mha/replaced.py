"""Parameters that a model has no more: whoever still holds one, an optimizer made too early above all, hears of it.

Such an optimizer would go on without a sound, and train nothing: what it holds never gets a gradient again.
"""

import functools

from torch import Tensor, nn

from two_level_mha.errors import GridError


class Replaced:
    """Of a parameter that stands in no model any more. Optimizers, clipping and GradScaler begin with its gradient."""

    was_called: str
    replaced_by: str

    @property
    def grad(self) -> Tensor | None:
        raise GridError(
            f"{self.was_called} was replaced by {self.replaced_by}, and what still holds it, an optimizer for "
            f"instance, would train nothing: call {self.replaced_by} first, then make the optimizer, of "
            "two_level_mha.param_groups(model)"
        )

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        self.grad  # noqa: B018  raises


@functools.cache
def _replaced(original: type[nn.Parameter]) -> type:
    return type(original.__name__, (Replaced, original), {})


def note_replaced(before: dict[str, nn.Parameter], model: nn.Module, replaced_by: str) -> None:
    """Lets those parameters of `before`, by name, that `model` has no more refuse to give a gradient."""
    kept = {id(p) for p in model.parameters()}
    for name, p in before.items():
        if id(p) not in kept and not isinstance(p, Replaced):
            p.__class__ = _replaced(type(p))
            vars(p).update(was_called=name, replaced_by=replaced_by)
