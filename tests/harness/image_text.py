"""Small models of transformers that read images and text, and what they are called with: for encoder_families.

Two sequences with an image each. How many tokens an image is, the model says: its get_image_features is tried with the
kinds of images there are, and the first whose call succeeds is taken.
"""

import inspect
from collections.abc import Iterator

import torch
import transformers
from torch import Tensor, nn

from harness import families

SIDE, PATCH, IMAGES = 32, 8, 2
PATCHES = (SIDE // PATCH) ** 2
SIZES = {
    "image_size": SIDE, "patch_size": PATCH, "num_channels": 3, "in_channels": 3, "depth": 2, "num_heads": 4,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 64, "fullatt_block_indexes": [1],
    "deepstack_visual_indexes": [1], "window_size": 16, "num_position_embeddings": 64, "projection_dim": 64,
    "vocab_size": 200, "vocab_size_per_layer_input": 200, "image_token_id": 7, "image_token_index": 7,
    "video_token_id": 8, "video_token_index": 8,
    "vision_start_token_id": 9, "vision_end_token_id": 10, "audio_token_id": 11, "boi_token_id": 12,
    "eoi_token_id": 13, "mm_hidden_size": 64, "query_tokens": 4, "num_query_tokens": 4,
}  # fmt: skip
_SECTIONS = {"text_config": {"rope_parameters": {
    "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3], "partial_rotary_factor": 1.0,
}}}  # fmt: skip
_TILES = {"image_grid_pinpoints": [[SIDE, SIDE], [SIDE, 2 * SIDE]]}
# What single families need besides.
MORE = {
    "aria": {"projector_patch_to_query_dict": {PATCHES: 4}},
    "blip-2": {"image_token_index": 7},
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma4": {"vision_config": {
        "model_type": "gemma4_vision", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "patch_size": PATCH,
        "pooling_kernel_size": 2, "position_embedding_size": 64,
    }},
    "glm46v": _SECTIONS,
    "glm4v": _SECTIONS,
    "glm4v_moe": _SECTIONS,
    "glm_ocr": _SECTIONS,
    "glmga": _SECTIONS,
    "instructblip": {"image_token_index": 7},
    "janus": {
        "vq_config": {"embed_dim": 8, "num_embeddings": 16, "base_channels": 32, "channel_multiplier": [1, 1]}
    },
    "llama4": {"vision_config": {
        "intermediate_size": 256, "projector_input_dim": 64, "projector_output_dim": 64, "vision_output_dim": 64,
    }},
    "llava_next": _TILES,
    "llava_next_video": _TILES,
    "llava_onevision": _TILES,
    "mllama": {
        "vision_config": {
            "vision_output_dim": 192, "num_global_layers": 1, "num_hidden_layers": 2,
            "intermediate_layers_indices": [0, 1], "supported_aspect_ratios": [[1, 1], [1, 2]], "max_num_tiles": 2,
        },
        "text_config": {"cross_attention_layers": [1]},
    },
    "paddleocr_vl": _SECTIONS,
    "qwen2_5_omni_thinker": _SECTIONS | {"vision_start_token_id": 9},
    "qwen2_5_vl": _SECTIONS,
    "qwen2_vl": _SECTIONS | {"vision_config": {"hidden_size": 64, "embed_dim": 64}},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 9},
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "vision-encoder-decoder": {
        "decoder": {"is_decoder": True, "add_cross_attention": True}, "decoder_start_token_id": 1, "pad_token_id": 0,
    },
    "vipllava": {"vision_feature_layers": [-1, -2]},
}  # fmt: skip
TOKEN = ("image_token_id", "image_token_index", "im_token_id", "media_token_id", "image_placeholder_token_id")


def configured(family: str) -> transformers.PretrainedConfig:
    """A small configuration."""
    default = transformers.AutoConfig.for_model(family)
    return type(default)(**_merged(_small(default), MORE.get(family, {})))


def _small(config: transformers.PretrainedConfig) -> dict:
    options = families.sizes_of(config) | {name: x for name, x in SIZES.items() if families.has(config, name)}
    options = {name: x for name, x in options.items() if isinstance(x, list) or not _is_list(config, name)}
    parts = {name: _small(x) for name, x in vars(config).items() if isinstance(x, transformers.PretrainedConfig)}
    return options | parts | ({"vocab_size": SIZES["vocab_size"]} if "vocab_size" in options else {})


def _is_list(config: transformers.PretrainedConfig, name: str) -> bool:
    try:
        return isinstance(getattr(config, name, None), (list, tuple))
    except Exception:  # of transformers' own: one that differs between layers
        return False


