"""docs/troubleshooting.md: the messages that it explains are those that are raised."""

import ast
import re
from pathlib import Path

import pytest
import torch
from harness.calls import mesh
from harness.decoders import make, prompt
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import two_level_mha as tlm

ROOT = Path(__file__).resolve().parents[2]
ROWS = [line for line in (ROOT / "docs" / "troubleshooting.md").read_text().splitlines() if line.startswith("| `")]
TORCH = ("aten.", "Attempted to call", "Can't pickle", "Missing key(s)", "size mismatch", "ParallelismConfig")


def messages(row: str) -> list[str]:
    return re.findall(r"`([^`]+)`", row.split(" | ")[0])


def strings(file: Path) -> list[str]:
    """Every string of a Python file, adjacent ones joined, what is inserted written as { }; comments of C++ and all."""
    if file.suffix != ".py":
        return [re.sub(r'"\s*"', "", file.read_text())]
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def test_our_messages_exist():
    """Localises: a message that was reworded, and is still explained under its old words."""
    files = [
        ROOT / "setup.py",
        *(ROOT / "src").rglob("*.py"),
        *(ROOT / "csrc").rglob("*.cpp"),
        *(ROOT / "csrc").rglob("*.h"),
    ]
    known = [text for file in files for text in strings(file)]
    ours = [message for row in ROWS for message in messages(row) if not message.startswith(TORCH)]
    assert len(ours) > 15
    for message in ours:
        parts = [part.strip() for part in re.split(r"\.\.", message) if part.strip()]
        parts = [part.removeprefix("dropout ") for part in parts]  # whatever argument it was
        assert any(all(part in text for part in parts) for text in known), message


def mixed(grid) -> dict[str, str]:
    """What torch says to a mix of tensors and DTensors."""
    model = tlm.parallelize(make("llama").train(), mesh(grid))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    ids, _ = prompt()
    model(ids, use_cache=False).logits.square().mean().backward()
    average.update_parameters(model)
    optimizers = {name: torch.optim.AdamW(model.parameters(), **{name: True}) for name in ("foreach", "fused")}
    calls = {name: optimizer.step for name, optimizer in optimizers.items()} | {
        "clip": lambda: nn.utils.clip_grad_norm_(model.parameters(), 1.0),
        "parallel": lambda: nn.parallel.DistributedDataParallel(model),
        "average": lambda: average.update_parameters(model),
        "copy": lambda: AveragedModel(model),
    }
    found = {}
    for name, call in calls.items():
        with pytest.raises(RuntimeError) as error:
            call()
        found[name] = str(error.value)
    tlm.clip_grad_norm_(model.parameters(), 1.0)
    nn.utils.clip_grad_value_(model.parameters(), 1e-3, foreach=False)
    for name in optimizers:
        torch.optim.AdamW(tlm.param_groups(model), **{name: True}).step()
    model.zero_grad()
    AveragedModel(model)
    return found


def test_torchs_messages(pool):
    """Localises: a torch whose words, or whose functions, have changed: the rows are wrong then, or not needed."""
    explained = [message.removesuffix(" ..") for row in ROWS for message in messages(row) if message.startswith(TORCH)]
    for found in pool.run(mixed, 2, (1, 2), timeout=120):
        for name, text in found.items():
            assert any(text.startswith(message) for message in explained), (name, text)
