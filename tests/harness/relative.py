"""Tiny encoders whose scores have more of relative positions, whole and split: models, inputs, what differs."""

import copy

import torch
import transformers
from torch import nn

import two_level_mha as tlm
from harness.calls import mesh
from harness.decoders import full_gradients
from two_level_mha.integrations.projected import ProjectedAttention

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
TEXT = {"vocab_size": 30, "max_position_embeddings": 5, "type_vocab_size": 2, "pad_token_id": 1,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "relative_attention": True,
        "position_biased_input": False}  # fmt: skip
BOTH = {"pos_att_type": ["c2p", "p2c"]}
SOUND = {"conv_dim": [8], "conv_kernel": [4], "conv_stride": [4], "vocab_size": 12,
         "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "conv_depthwise_kernel_size": 3,
         "layerdrop": 0.0, "apply_spec_augment": False, "feature_projection_input_dim": 10} | {
    f"{name}_dropout": 0.0 for name in ("hidden", "activation", "attention", "feat_proj", "final", "conformer_conv")
}  # fmt: skip

# Of a case: the model, its config, and what the config has besides; of a kind all that its attention can be.
CASES: dict[str, tuple[str, dict]] = {
    "deberta": ("DebertaModel", TEXT | BOTH),
    "deberta c2p": ("DebertaModel", TEXT | {"pos_att_type": ["c2p"]}),
    "deberta without": ("DebertaModel", TEXT | {"relative_attention": False}),
    "deberta-v2": ("DebertaV2Model", TEXT | BOTH),
    "deberta-v2 p2c": ("DebertaV2Model", TEXT | {"pos_att_type": ["p2c"]}),
    "deberta-v3": (
        "DebertaV2Model",
        TEXT | BOTH | {"share_att_key": True, "position_buckets": 3, "norm_rel_ebd": "layer_norm"},
    ),
    "wavlm": ("WavLMModel", SOUND | {"num_buckets": 6, "max_bucket_distance": 5}),
    "conformer": ("Wav2Vec2ConformerModel", SOUND | {"position_embeddings_type": "relative"}),
    "conformer without": ("Wav2Vec2ConformerModel", SOUND | {"position_embeddings_type": None}),
    "bert of sound": (
        "Wav2Vec2BertModel",
        SOUND | {"left_max_position_embeddings": 3, "right_max_position_embeddings": 2},
    ),
}


def make_config(name: str, **changes) -> transformers.PretrainedConfig:
    kind, options = CASES[name]
    made = getattr(transformers, kind.removesuffix("Model") + "Config")
    return made(**SIZES | options | changes)


def make(name: str, **changes) -> nn.Module:
    """The same on every rank; weights that are not small, and none of them zero."""
    torch.manual_seed(0)
    model = getattr(transformers, CASES[name][0])(make_config(name, **changes))
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model.double().eval()


def inputs(name: str, batch: int = 2) -> dict[str, torch.Tensor]:
    """Sequences of which the first is padded, as the model takes them."""
    torch.manual_seed(1)
    if CASES[name][0].startswith("Deberta"):
        keep = torch.ones(batch, 7, dtype=torch.long)
        keep[0, 4:] = 0
        return {"input_ids": torch.randint(2, 30, (batch, 7)), "attention_mask": keep}
    keep = torch.ones(batch, 28, dtype=torch.long)
    keep[0, 18:] = 0
    if name == "bert of sound":
        return {"input_features": torch.randn(batch, 7, 10).double(), "attention_mask": keep[:, ::4]}
    return {"input_values": torch.randn(batch, 28).double(), "attention_mask": keep}


def answers(model: nn.Module, given: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The output, rows of padding too, and every gradient by stock's names."""
    model.zero_grad()
    y = model(**given)[0]
    torch.manual_seed(2)
    (y * torch.randn_like(y)).sum().backward()
    return y, full_gradients(model)


def off(name: str, grid: tuple[int, int] | None, batch: int = 2, **options) -> float:
    """The largest difference of a split copy's output and of its gradients, relative where they are large."""
    stock = make(name)
    ours = tlm.parallelize(copy.deepcopy(stock), mesh(grid), **options)
    kinds = [type(module) for module in ours.modules() if isinstance(module, ProjectedAttention)]
    assert len(kinds) == 2, tlm.report(ours).gathered
    return farthest(answers(ours, inputs(name, batch)), answers(stock, inputs(name, batch)))


def farthest(got: tuple, expected: tuple) -> float:
    """As off, of two answers."""
    assert got[1].keys() == expected[1].keys(), got[1].keys() ^ expected[1].keys()
    pairs = [(got[0], expected[0]), *((got[1][key], x) for key, x in expected[1].items())]
    return max((a - b).abs().max().item() / max(1.0, b.abs().max().item()) for a, b in pairs)
