"""transformers' encoder-decoders: self-attention and cross-attention split, a cache of both, in float64 against stock.

A failure here with test_forms green is in `integrations/cross.py`, or in the bias that T5's layers hand on.
"""

import copy

import pytest
import torch
import transformers
from harness.calls import mesh
from harness.decoders import full_gradients
from transformers import DynamicCache
from transformers.cache_utils import EncoderDecoderCache

import two_level_mha as tlm
from two_level_mha.attentions import NO_PLAN
from two_level_mha.integrations.cross import CrossAttention

peft = pytest.importorskip("peft")

SIZES = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "dropout": 0.0,
    "forced_eos_token_id": None, "num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 32,
    "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip
T5 = {
    "vocab_size": 64, "d_model": 32, "d_kv": 6, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0,
    "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 1, "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 6,
}  # fmt: skip
BERT = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
KINDS = {
    "bart": ("Bart", "BartForConditionalGeneration", SIZES),
    "marian": ("Marian", "MarianMTModel", SIZES),
    "whisper": ("Whisper", "WhisperForConditionalGeneration", SIZES),
    "t5": ("T5", "T5ForConditionalGeneration", T5),
    "umt5": ("UMT5", "UMT5ForConditionalGeneration", T5),
    "mbart": ("MBart", "MBartForConditionalGeneration", SIZES),
    "pegasus": ("Pegasus", "PegasusForConditionalGeneration", SIZES),
    "plbart": ("PLBart", "PLBartForConditionalGeneration", SIZES),
    "m2m": ("M2M100", "M2M100ForConditionalGeneration", SIZES),
    "blenderbot": ("Blenderbot", "BlenderbotForConditionalGeneration", SIZES),
    "blenderbot small": ("BlenderbotSmall", "BlenderbotSmallForConditionalGeneration", SIZES),
    "mt5": ("MT5", "MT5ForConditionalGeneration", T5),
}
IN_DEPTH = ("bart", "marian", "whisper", "t5", "umt5", "bert to bert")


def make(name: str, implementation: str = "sdpa") -> torch.nn.Module:
    torch.manual_seed(0)
    if name == "bert to bert":
        both = (transformers.BertConfig(**BERT) for _ in range(2))
        config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*both, decoder_start_token_id=1)
        config.pad_token_id = config.eos_token_id = 0
        model = transformers.EncoderDecoderModel(config)
    else:
        kind, model, sizes = KINDS[name]
        config = getattr(transformers, f"{kind}Config")(**sizes)
        config._attn_implementation = implementation
        model = getattr(transformers, model)(config)
    model = model.double().eval()
    for p in model.parameters():
        p.data.normal_(std=0.2)
    return model


