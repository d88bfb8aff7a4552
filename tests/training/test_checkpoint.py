"""Checkpoints: saved on one grid, loaded on another or without any, exactly (level E)."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from harness.calls import EMBED, HEADS, Call, mesh, on_ranks, stock_layer
from harness.device import DEVICE
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import two_level_mha as tlm
from two_level_mha.blocks import full_tensor

CALL = Call({"add_bias_kv": True, "kdim": 6, "vdim": 10, "batch_first": True})


def trained(layer: nn.Module) -> torch.optim.AdamW:
    """Two steps of AdamW, so that parameters and both moments are not trivial."""
    torch.manual_seed(2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    for _ in range(2):
        q, k, v = (torch.randn(2, 5, width, dtype=torch.float64) for width in (EMBED, 6, 10))
        optimizer.zero_grad()
        layer(q, k, v)[0].square().sum().backward()
        optimizer.step()
    return optimizer


def values(layer: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Whole parameters and whole AdamW moments by name."""
    found = {name: full_tensor(p) for name, p in layer.named_parameters()}
    for name, p in layer.named_parameters():
        for key, x in optimizer.state[p].items():
            found[f"{name}/{key}"] = full_tensor(x)
    return found


def save(grid, scheme, directory) -> dict[str, torch.Tensor]:
    layer = tlm.TwoLevelMultiheadAttention.from_torch(stock_layer(CALL), mesh(grid), scheme=scheme)
    optimizer = trained(layer)
    dcp.save(
        {"model": layer.state_dict(), "optimizer": get_optimizer_state_dict(layer, optimizer)}, checkpoint_id=directory
    )
    return values(layer, optimizer)


def load(grid, scheme, directory) -> dict[str, torch.Tensor]:
    """Into other weights and an optimizer that has seen other steps."""
    layer = tlm.TwoLevelMultiheadAttention.from_torch(stock_layer(CALL, seed=7), mesh(grid), scheme=scheme)
    optimizer = trained(layer)
    state = {"model": layer.state_dict(), "optimizer": get_optimizer_state_dict(layer, optimizer)}
    dcp.load(state, checkpoint_id=directory)
    layer.load_state_dict(state["model"])
    set_optimizer_state_dict(layer, optimizer, state["optimizer"])
    return values(layer, optimizer)


SLICES, HEADS_WHOLE = "slices", "heads"  # the two storages


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        (((2, 2), SLICES), ((1, 4), SLICES)),
        (((4, 2), SLICES), ((2, 2), HEADS_WHOLE)),
        (((2, 2), HEADS_WHOLE), ((4, 2), SLICES)),
    ],
)
def test_another_grid(pool, tmp_path, saved, loaded):
    """Parameters and AdamW's moments, by torch.distributed.checkpoint, between grids and storages."""
    expected = pool.run(save, saved[0][0] * saved[0][1], *saved, str(tmp_path), timeout=120)[0]
    for found in pool.run(load, loaded[0][0] * loaded[0][1], *loaded, str(tmp_path), timeout=120):
        assert found.keys() == expected.keys() and "q_weight/exp_avg_sq" in found
        assert all(torch.equal(x, expected[name]) for name, x in found.items())


class Model(nn.Module):
    """Attention under a parent, one twice, a tied pair, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, EMBED, dtype=torch.float64)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(EMBED, HEADS, 8, dtype=torch.float64), 2)
        self.attention = nn.MultiheadAttention(EMBED, HEADS, kdim=6, add_bias_kv=True, dtype=torch.float64)
        self.again = self.attention
        self.head = nn.Linear(EMBED, 11, bias=False, dtype=torch.float64)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.ones(3))


def split(model: Model, grid) -> Model:
    convert = tlm.TwoLevelMultiheadAttention.from_torch
    model = copy.deepcopy(model)
    for layer in model.encoder.layers:
        layer.self_attn = convert(layer.self_attn, mesh(grid))
    model.attention = model.again = convert(model.attention, mesh(grid))
    return model


def full_states(grid) -> tuple[dict, dict]:
    """full_state_dict of a model, and of one module; the first loads into stock and into our model again."""
    torch.manual_seed(0)
    stock = Model()
    state = tlm.full_state_dict(split(stock, grid))
    single = tlm.full_state_dict(tlm.TwoLevelMultiheadAttention.from_torch(stock_layer(CALL), mesh(grid)))
    if state:
        expected = stock.state_dict()
        assert list(state) == list(expected)
        assert all(torch.equal(x, expected[name]) and type(x) is torch.Tensor for name, x in state.items())
        assert state["head.weight"] is state["embedding.weight"]
        assert state["again.bias_k"] is state["attention.bias_k"]
        Model().load_state_dict(state)
        theirs = stock_layer(CALL).state_dict()
        assert single.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in single.items())
    torch.manual_seed(1)
    other = split(Model(), grid)
    other.load_state_dict(stock.state_dict())
    again = tlm.full_state_dict(other)
    assert all(torch.equal(x, state[name]) for name, x in again.items())
    return state, single


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("grid", [None, (2, 2), (4, 2)])
def test_full_state_dict(pool, grid):
    """Stock's keys and values on rank 0, nothing elsewhere; and back."""
    results = on_ranks(pool, full_states, grid)
    assert all(results[0])
    assert all(result == ({}, {}) for result in results[1:])


def tied(grid) -> bool:
    """Whether attentions that share a weight write it twice, as stock has it."""
    torch.manual_seed(0)
    stock = nn.ModuleList([stock_layer(Call()), stock_layer(Call(), seed=1)])
    ours = nn.ModuleList([tlm.TwoLevelMultiheadAttention.from_torch(one, mesh(grid)) for one in stock])
    ours[1].k_weight = ours[0].k_weight
    ours[1].out_weight = ours[0].out_weight
    state = tlm.full_state_dict(ours)
    if not state:
        return True
    again = nn.ModuleList([stock_layer(Call()), stock_layer(Call())])
    again.load_state_dict(state)
    k_rows, expected = slice(EMBED, 2 * EMBED), stock.state_dict()
    expected["1.in_proj_weight"][k_rows] = expected["0.in_proj_weight"][k_rows]
    expected["1.out_proj.weight"] = expected["0.out_proj.weight"]
    return all(torch.equal(x, expected[name]) for name, x in again.state_dict().items())


def test_tied_attentions(pool):
    """Localises: a tensor taken as written because another module wrote it."""
    assert tied(None)
    assert pool.run(tied, 2, (1, 2)) == [True] * 2


def stages() -> int:
    """Tensors that this rank gets of its stage of a pipeline of two."""
    whole = torch.distributed.init_device_mesh(DEVICE, (2, 1, 2), mesh_dim_names=("pp", "head", "slice"))
    layer = tlm.TwoLevelMultiheadAttention(EMBED, HEADS, mesh=whole["head", "slice"])
    return len(tlm.full_state_dict(layer))


def test_a_stage_without_rank_0(pool):
    """Localises: the weights of a stage that rank 0 has no part of, kept by nobody."""
    assert pool.run(stages, 4) == [4, 0, 4, 0]


def test_extra_state():
    """Localises: values of a state dict that are no tensors."""

    class Counts(nn.Module):
        def get_extra_state(self):
            return {"steps": 3}

        def set_extra_state(self, state):
            pass

    assert tlm.full_state_dict(nn.Sequential(Counts()))["0._extra_state"] == {"steps": 3}
