"""fully_shard around a grid, on a mesh (dp, head, slice) of 8 ranks: the unsplit model on the whole batch, in float64.

A failure here with test_training_decoder.py green is in how FSDP and the storage of blocks meet.
"""

import copy

import pytest
import torch
from harness.decoders import full_gradients, make, prompt
from harness.device import DEVICE
from harness.language import Model, backward, difference, gradients, tokens, weights
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

import two_level_mha as tlm

DP = 2


def sharded(mesh, **options) -> Model:
    model = Model(mesh["head", "slice"], **options)
    for attention in model.attentions:
        fully_shard(attention, mesh=mesh["dp"], shard_placement_fn=tlm.shard_embed_dim)
    return fully_shard(model, mesh=mesh["dp"], shard_placement_fn=tlm.shard_embed_dim)


def held(model: Model) -> dict[str, float]:
    """The share of each weight of the first attention that this rank keeps."""
    return {
        name: p._local_tensor.numel() / p.numel()
        for name, p in model.attentions[0].named_parameters()
        if name.endswith("_weight") and "norm" not in name
    }


def trained(options: dict) -> tuple[dict[str, float], dict[str, float]]:
    mesh = init_device_mesh(DEVICE, (DP, 2, 2), mesh_dim_names=("dp", "head", "slice"))
    whole, split = Model(**options), sharded(mesh, **options)
    arguments = {"lr": 0.01, "weight_decay": 0.1}
    optimizers = [torch.optim.AdamW(tlm.param_groups(model), **arguments) for model in (whole, split)]
    found, ids = {}, tokens(batch=2 * DP)
    mine = ids.chunk(DP)[mesh.get_local_rank("dp")]
    for step in range(2):
        for model, batch in ((whole, ids), (split, mine)):
            backward(model, batch)
        found[f"gradients {step}"] = difference(gradients(split), gradients(whole))
        norms = [tlm.clip_grad_norm_(model.parameters(), 0.5) for model in (whole, split)]
        found[f"norm {step}"] = (norms[0] - norms[1]).abs().item()
        for one in optimizers:
            one.step()
    found["weights"] = difference(weights(split), weights(whole))
    return {name: error for name, error in found.items() if not error <= 1e-10}, held(split)


@pytest.mark.parametrize("options", [{}, {"scheme": "heads"}], ids=str)
def test_steps(pool, options):
    """T. Localises: gradients averaged over dp, clipping over three meshes, the embed dim that is sharded."""
    for found, shares in pool.run(trained, 8, options, timeout=120):
        assert not found
        assert shares == dict.fromkeys(("q_weight", "k_weight", "v_weight", "out_weight"), 1 / 8)


def test_which_dim(pool):
    """E. Localises: shard_embed_dim, for both storages and for what is no weight block."""
    assert pool.run(dims, 4) == [True] * 4


def dims() -> bool:
    expected = {name: Shard(2) for name in ("q_weight", "k_weight", "v_weight")} | {"out_weight": Shard(0)}
    mesh = tlm.init_mesh(DEVICE, (2, 2))
    for scheme in ("slices", "heads"):
        layer = tlm.TwoLevelAttention(12, 8, 4, 8, bias=True, qk_norm=1e-6, mesh=mesh, scheme=scheme)
        for name, p in layer.named_parameters():
            assert isinstance(p, DTensor) and tlm.shard_embed_dim(p) == expected.get(name), name
    assert tlm.shard_embed_dim(torch.nn.Parameter(torch.zeros(2, 3, 4))) is None
    return True


def mixed_precision() -> tuple[float, float]:
    """Relative errors of bf16 gradients from float64, split and unsplit under one policy: the largest."""
    mesh = init_device_mesh(DEVICE, (DP, 2, 2), mesh_dim_names=("dp", "head", "slice"))
    policy = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}
    exact, split, whole = Model(), Model(mesh["head", "slice"]).float(), Model().float()
    for model in (split, whole):
        for attention in model.attentions:
            fully_shard(attention, mesh=mesh["dp"], shard_placement_fn=tlm.shard_embed_dim, **policy)
        fully_shard(model, mesh=mesh["dp"], shard_placement_fn=tlm.shard_embed_dim, **policy)
    ids = tokens(batch=2 * DP)
    backward(exact, ids)
    for model in (split, whole):
        backward(model, ids.chunk(DP)[mesh.get_local_rank("dp")])
    wanted = gradients(exact)
    ours, stock = (
        max(((x.double() - wanted[name]).norm() / wanted[name].norm()).item() for name, x in gradients(model).items())
        for model in (split, whole)
    )
    return ours, stock


def test_mixed_precision(pool):
    """R. Localises: an input or a replicated parameter that FSDP's cast does not reach, or a sum in bf16."""
    for ours, stock in pool.run(mixed_precision, 8, timeout=120):
        assert ours <= 2 * stock, (ours, stock)


def with_the_rest() -> dict[str, float]:
    """What differs by more than rounding from the unsplit Llama on the whole batch: logits and gradients."""
    mesh = init_device_mesh(DEVICE, (DP, 2, 2), mesh_dim_names=("dp", "head", "slice"))
    stock = make("llama", exact=True)
    split = tlm.parallelize(copy.deepcopy(stock), mesh["head", "slice"])
    for part in (*split.model.layers, split):
        fully_shard(part, mesh=mesh["dp"], shard_placement_fn=tlm.shard_embed_dim)
    ids, keep = prompt(rows=2 * DP)
    dp = mesh.get_local_rank("dp")
    logits = [model(x, use_cache=False).logits for model, x in ((stock, ids), (split, ids.chunk(DP)[dp]))]
    found = {"logits": (logits[0].chunk(DP)[dp] - logits[1]).abs().max().item()}
    for y in logits:
        y.square().mean().backward()
    grads = full_gradients(split)
    for name, p in stock.named_parameters():
        found[name] = (grads[name] - p.grad).abs().max().item() / p.grad.abs().max().item()
    return {name: error for name, error in found.items() if not error <= 1e-10}


def test_with_the_models_own_plan(pool):
    """T. Localises: MLPs and embeddings split over the flattened grid, which FSDP must find in the same mesh."""
    assert pool.run(with_the_rest, 8, timeout=120) == [{}] * 8
