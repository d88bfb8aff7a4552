"""Training a model of TwoLevelAttention on a grid is training the unsplit model: float64, level T, unless it says R.

A failure here with test_decoder.py green is in training.py, or in how torch's utilities treat DTensors.
"""

import pytest
import torch
from harness.calls import mesh, text_of
from harness.device import DEVICE
from harness.language import Model, backward, difference, gradients, local_bytes, tokens, weights
from torch.distributed.tensor import DTensor

import two_level_mha as tlm

OPTIMIZERS = ({}, {"foreach": True}, {"fused": True})


def steps(grid, optimizer: dict, options: dict) -> dict[str, float]:
    """Three steps of AdamW with clipping: the differences of gradients, norms and weights."""
    whole, split = Model(**options), Model(mesh(grid), **options)
    arguments = {"lr": 0.01, "weight_decay": 0.1, **optimizer}
    optimizers = [torch.optim.AdamW(tlm.param_groups(model), **arguments) for model in (whole, split)]
    found = {}
    for step in range(3):
        losses = [backward(model, tokens(seed=step), seed=step) for model in (whole, split)]
        found[f"loss {step}"] = abs(losses[0] - losses[1])
        found[f"gradients {step}"] = difference(gradients(split), gradients(whole))
        norms = [tlm.clip_grad_norm_(model.parameters(), 0.5) for model in (whole, split)]
        assert norms[0] > 0.5
        found[f"norm {step}"] = (norms[0] - norms[1]).abs().item()
        for one in optimizers:
            one.step()
    found["weights"] = difference(weights(split), weights(whole))
    return {name: error for name, error in found.items() if not error <= 1e-10}


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_steps(pool, optimizer):
    """T. Localises: an optimizer, or clipping, over blocks, replicated DTensors (norms, biases) and plain ones."""
    assert pool.run(steps, 4, (2, 2), optimizer, {}) == [{}] * 4


@pytest.mark.parametrize(
    "options", [{"scheme": "sequence", "combine": "concat"}, {"scheme": "weights"}, {"dropout": 0.3}], ids=str
)
def test_steps_of_other_layers(pool, options):
    """T. Localises: storage and layout, dropout that every grid draws alike."""
    assert pool.run(steps, 4, (2, 2), {}, options) == [{}] * 4


def checkpointed(grid) -> list[float]:
    ids = tokens()
    options = {"dropout": 0.4}
    models = [Model(), Model(mesh(grid), **options), Model(mesh(grid), checkpointed=True, **options), Model(**options)]
    for model in models:
        backward(model, ids)
    undropped, plain, again, whole = (gradients(model) for model in models)
    return [difference(plain, again), difference(plain, whole), difference(undropped, whole)]


def test_activation_checkpointing(pool):
    """E and T. Localises: the dropout seed, which recomputation must draw again, not anew."""
    for again, whole, undropped in pool.run(checkpointed, 4, (2, 2)):
        assert again == 0.0 and whole <= 1e-10 and undropped > 1e-3


# -- Low precision


def low_precision(grid, dtype: torch.dtype) -> list[float]:
    """Relative errors of all gradients under autocast, split and unsplit, against float64."""
    ids = tokens(batch=4, length=24)
    exact = Model()
    backward(exact, ids)
    expected = torch.cat([g.flatten() for g in gradients(exact).values()])
    errors = []
    for place in (grid, None):
        model = Model(mesh(place), dtype=torch.float32)
        model.load_state_dict({name: x.float() for name, x in exact.state_dict().items()})
        with torch.autocast(DEVICE, dtype):
            backward(model, ids, scale=1024.0)
        got = torch.cat([g.flatten() for g in gradients(model).values()]) / 1024.0
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        errors.append(((got - expected).norm() / expected.norm()).item())
    return errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(pool, dtype):
    """R. Localises: an exchange or a sum in lower precision than the unsplit layer's."""
    for split, whole in pool.run(low_precision, 4, (2, 2), dtype):
        assert 0.0 < split <= 2 * whole < 0.1


# -- GradScaler: two optimizers under one scaler


