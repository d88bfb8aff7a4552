"""tlm.verify(repair=True): a majority of ranks mends what it can, and the run goes on as if undisturbed.

A failure here with test_verify.py green is in what is copied from whom (verify.py).
"""

import pytest
import torch
import torch.distributed as dist
from harness.device import DEVICE
from harness.language import Model
from harness.watched import alike, error_of, flip, train, trained
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import two_level_mha as tlm
from two_level_mha.held import held_by, local_of

pytestmark = pytest.mark.cpu_only("bits are flipped by address, in the host's memory")


def mended(hit: str) -> tuple[list[str], str, bool]:
    """What repair did to a flip of rank 2, and whether 3 more steps give the bits of a run without it."""
    runs = []
    for disturbed in (True, False):
        model, optimizer, handle = trained()
        states = optimizer.state[model.head.weight]
        tensors = {"weight": [model.head.weight], "own": [model.attentions[0].q_weight], "buffer": [model.gain]}
        tensors |= {"moment": [states["exp_avg_sq"], states["step"]], "norm": [model.attentions[1].q_norm_weight]}
        done = []
        for step in range(3, 6):
            if disturbed and step == 4 and dist.get_rank() == 2:
                for x in tensors.get(hit, []):
                    flip(local_of(x), 30)
            if hit == "tie" and step == 4 and dist.get_rank() > 1:
                with torch.no_grad():
                    model.norms[0].bias.add_(1.0)
            text = error_of(train, model, [optimizer], step)
            if text != "no error":
                try:
                    done = handle.repair()
                except tlm.IntegrityError as error:
                    return [], str(error), True
                train(model, [optimizer], step)
        runs.append([one.local.clone() for one in held_by(model, [optimizer], handle._places) if one.name != "seen"])
        if disturbed:
            repaired = [text for text in done if not text.startswith("seen")]  # what forward made of the flip
    return repaired, "", all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@pytest.mark.parametrize(
    "hit, expected",
    [
        ("weight", ["head.weight of rank 0 on rank 2"]),
        ("norm", ["attentions.1.q_norm_weight of rank 0 on rank 2"]),
        ("buffer", ["gain of rank 0 on rank 2"]),
        ("moment", ["step of head.weight of rank 0 on rank 2", "exp_avg_sq of head.weight of rank 0 on rank 2"]),
    ],
)
def test_repair_gives_the_undisturbed_run(pool, hit, expected):
    """E. Localises: who is copied from and to, the place that is written, what is kept after it."""
    for done, text, equal in pool.run(mended, 4, hit):
        assert (done, text, equal) == (expected, "", True)


@pytest.mark.parametrize(
    "hit, expected",
    [
        ("own", "attentions.0.q_weight on rank 2 exists once; load the last checkpoint"),
        ("tie", "norms.0.bias has no majority among ranks 0, 1, 2, 3; "),
    ],
)
def test_repair_refuses(pool, hit, expected):
    """Localises: a block that no other rank has, or that as many have otherwise: the last checkpoint must give it."""
    text = alike([text for _, text, _ in pool.run(mended, 4, hit)])
    assert text.startswith(f"repair is not possible: {expected}")


# -- Other ways to run


def replicas(hit: str) -> tuple[str, list[str], bool]:
    """Data parallelism of two replicas around a grid of two ranks: blocks exist twice then."""
    whole = init_device_mesh(DEVICE, (2, 1, 1, 2), mesh_dim_names=("replicate", "shard", "head", "slice"))
    model = Model(whole["head", "slice"], dtype=torch.float32)
    for part in (*model.attentions, model):
        fully_shard(part, mesh=whole["replicate", "shard"], shard_placement_fn=tlm.shard_embed_dim)
    optimizer = torch.optim.AdamW(tlm.param_groups(model), lr=0.01)
    handle = tlm.verify(model, optimizer, every=1)
    torch.manual_seed(whole.get_local_rank("replicate"))  # replicas draw and read what they like
    for step in range(3):
        train(model, [optimizer], 10 * step + whole.get_local_rank("replicate"))
    before = [local_of(p).clone() for p in model.parameters()]
    if dist.get_rank() == 2:
        flip(local_of(model.get_parameter(hit)), 30)
    text = error_of(train, model, [optimizer], 7 + whole.get_local_rank("replicate"))
    done = handle.repair()
    return text, done, all(torch.equal(local_of(p), x) for p, x in zip(model.parameters(), before, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("hit", ["attentions.0.q_weight", "head.weight"])
def test_replicas_of_fsdp_mend_blocks(pool, hit):
    """Localises: who holds the same on meshes of more axes; ids and random states, which are those of a grid."""
    found = pool.run(replicas, 4, hit, timeout=240)
    assert alike([text for text, *_ in found]).startswith(f"before step 4: rank 2: {hit} changed without")
    assert [rest for _, *rest in found] == [[[f"{hit} of rank 0 on rank 2"], True]] * 4
