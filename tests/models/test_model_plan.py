"""What `plan --model` says of a whole model, against the model split over 4 ranks."""

import json
import subprocess
import sys

import pytest
import torch
from harness.calls import mesh
from harness.families import build, small
from harness.programs import environment
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    DeepseekV3Config,
    Gemma4TextConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
)
from transformers.cache_utils import LinearAttentionCacheLayerMixin

import two_level_mha as tlm
from two_level_mha.model_plan import plan_model

SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "dtype": "float32",
}  # fmt: skip


def saved(folder, kind=LlamaConfig, **more):
    kind(
        **SIZES | more, architectures=[kind.__name__.replace("TextConfig", "Config").replace("Config", "ForCausalLM")]
    ).save_pretrained(folder)
    return folder


def held(folder, grid, scheme, batch: int, seq: int) -> tuple[int, int, int]:
    """Bytes of this rank's attention, of all else that is split, and of a cache of `seq` positions."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(folder))
    model = tlm.parallelize(model.eval(), mesh(grid), scheme=scheme)
    sizes = {name: p.to_local().nbytes for name, p in model.named_parameters() if isinstance(p, DTensor)}
    attention = sum(size for name, size in sizes.items() if ".self_attn." in name)
    cache = tlm.KVCache(model.config, mesh(grid), max_length=seq)
    with torch.no_grad():
        model(input_ids=torch.zeros(batch, seq, dtype=torch.long), past_key_values=cache)
    return attention, sum(sizes.values()) - attention, cache.nbytes


def test_a_model(pool, tmp_path):
    """Localises: layers or parameters counted wrong; a figure that is not one rank's."""
    folder = saved(tmp_path)
    found = plan_model(folder, ranks=4, batch=2, seq=16, device_type="cpu")
    pick = found.layer.pick
    for attention, others, cache in pool.run(held, 4, str(folder), pick.grid, pick.scheme, 2, 16):
        assert (attention, cache) == (found.attention_bytes, found.cache_bytes)
        norms = 7 * 64 * 4  # held whole
        assert others == found.other_bytes - norms // 4
    assert found.logits_bytes == 2 * 16 * 64 * 4


def test_unequal_memory(pool, tmp_path):
    """Localises: shares of a layer in place of those of the model, which is run on such a mesh."""
    folder = saved(tmp_path)
    found = plan_model(folder, memory=[4, 2, 2, 3], batch=16, seq=182, decode=True, device_type="cpu")
    (n, m), shares = found.layer.pick.grid, found.layer.shares
    assert shares.in_proportion and found.layer.call["devices"] == 4
    norms, cycle = 7 * 64 * 4, sum(shares.cache_shares) // n
    grid = (n, m, shares.cache_shares)
    ran = pool.run(held, 4, str(folder), grid, "auto", 16, 182)
    for (attention, others, cache), planned, share in zip(ran, shares.rank_bytes, shares.cache_shares, strict=True):
        assert attention + others + norms // 4 + cache == pytest.approx(planned, rel=0.02)
        assert cache == pytest.approx(3 * 2 * (2 // n) * 16 * 4 * 16 * 182 * share / cycle, rel=0.15)  # and its room
    assert found.cache_bytes == max(shares.rank_bytes) - found.attention_bytes - found.other_bytes


def test_windows(tmp_path):
    """Localises: a layer with a window that is priced with all of the context."""
    every = plan_model(saved(tmp_path / "every", MistralConfig, sliding_window=None), ranks=4, batch=2, seq=64)
    short = plan_model(saved(tmp_path / "short", MistralConfig, sliding_window=16), ranks=4, batch=2, seq=64)
    assert every.cache_bytes == 4 * short.cache_bytes


def command(*words: str) -> subprocess.CompletedProcess:
    ours = environment(HF_HUB_OFFLINE="1")
    return subprocess.run(
        [sys.executable, "-m", "two_level_mha", "plan", "--ranks", "4", "--batch", "2", "--seq", "16", *words],
        capture_output=True, text=True, timeout=120, env=ours,
    )  # fmt: skip


def test_command(tmp_path):
    """Localises: arguments of the command line, and what it says of those that do not fit."""
    folder = str(saved(tmp_path))
    result = command("--model", folder, "--json")
    assert json.loads(result.stdout)["parameters"] > 0, result.stderr
    assert "LlamaForCausalLM: 3 layers" in command("--model", folder).stdout
    both = command("--model", folder, "--head-dim", "16")
    assert both.returncode == 2 and both.stderr.endswith("leave out --head-dim\n")
    neither = command()
    assert neither.returncode == 2 and "--model FOLDER" in neither.stderr


LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 8,
    "v_head_dim": 7, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip


def held_latents(folder, batch: int, seq: int) -> tuple[int, int]:
    """Bytes of this rank's attention, and of a cache of `seq` positions."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(DeepseekV3Config.from_pretrained(folder))
    model = tlm.parallelize(model.eval(), mesh((2, 2)))
    held = {
        name: (p.to_local() if isinstance(p, DTensor) else p).nbytes
        for name, p in model.named_parameters()
        if ".self_attn." in name
    }
    cache = tlm.KVCache(model.config, mesh((2, 2)), max_length=seq)
    with torch.no_grad():
        model(input_ids=torch.zeros(batch, seq, dtype=torch.long), past_key_values=cache)
    return sum(held.values()), cache.nbytes


def test_latents(pool, tmp_path):
    """Localises: latent attention priced as if it had keys and values of heads; what every rank has whole; a config
    that says how the weights are quantised, as DeepSeek-V3's does.
    """
    folder = saved(tmp_path, DeepseekV3Config, **LATENT, quantization_config={"quant_method": "fp8"})
    found = plan_model(folder, ranks=4, batch=2, seq=16, decode=True, device_type="cpu")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    position = next(option for option in found.layer.options if option.scheme == "position")
    assert position.grid == (4, 1)
    for attention, cache in pool.run(held_latents, 4, str(folder), 2, 16):
        assert attention == 3 * position.weight_bytes == found.attention_bytes
        assert cache == 3 * position.cache_bytes == 3 * 2 * 16 // 4 * 18 * 4
    assert "latent of 10, one of 12 for queries" in str(found)
    whole = plan_model(folder, ranks=1, batch=2, seq=16, device_type="cpu")
    assert whole.attention_bytes + whole.other_bytes == whole.parameters * 4


def test_what_has_no_heads(tmp_path):
    """Localises: layers that are priced as latent attention and have an indexer, or another layer between."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "deepseek_v32", "architectures": ["DeepseekV32ForCausalLM"],
                                  "num_hidden_layers": 2, "hidden_size": 64, "n_routed_experts": 4, "vocab_size": 64,
                                  "n_group": 1, "topk_group": 1}))  # fmt: skip
    with pytest.raises(tlm.GridError, match="without --model"):
        plan_model(tmp_path, ranks=4, batch=1, seq=16)


