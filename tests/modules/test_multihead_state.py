"""TwoLevelMultiheadAttention as what holds weights: construction, conversion, state dicts, copies (level E)."""

import copy

import pytest
import torch
from harness.calls import EMBED, FLOAT64, GRIDS, HEADS, Call, everything, mesh, on_ranks, stock_layer
from harness.device import DEVICE
from torch import nn

import two_level_mha as tlm
from two_level_mha.blocks import full_tensor

VARIANTS = [
    {"bias": bias, "add_bias_kv": bias_kv, **widths, "dtype": dtype}
    for bias in (True, False)
    for bias_kv in (True, False)
    for widths in ({}, {"kdim": 6, "vdim": 10}, {"kdim": 6})
    for dtype in (torch.float32, torch.bfloat16)
]


def initial(options: dict, grid) -> bool:
    """The same seed, the same weights, and the generator is left where stock leaves it."""
    torch.manual_seed(5)
    stock, expected_rng = nn.MultiheadAttention(EMBED, HEADS, **options), torch.get_rng_state()
    torch.manual_seed(5)
    ours, rng = tlm.TwoLevelMultiheadAttention(EMBED, HEADS, **options, mesh=mesh(grid)), torch.get_rng_state()
    state = ours.stock_state()
    same = list(state) == list(stock.state_dict()) and torch.equal(rng, expected_rng)
    return same and all(torch.equal(x, state[name]) for name, x in stock.state_dict().items())


def converted(options: dict, grid) -> bool:
    """from_torch, to_torch: bits, requires_grad, mode and attributes."""
    stock = nn.MultiheadAttention(EMBED, HEADS, 0.25, batch_first=True, add_zero_attn=True, **options)
    stock = stock.train(options["bias"])
    for index, p in enumerate(stock.parameters()):
        p.requires_grad_(index % 2 == 0)
    back = tlm.TwoLevelMultiheadAttention.from_torch(stock, mesh(grid)).to_torch()
    mine, theirs = dict(back.named_parameters()), dict(stock.named_parameters())
    same = list(mine) == list(theirs) and list(back.state_dict()) == list(stock.state_dict())
    same &= all(torch.equal(mine[name], p) for name, p in theirs.items())
    same &= all(mine[name].requires_grad == p.requires_grad for name, p in theirs.items())
    attributes = ("training", "dropout", "batch_first", "add_zero_attn", "kdim", "vdim", "embed_dim", "num_heads")
    return same and all(getattr(back, name) == getattr(stock, name) for name in attributes)