def scaled(grid, poisoned: str | None, together: bool, optimizer: dict) -> dict[str, object]:
    """One step; `poisoned` gets an inf, a DTensor on rank 3 only. What moved on this rank, the scale, the distance."""
    whole, split = Model(), Model(mesh(grid))
    scalers = [torch.amp.GradScaler(DEVICE, init_scale=8.0) for _ in range(2)]
    optimizers = [
        [torch.optim.AdamW([group], lr=0.01, **optimizer) for group in tlm.param_groups(model)]
        for model in (whole, split)
    ]
    before = local_bytes(split)
    for model, scaler, group in zip((whole, split), scalers, optimizers, strict=True):
        backward(model, tokens(), scale=scaler.scale(torch.ones(())))
        if poisoned and model is split:
            grad = split.get_parameter(poisoned).grad
            if not isinstance(grad, DTensor):
                grad.fill_(torch.inf)
            elif torch.distributed.get_rank() == 3:
                grad._local_tensor.view(-1)[0] = torch.inf
        if together:
            tlm.unscale_(scaler, group)
        for one in group:
            scaler.step(one)
        scaler.update()
    changed = [not torch.equal(x, y) for x, y in zip(before, local_bytes(split), strict=True)]
    is_split = [isinstance(p, DTensor) for p in split.parameters()]
    moved = {kind: {c for c, s in zip(changed, is_split, strict=True) if s == kind} for kind in (True, False)}
    return {
        "split": moved[True], "plain": moved[False], "scale": scalers[1].get_scale(),
        "difference": difference(weights(split), weights(whole)),
    }  # fmt: skip


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_grad_scaler(pool, together, optimizer):
    """T. Localises: unscaling of blocks; a finite step is the unsplit model's."""
    for found in pool.run(scaled, 4, (2, 2), None, together, optimizer):
        assert found["split"] == found["plain"] == {True} and found["scale"] == 8.0
        assert found["difference"] <= 1e-10


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
@pytest.mark.parametrize("name", ["attentions.1.k_weight", "attentions.0.q_bias", "head.weight"])
def test_an_inf_skips_the_step(pool, name, optimizer, together):
    """E. Localises: found_inf of one rank that the others never hear of: ranks would part for good."""
    for found in pool.run(scaled, 4, (2, 2), name, together, optimizer):
        kind, other = ("plain", "split") if name == "head.weight" else ("split", "plain")
        assert found[kind] == {False} and found[other] == {not together} and found["scale"] == 4.0


def replicated_first(ours: bool) -> float:
    """Whether this rank hears of rank 3's inf where a replicated gradient comes first."""
    layer = Model(mesh((2, 2))).attentions[0]
    optimizer = torch.optim.SGD([layer.q_norm_weight, layer.q_weight])
    for p in (layer.q_norm_weight, layer.q_weight):
        p.grad = torch.ones_like(p)
    if torch.distributed.get_rank() == 3:
        layer.q_weight.grad._local_tensor.fill_(torch.inf)
    scaler = torch.amp.GradScaler(DEVICE)
    scaler.scale(torch.ones(()))
    if ours:
        tlm.unscale_(scaler, [optimizer])
    else:
        scaler.unscale_(optimizer)
    return sum(x.item() for x in scaler._found_inf_per_device(optimizer).values())


def test_torch_looks_at_the_first_gradient_only(pool):
    """When this fails, torch spreads found_inf however a group is ordered, and param_groups need not sort."""
    assert pool.run(replicated_first, 4, False) == [0.0, 0.0, 0.0, 1.0]


def test_unscale_takes_any_order(pool):
    """E. Localises: unscale_'s own news of an inf, for optimizers that param_groups did not order."""
    assert pool.run(replicated_first, 4, True) == [1.0] * 4


def mixed_kinds() -> str:
    model = Model(mesh((2, 2)))
    optimizer = torch.optim.SGD(tlm.param_groups(model), lr=0.1)
    return text_of(tlm.unscale_, torch.amp.GradScaler(DEVICE), [optimizer])


def test_unscale_names_the_way_for_mixed_kinds(pool):
    """E. Localises: torch's own error for plain parameters and DTensors in one optimizer."""
    for text in pool.run(mixed_kinds, 4):
        assert text.startswith("optimizer 0 has parameters of 2 kinds") and "tlm.param_groups" in text


def test_param_groups_put_split_parameters_first(pool):
    """E. Localises: the order inside a group, which GradScaler reads: the two tests above say why."""
    assert pool.run(split_first, 4) == [True] * 4


def split_first() -> bool:
    model = Model(mesh((2, 2)))
    model.attentions[0].q_weight.requires_grad_(False)
    groups = [group["params"] for group in tlm.param_groups(model)]
    ours = next(group for group in groups if isinstance(group[0], DTensor))
    replicated = [all(placement.is_replicate() for placement in p.placements) for p in ours]
    return replicated == sorted(replicated) and True in replicated
