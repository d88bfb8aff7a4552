"""generate() of a split transformers model: every rank takes the token that the grid's first rank has drawn."""

import functools

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import StoppingCriteriaList

from two_level_mha.control import Control
from two_level_mha.mesh import control_on


class FirstRanksTokens(StoppingCriteriaList):
    """The criteria of one generate(), of which the answer on the first rank counts, as does the token that it drew.

    They are asked after each step, with the ids so far: (B, length), whose last column was just drawn. There ranks may
    have drawn apart: generators seeded apart, logits that differ in a last bit, clocks. 8 bytes a sequence and step.
    """

    def __init__(self, criteria: StoppingCriteriaList, control: Control) -> None:
        super().__init__(criteria)
        self.control = control

    def __call__(self, input_ids: Tensor, scores: tuple[Tensor, ...] | None, **kwargs) -> Tensor:
        done_B = super().__call__(input_ids, scores, **kwargs)
        told_B = (input_ids[:, -1] * 2 + done_B).cpu()
        told_B = self.control.from_first(told_B, "taking the token that the first rank drew").to(input_ids.device)
        input_ids[:, -1] = told_B // 2
        return told_B % 2 == 1


class Together:
    """Of a model whose ranks generate together. What else it is, is its original's class."""

    grid_control: Control | None  # None: unpickled in another job

    def _get_stopping_criteria(self, generation_config, *args, **kwargs) -> StoppingCriteriaList:
        criteria = super()._get_stopping_criteria(generation_config, *args, **kwargs)
        if generation_config.num_beams > 1 or self.grid_control is None:  # beams: the column is a copy, see the README
            return criteria
        return FirstRanksTokens(criteria, self.grid_control)

    def __reduce__(self) -> tuple:  # its class has no place in a module
        return _blank, (type(self).__bases__[1],), vars(self)


@functools.cache
def _together(original: type) -> type:
    """Under the original's name, which save_pretrained writes into a config."""
    return type(original.__name__, (Together, original), {"__module__": original.__module__})


def _blank(original: type) -> nn.Module:
    return _together(original).__new__(_together(original))


def generate_together(model: nn.Module, mesh: DeviceMesh) -> None:
    """Makes generate() of a model on a grid take the same token everywhere: its class becomes one of its own."""
    if not isinstance(model, Together):
        model.grid_control = control_on(mesh)
        model.__class__ = _together(type(model))