def wrong(grid, check) -> list[dict]:
    return [options for options in VARIANTS if not check(options, grid)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("check", [initial, converted])
def test_every_variant(pool, check, grid):
    """Level E: bit for bit, each combination of biases, widths and dtype."""
    for failed in on_ranks(pool, wrong, grid, check):
        assert not failed


def loaded(grid) -> None:
    """Stock's keys and full own keys load, alone and under a parent, strictly; own ones load as saved."""
    options = {"add_bias_kv": True, "kdim": 6}
    source = stock_layer(Call(options))
    names = ("attention", "norm")
    parents = {
        "stock": nn.ModuleDict(zip(names, (source, nn.LayerNorm(4)), strict=True)),
        "ours": nn.ModuleDict(
            zip(names, (tlm.TwoLevelMultiheadAttention(EMBED, HEADS, **options, **FLOAT64, mesh=mesh(grid)),
                        nn.LayerNorm(4)), strict=True)
        ),
    }  # fmt: skip

    def check(what):
        state = parents["ours"]["attention"].stock_state()
        assert all(torch.equal(x, state[name]) for name, x in source.state_dict().items()), what
        with torch.no_grad():
            for p in parents["ours"].parameters():
                p.zero_()

    ours = parents["ours"]["attention"]
    ours.load_state_dict(source.state_dict())
    own_full = {name: full_tensor(x).clone() for name, x in ours.state_dict().items()}
    own = {name: x.clone() for name, x in ours.state_dict().items()}
    check("stock keys")
    missing = parents["ours"].load_state_dict(parents["stock"].state_dict())
    assert not missing.missing_keys and not missing.unexpected_keys
    check("stock keys under a parent")
    ours.load_state_dict(own_full)
    check("full own keys")
    ours.load_state_dict(own)
    check("own keys")
    ours.load_state_dict(source.state_dict(), assign=True)
    check("assign")
    incomplete = source.state_dict()
    del incomplete["out_proj.bias"]
    with pytest.raises(RuntimeError, match="Missing key.*out_proj.bias"):
        ours.load_state_dict(incomplete)
    wrong = source.state_dict() | {"out_proj.weight": torch.zeros(8, 16)}
    with pytest.raises(RuntimeError, match="size mismatch for out_proj.weight"):
        ours.load_state_dict(wrong)


@pytest.mark.parametrize("grid", [None, (2, 2), (4, 2)])
def test_load_state_dict(pool, grid):
    """T. Localises: the table of stock names, or the hook that reads them; `msg` says after which load."""
    on_ranks(pool, loaded, grid)


def copies(grid, directory) -> None:
    """deepcopy, torch.save of the state dict and dtype changes leave a working layer."""
    call = Call()
    stock = stock_layer(call)
    ours = tlm.TwoLevelMultiheadAttention.from_torch(stock, mesh(grid))
    expected = everything(stock, call)

    def check(layer, what):
        for name, x in everything(layer, call).items():
            torch.testing.assert_close(x, expected[name], rtol=0, atol=1e-10, msg=f"{what}: {name}")

    check(copy.deepcopy(ours), "deepcopy")
    rank = torch.distributed.get_rank() if grid else 0
    path = f"{directory}/{grid}-{rank}.pt"
    torch.save(ours.state_dict(), path)
    fresh = tlm.TwoLevelMultiheadAttention(EMBED, HEADS, **FLOAT64, mesh=mesh(grid))
    fresh.load_state_dict(torch.load(path, weights_only=False))
    check(fresh, "save and load")
    single = tlm.TwoLevelMultiheadAttention.from_torch(copy.deepcopy(stock).float(), mesh(grid)).double()
    assert single.q_weight.dtype == torch.float64
    torch.testing.assert_close(everything(single, call)["y"], expected["y"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("grid", [None, (2, 2)])
def test_copies(pool, grid, tmp_path):
    """T. Localises: state of a layer that does not travel with its copy."""
    on_ranks(pool, copies, grid, str(tmp_path))


def on_meta(grid) -> None:
    with torch.device("meta"):
        layer = tlm.TwoLevelMultiheadAttention(EMBED, HEADS, mesh=mesh(grid), **FLOAT64)
    assert all(p.is_meta for p in layer.parameters())
    stock = stock_layer(Call())
    layer.to_empty(device=DEVICE).load_state_dict(stock.state_dict())
    x = torch.randn(5, 3, EMBED, **FLOAT64)
    torch.testing.assert_close(layer(x, x, x)[0], stock(x, x, x)[0], rtol=0, atol=1e-10)
    explicit = tlm.TwoLevelMultiheadAttention(EMBED, HEADS, mesh=mesh(grid), device="meta")
    assert explicit.out_weight.is_meta and explicit.out_weight.shape == (EMBED, HEADS, EMBED // HEADS)


@pytest.mark.parametrize("grid", [None, (2, 2)])
def test_meta_construction(pool, grid):
    """T. Localises: a constructor that touches numbers, which meta has not."""
    on_ranks(pool, on_meta, grid)


def test_parameters_per_rank(pool):
    """1 / (n m) of the whole with combine="reduce", the output bias aside."""
    for grid in ((2, 2), (4, 2)):
        for sizes in on_ranks(pool, local_sizes, grid):
            assert sizes == (4 * EMBED**2 + 3 * EMBED) // (grid[0] * grid[1]) + EMBED


def local_sizes(grid) -> int:
    layer = tlm.TwoLevelMultiheadAttention(EMBED, HEADS, mesh=mesh(grid))
    return sum(p.to_local().numel() for p in layer.parameters())
