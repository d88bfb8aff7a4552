"""A model that tlm.verify watches, its training, and faults in it, for test_verify.py and test_verify_repair.py."""

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import two_level_mha as tlm
from harness.calls import mesh
from harness.language import BYTES, Model, tokens

GRID = (2, 2)


class Net(Model):
    """The tiny language model with a buffer that stays and one that forward writes."""

    def __init__(self, grid=GRID, **options) -> None:
        super().__init__(mesh(grid), dtype=torch.float32, **options)
        for layer in self.attentions:
            layer.debug = False  # what every call compares would be named before verify looks
        self.register_buffer("gain", torch.linspace(0.5, 1.5, BYTES))
        self.register_buffer("seen", torch.zeros(BYTES))

    def forward(self, ids_BL: Tensor) -> Tensor:
        logits = super().forward(ids_BL)
        if self.training:
            with torch.no_grad():
                self.seen.mul_(0.9).add_(logits.mean((0, 1)))
        return logits * self.gain


def backward(model: nn.Module, step: int) -> None:
    ids = tokens(seed=step)
    logits = model(ids[:, :-1])
    logits = logits if isinstance(logits, Tensor) else logits.logits
    F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()


def train(model: nn.Module, optimizers: list, step: int) -> None:
    for one in optimizers:
        one.zero_grad()
    backward(model, step)
    for one in optimizers:
        one.step()


def trained(every: int = 1, steps: int = 2, **options) -> tuple:
    """A net, its optimizer and its handle, after some steps."""
    model = Net(**options)
    optimizer = torch.optim.AdamW(tlm.param_groups(model), lr=0.01)
    handle = tlm.verify(model, optimizer, every=every)
    for step in range(steps):
        train(model, [optimizer], step)
    return model, optimizer, handle


def error_of(function, *args) -> str:
    try:
        function(*args)
    except tlm.IntegrityError as error:
        return str(error)
    return "no error"


def flip(x: Tensor, bit: int) -> None:
    """Flips a bit of the memory of x as no code does: torch does not know."""
    byte = ctypes.c_ubyte.from_address(x.data_ptr() + bit // 8)
    byte.value ^= 1 << bit % 8


def alike(texts: list[str]) -> str:
    assert len(set(texts)) == 1, texts
    return texts[0]


# -- No false alarm
