"""Usage errors: a ValueError that is also what stock raises and starts with stock's sentence, the same on every rank,
before anything is sent; and ranks that disagree.
"""

import pytest
import torch
from harness.calls import EMBED, HEADS, mesh, text_of
from harness.device import DEVICE
from torch import nn
from torch.nn.utils import prune

import two_level_mha as tlm
from two_level_mha.testing import record_collectives

F64 = torch.float64


def x(*shape, dtype=F64):
    return torch.zeros(shape, dtype=dtype)


L, S, B = 5, 7, 3
QUERY, KEY = x(L, B, EMBED), x(S, B, EMBED)
# name -> (constructor options, arguments of forward, stock has a sentence for it)
CALLS = {
    "query of 4 dims": ({}, {"query": x(1, L, B, EMBED)}, True),
    "key of 2 dims": ({}, {"key": x(S, EMBED)}, True),
    "key of 3 dims, unbatched query": ({}, {"query": x(L, EMBED)}, True),
    "padding of 1 dim": ({}, {"key_padding_mask": x(S)}, True),
    "padding of 2 dims, unbatched": (
        {}, {"query": x(L, EMBED), "key": x(S, EMBED), "value": x(S, EMBED), "key_padding_mask": x(1, S)}, True),
    "mask of 4 dims": ({}, {"attn_mask": x(B, HEADS, L, S)}, True),
    "mask of 2 dims, shape": ({}, {"attn_mask": x(L, L)}, True),
    "mask of 3 dims, shape": ({}, {"attn_mask": x(B, L, S)}, True),
    "mask of 3 dims, unbatched": (
        {}, {"query": x(L, EMBED), "key": x(S, EMBED), "value": x(S, EMBED), "attn_mask": x(B, L, S)}, True),
    "padding, shape": ({}, {"key_padding_mask": x(B, L)}, False),
    "padding, transposed": ({}, {"key_padding_mask": x(S, B)}, False),
    "integer padding": ({}, {"key_padding_mask": x(B, S, dtype=torch.int64)}, True),
    "integer mask": ({}, {"attn_mask": x(L, S, dtype=torch.uint8)}, True),
    "is_causal without mask": ({}, {"is_causal": True, "need_weights": False}, True),
    "width of query": ({}, {"query": x(L, B, 12)}, True),
    "key and value": ({}, {"value": x(S + 1, B, EMBED)}, True),
    "key and value, widths": ({"kdim": 6}, {"key": x(S + 1, B, 6)}, True),
    "width of key": ({"kdim": 6}, {}, True),
    "width of value": ({"vdim": 6}, {}, True),
    "width of key and value": ({}, {"key": x(S, B, 12), "value": x(S, B, 12)}, False),
    "batch of key": ({}, {"key": x(S, 2, EMBED), "value": x(S, 2, EMBED)}, False),
    "dtype of query": ({}, {"query": QUERY.float()}, False),
    "dtype of value": ({}, {"value": KEY.to(torch.bfloat16)}, False),
    "device": ({}, {"query": QUERY.to("meta")}, False),
}  # fmt: skip


def error_of(layer: nn.Module, arguments: dict) -> Exception | None:
    try:
        layer(**{"query": QUERY, "key": KEY, "value": KEY, **arguments})
    except Exception as error:
        return error
    return None


def errors(grid) -> dict[str, tuple[str, str, int]]:
    """Class and text of each error, and what was sent: once at the first call, once later."""
    found = {}
    for name, (options, arguments, _) in CALLS.items():
        for later in (False, True):
            layer = tlm.TwoLevelMultiheadAttention(EMBED, HEADS, dtype=F64, mesh=mesh(grid), **options)
            layer._compared = later
            with record_collectives() as record:
                error = error_of(layer, arguments)
            found[f"{name}, {later=}"] = (type(error).__name__, str(error), len(record.calls))
    return found


