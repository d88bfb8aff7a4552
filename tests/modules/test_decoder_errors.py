"""What TwoLevelAttention refuses, and with which sentence: before anything is sent, the same on every rank."""

import pytest
import torch
from harness.calls import mesh, text_of
from harness.device import DEVICE

import two_level_mha as tlm

CONSTRUCTION = [
    ({"num_heads": 8, "num_kv_heads": 3}, "num_kv_heads must divide num_heads"),
    ({"num_heads": 5}, "num_heads must divide embed_dim, or head_dim be given"),
    ({"num_heads": 0}, "num_heads must be greater than 0"),
    ({"bias": "kv"}, "bias must be one of"),
    ({"qk_norm": True}, "qk_norm must be the eps"),
    ({"rope": 10000.0}, "rope must be a Rotary or None, got float"),
    ({"rope": tlm.Rotary(dim=3)}, "rope.dim must be even and at most head_dim 4, got 3"),
    ({"rope": tlm.Rotary(dim=6)}, "rope.dim must be even and at most head_dim 4, got 6"),
    ({"rope": tlm.Rotary(), "scheme": "independent"}, "takes neither rope nor qk_norm"),
    ({"qk_norm": 1e-6, "scheme": "independent"}, "takes neither rope nor qk_norm"),
    ({"window": 0}, "window must be at least 1"),
    ({"softcap": 0.0}, "softcap must be greater than 0"),
    ({"dropout": 1.5}, "dropout must be between 0 and 1"),
    ({"scheme": "rows"}, "scheme must be one of"),
]


@pytest.mark.parametrize("options, sentence", CONSTRUCTION, ids=lambda x: str(x)[:40])
def test_construction(options, sentence):
    """Localises: which argument is checked first, and the sentence of the constructor."""
    with pytest.raises(tlm.GridError, match=sentence):
        tlm.TwoLevelAttention(**{"embed_dim": 32, "num_heads": 8, **options})


X = torch.zeros(2, 5, 32)
COS = torch.zeros(1, 5, 4)
CALLS = {
    "another width": ({"x_BLD": torch.zeros(2, 5, 16)}, "x must have shape (B, L, 32), got (2, 5, 16)"),
    "unbatched": ({"x_BLD": torch.zeros(5, 32)}, "x must have shape (B, L, 32), got (5, 32)"),
    "another dtype": ({"x_BLD": X.double()}, "x has dtype torch.float64, but the module's weights are torch.float32"),
    "another device": ({"x_BLD": X.to("meta")}, f"x is on meta, but the module is on {DEVICE}"),
    "nested": (
        {"x_BLD": torch.nested.nested_tensor([X[0], X[1, :3]], layout=torch.jagged)}, "x is a nested tensor"
    ),
    "integer mask": ({"attn_mask": torch.ones(5, 5, dtype=torch.int)}, "attn_mask must be bool"),
    "mask of another length": (
        {"attn_mask": torch.ones(2, 1, 5, 6, dtype=torch.bool)}, "broadcastable to (B, h, L, S) = (2, 8, 5, 5), got"
    ),
    "mask of five dims": ({"attn_mask": torch.ones(1, 2, 8, 5, 5, dtype=torch.bool)}, "broadcastable to (B, h, L, S)"),
    "window without causal": ({"is_causal": False}, "a window (3) needs is_causal=True"),
    "one tensor": ({"position_embeddings": (COS,)}, "must be (cos, sin) of shape (1 or 2, 5, r)"),
    "too wide": ({"position_embeddings": (torch.zeros(1, 5, 6),) * 2}, "r even and at most head_dim 4"),
    "of another length": ({"position_embeddings": (COS[:, 1:],) * 2}, "must be (cos, sin) of shape (1 or 2, 5, r)"),
    "of other widths": ({"position_embeddings": (COS, COS[..., :2])}, "must be (cos, sin) of shape"),
    "integer angles": ({"position_embeddings": (COS.int(), COS.int())}, "cos must be floating"),
}  # fmt: skip


def refusal(grid, arguments: dict, options: dict) -> str:
    torch.manual_seed(0)
    layer = tlm.TwoLevelAttention(32, 8, 4, mesh=mesh(grid), **options)
    try:
        layer(**{"x_BLD": X, **arguments})
    except tlm.GridError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize("name", CALLS)
