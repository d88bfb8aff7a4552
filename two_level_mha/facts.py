"""What this process is made of, as other ranks compare it."""

import functools
import hashlib
import os
from pathlib import Path

import torch

import two_level_mha
from two_level_mha import _C, _load


@functools.cache
def library_hash() -> str:
    """SHA-256 of the compiled libraries, its first 16 digits."""
    state = hashlib.sha256()
    for file in (_load.ops_library(), Path(_C.__file__)):
        state.update(file.read_bytes())
    return state.hexdigest()[:16]


def facts_alike() -> dict[str, str]:
    """What must be equal on every rank of a job."""
    return {
        "the version of torch": torch.__version__,
        "the version of two_level_mha": two_level_mha.__version__,
        "the build of two_level_mha": library_hash(),
        "the table of rates": str(_C.profiles()),
        "the CPU capability": torch.backends.cpu.get_cpu_capability(),
        "the variables TLM_*": str(sorted((k, v) for k, v in os.environ.items() if k.startswith("TLM_"))),
    }