@pytest.mark.parametrize("name", CALLS)
def test_as_stock(name):
    """A ValueError, caught by code written for stock too, and read as stock's."""
    options, arguments, has_sentence = CALLS[name]
    stock = nn.MultiheadAttention(EMBED, HEADS, dtype=F64, **options)
    theirs = error_of(stock, arguments)
    ours = error_of(tlm.TwoLevelMultiheadAttention.from_torch(stock), arguments)
    assert isinstance(ours, tlm.GridError) and isinstance(ours, ValueError), repr(ours)
    if theirs is not None:
        assert isinstance(ours, type(theirs)), f"{ours!r} is no {theirs!r}"
    if has_sentence:
        assert str(ours).startswith(str(theirs)), f"\n{ours}\n{theirs}"


@pytest.mark.parametrize("grid", [(2, 2)])
def test_alike_on_every_rank(pool, grid):
    """At the first call and later; no tensor is sent."""
    found = pool.run(errors, 4, grid)
    assert all(other == found[0] for other in found)
    expected = errors(None)
    assert found[0] == expected
    assert all(name.startswith("Usage") and sent == 0 for name, _, sent in expected.values()), expected


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested(layout):
    """Localises: nested tensors of either layout, which have no length to split."""
    layer = tlm.TwoLevelMultiheadAttention(EMBED, HEADS, batch_first=True)
    nested = torch.nested.nested_tensor([torch.zeros(n, EMBED) for n in (2, 3)], layout=layout)
    with pytest.raises(ValueError, match="query is a nested tensor.*to_padded_tensor"):
        layer(nested, nested, nested)


def test_autocast_takes_other_dtypes():
    """Localises: the check of dtypes, which autocast makes void."""
    layer = tlm.TwoLevelMultiheadAttention(EMBED, HEADS)
    with torch.autocast(DEVICE, torch.bfloat16):
        y, _ = layer(*[x(L, B, EMBED, dtype=torch.bfloat16)] * 3)
    assert y.dtype == torch.bfloat16


# -- Construction

CONSTRUCTIONS = {
    "indivisible": (15, 4, {}, "embed_dim must be divisible by num_heads"),
    "no heads": (16, 0, {}, "embed_dim and num_heads must be greater than 0"),
    "no width": (0, 4, {}, "embed_dim and num_heads must be greater than 0"),
}


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_construction_as_stock(name):
    """Localises: the constructor's errors: of stock's type, beginning with stock's sentence."""
    embed, heads, options, sentence = CONSTRUCTIONS[name]
    with pytest.raises((ValueError, AssertionError), match=sentence) as theirs:
        nn.MultiheadAttention(embed, heads, **options)
    with pytest.raises(tlm.GridError, match=sentence) as ours:
        tlm.TwoLevelMultiheadAttention(embed, heads, **options)
    assert isinstance(ours.value, theirs.type) and str(ours.value).startswith(str(theirs.value))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"scheme": "rows"}, "scheme must be one of auto, .*slices.*got 'rows'"),
        ({"combine": "sum"}, "combine must be one of reduce, concat, got 'sum'"),
        ({"reduce_dtype": torch.float16}, "reduce_dtype must be None or torch.float32, got torch.float16"),
        ({"dropout": 1.5}, "dropout probability has to be between 0 and 1, but got 1.5"),
    ],
)
def test_options(options, text):
    """Localises: the checks of our own options of the constructor."""
    with pytest.raises(tlm.GridError, match=text):
        tlm.TwoLevelMultiheadAttention(EMBED, HEADS, **options)


def test_from_torch_takes_only_stock():
    """Localises: from_torch of another module, which would fail later at an attribute."""
    with pytest.raises(tlm.GridError, match="mha must be an nn.MultiheadAttention, got Linear"):
        tlm.TwoLevelMultiheadAttention.from_torch(nn.Linear(2, 2))


def test_no_process_group():
    """Localises: init_mesh without a process group: it must not start one by itself."""
    with pytest.raises(ValueError, match="needs an initialised process group.*init_process_group"):
        tlm.init_mesh(DEVICE, (2, 2))
    assert not torch.distributed.is_initialized()