def inputs(name: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    if name == "whisper":
        return {"input_features": torch.randn(3, 8, 24, dtype=torch.float64)}
    given = {"input_ids": torch.randint(3, 64, (3, 9)), "attention_mask": torch.ones(3, 9, dtype=torch.long)}
    given["attention_mask"][1, 6:] = 0
    return given


def numbers(model: torch.nn.Module, name: str) -> dict[str, torch.Tensor]:
    """Logits of a call with labels, and the gradient of every parameter."""
    model.zero_grad()
    output = model(**inputs(name), labels=torch.randint(3, 64, (3, 7), generator=torch.manual_seed(2)), use_cache=False)
    output.loss.backward()
    trained = copy.copy(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    return {"logits": output.logits.detach(), **full_gradients(trained)}


def off(stock: torch.nn.Module, ours: torch.nn.Module, name: str) -> dict[str, float]:
    expected, got = numbers(stock, name), numbers(ours, name)
    assert expected.keys() == got.keys(), expected.keys() ^ got.keys()
    scale = max(x.abs().max() for key, x in expected.items() if key != "logits").clamp(min=1.0)
    return {key: ((x - got[key]).abs().max() / scale).item() for key, x in expected.items()}


def tokens(model: torch.nn.Module, name: str, beams: int, **options) -> torch.Tensor:
    options = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "num_beams": beams} | options
    return model.generate(**inputs(name), **options)


def differences(name: str, grid: tuple[int, int], options: dict) -> tuple[dict[str, float], list[bool], int, list[str]]:
    """Of logits and gradients; whether tokens are alike; how many are split, and what attention is gathered."""
    stock = make(name)
    ours = tlm.parallelize(copy.deepcopy(stock), mesh(grid), **options)
    alike = [torch.equal(*(tokens(model, name, beams) for model in (stock, ours))) for beams in (1, 3)]
    alike.append(torch.equal(tokens(stock, name, 1), tokens(ours, name, 1, cache_implementation="static")))
    report = tlm.report(ours)
    gathered = [one for one, why in report.gathered.items() if why != NO_PLAN]
    return off(stock, ours, name), alike, report.attentions, gathered


@pytest.mark.parametrize("name", IN_DEPTH)
def test_encoder_decoder(pool, name):
    """T. Localises: the part of a cache that each attention takes; an encoder's attention that is given none; a bias
    that one layer makes and the others are given.
    """
    for grid, options in (((2, 2), {}), ((1, 4), {"cache": "batch", "rest": False})):
        for found, alike, count, gathered in pool.run(differences, 4, name, grid, options, timeout=240):
            assert max(found.values()) < 1e-10, found
            assert alike == [True] * 3  # greedy, beams, a static cache
            assert (count, gathered) == (6, [])


def in_scheme(name: str, scheme: str) -> dict[str, float]:
    stock = make(name)
    return off(stock, tlm.parallelize(copy.deepcopy(stock), mesh((2, 2)), scheme=scheme, rest=False), name)


@pytest.mark.parametrize("scheme", ["slices", "sequence", "batch", "heads", "weights"])
def test_schemes(pool, scheme):
    """T. Localises: keys of another length than the queries, and their gradients, in every scheme."""
    for name in ("bart", "t5"):
        for found in pool.run(in_scheme, 4, name, scheme, timeout=120):
            assert max(found.values()) < 1e-10, found


def one_attention(grid: tuple[int, int] | None, cache: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    stock = make("bart")
    ours = tlm.parallelize(copy.deepcopy(stock), mesh(grid), rest=False, cache=cache)
    name = "model.decoder.layers.1.encoder_attn"
    return stock.get_submodule(name), ours.get_submodule(name)


def kept(grid: tuple[int, int] | None, cache: str) -> tuple[float, int]:
    """The difference of three calls with a cache, the later ones given states of NaN; and bytes of the cache."""
    torch.manual_seed(3)
    xs, states = torch.randn(3, 2, 4, 32, dtype=torch.float64), torch.randn(2, 7, 32, dtype=torch.float64)
    xs[:, 0] = xs[:, 1]
    found, caches = [], []
    with torch.no_grad():
        for one in one_attention(grid, cache):
            assert isinstance(one, CrossAttention) == bool(found)
            caches.append(EncoderDecoderCache(DynamicCache(), DynamicCache()))
            given = [states, states * torch.nan, states * torch.nan]
            found.append([one(x, s, past_key_values=caches[-1])[0] for x, s in zip(xs, given, strict=True)])
    assert all(cache.is_updated == {1: True} for cache in caches)
    layer = caches[1].cross_attention_cache.layers[1]
    assert layer.get_seq_length() == 7
    return max((a - b).abs().max().item() for a, b in zip(*found, strict=True)), layer.nbytes


@pytest.mark.parametrize("cache", ["position", "batch"])
def test_kept_once(pool, cache):
    """T, E. Localises: states that are projected again in later calls; keys and values that two ranks hold."""
    for grid in ((2, 2), (1, 4)):
        found = pool.run(kept, 4, grid, cache)
        assert max(error for error, _ in found) < 1e-10
        sequences = 2 if cache == "position" else -(-2 // grid[1]) * grid[1]  # filled up for all ranks
        capacity = sum(nbytes for _, nbytes in found)
        assert capacity == sequences * 7 * 32 * 8 * 2, capacity


def refused() -> list[str]:
    own, cross = make("bart"), one_attention(None, "position")[1]
    self_attention = tlm.parallelize(own, None).model.decoder.layers[0].self_attn
    x, found = torch.randn(2, 3, 32, dtype=torch.float64), []
    calls = (
        lambda: cross(x),
        lambda: cross(x, x, past_key_values=DynamicCache()),
        lambda: self_attention(x, key_value_states=x),
    )
    for call in calls:
        with pytest.raises(ValueError) as error:
            call()
        found.append(str(error.value))
    return found


def test_refusals():
    """Localises: a call that would attend to nothing, or to its own states; a cache without a part for it."""
    none, plain, own = refused()
    assert "attends to key_value_states: give it" in none
    assert "EncoderDecoderCache, got a DynamicCache" in plain
    assert "it is self-attention" in own


def weights(name: str, cache: str) -> float:
    stock = make(name, "eager")
    ours = tlm.parallelize(copy.deepcopy(stock), mesh((2, 2)), cache=cache)
    use_cache, labels = cache == "batch", torch.randint(3, 64, (3, 7), generator=torch.manual_seed(2))
    with torch.no_grad():
        both = [
            model(**inputs(name), decoder_input_ids=labels, output_attentions=True, use_cache=use_cache)
            for model in (stock, ours)
        ]
    pairs = zip(both[0].cross_attentions, both[1].cross_attentions, strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("name", ["bart", "whisper"])
def test_attention_weights(pool, name):
    """T. Localises: weights over other states than the queries', also where a cache takes the keys first."""
    for cache in ("position", "batch"):
        assert max(pool.run(weights, 4, name, cache)) < 1e-10


def split_activations(activations: str) -> tuple[dict[str, float], list[str]]:
    stock = make("bart")
    ours = tlm.parallelize(copy.deepcopy(stock), mesh((2, 2)), activations=activations)
    return off(stock, ours, "bart"), [why for why in tlm.report(ours).left_out.values() if "cross-attention" in why]


@pytest.mark.parametrize("activations", ["sequence", "batch"])
def test_split_activations(pool, activations):
    """T. Localises: parts of hidden states given to attention whose other states are whole."""
    for found, left_out in pool.run(split_activations, 4, activations):
        assert max(found.values()) < 1e-10, found
        assert len(left_out) == 1


LORA = {"bart": ["q_proj", "k_proj", "v_proj", "out_proj"], "t5": ["q", "k", "v", "o"]}


def with_adapters(name: str) -> tuple[float, bool]:
    """Of LoRA on all projections: how far logits and adapters' gradients are off, whether tokens are alike."""
    models = []
    for grid in (None, (2, 2)):
        torch.manual_seed(5)
        config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=LORA[name])
        model = peft.get_peft_model(make(name), config)
        draw = torch.Generator().manual_seed(3)
        for key, p in sorted(model.named_parameters()):
            if "lora_B" in key:  # zero at the start
                p.data.copy_(torch.randn(p.shape, generator=draw, dtype=torch.float64) * 0.2)
        models.append(model if grid is None else tlm.parallelize(model, mesh(grid)))
    found = []
    for model in models:
        labels = torch.randint(3, 64, (3, 7), generator=torch.manual_seed(2))
        output = model(**inputs(name), labels=labels, use_cache=False)
        output.loss.backward()
        grads = {key: p.grad for key, p in model.named_parameters() if "lora_" in key}
        assert any("EncDecAttention" in key or "encoder_attn" in key for key in grads)
        found.append({"logits": output.logits, **grads})
    assert found[0].keys() == found[1].keys()
    off = max((x - found[1][key]).abs().max().item() for key, x in found[0].items())
    return off, torch.equal(*(tokens(model, name, 1) for model in models))


@pytest.mark.parametrize("name", LORA)
def test_adapters(pool, name):
    """T. Localises: an adapter's product of other states than the queries', of none where a cache has the keys."""
    for off, alike in pool.run(with_adapters, 4, name, timeout=120):
        assert off < 1e-10 and alike


def stored(name: str, folder: str) -> int:
    """full_state_dict, load_state_dict, and load_pretrained of a model that was made on meta and split."""
    stock = make(name)
    expected = stock.state_dict()
    ours = tlm.parallelize(copy.deepcopy(stock), mesh((2, 2)))
    for p in ours.parameters():
        torch.nn.init.zeros_(p)
    ours.load_state_dict(expected)
    ours.save_pretrained(folder)
    torch.distributed.barrier()
    with torch.device("meta"):
        blank = type(stock)(stock.config).double()
    read = tlm.load_pretrained(tlm.parallelize(blank, mesh((2, 2))), folder)
    assert tlm.report(read).attentions == 6
    for model in (ours, read):
        state = tlm.full_state_dict(model)
        assert not state or all(torch.equal(state[key], x) for key, x in expected.items())
    return len(expected)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_stored(pool, tmp_path, name):
    """E. Localises: a projection of cross-attention, or T5's table, under another name; a trial of a model on meta."""
    assert min(pool.run(stored, 4, name, str(tmp_path), timeout=120)) > 0


@pytest.mark.parametrize("name", [name for name in KINDS if name not in IN_DEPTH])
def test_split(name):
    """Localises: a family whose attention the trial refuses; gathered, it would give the right numbers in all above."""
    report = tlm.report(tlm.parallelize(make(name), None))
    assert (report.attentions, report.gathered) == (6, {})
