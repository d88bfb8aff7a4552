"""Users' errors, each a ValueError that says what was expected, what came, and the way out; two shared sentences; and
the one error that is no user's.

nn.MultiheadAttention raises AssertionError, RuntimeError and ValueError for usage errors; ours also inherit from what
it raises, so that code written for either catches them.
"""

import torch
from torch import Tensor

MASK_DTYPES = (torch.bool, torch.float64, torch.float32, torch.bfloat16, torch.float16)
MASK_DTYPE_NAMES = "bool, float64, float32, bfloat16 or float16"


class GridError(ValueError):
    """A grid, a mesh or an argument that does not fit; the message says what would."""


class UsageAssertionError(GridError, AssertionError):
    """A usage error where nn.MultiheadAttention raises AssertionError."""


class UsageRuntimeError(GridError, RuntimeError):
    """A usage error where nn.MultiheadAttention, or transformers, raises RuntimeError."""


class UsageAttributeError(GridError, AttributeError):
    """An attribute of nn.MultiheadAttention that a split layer has not."""


class RankFailure(RuntimeError):
    """A rank is gone, does not answer, or has gone another way; raised on every rank that meets it."""


class IntegrityError(RuntimeError):
    """Memory that changed by itself, ranks that hold what should be alike and is not, or NaN and Inf: of two_level_mha.
    verify, alike on every rank. The message says which rank, which layer or tensor, what differs, and the way out.
    """


def no_tensor(name: str, x: object) -> str | None:
    """What is wrong with an argument that should be a tensor, or None."""
    return None if isinstance(x, Tensor) else f"{name} must be a tensor, got a {type(x).__name__}: torch.as_tensor(..)"


def wrong_device(name: str, x: Tensor, weight: Tensor) -> str | None:
    """What is wrong with the device of an input of the module that owns `weight`, or None."""
    if x.device == weight.device:
        return None
    return f"{name} is on {x.device}, but the module is on {weight.device}: move one of them"


def wrong_dtype(name: str, x: Tensor, weight: Tensor) -> str | None:
    """What is wrong with the dtype of an input of the module that owns `weight`, or None."""
    if x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type):
        return None
    return (
        f"{name} has dtype {x.dtype}, but the module's weights are {weight.dtype}: convert one of them, or run "
        "under torch.autocast"
    )
