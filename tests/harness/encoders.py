"""Tiny encoders, of transformers and torch, whole and parallelized: the models, their inputs, and what differs.

Every model has a few heads of width 4 and no dropout.
"""

import copy

import torch
import transformers
from torch import nn
from transformers import BertConfig, RobertaConfig, ViTConfig

import two_level_mha as tlm
from two_level_mha.blocks import full_tensor
from two_level_mha.integrations.projected import ProjectedAttention
from two_level_mha.layer import GridAttention
from two_level_mha.stock import put

TIGHT = 1e-10
SIZES = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
TEXT = {"vocab_size": 30, "max_position_embeddings": 16, "type_vocab_size": 2, "pad_token_id": 1}
IMAGE = {"image_size": 8, "patch_size": 4, "num_channels": 1}
MODELS = {
    "BertModel": (BertConfig, TEXT),
    "RobertaModel": (RobertaConfig, TEXT),
    "ViTModel": (ViTConfig, IMAGE),
}


def make_config(kind: str, implementation: str = "sdpa", **sizes) -> transformers.PretrainedConfig:
    config, extra = MODELS[kind]
    return config(**{**SIZES, **extra, **sizes}, attn_implementation=implementation)


def make(kind: str, implementation: str = "sdpa", **sizes) -> nn.Module:
    torch.manual_seed(0)
    model = getattr(transformers, kind)(make_config(kind, implementation, **sizes))
    for p in model.parameters():  # transformers' own are small, and its biases zero
        nn.init.normal_(p, std=0.3)
    return model.double()


def inputs(kind: str) -> dict:
    torch.manual_seed(1)
    if kind == "ViTModel":
        x = {"pixel_values": torch.randn(2, 1, 8, 8, dtype=torch.float64)}
    else:
        x = {"input_ids": torch.randint(2, 30, (2, 6))}
    keep = torch.ones(2, 5 if kind == "ViTModel" else 6, dtype=torch.long)
    keep[1, 4:] = 0
    return {**x, "attention_mask": keep}


def make_torch(norm_first: bool = False, batch_first: bool = True, **sizes) -> nn.Transformer:
    torch.manual_seed(0)
    counts = {"nhead": 4, "num_encoder_layers": 2, "num_decoder_layers": 1, "dim_feedforward": 24, **sizes}
    model = nn.Transformer(16, **counts, dropout=0.0, batch_first=batch_first, norm_first=norm_first)
    for name, p in model.named_parameters():
        if "bias" in name:
            nn.init.normal_(p, std=0.3)
    return model.double()


def torch_inputs(batch_first: bool = True) -> tuple[tuple, dict]:
    torch.manual_seed(1)
    xs = [torch.randn(2, n, 16, dtype=torch.float64) for n in (6, 5)]
    hidden = torch.zeros(2, 6, dtype=torch.bool)
    hidden[1, 4:] = True
    masks = {"tgt_mask": torch.ones(5, 5, dtype=torch.bool).triu(1), "src_key_padding_mask": hidden,
             "memory_key_padding_mask": hidden}  # fmt: skip
    return tuple(xs if batch_first else [x.transpose(0, 1) for x in xs]), masks


def stock_grads(model: nn.Module) -> dict[str, torch.Tensor]:
    """Full gradients under the names the unmodified model has."""
    grads = {name: full_tensor(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    for name, module in model.named_modules():
        if not isinstance(module, GridAttention):
            continue
        own = {key: grads.pop(f"{name}.{key}") for key in module._parameters if f"{name}.{key}" in grads}
        if not isinstance(module, ProjectedAttention):
            for key, g in own.items():
                put(grads, f"{name}.{module.stock_names[key].key}", module.stock_names[key], g)
            continue
        bert = name.endswith(".self")
        names = ("query", "key", "value") if bert else ("q_proj", "k_proj", "v_proj")
        out = name.removesuffix("self") + "output.dense" if bert else f"{name}.o_proj"
        for key, g in own.items():
            letter, _, part = key.partition("_")
            path = out if letter == "out" else f"{name}.{names['qkv'.index(letter)]}"
            grads[f"{path}.{part}"] = g.flatten(1) if key == "out_weight" else g.flatten(0, 1) if letter != "out" else g
    return grads


def first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def errors(model: nn.Module, args: tuple, kwargs: dict, mesh, **options) -> dict[str, float]:
    """Differences of output and gradients between a model and its parallelized copy, the largest ones first."""
    split = tlm.parallelize(copy.deepcopy(model), mesh, **options)
    assert any(isinstance(module, GridAttention) for module in split.modules())
    outputs = []
    for one in (model, split):
        one.zero_grad()
        y = first(one(*args, **kwargs))
        torch.manual_seed(2)
        (y * torch.randn_like(y)).sum().backward()
        outputs.append(y)
    expected, got = stock_grads(model), stock_grads(split)
    assert set(expected) == set(got), set(expected) ^ set(got)
    found = {name: (expected[name] - got[name]).abs().max().item() for name in expected}
    found = dict(sorted(found.items(), key=lambda item: -item[1])[:3])
    return {"output": (outputs[0] - outputs[1]).abs().max().item(), **found}


def check(found: list[dict[str, float]]) -> None:
    for rank, one in enumerate(found):
        assert all(error <= TIGHT for error in one.values()), (rank, one)
