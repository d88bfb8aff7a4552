"""KVCache makes the cache that its config needs; a call of attention is asked for before anything is changed."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from harness.decoders import make
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import two_level_mha as tlm
from two_level_mha.cache_layer import CachedCall, CacheLayer
from two_level_mha.integrations.cache import ModelCacheLayer

SIZES = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 4}


def config():
    return make("llama").config


@pytest.mark.parametrize("kind", ["sizes", "transformers"])
def test_one_name_for_both_kinds(kind):
    """Localises: what KVCache makes of sizes and of a config: its class, its layers, and copies of it."""
    of = SIZES if kind == "sizes" else config()
    cache = tlm.KVCache(of, None, layout="batch", max_length=7)
    layer = CacheLayer if kind == "sizes" else ModelCacheLayer
    k_BKSd = torch.ones(1, 2, 3, 4)
    for one in (cache, copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert isinstance(one, tlm.KVCache) and type(one) is type(cache)
        assert {type(each) for each in one.layers} == {layer}
        assert (one.layers[0].layout, one.layers[0].max_length, one.length) == ("batch", 7, 0)
        one.layers[0].begin(1, 3)
        one.layers[0].append(k_BKSd, k_BKSd, 3)
        assert one.length == 3
    assert not isinstance(DynamicCache(), tlm.KVCache) and not isinstance(cache.layers, tlm.KVCache)


def test_sizes_need_no_transformers():
    """Localises: an import of transformers, or of its adapters, for a layer of our own."""
    code = (
        "import sys, two_level_mha as tlm; tlm.KVCache(dict(num_layers=1, num_kv_heads=1, head_dim=4), None);"
        "sys.exit('transformers' in sys.modules or 'two_level_mha.integrations.cache' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_what_a_call_would_be_changes_nothing():
    """E. Localises: the fields of a call; next_call that begins it, or begin that decides otherwise."""
    layer = tlm.KVCache(SIZES | {"window": 4}, None).layers[0]
    x_BKSd = torch.ones(3, 2, 6, 4)
    layer.begin(3, 6)
    layer.append(x_BKSd, x_BKSd, 6)
    before = copy.deepcopy(vars(layer))
    call = layer.next_call(3, 1)
    assert call == CachedCall("position", 6, 3) and (call.scheme, call.position, call.first_key) == call
    assert str(vars(layer)) == str(before)
    with pytest.raises(tlm.GridError, match="the cache holds 3 sequences, but the input has 5"):
        layer.next_call(5, 1)
    assert layer.begin(3, 1) == call and CachedCall() == (None, 0, 0)


def test_a_refused_call_leaves_the_cache_alone():
    """Localises: a check of arguments that swaps a layer of transformers' cache, or begins one, before it raises."""
    model = tlm.parallelize(make("llama"), None)
    attention = model.model.layers[1].self_attn
    cache = DynamicCache()
    x_BLD = torch.zeros(2, 3, attention.q_weight.shape[2], dtype=attention.q_weight.dtype)
    with pytest.raises(tlm.GridError, match="output_attentions needs all keys"):
        attention(x_BLD, past_key_values=cache, output_attentions=True)
    assert cache.layers == []
    attention.rotary = None
    attention(x_BLD, past_key_values=cache)
    assert [type(layer) for layer in cache.layers] == [DynamicLayer, ModelCacheLayer] and cache.layers[1].length == 3
    with pytest.raises(tlm.GridError, match="the cache holds 2 sequences, but the input has 1"):
        attention(x_BLD[:1], past_key_values=cache)
    assert (cache.layers[1].batch, cache.layers[1].length) == (2, 3)