def wrong_grids() -> list[str]:
    layer = tlm.TwoLevelMultiheadAttention
    return [
        text_of(tlm.init_mesh, DEVICE, (3, 2)),
        text_of(tlm.init_mesh, DEVICE, (0, 4)),
        text_of(layer, 18, 3, mesh=mesh((2, 2))),
        text_of(layer, 15, 3, mesh=mesh((4, 1))),
        text_of(layer, 12, 6, mesh=mesh((4, 1))),
        text_of(layer, 15, 3, mesh=mesh((1, 4)), scheme="independent"),
        text_of(layer, 16, 4, mesh=torch.distributed.device_mesh.init_device_mesh(DEVICE, (4,))),
    ]


def test_grids_that_do_not_fit(pool):
    """Localises: which rule of the grid is checked, and the search for grids that would fit; alike on every rank."""
    found = pool.run(wrong_grids, 4)
    assert all(texts == found[0] for texts in found)
    expected = [
        "grid 3 x 2 needs 6 ranks, but the world size is 4; grids of 4 ranks: (4, 1), (2, 2), (1, 4)",
        "head_groups and slices must be positive, got head_groups=0, slices=4",
        "grid (2, 2) does not fit num_heads=3, num_kv_heads=3, head_dim=6: head_groups=2 must divide num_kv_heads=3; "
        "valid grids for 4 ranks: (1, 4); for 3: (3, 1), (1, 3); for 6: (3, 2), (1, 6)",
        "grid (4, 1) does not fit num_heads=3, num_kv_heads=3, head_dim=5: head_groups=4 must divide num_kv_heads=3; "
        "valid grids for 4 ranks: (1, 4); for 3: (3, 1), (1, 3); for 5: (1, 5)",
        "grid (4, 1) does not fit num_heads=6, num_kv_heads=6, head_dim=2: head_groups=4 must divide num_kv_heads=6; "
        "valid grids for 4 ranks: (2, 2), (1, 4); for 3: (3, 1), (1, 3); for 6: (6, 1), (3, 2), (2, 3), (1, 6)",
        "scheme 'independent' makes a head of every slice: slices=4 must divide head_dim=5; take another grid, or",
        'mesh must have the axes ("head", "slice"), got None; use two_level_mha.init_mesh, or take',
    ]
    for text, sentence in zip(found[0], expected, strict=True):
        assert text.startswith(sentence), text


# -- Ranks that disagree

ODD = 2  # the rank that differs


def disagreements(grid) -> list[str]:
    """What every rank reads if rank ODD passes something else, at the first call."""
    mine = torch.distributed.get_rank() == ODD
    padding = torch.zeros(B, L, dtype=torch.bool)
    other = padding.clone()
    other[0, 0] = True
    calls = {
        "content of query": ({"query": QUERY + 1}, {}),
        "shape of query": ({"query": x(L - 1, B, EMBED)}, {}),
        "need_weights": ({"need_weights": False}, {}),
        "average_attn_weights": ({"average_attn_weights": False}, {}),
        "content of key_padding_mask": ({"key_padding_mask": other}, {"key_padding_mask": padding}),
        "shape of attn_mask": ({"attn_mask": x(L, L)}, {}),
        "was expecting embedding dimension of 16, but got 12": ({"query": x(L, B, 12)}, {}),
        "must be a tensor, got a NoneType": ({"query": None}, {}),
    }
    texts = []
    for odd, rest in calls.values():
        layer = tlm.TwoLevelMultiheadAttention(EMBED, HEADS, dtype=F64, mesh=mesh(grid))
        error = error_of(layer, {"key": QUERY, "value": QUERY, **(odd if mine else rest)})
        texts.append(f"{type(error).__name__}: {error}")
    for mode in ("training", "grad mode"):
        layer = tlm.TwoLevelMultiheadAttention(EMBED, HEADS, dtype=F64, mesh=mesh(grid))
        layer.train(not (mine and mode == "training"))
        with torch.set_grad_enabled(not (mine and mode == "grad mode")):
            texts.append(str(error_of(layer, {})))
    return texts


