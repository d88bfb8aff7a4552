"""Copies of split models: the reference of a preference loss, averages of weights, whole models in a file."""

import copy

import pytest
import torch
from harness.calls import mesh, text_of
from harness.decoders import make, prompt
from harness.encoders import make_torch
from harness.families import build
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

import two_level_mha as tlm
from two_level_mha.integrations.tp_plan import SharedForward

DECODERS = ("llama", "gemma", "mixtral", "qwen3 moe", "youtu")  # an own head, a tied one, fused experts, latents
GATHERED = ("deepseek_v32", "doge")  # what of them is split keeps its own code


def outputs(model: nn.Module) -> torch.Tensor:
    ids, _ = prompt()
    if isinstance(model, nn.Transformer):
        torch.manual_seed(3)
        x = torch.randn(2, 5, 16, dtype=torch.float64)
        return model(x, x)
    return model(ids, use_cache=False).logits


def split(name: str, grid, **options) -> nn.Module:
    torch.manual_seed(0)
    if name == "torch":
        model = make_torch(False, True, num_decoder_layers=1)
    else:
        model = build(name) if name in GATHERED else make(name)
    return tlm.parallelize(model.eval(), mesh(grid), **options)


def copied(grid, name: str, options: dict) -> dict[str, object]:
    """What a copy does as its original, and what one of the two does to the other."""
    ours = split(name, grid, **options)
    expected = outputs(ours).detach()
    other = copy.deepcopy(ours)
    found: dict[str, object] = {"same": torch.equal(outputs(other), expected)}
    outputs(other).square().sum().backward()
    found["all of the copy is trained"] = [key for key, p in other.named_parameters() if p.grad is None]
    found["the original is trained"] = [key for key, p in ours.named_parameters() if p.grad is not None]
    with torch.no_grad():
        for p in ours.parameters():
            p.mul_(1.5)
    found["still the same"] = torch.equal(outputs(other), expected)
    found["and the original is not"] = not torch.equal(outputs(ours), expected)
    return found


@pytest.mark.parametrize("options", [{}, {"activations": "sequence"}, {"activations": "batch"}])
@pytest.mark.parametrize("name", [*DECODERS, "torch"])
def test_deep_copy(pool, name, options):
    """E. Localises: a module of a copy that runs the original's, by a closure or a hook; a DPO reference that moves."""
    for found in pool.run(copied, 2, (1, 2), name, options, timeout=120):
        assert found == {
            "same": True, "all of the copy is trained": [], "the original is trained": [], "still the same": True,
            "and the original is not": True,
        }  # fmt: skip


@pytest.mark.parametrize("name", GATHERED)
def test_deep_copy_of_gathered_weights(pool, name):
    """E. As test_deep_copy, of modules that run their own code."""
    for found in pool.run(copied, 2, (1, 2), name, {}, timeout=120):
        assert found["same"] and found["still the same"] and found["and the original is not"], found
        assert not found["the original is trained"]


def averaged(grid, decay: float | None) -> float:
    """How far the average over three steps is from that of the unsplit model."""
    options = {} if decay is None else {"avg_fn": get_ema_avg_fn(decay)}
    models = [make("llama").train(), split("llama", grid).train()]
    averages = [AveragedModel(model, **options) for model in models]
    found = []
    for model, average in zip(models, averages, strict=True):
        optimizer = torch.optim.SGD(tlm.param_groups(model), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            outputs(model).square().mean().backward()
            optimizer.step()
            average.update_parameters(model)
        found.append(outputs(average.module.eval()).detach())
    assert not torch.allclose(found[0], outputs(models[0].eval()), rtol=0, atol=1e-3)  # an average is not the model
    return (found[0] - found[1]).abs().max().item()


@pytest.mark.parametrize("decay", [None, 0.5])
def test_averaged_model(pool, decay):
    """T. Localises: weights that torch's average takes from a module which it does not run."""
    for error in pool.run(averaged, 2, (1, 2), decay, timeout=120):
        assert error <= 1e-6  # transformers' norms round to float32


def stored(grid, name: str, directory: str) -> bool:
    ours = split(name, grid)
    path = f"{directory}/{torch.distributed.get_rank()}.pt"
    torch.save(ours, path)
    return torch.equal(outputs(torch.load(path, weights_only=False)), outputs(ours))


@pytest.mark.parametrize("name", [*DECODERS, *GATHERED])
def test_saved_whole(pool, name, tmp_path):
    """E. Localises: what of a model does not go through pickle, rank by rank."""
    assert all(pool.run(stored, 2, (1, 2), name, str(tmp_path)))


def test_a_closure_of_transformers_is_not_copied():
    """Localises: a style that would share a module between copies, and does not say so."""
    layer = nn.Linear(2, 2)
    vars(layer)["forward"] = SharedForward(layer.forward, "experts.norm (a style)")
    assert torch.equal(layer(torch.ones(2)), nn.functional.linear(torch.ones(2), layer.weight, layer.bias))
    assert text_of(copy.deepcopy, layer) == (
        "a model cannot be copied or pickled after parallelize where transformers changes experts.norm (a style): copy "
        "it first, and split both"
    )