def held_states(family: str, grid, batch: int, seq: int) -> tuple[int, int, int]:
    """Bytes of this rank's attention and layers with a state, of keys and values, and of states."""
    model = tlm.parallelize(build(family, dtype=torch.float32), mesh(grid))
    held = {name: (p.to_local() if isinstance(p, DTensor) else p).nbytes for name, p in model.named_parameters()}
    norms = ("q_norm.weight", "k_norm.weight")  # which no plan counts
    mixers = sum(held[name] for name in held if ("_attn." in name or ".mamba." in name) and not name.endswith(norms))
    with torch.no_grad():
        cache = model(input_ids=torch.zeros(batch, seq, dtype=torch.long), use_cache=True).past_key_values
    states = [layer for layer in cache.layers if isinstance(layer, LinearAttentionCacheLayerMixin)]
    kept = [x for layer in states for x in (*layer.conv_states.values(), *layer.recurrent_states.values())]
    keys = sum(layer.nbytes for layer in cache.layers if hasattr(layer, "nbytes"))
    return mixers, keys, sum(x.nbytes for x in kept if x is not None)


@pytest.mark.parametrize("family", ["qwen3_next", "bamba"])
def test_states(pool, tmp_path, family):
    """Localises: a layer that keeps a state priced as attention, with keys and values of all tokens; its states or
    weights counted wrong; gates of the heads' outputs left out.
    """
    config = small(family)
    config.architectures = [type(build(family)).__name__]
    config.save_pretrained(tmp_path)
    found = plan_model(tmp_path, ranks=4, batch=2, seq=16, device_type="cpu", dtype=torch.float32)
    mixers, keys, states = pool.run(held_states, 4, family, found.layer.pick.grid, 2, 16)[0]
    assert (found.attention_bytes, found.cache_bytes, found.state_bytes) == (mixers, keys, states)
    assert "states" in str(found)


def test_own_layers(tmp_path):
    """Localises: heads of one layer taken for all; layers that reuse another's keys priced with some of their own;
    biases left out.
    """
    folder = saved(tmp_path / "own", Gemma4TextConfig, head_dim=16, global_head_dim=32, sliding_window=8,
                   num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2,
                   num_kv_shared_layers=2, hidden_size_per_layer_input=8, vocab_size_per_layer_input=64)  # fmt: skip
    found = plan_model(folder, ranks=2, batch=1, seq=32, decode=True, device_type="cpu")
    window, whole = 8 * 16, 32 * 32  # of the two layers that have keys
    assert found.cache_bytes == (window + whole) * 2 * 2 * 4 // 2
    opt = plan_model(saved(tmp_path / "opt", OPTConfig, ffn_dim=96), ranks=2, batch=1, seq=8, device_type="cpu")
    assert opt.attention_bytes == 3 * (4 * 64 * 64 // 2 + 3 * 32 + 64) * 4


def test_without_a_cache(tmp_path):
    """Localises: keys of an encoder counted as kept; states that are not in transformers' cache taken for none."""
    bert = BertConfig(architectures=["BertForMaskedLM"], dtype="float32", vocab_size=64, hidden_size=48,
                      num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)  # fmt: skip
    bert.save_pretrained(tmp_path / "bert")
    assert plan_model(tmp_path / "bert", ranks=4, batch=2, seq=16, device_type="cpu").cache_bytes == 0
    config = small("minimax")
    config.architectures = ["MiniMaxForCausalLM"]
    config.save_pretrained(tmp_path / "minimax")
    with pytest.raises(tlm.GridError, match="MiniMaxLightningAttention keeps states in no cache of transformers"):
        plan_model(tmp_path / "minimax", ranks=4, batch=2, seq=16)
