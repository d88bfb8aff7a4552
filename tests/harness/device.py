"""The device that the suite runs on: TLM_TEST_DEVICE, "cpu" (the default) or "cuda"; and the group of its ranks.

Ranks share one GPU, which NCCL refuses, so theirs is the staged group (staged.py). TLM_TEST_BACKEND=staged takes it on
the CPU as well; nccl gives each rank a GPU of its own, and tests of more ranks than GPUs are skipped. What is expected
of a device, where devices differ, is in EXPECTED alone.
"""

import os

import torch

BACKENDS = {"cpu": ("gloo", "staged"), "cuda": ("staged", "nccl")}  # by device
DEVICE = os.environ.get("TLM_TEST_DEVICE", "cpu")
BACKEND = os.environ.get("TLM_TEST_BACKEND", "gloo" if DEVICE == "cpu" else "staged")

# what -> on each device
EXPECTED = {
    # gradients of the same call twice: flash and the memory-efficient kernel add dQ with atomics
    "the same bits in backward": {"cpu": True, "cuda": False},
    # a row whose scores all are finfo.min: the memory-efficient kernel takes it for one without keys
    "rows of finfo.min": {"cpu": "uniform", "cuda": "zero"},
    # relative errors of attention in fp32, which the memory-efficient kernel multiplies in 3xTF32: argued, not measured
    "fp32 against float64": {"cpu": 5e-6, "cuda": 1e-5},
    "fp32 by another way": {"cpu": 1e-6, "cuda": 1e-5},
}


def problem() -> str | None:
    """Why the suite cannot run as the variables say, or None."""
    if DEVICE not in BACKENDS:
        return f"TLM_TEST_DEVICE must be one of {', '.join(BACKENDS)}, got {DEVICE!r}"
    if BACKEND not in BACKENDS[DEVICE]:
        return f"TLM_TEST_BACKEND must be one of {', '.join(BACKENDS[DEVICE])} with {DEVICE}, got {BACKEND!r}"
    if DEVICE == "cuda" and not torch.cuda.is_available():
        return "TLM_TEST_DEVICE=cuda, and torch sees no GPU on this machine"
    return None


def use_device(rank: int = 0) -> None:
    """Makes DEVICE the default of this process: tensors that name none are there."""
    if DEVICE == "cuda":
        torch.cuda.set_device(rank if BACKEND == "nccl" else 0)
        torch.set_default_device(DEVICE)


def of_device(what: str):
    return EXPECTED[what][DEVICE]
