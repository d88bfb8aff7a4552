"""save and load: training goes on as if it had not stopped. E on the grid of the save, T on another.

A failure here with test_checkpoint.py green is in what is stored (training_state.py): a name that depends on the grid,
a state or a hyper-parameter that is left out, a random generator. What is refused, and what a kill or a bad disk does:
test_saving_faults.py.
"""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from harness.calls import mesh, on_ranks
from harness.device import DEVICE
from harness.language import BYTES, Model, tokens
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import two_level_mha as tlm

WIDTH = 16


class Encoder(nn.Module):
    """A model that `parallelize` splits, MLPs too: parameters of three kinds, tied weights, buffers of both sorts."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        options = {"dropout": dropout, "batch_first": True, "dtype": torch.float64}
        self.embedding = nn.Embedding(BYTES, WIDTH, dtype=torch.float64)
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(WIDTH, 4, 8, **options) for _ in range(2)])
        self.head = nn.Linear(WIDTH, BYTES, dtype=torch.float64)
        self.head.weight = self.embedding.weight
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, ids_BL):
        x_BLD = self.embedding(ids_BL) * 0.3
        for layer in self.layers:
            x_BLD = layer(x_BLD)
        self.seen += 1
        return self.head(x_BLD) * (1 + self.seen / 10)


def decoder(grid, seed: int, dropout: float) -> nn.Module:
    model = Model(mesh(grid), dropout=dropout)
    torch.manual_seed(seed)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1) if seed else None
    return model


def encoder(grid, seed: int, dropout: float) -> nn.Module:
    torch.manual_seed(seed)
    return tlm.parallelize(Encoder(dropout), mesh(grid))


MODELS = {"decoder": decoder, "encoder": encoder}


def trainer(kind: str, grid, seed: int, dropout: float):
    model = MODELS[kind](grid, seed, dropout)
    optimizer = torch.optim.AdamW(tlm.param_groups(model), lr=0.01 if seed == 0 else 0.5, weight_decay=0.1)
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)


def train(model, optimizer, scheduler, first: int) -> list[float]:
    """The losses of three steps, and a number drawn after each."""
    losses = []
    for step in range(first, first + 3):
        ids_BL = tokens(seed=step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(ids_BL[:, :-1]).flatten(0, 1), ids_BL[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses += [loss.item(), torch.rand(()).item()]
    return losses


def through(grid, kind: str, dropout: float, directory: Path) -> list[float]:
    """The losses of steps 3 to 5 of one run, which saves after step 2."""
    parts = trainer(kind, grid, 0, dropout)
    train(*parts, 0)
    extra = {"scheduler": parts[2].state_dict(), "position": [3, "epoch"]}
    assert tlm.save(directory, *parts[:2], step=3, extra=extra) == directory / "step-00000003"
    return train(*parts, 3)


def resumed(grid, kind: str, dropout: float, directory: Path, step: int | None = None) -> list[float]:
    """The same losses of another run: other weights, another lr, other draws before it loads."""
    parts = trainer(kind, grid, 1, dropout)
    loaded = tlm.load(directory, *parts[:2], step=step)
    assert (loaded.step, loaded.extra["position"], loaded.path) == (3, [3, "epoch"], directory / "step-00000003")
    parts[2].load_state_dict(loaded.extra["scheduler"])
    return train(*parts, loaded.step)


@pytest.mark.parametrize("kind", MODELS)
def test_the_same_grid(pool, tmp_path, kind):
    """E, with dropout: losses and the numbers drawn between them. Localises: anything left out of a checkpoint."""
    expected = on_ranks(pool, through, (2, 2), kind, 0.2, tmp_path)
    assert on_ranks(pool, resumed, (2, 2), kind, 0.2, tmp_path) == expected
    assert len(set(expected[0])) == 6


@pytest.mark.parametrize("kind", MODELS)
def test_other_grids(pool, tmp_path, kind):
    """T. Localises: resharding, names or optimizer groups that depend on the grid. Dropout on 4 ranks."""
    for dropout, grids in ((0.2, [(4, 1), (1, 4)]), (0.0, [(1, 2), None])):
        directory = tmp_path / str(dropout)
        expected = torch.tensor(on_ranks(pool, through, (2, 2), kind, dropout, directory)[0])
        for grid in grids:
            found = torch.tensor(on_ranks(pool, resumed, grid, kind, dropout, directory, 3), dtype=torch.float64)
            losses = (found - expected)[:, ::2].abs().max().item()
            assert losses <= 1e-6, (kind, grid, losses)


def sharded(directory: Path, seed: int, save: bool) -> list[float]:
    """fully_shard around a grid; with a head of 11 rows and norms of 12 its shards are of different sizes."""
    whole = init_device_mesh(DEVICE, (2, 1, 2), mesh_dim_names=("dp", "head", "slice"))
    model = Model(whole["head", "slice"])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + seed)
    model.odd = nn.Parameter(torch.ones(1, dtype=torch.float64))  # one rank holds nothing of it
    for block in (*model.attentions, model):
        fully_shard(block, mesh=whole["dp"], shard_placement_fn=tlm.shard_embed_dim)
    optimizer = torch.optim.AdamW(tlm.param_groups(model), lr=0.01 + seed)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100)
    if save:
        train(model, optimizer, scheduler, 0)
        tlm.save(directory, model, optimizer, step=3)
    else:
        tlm.load(directory, model, optimizer)
    return train(model, optimizer, scheduler, 3)


def test_fully_shard(pool, tmp_path):
    """E. Localises: FSDP2's parameters, which are in place only after its hooks; shards of no rows."""
    expected = pool.run(sharded, 4, tmp_path, 0, True, timeout=120)
    assert pool.run(sharded, 4, tmp_path, 1, False, timeout=120) == expected


