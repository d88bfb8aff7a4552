"""Writes src/two_level_mha/operators.pyi, the signatures of the operators, of the schemas that the library registers.

python tools/operator_stub.py
"""

import re
from pathlib import Path

import torch

import two_level_mha  # noqa: F401  registers the operators

STUB = Path(__file__).resolve().parents[1] / "src" / "two_level_mha" / "operators.pyi"
HEAD = '''"""What the operators take and give, by the schemas in csrc; written by tools/operator_stub.py."""

from collections.abc import Sequence

import torch
from torch import Tensor

ops: Operators

class Operators:'''


def annotation(of: torch.Argument, sequence: str) -> str:
    """The Python type of an argument, or of what is returned. sequence: what stands for a list."""
    text = of.real_type.annotation_str.replace("ScalarType", "torch.dtype").replace("List", sequence)
    return re.sub(r"^Optional\[(.*)\]$|Optional\[(\w+)\]", r"\1\2 | None", text)


def parameter(of: torch.Argument) -> str:
    text = f"{of.name}: {annotation(of, 'Sequence')}"
    if not of.has_default_value():
        return text
    return f"{text} = {'...' if isinstance(of.default_value, list) else repr(of.default_value)}".replace("'", '"')


def method(schema: torch.FunctionSchema) -> list[str]:
    by_position = ["self", *(parameter(one) for one in schema.arguments if not one.kwarg_only)]
    by_name = [parameter(one) for one in schema.arguments if one.kwarg_only]
    given = [*by_position, "*", *by_name] if by_name else by_position
    gives = [annotation(one, "list") for one in schema.returns]
    returned = gives[0] if len(gives) == 1 else f"tuple[{', '.join(gives)}]" if gives else "None"
    name = schema.name.removeprefix("two_level_mha::")
    return [f"    def {name}(", *(f"        {one}," for one in given), f"    ) -> {returned}: ..."]


def stub() -> str:
    """The file's text."""
    ours = [one for one in torch._C._jit_get_all_schemas() if one.name.startswith("two_level_mha::")]
    lines = [line for schema in sorted(ours, key=lambda one: one.name) for line in method(schema)]
    return "\n".join([HEAD, *lines]) + "\n"


if __name__ == "__main__":
    STUB.write_text(stub())
