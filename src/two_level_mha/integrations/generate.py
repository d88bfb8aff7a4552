"""generate() of a split transformers model: every rank takes the token that the grid's first rank has drawn."""

from typing import Any

from torch import Tensor
from transformers import StoppingCriteriaList

from two_level_mha.control import Control


class FirstRanksTokens(StoppingCriteriaList):
    """The criteria of one generate(), of which the answer on the first rank counts, as does the token that it drew.

    They are asked after each step, with the ids so far: (B, length), whose last column was just drawn. There ranks may
    have drawn apart: generators seeded apart, logits that differ in a last bit, clocks. 8 bytes a sequence and step.
    """

    def __init__(self, criteria: StoppingCriteriaList, control: Control) -> None:
        super().__init__(criteria)
        self.control = control

    def __call__(self, input_ids: Tensor, scores: tuple[Tensor, ...] | None, **kwargs: Any) -> Tensor:
        done_B = super().__call__(input_ids, scores, **kwargs)
        told_B = (input_ids[:, -1] * 2 + done_B).cpu()
        told_B = self.control.from_first(told_B, "taking the token that the first rank drew").to(input_ids.device)
        input_ids[:, -1] = told_B // 2
        return told_B % 2 == 1
