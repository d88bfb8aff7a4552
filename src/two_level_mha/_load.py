"""Loads the compiled libraries, after making sure that they were built for the torch that is running."""

import json
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parent
REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."


def build_decisions() -> dict[str, list[str]]:
    """What the build decided: name -> [value, reason]. Raises ImportError where nothing was built."""
    file = PACKAGE / "_build.json"
    if not file.exists():
        raise ImportError(
            f"two_level_mha is not built in {PACKAGE}: run `{REBUILD}` in its source folder, or "
            "`python setup.py build_ext --inplace` to work in it"
        )
    decisions: dict[str, list[str]] = json.loads(file.read_text())
    return decisions


def ops_library() -> Path:
    """Path of the operator library, which a C++ program can link to as well."""
    return PACKAGE / "_ops.abi3.so"


def load() -> None:
    """Registers the operators. Raises ImportError if they were built for another torch than runs."""
    built = build_decisions()["torch"][0]
    if built != torch.__version__:
        raise ImportError(
            f"two_level_mha was built for torch {built}, but torch {torch.__version__} is running. "
            f"Build it again with the running one: `{REBUILD}` in its source folder, or install torch {built}"
        )
    torch.ops.load_library(ops_library())
