"""Whole models whose hidden states stay split, against the stock model, float64."""

import pytest
import torch
from harness import encoders
from harness.calls import mesh
from harness.decoders import MODELS, full_gradients, pair, prompt

import two_level_mha as tlm

EXACT = {"exact": True}
SDPA = [name for name in MODELS if name not in ("gemma2", "28 heads", "2 kv heads", "head_dim 512")]


def differences(grid, names, activations: str, rest: bool, lengths) -> dict[str, float]:
    """Of logits and gradients, the largest by model."""
    found = {}
    for name in names:
        models = pair(name, grid, tuple(EXACT.items()), rest=rest, activations=activations)
        report = tlm.report(models[1])
        if split := [what for what in report.left_out if "hidden states" in what]:
            found[name] = {what: report.left_out[what] for what in split}
            continue
        for rows, length in lengths:
            ids, keep = prompt(rows, length)
            outputs = []
            for model in models:
                model.zero_grad()
                logits = model(ids, attention_mask=keep, use_cache=False).logits
                (logits.log_softmax(-1)[..., 3] * keep).sum().backward()
                outputs.append(logits.detach())
            grads = full_gradients(models[1])
            errors = {
                key: (grads[key] - p.grad).abs().max().item() / max(1.0, p.grad.abs().max().item())
                for key, p in models[0].named_parameters()
            }
            errors["logits"] = (outputs[0] - outputs[1])[keep.bool()].abs().max().item()
            wrong = {key: error for key, error in errors.items() if not error <= 1e-10}
            if wrong:
                found[f"{name} {rows} {length}"] = dict(sorted(wrong.items(), key=lambda item: -item[1])[:4])
    return found


@pytest.mark.parametrize("rest", [True, False])
@pytest.mark.parametrize("activations", ["sequence", "batch"])
def test_decoders(pool, activations, rest):
    """T. Localises: an exchange at a module's border, a gradient that is not summed or summed twice, a part's order."""
    lengths = ((2, 11), (4, 16), (3, 5))
    for found in pool.run(differences, 4, (2, 2), ["llama", "qwen3 moe"], activations, rest, lengths, timeout=240):
        assert not found


@pytest.mark.parametrize("grid", [(2, 2), (1, 4), (2, 4)])
def test_families(pool, grid):
    """T. Localises: a family whose layers hold what does not act on single rows, or whose head takes parts."""
    names = [name for name in SDPA if name not in ("llama", "qwen3 moe")]
    for found in pool.run(differences, grid[0] * grid[1], (grid), names, "sequence", True, ((2, 19),), timeout=400):
        assert not found


def encoders_off(grid, activations) -> dict[str, dict]:
    found = {}
    for kind in encoders.MODELS:
        args = encoders.make(kind), (), encoders.inputs(kind), mesh(grid)
        found[kind] = encoders.errors(*args, activations=activations)
    for norm_first in (False, True):
        for batch_first in (False, True):
            args = encoders.make_torch(norm_first, batch_first, num_decoder_layers=2), *encoders.torch_inputs(batch_first)
            found[f"torch {norm_first} {batch_first}"] = encoders.errors(*args, mesh(grid), activations=activations)
    return found


@pytest.mark.parametrize("activations", ["sequence", "batch"])
def test_encoders(pool, activations):
    """T. Localises: cross-attention's memory, batch_first, an MLP whose linears are the layer's own."""
    for per_rank in pool.run(encoders_off, 4, (2, 2), activations, timeout=240):
        for name, one in per_rank.items():
            assert max(one.values()) <= 1e-10, (name, one)