def test_ranks_that_disagree(pool):
    """Every rank raises, and reads which rank and which field."""
    found = pool.run(disagreements, 4, (2, 2))
    fields = ["content of query", "shape of query", "need_weights", "average_attn_weights",
              "content of key_padding_mask", "shape of attn_mask", "was expecting embedding dimension of 16",
              "must be a tensor, got a NoneType", "training differs", "grad mode differs"]  # fmt: skip
    for rank, texts in enumerate(found):
        for field, text in zip(fields, texts, strict=True):
            own_error = rank == ODD and ("expecting" in field or "NoneType" in field)
            assert field in text and (own_error or f"rank {ODD}" in text), (rank, field, text)


def later_calls(grid, debug, variable) -> list[bool]:
    """Whether a second call with another query on rank ODD raises, and then whether an equal one does."""
    import os

    layer = tlm.TwoLevelMultiheadAttention(EMBED, HEADS, dtype=F64, mesh=mesh(grid), debug=debug)
    error = error_of(layer, {})
    assert error is None, error
    query = QUERY + (torch.distributed.get_rank() == ODD)
    os.environ["TLM_DEBUG"] = variable
    try:
        return [error_of(layer, arguments) is not None for arguments in ({"query": query}, {})]
    finally:
        del os.environ["TLM_DEBUG"]


@pytest.mark.parametrize(
    ("debug", "variable", "compared"),
    [(None, "0", False), (True, "0", True), (None, "1", True), (False, "1", False)],
)
def test_debug_compares_every_call(pool, debug, variable, compared):
    """Localises: debug, TLM_DEBUG and which of them wins, after the first call."""
    assert pool.run(later_calls, 4, (2, 2), debug, variable) == [[compared, False]] * 4


def seeds(grid) -> list[str]:
    """from_torch where ranks hold other weights, or will drop others."""
    torch.manual_seed(torch.distributed.get_rank())
    texts = [text_of(tlm.TwoLevelMultiheadAttention.from_torch, nn.MultiheadAttention(EMBED, HEADS), mesh(grid))]
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(EMBED, HEADS, dropout=0.5)
    torch.manual_seed(torch.distributed.get_rank())
    return [*texts, text_of(tlm.TwoLevelMultiheadAttention.from_torch, layer, mesh(grid))]


def test_other_seeds(pool):
    """The same text everywhere, with the way out."""
    found = pool.run(seeds, 4, (2, 2))
    assert all(texts == found[0] for texts in found)
    for text, what in zip(found[0], ("source parameters", "random generator"), strict=True):
        assert what in text and "rank 1" in text and "seed every rank alike" in text


def differing_state(case: str, grid) -> str:
    """What the first call says where ranks differ in something that is not an argument."""
    mine = torch.distributed.get_rank() == ODD
    options = {
        "content of out_weight": {"combine": "concat"},
        "add_zero_attn": {"add_zero_attn": mine},
        "parameters": {"add_bias_kv": mine},
        "reduce_dtype": {"reduce_dtype": torch.float32 if mine else None},
    }.get(case, {})
    layer = tlm.TwoLevelMultiheadAttention(EMBED, HEADS, dropout=0.5, dtype=F64, mesh=mesh(grid), **options)
    query, key = QUERY, QUERY.clone() if mine and case == "which inputs are one tensor" else QUERY
    if case == "requires_grad of query":
        query = QUERY.clone().requires_grad_(mine)
    if case == "trained parameters":
        layer.q_weight.requires_grad_(mine)
    if case == "content of out_bias":
        torch.nn.init.constant_(layer.out_bias, float(mine))
    if case == "content of out_weight":
        layer.out_weight.to_local().data.add_(float(mine))
    if case == "random generator":
        torch.manual_seed(int(mine))
    with torch.autocast(DEVICE, torch.bfloat16, enabled=mine and case == "autocast"):
        return str(error_of(layer, {"query": query, "key": key, "value": key}))