def test_calls(name):
    """Localises: the checks of a call's arguments, in one process."""
    arguments, sentence = CALLS[name]
    assert sentence in refusal(None, arguments, {"window": 3})


def refusals(grid, calls: dict) -> list[str]:
    return [refusal(grid, arguments, {"window": 3}) for arguments, _ in calls.values()]


def test_calls_on_a_grid(pool):
    """Every rank raises the same sentence, and none waits for another."""
    calls = {name: call for name, call in CALLS.items() if name not in ("another device", "nested")}
    for found in pool.run(refusals, 4, (2, 2), calls):
        for message, (_, sentence) in zip(found, calls.values(), strict=True):
            assert sentence in message


def one_rank_differs(name: str) -> str:
    rank = torch.distributed.get_rank()
    if name == "seed":
        torch.manual_seed(rank)
    layer = tlm.TwoLevelAttention(32, 8, 4, bias=True, mesh=mesh((2, 2)))
    x, arguments = X, {}
    if name == "input" and rank == 3:
        x = X + 1
    if name == "mask" and rank == 3:
        arguments["attn_mask"] = torch.ones(5, 5, dtype=torch.bool)
    if name == "angles":
        arguments["position_embeddings"] = (COS + (rank == 3), COS)
    if name == "error" and rank == 3:
        x = X.double()
    try:
        layer(x, **arguments)
    except tlm.GridError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("seed", "content of out_bias differs between ranks"),
        ("input", "content of x differs between ranks"),
        ("mask", "attn_mask differs between ranks"),
        ("angles", "content of cos differs between ranks"),
        ("error", "dtype torch.float64"),
    ],
)
def test_ranks_that_disagree(pool, name, sentence):
    """The first call compares: arguments, replicated parameters, and one rank's error."""
    for message in pool.run(one_rank_differs, 4, name):
        assert sentence in message


def no_grids() -> list[str]:
    return [
        text_of(tlm.TwoLevelAttention, 32, 8, 2, mesh=mesh((4, 1))),
        text_of(tlm.TwoLevelAttention, 32, 8, 2, 6, mesh=mesh((1, 4)), scheme="independent"),
    ]


def test_grids_that_do_not_fit(pool):
    """Localises: which heads are counted: two KV heads have no four groups; slices as heads, of 2 dims and of 0."""
    expected = [
        "grid (4, 1) does not fit num_heads=8, num_kv_heads=2, head_dim=4: head_groups=4 must divide num_kv_heads=2; "
        "valid grids for 4 ranks: (2, 2), (1, 4);",
        "scheme 'independent' makes a head of every slice: slices=4 must divide head_dim=6; take another grid, or",
    ]
    for texts in pool.run(no_grids, 4):
        for text, sentence in zip(texts, expected, strict=True):
            assert text.startswith(sentence), text


def test_autocast_takes_other_dtypes():
    """Localises: the check of dtypes, which autocast makes void."""
    layer = tlm.TwoLevelAttention(32, 8, 4, qk_norm=1e-6, rope=tlm.Rotary())
    with torch.autocast(DEVICE, torch.bfloat16):
        assert layer(X.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(0, 5, 32), (2, 0, 32)])
def test_nothing_in_nothing_out(shape):
    """Localises: sizes of 0 in projection, norm, rotary or attention."""
    layer = tlm.TwoLevelAttention(32, 8, 4, qk_norm=1e-6, rope=tlm.Rotary())
    assert layer(torch.zeros(shape)).shape == shape


def dropout_with_cache() -> list[str]:
    layer = tlm.TwoLevelAttention(32, 8, 4, dropout=0.5, mesh=mesh((2, 2)))
    texts = []
    for layout in ("position", "batch"):
        cache = tlm.KVCache({"num_layers": 1, "num_kv_heads": 4, "head_dim": 4}, mesh((2, 2)), layout=layout)
        try:
            layer(X, cache=cache.layers[0])
            texts.append("accepted")
        except tlm.GridError as error:
            texts.append(str(error))
    return texts


def test_dropout_with_a_cache_by_position(pool):
    """Localises: dropout drawn by the keys that a rank has, in place of all keys."""
    for by_position, by_batch in pool.run(dropout_with_cache, 4):
        assert "dropout of attention weights (0.5) needs all keys" in by_position and by_batch == "accepted"
