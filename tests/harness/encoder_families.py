"""Encoders and encoder-decoders of transformers, small, split over 4 ranks and not: what is right, what is refused.

    PYTHONPATH=tests python -m harness.encoder_families [--ranks 4] [--kinds masked] [--only bert t5] [--json FILE]

Masked language models, encoder-decoders, image and audio classifiers, models of images and text, of each family of
transformers' mappings one with random weights. Right: the outputs that carry a loss and the gradient of every parameter
are the unsplit model's, and where it generates 6 greedy tokens with a cache too.
"""

import argparse
import copy
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.models.auto import modeling_auto

import two_level_mha as tlm
from harness import families, image_text
from harness.calls import mesh
from harness.pool import Pool, RankFailure
from two_level_mha.attentions import NO_PLAN

TOKENS = 6


# Fields of all configurations of a kind, and of single families, besides those of families.SIZES.
PARTS = {"image_size": 32, "patch_size": 8, "num_channels": 3, "feature_size": 64}
OF_KIND = {"image": {"num_labels": 3}, "seq2seq": {"decoder_start_token_id": 1}}
STAGES = {"depths": [1, 1], "num_stages": 2, "num_encoder_blocks": 2, "out_features": None, "out_indices": None}
MORE = {
    "convbert": {"head_ratio": 2},
    "convnext": {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2},
    "convnextv2": {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "share_att_key": True,
                   "position_buckets": 4, "norm_rel_ebd": "layer_norm"},
    "esm": {"vocab_size": 96, "mask_token_id": 4, "pad_token_id": 0},
    "esmc": {"num_key_value_heads": 4},
    "fsmt": {"src_vocab_size": 96, "tgt_vocab_size": 96, "langs": ["a", "b"]},
    "funnel": {"num_hidden_layers": None, "block_sizes": [1, 1], "d_head": 16},
    "hiera": {"num_heads": [2, 4], "depths": [1, 1], "embed_dim": 32, "query_stride": [2, 2], "num_query_pool": 1},
    "luke": {"entity_vocab_size": 8},
    "marian": {"pad_token_id": 0, "decoder_vocab_size": 96, "forced_eos_token_id": None},
    "mobilebert": {"embedding_size": 32, "true_hidden_size": 32, "intra_bottleneck_size": 32},
    "perceiver": {"num_latents": 8, "d_latents": 64, "d_model": 64, "num_self_attends_per_block": 2, "num_blocks": 1},
    "prophetnet": families.MORE["prophetnet"],
    "pvt": STAGES | {"num_attention_heads": [2, 4], "hidden_sizes": [32, 64], "sequence_reduction_ratios": [2, 1],
                     "patch_sizes": [4, 2], "strides": [4, 2], "mlp_ratios": [2, 2]},
    "pvt_v2": STAGES | {"num_attention_heads": [2, 4], "hidden_sizes": [32, 64], "sr_ratios": [2, 1], "num_blocks": 2,
                        "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2], "linear_attention": False},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "local"], "local_attn_chunk_length": 11,
                 "is_decoder": False},
    "segformer": STAGES | {"num_attention_heads": [2, 4], "hidden_sizes": [32, 64], "sr_ratios": [2, 1],
                           "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]},
    "swiftformer": {"depths": [1, 1, 1, 1]},
    "switch_transformers": {"num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "swin": STAGES | {"num_heads": [2, 4], "embed_dim": 32, "patch_size": 4, "window_size": 4},
    "swinv2": STAGES | {"num_heads": [2, 4], "embed_dim": 32, "patch_size": 4, "window_size": 4},
    "donut-swin": STAGES | {"num_heads": [2, 4], "embed_dim": 32, "patch_size": 4, "window_size": 4},
    "whisper": {"max_source_positions": 20},
    "xmod": {"default_language": "en_XX"},
}  # fmt: skip


LARGE = {"vibevoice_asr": "acoustic tokenizer"}


class Kind(NamedTuple):
    called: str
    make: type
    names: dict[str, object]
    inputs: Callable[[nn.Module], dict[str, Tensor]]


def text(model: nn.Module) -> dict[str, Tensor]:
    return families.inputs()


def both(model: nn.Module) -> dict[str, Tensor]:
    return families.inputs() | {"decoder_input_ids": torch.randint(3, 96, (3, 5))}


def image(model: nn.Module) -> dict[str, Tensor]:
    size = getattr(model.config, "image_size", None) or 32
    if model.main_input_name == "input_ids":
        return {"input_ids": torch.randint(96, (2, 16))}
    # two for each rank: torch 2.15's own gradient of CvT's depthwise convolutions is wrong for an image alone
    return {"pixel_values": torch.randn(8, 3, *(size if isinstance(size, (list, tuple)) else (size, size)))}


def audio(model: nn.Module) -> dict[str, Tensor]:
    if model.main_input_name == "input_features":
        width = getattr(model.config, "feature_projection_input_dim", None) or model.config.num_mel_bins
        return {"input_features": torch.randn(2, *((40, width) if "2" in type(model).__name__ else (width, 40)))}
    frames = getattr(model.config, "max_length", None)
    return {
        "input_values": torch.randn(2, 1600) if frames is None else torch.randn(2, frames, model.config.num_mel_bins)
    }


KINDS = {
    "masked": Kind(
        "masked language model",
        transformers.AutoModelForMaskedLM,
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        text,
    ),
    "seq2seq": Kind(
        "encoder-decoder",
        transformers.AutoModelForSeq2SeqLM,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        both,
    ),
    "image": Kind(
        "image classifier",
        transformers.AutoModelForImageClassification,
        modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        image,
    ),
    "audio": Kind(
        "audio classifier",
        transformers.AutoModelForAudioClassification,
        modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
        audio,
    ),
    "image-text": Kind(
        "model of images and text",
        transformers.AutoModelForImageTextToText,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        image_text.inputs,
    ),
}


def configured(kind: str, family: str) -> transformers.PretrainedConfig:
    """A small configuration."""
    if kind == "image-text":
        return image_text.configured(family)
    default, own = transformers.AutoConfig.for_model(family), MORE.get(family, {})
    options = families.sizes_of(default)
    for name, part in vars(default).items():
        if isinstance(part, transformers.PretrainedConfig):
            options[name] = families.sizes_of(part) | {key: size for key, size in PARTS.items() if hasattr(part, key)}
    if kind == "image":
        options |= {name: size for name, size in PARTS.items() if hasattr(default, name)}
    lists = {name for name in options if isinstance(getattr(default, name, None), (list, tuple))}
    options = {name: value for name, value in options.items() if name not in lists} | OF_KIND.get(kind, {}) | own
    return type(default)(**{name: value for name, value in options.items() if value is not None})


def build(kind: str, family: str) -> nn.Module:
    """A small model of a family, random."""
    torch.manual_seed(0)
    config = configured(kind, family)
    name = KINDS[kind].names[family]
    config.architectures = [name if isinstance(name, str) else name[0]]
    return families.drawn(KINDS[kind].make, config)


def answers(kind: str, model: nn.Module) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
    """Outputs, gradients by name, tokens."""
    torch.manual_seed(1)
    given = KINDS[kind].inputs(model)
    output = model(**{name: x.clone() for name, x in given.items()})  # BLIP writes to its tokens
    logits = output.logits if kind == "image-text" else output[0]
    mask = given.get("attention_mask")
    if mask is not None and logits.shape[:2] == mask.shape:
        logits = logits[mask.bool()]
    (logits.float() ** 2).mean().backward()
    tokens = None
    if kind in ("seq2seq", "image-text"):
        given.pop("decoder_input_ids", None)
        with torch.no_grad():
            tokens = model.generate(**given, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
    held = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    grads = {name: (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone() for name, x in held.items()}
    return logits.detach(), grads, tokens


def try_family(kind: str, family: str, grid: tuple[int, int]) -> dict[str, object]:
    """On every rank."""
    if family in LARGE:
        return {"verdict": "not built", "why": f"its {LARGE[family]} is large"}
    try:
        model = build(kind, family)
        logits, grads, tokens = answers(kind, copy.deepcopy(model))
    except Exception as error:
        return {"verdict": "not built", "why": f"{type(error).__name__}: {str(error)[:200]}"}
    try:
        model = tlm.parallelize(model, mesh(grid))
    except tlm.GridError as error:
        none = str(error).startswith("no attention was found")
        return {"verdict": "has none" if none else "refused", "why": str(error)[:300]}
    report = tlm.report(model)
    mlps = sum(why == NO_PLAN for why in report.gathered.values())
    own_logits, _, own_tokens = answers(kind, model)
    own_grads, problems = families.stock_gradients(model), []
    tolerance = families.TOLERANCE[logits.dtype]
    off = families.off_by(own_logits, logits)
    if not off <= tolerance:
        problems.append(f"outputs differ by {off:.1e}")
    if tokens is not None and not torch.equal(tokens, own_tokens):
        problems.append("tokens differ")
    grads = {name: x for name, x in grads.items() if x.numel() and not x.isnan().any()}
    least = 1e-3 * max(x.abs().max().item() for x in grads.values())
    offs = [(families.off_by(own_grads[name], x, least), name) for name, x in grads.items() if name in own_grads]
    worst = max(offs, default=(0.0, ""))
    if own_grads and not worst[0] <= 10 * tolerance:
        problems.append(f"the gradient of {worst[1]} differs by {worst[0]:.1e}")
    return {
        "verdict": "wrong" if problems else "right",
        "why": "; ".join(problems),
        "attentions": report.attentions + report.states,
        "gathered": len(report.gathered) - mlps,
        "gathered_mlps": mlps,
        "reasons": sorted({why for why in report.gathered.values() if why != NO_PLAN}),
    }


def survey(kind: str, names: list[str], ranks: int) -> dict[str, dict]:
    from harness.encoder_families import try_family  # ranks import it by this name, also where this is __main__

    pool, found = Pool(alive=1), {}
    for family in names:
        try:
            results = pool.run(try_family, ranks, kind, family, (2, ranks // 2), timeout=families.TIMEOUT)
            one = next((one for one in results if one["verdict"] != "right"), results[0])
        except RankFailure as error:
            lines = str(error.__cause__ or error).strip().splitlines()
            one = {"verdict": "crash", "why": lines[-1][-300:] if lines else type(error.__cause__).__name__}
        found[family] = one
        ways = f"{one.get('attentions', '')} + {one.get('gathered', '')}"
        print(
            f"{kind:8} {family:24} {one['verdict']:10} {ways:8} {one['why'][:140]} {one.get('reasons', '')}", flush=True
        )
    pool.close()
    return found


def summary(made: dict) -> str:
    """README's."""
    found = [one for of_kind in made["kinds"].values() for one in of_kind.values()]
    verdicts = [one["verdict"] for one in found]
    right = [one for one in found if one["verdict"] == "right"]
    of = len(found) - verdicts.count("not built") - verdicts.count("has none")
    return (
        f"Of its {of} encoders, encoder-decoders, image and audio classifiers and models of images and text with "
        f"attention of which a small one can be made, {len(right)} are right in outputs and gradients, "
        f"{sum(not one['gathered'] for one in right)} of them all split ([the table](docs/encoders.md))."
    )


def sentence(made: dict) -> str:
    """Of docs/encoders.md."""
    parts = []
    for kind, found in made["kinds"].items():
        verdicts = [one["verdict"] for one in found.values()]
        split = sum(one["verdict"] == "right" and not one["gathered"] for one in found.values())
        of = len(verdicts) - verdicts.count("not built") - verdicts.count("has none")
        parts.append(f"{KINDS[kind].called}: {verdicts.count('right')} of {of} right, {split} wholly split")
    return "; ".join(parts) + "."


def page(made: dict) -> str:
    """docs/encoders.md, of what is in its JSON."""
    rows, left, none = [], [], []
    for kind, found in made["kinds"].items():
        for family, one in found.items():
            if one["verdict"] == "not built":
                left.append(f"{family} ({families.cell(one['why'])})")
            elif one["verdict"] == "has none":
                none.append(family)
            else:
                rows.append(f"| {KINDS[kind].called} | {family} | {one['verdict']} | {families.how(one)} |")
    return f"""# Encoders, encoder-decoders, models of images and text

Made by `make models` on {made["date"]}, torch {made["torch"]}, transformers {made["transformers"]}.

Families of transformers other than [causal language models](models.md), small and with random weights, on
{made["ranks"]} Gloo ranks in a grid of 2 head groups. Right: the outputs that carry a loss and the gradient of every
parameter are the unsplit model's, and where it generates {TOKENS} greedy tokens with a cache too. {sentence(made)}

Where attention is not split it runs its own code, with weights that are stored split and gathered for each call.

| kind | family | here | attention |
|---|---|---|---|
{chr(10).join(rows)}

Without attention: {", ".join(none)}.

No small model was made of {len(left)}: {"; ".join(left)}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--only", nargs="*", default=[], help="these anew; the others stay as the JSON file has them")
    parser.add_argument("--json", type=Path, help="all that was found")
    parser.add_argument("--docs", type=Path, help="a page of it, in Markdown")
    args = parser.parse_args()
    before = json.loads(args.json.read_text())["kinds"] if args.only and args.json and args.json.is_file() else {}
    found = dict(before)
    for kind in args.kinds:
        names = [name for name in sorted(KINDS[kind].names) if not args.only or name in args.only]
        found[kind] = dict(sorted((before.get(kind, {}) | survey(kind, names, args.ranks)).items()))
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    made = {"date": str(datetime.date.today()), **versions, "ranks": args.ranks, "kinds": found}
    print(sentence(made))
    if args.docs:
        args.docs.write_text(page(made))
    if args.json:
        args.json.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