DIFFERING = [
    "content of out_bias", "content of out_weight", "random generator", "autocast", "add_zero_attn", "parameters",
    "trained parameters", "reduce_dtype", "requires_grad of query", "which inputs are one tensor",
]  # fmt: skip


@pytest.mark.parametrize("case", DIFFERING)
def test_ranks_that_differ_in_state(pool, case):
    """Localises: what decides what is sent, then or in backward, or what every rank holds, taken to be alike."""
    for text in pool.run(differing_state, 4, case, (2, 2)):
        assert case in text and f"rank {ODD}" in text


def second_derivative(grid, need_weights: bool) -> str:
    layer = tlm.TwoLevelMultiheadAttention(EMBED, HEADS, dtype=F64, mesh=mesh(grid))
    torch.manual_seed(0)
    query = torch.randn(L, B, EMBED, dtype=F64, requires_grad=True)
    y = layer(query, query, query, need_weights=need_weights)[0]
    try:
        (first,) = torch.autograd.grad(y.sin().sum(), query, create_graph=True)
        torch.autograd.grad(first.square().sum(), [query, layer.q_weight])
    except NotImplementedError as error:
        return str(error)
    return "a number"


@pytest.mark.parametrize("grid", [(1, 2), (2, 1)])
@pytest.mark.parametrize("need_weights", [True, False])
def test_gradients_of_gradients(pool, grid, need_weights):
    """Localises: second derivatives that lack what other ranks would add, without a word."""
    assert all("create_graph=True" in text for text in pool.run(second_derivative, 2, grid, need_weights))
    if need_weights:  # the math path, as stock's
        assert second_derivative(None, True) == "a number"
    else:
        assert "create_graph=True) are not available of fused attention" in second_derivative(None, False)


def test_what_would_be_ignored():
    """Localises: a module that a property hides, weights that a hook computes, a DTensor."""
    layer = tlm.TwoLevelMultiheadAttention(EMBED, HEADS, dtype=F64)
    with pytest.raises(tlm.GridError, match="out_proj cannot be replaced"):
        layer.out_proj = nn.Linear(EMBED, EMBED)
    prune.l1_unstructured(layer, "q_weight", 0.9)
    whole = tlm.TwoLevelMultiheadAttention(EMBED, HEADS, dtype=F64)
    whole.load_state_dict({name: getattr(layer, name).detach() for name in whole.state_dict()})
    query = torch.randn(L, B, EMBED, dtype=F64)
    assert torch.equal(layer(query, query, query)[0], whole(query, query, query)[0])
    mha = torch.nn.utils.parametrizations.weight_norm(nn.MultiheadAttention(EMBED, HEADS), "in_proj_weight")
    with pytest.raises(tlm.GridError, match="mha, or its out_proj, is parametrized"):
        tlm.TwoLevelMultiheadAttention.from_torch(mha)

    class Other(nn.MultiheadAttention):
        pass

    with pytest.raises(tlm.GridError, match="mha must be an nn.MultiheadAttention, got Other"):
        tlm.TwoLevelMultiheadAttention.from_torch(Other(EMBED, HEADS))


def dtensor_text(grid) -> str:
    from torch.distributed.tensor import distribute_tensor

    layer = tlm.TwoLevelMultiheadAttention(EMBED, HEADS, dtype=F64, mesh=mesh(grid))
    return str(error_of(layer, {"query": distribute_tensor(QUERY, mesh(grid))}))


def test_dtensor(pool):
    """Localises: an input that is split already, of which each rank would take its part for the whole."""
    assert all("query is a DTensor: give every rank the whole" in text for text in pool.run(dtensor_text, 2, (1, 2)))