def _merged(options: dict, more: dict) -> dict:
    inner = {name: _merged(options[name], x) for name, x in more.items() if isinstance(options.get(name), dict)}
    return options | more | inner


def inputs(model: nn.Module) -> dict[str, Tensor]:
    """Tokens with images among them, or images and tokens. Raises ValueError where no kind of image goes."""
    draw = torch.Generator().manual_seed(2)
    text, named = torch.randint(20, 90, (IMAGES, 6), generator=draw), inspect.signature(model.forward).parameters
    features = getattr(model, "get_image_features", None)
    features = features or getattr(getattr(model, "model", None), "get_image_features", None)
    tokens = [] if features is None or _number(model.config, *TOKEN) is None else [features]
    if "input_ids" in named:
        plain = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    else:
        plain = {name: text for name in ("decoder_input_ids",) if name in named}
    why: list[str] = []
    for of_tokens in (*tokens, None):
        for images in _images(draw):
            try:
                with torch.no_grad():
                    count = 0 if of_tokens is None else _rows(of_tokens(**images)) // IMAGES
                    given = (plain if of_tokens is None else _among(text, count, model, named)) | images
                    model(**given)
                return given
            except Exception as error:  # of any kind: it is another's code
                why.append(f"{type(error).__name__}: {str(error)[:100]}")
    raise ValueError(why[0])


def _images(draw: torch.Generator) -> Iterator[dict[str, Tensor]]:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    x, n = random(IMAGES, 3, SIDE, SIDE), IMAGES
    sizes, grid = torch.tensor([[SIDE, SIDE]] * n), torch.tensor([[1, SIDE // PATCH, SIDE // PATCH]] * n)
    ones = torch.ones(n, SIDE, SIDE).long()
    yield {"pixel_values": x}
    yield {"pixel_values": x, "pixel_attention_mask": ones}
    yield {"pixel_values": x.unsqueeze(1), "pixel_attention_mask": ones.unsqueeze(1)}
    yield {"pixel_values": x, "qformer_input_ids": torch.ones(n, 3).long()}
    yield {"pixel_values": x, "image_sizes": sizes}
    tiles = {"aspect_ratio_ids": torch.ones(n, 1).long(), "aspect_ratio_mask": torch.ones(n, 1, 2).long()}
    tiles |= {"cross_attention_mask": torch.ones(n, 6, 1, 2).long()}
    yield {"pixel_values": x[:, None, None].repeat(1, 1, 2, 1, 1, 1), **tiles}
    yield {"pixel_values": x.unsqueeze(1).repeat(1, 2, 1, 1, 1), "image_sizes": sizes}
    for width in (3 * 2 * PATCH**2, 3 * PATCH**2):
        patches = {"pixel_values": random(PATCHES * n, width), "image_grid_thw": grid}
        yield patches
        yield patches | {"image_merge_sizes": torch.tensor([2] * n)}
    yield {"pixel_values": random(PATCHES * n, 3, PATCH, PATCH), "image_grid_thw": grid}
    at = torch.cartesian_prod(*(torch.arange(SIDE // PATCH) for _ in "yx")).flip(1).repeat(n, 1, 1)
    yield {"pixel_values": random(n, PATCHES, 3 * PATCH**2), "image_position_ids": at}
    shapes = {"spatial_shapes": grid[:, 1:], "pixel_attention_mask": torch.ones(n, PATCHES).long()}
    yield {"pixel_values": random(n, PATCHES, 3 * PATCH**2), **shapes}


def _among(text: Tensor, count: int, model: nn.Module, named: object) -> dict[str, Tensor]:
    token, ends = _number(model.config, *TOKEN), ("vision_start_token_id", "vision_end_token_id")
    begin, end = (_number(model.config, name) for name in ends)
    image = [token] * count if begin is None else [begin, *[token] * count, 20 if end is None else end]
    ids = torch.cat([text[:, :2], torch.tensor([image] * IMAGES), text[:, 2:]], 1)
    kinds = {name: (ids == token).int() for name in ("mm_token_type_ids", "token_type_ids") if name in named}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **kinds}


def _number(config: transformers.PretrainedConfig, *names: str) -> int | None:
    parts = (config, *(x for x in vars(config).values() if isinstance(x, transformers.PretrainedConfig)))
    found = (getattr(part, name, None) for part in parts for name in names)
    return next((x for x in found if isinstance(x, int)), None)


def _rows(found: object) -> int:
    """How many tokens images are, of what get_image_features gives."""
    for name in ("pooler_output", "last_hidden_state"):
        found = found if getattr(found, name, None) is None else getattr(found, name)
    if isinstance(found, (list, tuple)):
        return sum(map(_rows, found)) if isinstance(found[0], Tensor) else _rows(found[0])
    return found.numel() // found.shape[-1]
