"""Training a parallelized model: parameter groups, clipping and steps are those of the unsplit model, in float64.

A failure here with test_convert.py green is in training.py, or in how optimizers treat DTensors.
"""

import copy

import pytest
import torch
from harness.device import DEVICE
from harness.encoders import check, inputs, make, stock_grads
from torch import nn
from torch.distributed.tensor import DTensor

import two_level_mha as tlm
from two_level_mha.blocks import full_tensor

OPTIMIZERS = ({}, {"foreach": True}, {"fused": True})


def pair(grid: tuple[int, int] = (2, 2), **options) -> tuple[nn.Module, nn.Module]:
    """A model and its parallelized copy; the copy has DTensors of two meshes and plain parameters."""
    model = make("BertModel")
    return model, tlm.parallelize(copy.deepcopy(model), tlm.init_mesh(DEVICE, grid), **options)


def backward(model: nn.Module, seed: int = 2) -> None:
    model.zero_grad()
    y_BLD = model(**inputs("BertModel"))[0]
    torch.manual_seed(seed)
    (y_BLD * torch.randn_like(y_BLD)).sum().backward()


def groups_of(rest: bool) -> tuple[list[int], int, int, int]:
    _, split = pair(rest=rest)
    split.encoder.layer[0].attention.self.q_bias.requires_grad_(False)
    groups = tlm.param_groups(split)
    kinds = [{p.device_mesh if isinstance(p, DTensor) else None for p in group["params"]} for group in groups]
    grouped = [id(p) for group in groups for p in group["params"]]
    trained = [id(p) for p in split.parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(trained)
    return [len(kind) for kind in kinds], len(set().union(*kinds))


@pytest.mark.parametrize("rest, kinds", [(True, 3), (False, 2)])
def test_param_groups(pool, rest, kinds):
    """Each group is of one kind; every trained parameter is in one group, frozen ones in none."""
    for sizes, different in pool.run(groups_of, 4, rest):
        assert sizes == [1] * kinds and different == kinds


def steps(grid: tuple[int, int], optimizer: dict, max_norm: float) -> dict[str, float]:
    """Three steps of AdamW with clipping, each with other gradients; then the differences of norm and parameters."""
    model, split = pair(grid)
    found, moved = {}, [p.detach().clone() for p in model.parameters()]
    arguments = {"lr": 0.01, "weight_decay": 0.1}
    optimizers = [
        torch.optim.AdamW(model.parameters(), **arguments),
        torch.optim.AdamW(tlm.param_groups(split), **arguments, **optimizer),
    ]
    for step in range(3):
        for one in (model, split):
            backward(one, seed=step)
        expected = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        got = tlm.clip_grad_norm_(split.parameters(), max_norm)
        found[f"norm {step}"] = (expected - got).abs().item()
        for one in optimizers:
            one.step()
    for p, before in zip(model.parameters(), moved, strict=True):
        assert p.grad is None or (p - before).abs().max() > 1e-4
    reloaded = make("BertModel")
    tlm.parallelize(reloaded, tlm.init_mesh(DEVICE, grid))
    reloaded.load_state_dict(model.state_dict())  # the trained stock model, split: the same layout as ours
    for (name, p), q in zip(split.named_parameters(), reloaded.parameters(), strict=True):
        found[name] = (full_tensor(p) - full_tensor(q)).abs().max().item()
    return found


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_steps(pool, optimizer):
    """AdamW, in its three forms, over DTensors of two meshes and plain parameters."""
    check(pool.run(steps, 4, (2, 2), optimizer, 1.0))


def test_steps_on_slices_only(pool):
    """Localises: an axis of one rank in the meshes that the steps go by."""
    check(pool.run(steps, 4, (1, 4), {}, 1.0))


def clipped(max_norm: float, norm_type: float) -> dict[str, float]:
    model, split = pair()
    for one in (model, split):
        backward(one)
    expected = nn.utils.clip_grad_norm_(model.parameters(), max_norm, norm_type)
    got = tlm.clip_grad_norm_(split.parameters(), max_norm, norm_type)
    assert type(got) is torch.Tensor and got.shape == ()
    grads, ours = stock_grads(model), stock_grads(split)
    assert set(grads) == set(ours)
    found = {name: (grads[name] - ours[name]).abs().max().item() for name in grads}
    return {"norm": (expected - got).abs().item() / expected.item(), **found}


@pytest.mark.parametrize("max_norm, norm_type", [(0.5, 2.0), (1e9, 2.0), (0.5, 1.0), (0.1, float("inf"))])
def test_clip_grad_norm(pool, max_norm, norm_type):
    """The unsplit model's norm and clipped gradients; above max_norm and below."""
    check(pool.run(clipped, 4, max_norm, norm_type))


def refused() -> list[str]:
    """What stock says to the mix: the reason for these functions."""
    _, split = pair()
    backward(split)
    answers = []
    for attempt in (
        lambda: nn.utils.clip_grad_norm_(split.parameters(), 1.0),
        lambda: torch.optim.AdamW(split.parameters(), foreach=True).step(),
    ):
        try:
            attempt()
            answers.append("accepted")
        except RuntimeError as error:
            answers.append(str(error))
    return answers


def test_stock_refuses_the_mix(pool):
    """When this fails, torch takes mixed parameters by itself, and training.py can go."""
    for answers in pool.run(refused, 4):
        for answer in answers:
            assert "got mixed torch.Tensor and DTensor" in answer, answers


def not_finite() -> str:
    _, split = pair()
    backward(split)
    if torch.distributed.get_rank() == 3:  # in one rank's block only
        split.encoder.layer[0].attention.self.q_weight.grad._local_tensor.fill_(torch.inf)
    before = split.embeddings.word_embeddings.weight.grad.clone()
    try:
        tlm.clip_grad_norm_(split.parameters(), 1.0, error_if_nonfinite=True)
    except RuntimeError as error:
        assert torch.equal(split.embeddings.word_embeddings.weight.grad, before)
        return str(error)
    return ""


def test_not_finite(pool):
    """An infinite gradient of one rank is refused on all, before anything is scaled."""
    for message in pool.run(not_finite, 4):
        assert "non-finite" in message


def test_plain_models():
    """Without DTensors: as torch, also for one tensor, a generator and no gradients."""
    model = nn.Linear(3, 3)
    assert [len(group["params"]) for group in tlm.param_groups(model)] == [2]
    assert tlm.clip_grad_norm_(model.parameters(), 1.0) == 0.0
    model(torch.ones(2, 3)).sum().backward()
    expected = copy.deepcopy([p.grad for p in model.parameters()])
    total = torch.linalg.vector_norm(torch.cat([g.flatten() for g in expected]))
    torch.testing.assert_close(tlm.clip_grad_norm_(model.parameters(), 0.1), total)
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g * 0.1 / total, rtol=1e-5, atol=0)
    assert tlm.clip_grad_norm_(model.weight, 1e-3) > 1e-3
    assert model.weight.grad.norm() <= 1.001e-3
