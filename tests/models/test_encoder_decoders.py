"""transformers' encoder-decoders: self-attention split, cross-attention gathered, a cache of both."""

import copy

import pytest
import torch
import transformers
from harness.calls import mesh

import two_level_mha as tlm
from two_level_mha.blocks import full_tensor

SIZES = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "dropout": 0.0,
    "forced_eos_token_id": None, "num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 32,
    "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip
MODELS = {
    "bart": (transformers.BartConfig, transformers.BartForConditionalGeneration),
    "marian": (transformers.MarianConfig, transformers.MarianMTModel),
    "whisper": (transformers.WhisperConfig, transformers.WhisperForConditionalGeneration),
}


def differences(name: str, grid: tuple[int, int]) -> tuple[dict[str, float], list[bool], tuple[int, int]]:
    """Relative differences of logits and gradients, whether tokens are alike, how many are split and gathered."""
    kind, make = MODELS[name]
    torch.manual_seed(0)
    stock = make(kind(**SIZES)).double().eval()
    for p in stock.parameters():
        p.data.normal_(std=0.2)
    ours = tlm.parallelize(copy.deepcopy(stock), mesh(grid))
    if name == "whisper":
        given = {"input_features": torch.randn(3, 8, 24, dtype=torch.float64)}
    else:
        given = {"input_ids": torch.randint(3, 64, (3, 9)), "attention_mask": torch.ones(3, 9, dtype=torch.long)}
        given["attention_mask"][1, 6:] = 0
    labels = torch.randint(3, 64, (3, 7))
    outputs, grads = [], []
    for model in (stock, ours):
        outputs.append(model(**given, labels=labels, use_cache=False))
        outputs[-1].loss.backward()
        grads.append({n: full_tensor(p.grad) for n, p in model.named_parameters() if p.grad is not None})
    found = {n: (g - grads[1][n]).abs().max().item() for n, g in grads[0].items() if n in grads[1]}
    found["logits"] = (outputs[0].logits - outputs[1].logits).abs().max().item()
    options = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
    alike = []
    for beams in (1, 3):
        tokens = [model.generate(**given, num_beams=beams, **options) for model in (stock, ours)]
        alike.append(torch.equal(*tokens))
    report = tlm.report(ours)
    cross = [one for one, why in report.gathered.items() if why == "it is cross-attention"]
    return found, alike, (report.attentions, len(cross))


@pytest.mark.parametrize("name", MODELS)
def test_encoder_decoder(pool, name):
    """Localises: the part of a cache that each attention takes; an encoder's attention that is given none."""
    for grid in ((2, 2), (1, 4)):
        for found, alike, counts in pool.run(differences, 4, name, grid, timeout=120):
            assert max(found.values()) < 1e-10, found
            assert alike == [True, True]
            assert counts == (4, 2)