def scalar(directory: Path) -> float:
    """A DTensor without dims, after a step, a save, a load and a step; AdamW's count of steps has no dims either."""
    whole = mesh((1, 2))["slice"]
    model = nn.Linear(2, 2)
    model.scale = nn.Parameter(distribute_tensor(torch.ones(()), whole, [Replicate()]))
    optimizer = torch.optim.AdamW(tlm.param_groups(model), lr=0.25, weight_decay=0.0)
    model.scale.grad = torch.ones_like(model.scale)
    optimizer.step()
    tlm.save(directory, model, optimizer, step=1)
    tlm.load(directory, model, optimizer)
    assert not isinstance(optimizer.state[model.scale]["step"], DTensor)
    optimizer.step()
    optimizer.state[model.scale]["rows"] = distribute_tensor(torch.ones(4), whole, [Shard(0)])
    with pytest.raises(
        tlm.GridError, match=r"keeps a DTensor rows of shape \(4,\) for scale of shape \(\): only states"
    ):
        tlm.save(directory, model, optimizer, step=2)
    return model.scale.full_tensor().item()


def test_a_split_scalar(pool, tmp_path):
    """E. Localises: a state that is taken for a part of its parameter because it has its shape."""
    assert pool.run(scalar, 2, tmp_path) == [pytest.approx(0.5)] * 2


OPTIMIZERS = {
    "AdamW, foreach": lambda params, lr: torch.optim.AdamW(params, lr=lr, amsgrad=True, foreach=True),
    "Adam, tensor lr": lambda params, lr: torch.optim.Adam(
        params, lr=torch.tensor(lr), betas=(0.8, 0.9), foreach=False
    ),
    "SGD": lambda params, lr: torch.optim.SGD(params, lr=lr),
    "SGD, momentum": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9),
    "NAdam": lambda params, lr: torch.optim.NAdam(params, lr=lr),
    "RMSprop": lambda params, lr: torch.optim.RMSprop(params, lr=lr, centered=True, momentum=0.5),
    "Adagrad": lambda params, lr: torch.optim.Adagrad(params, lr=lr),
    "Adafactor": lambda params, lr: torch.optim.Adafactor(params, lr=lr),
    "two": lambda params, lr: [torch.optim.SGD(params[:1], lr, 0.9), torch.optim.Adam(params[1:], lr)],
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(tmp_path, name):
    """E, one process, no grid. Localises: a state without tensors, or of another shape than its parameter's; several
    optimizers; a parameter that has no state yet, and a save that would give it one.
    """

    def make(seed: int, lr: float):
        torch.manual_seed(seed)
        model = nn.ModuleDict(
            {"used": nn.Linear(3, 4), "scalar": nn.ParameterList([torch.ones(())]), "not": nn.Linear(2, 2)}
        )
        return model, OPTIMIZERS[name](list(model.parameters()), lr)

    def steps(model, optimizers) -> list:
        torch.manual_seed(3)
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        for _ in range(2):
            model.zero_grad()
            (model["used"](torch.randn(5, 3)) * model["scalar"][0]).square().sum().backward()
            for one in optimizers:
                one.step()
        return [*model.state_dict().values()], [one.state_dict() for one in optimizers]

    model, optimizer = make(0, 0.02)
    tlm.save(tmp_path, model, optimizer, step=0)
    steps(model, optimizer)
    tlm.save(tmp_path, model, optimizer, step=2)
    for step in (0, 2):
        expected_model, expected = make(0, 0.02)
        for _ in range(step // 2):
            steps(expected_model, expected)
        expected = steps(expected_model, expected)
        other, another = make(1, 0.5)
        steps(other, another)
        tlm.load(tmp_path, other, another, step=step)
        torch.testing.assert_close(steps(other, another), expected, rtol=0, atol=0)


def test_names(tmp_path):
    """E. Localises: names that torch.compile changes, a tensor stored twice, a buffer that is not part of the state."""
    torch.manual_seed(0)
    model = Encoder(0.0)
    compiled = torch.compile(copy.deepcopy(model))
    folder = tlm.save(tmp_path, compiled, step=1)
    stored = folder.joinpath("manifest.json").read_text()
    assert "_orig_mod" not in stored and "head.weight" not in stored and "scratch" not in stored
    other = Encoder(0.0)
    tlm.load(str(tmp_path), other)
    assert all(torch.equal(x, other.state_dict()[name]) for name, x in model.state_dict().items())
