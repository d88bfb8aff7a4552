"""The public functions as a reader and a type checker see them."""

import inspect
import typing

import pytest
import torch
from harness.calls import text_of

import two_level_mha as tlm
from two_level_mha import names
from two_level_mha.blocks import COMBINES
from two_level_mha.cache_layer import CACHE_LAYOUTS
from two_level_mha.context import ACTIVATIONS
from two_level_mha.layer import SCHEMES


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (names.Scheme, SCHEMES),
        (names.Combine, COMBINES),
        (names.Activations, ACTIVATIONS),
        (names.CacheLayout, CACHE_LAYOUTS),
    ],
)
def test_words_of_arguments(kind, words):
    """Localises: a word that the code takes, and a type checker calls a typo, or the other way round."""
    assert set(typing.get_args(kind)) == set(words)


def test_what_goes_in_comes_out():
    """Localises: a model that is an nn.Module and no more to a type checker, after parallelize or load_pretrained."""
    for function in (tlm.parallelize, tlm.load_pretrained):
        hints = typing.get_type_hints(function)
        assert hints["model"] is hints["return"] is names.Model


def test_partial_attention():
    """T. Localises: a default of the function that is not the operator's."""
    q, k, v = torch.randn(3, 2, 4, 5, 8, dtype=torch.float64)
    out, logsumexp = tlm.partial_attention(q, k, v, causal=0)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    assert logsumexp.shape == (2, 4, 5)
    mine = inspect.signature(tlm.partial_attention).parameters
    schema = torch.ops.two_level_mha.partial_attention.default._schema
    assert list(mine) == [argument.name for argument in schema.arguments]
    for argument in schema.arguments:
        if argument.has_default_value():
            default = argument.default_value
            assert mine[argument.name].default == (tuple(default) if isinstance(default, list) else default)


def test_candidates_need_a_head_dim():
    """Localises: an empty list for want of an argument."""
    assert text_of(tlm.Grid.candidates, 16, 64, 8) == "head_dim must be given: the price of a grid depends on it"
    assert tlm.Grid.candidates(16, 64, 8, 128)


def test_one_word_for_the_number_of_ranks():
    """Localises: the older name of `ranks`, which programs call; none or both."""
    sizes = {"embed_dim": 64, "num_heads": 4, "batch": 1, "seq": 8}
    assert str(tlm.plan(**sizes, ranks=4)) == str(tlm.plan(**sizes, devices=4))
    for wrong in ({}, {"ranks": 4, "devices": 4}):
        assert text_of(tlm.plan, **sizes, **wrong) == "plan needs the number of ranks, once: ranks=16"


def test_public_names():
    """Localises: a name that is exported and not there, or a class that callers must annotate and cannot name."""
    assert sorted(tlm.__all__) == tlm.__all__
    assert all(hasattr(tlm, name) for name in tlm.__all__)
    assert isinstance(tlm.plan(embed_dim=64, num_heads=4, ranks=4, batch=1, seq=8), tlm.Plan)
    cache = tlm.KVCache({"num_layers": 1, "num_kv_heads": 2, "head_dim": 8}, None)
    assert isinstance(cache.layers[0], tlm.CacheLayer)
