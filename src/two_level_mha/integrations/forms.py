"""What transformers' attention modules have in common, by the names under which they have it: data, no code of theirs.

What is found here is a claim. The trial on a random copy (attentions.py) decides whether it is the whole truth.
"""

import inspect
import itertools
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from two_level_mha.errors import GridError
from two_level_mha.low_rank import features_of, is_linear
from two_level_mha.stock import StockTensor, from_stock, fused_names, linear_names, take_stock_keys

if TYPE_CHECKING:
    from two_level_mha.layer import GridAttention

# Letter of a projection -> its names, the first that a module has; with "../" its parent's.
PROJECTIONS = {
    "q": ("q_proj", "query", "q_lin", "q", "Wq", "project_q"),
    "k": ("k_proj", "key", "k_lin", "k", "Wk", "project_k"),
    "v": ("v_proj", "value", "v_lin", "v", "Wv", "project_v"),
    "qkv": ("qkv_proj", "query_key_value", "Wqkv", "c_attn", "qkv"),
    "o": ("o_proj", "out_proj", "dense", "c_proj", "out_lin", "Wo", "o", "attention_out", "proj", "projection",
          "projection_layer", "../output.dense"),
}  # fmt: skip
INNER = "linear"  # of a module around one, such as MoshiLinear
# Of gates of attention's output: a projection as wide as q's, or a linear of one number for each head; and what the
# output may be multiplied with of them, the likelier first.
GATES = ("gate_proj", "g_proj")
GATE_SHIFT = "gate_bias"  # (h,), of a gate as wide as q: what each head adds to it
GATE_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "softplus": nn.functional.softplus}
# How q, k, v lie in one projection (stock.PACKINGS), the likelier first.
PACKINGS = {"query_key_value": ("groups", "blocks")}
ANY_PACKING = ("blocks", "groups", "quarters")

# Of multi-head latent attention: x -> latent and rotary key; latent -> each head's key, not rotated, and value; x, or
# the latent of LATENT_QUERY -> q; the norms of latents, and what these are multiplied with.
LATENT, LATENT_QUERY = "kv_a_proj_with_mqa", "q_a_proj"
LATENT_PATHS = {"q": ("q_b_proj", "q_proj"), "kv": ("kv_b_proj",), "o": ("o_proj",)}
LATENT_NORMS = {LATENT: "kv_a_layernorm", LATENT_QUERY: "q_a_layernorm"}
LATENT_SCALES = {
    LATENT: ("mla_scale_kv_lora", "kv_lora_scale"),
    LATENT_QUERY: ("mla_scale_q_lora", "q_lora_scale"),
}
ROTARY_KEY_NORM = "k_rope_only_layernorm"  # of the rotary key, before it is rotated
INDEXER = "indexer"  # a module of x and the queries' latent, without gradients: which keys of its mask a row sees
CHOSEN = "prev_topk_indices"  # an argument: what an earlier layer's chose, for one without; it is returned last
# Children that every rank calls whole, beside projections that are split: an adapter in one is as everywhere.
CALLED_WHOLE = (LATENT, LATENT_QUERY, INDEXER, *GATES)
LATENT_DIMS = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
# Rotary functions beside such modules; the last one takes complex numbers.
ROTARIES = ("apply_rotary_pos_emb", "apply_rotary_pos_emb_interleave", "apply_rotary_emb")

NORMS = {
    "q": ("q_norm", "query_norm", "q_layernorm", "query_layernorm", "qk_norm"),
    "k": ("k_norm", "key_norm", "k_layernorm", "key_layernorm", "qk_norm"),
}
VALUE_NORM = "v_norm"  # of each head of v; without weights
VALUE_SCALE = "v_scale"  # what values are multiplied with
VALUE_DIM = "v_head_dim"  # of a head of v, where it is narrower than one of q and k
HEAD_DIMS = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "dim_head")
HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head")
LAYERS = ("layer_idx", "layer_id")
CALLED_AS = "layer_idx"  # an argument of attention that several layers share: which of them calls
SCALES = ("scaling", "scale", "inv_norm_factor", "softmax_scale")
CLIP = "clip_qkv"
SOFTCAP = "attn_logit_softcapping"
SINKS = "sinks"  # (h,)
# A function beside the module: of position_ids, a rate and a length of the config, what queries are multiplied with.
TEMPERATURE = "get_llama_4_attn_scale"
QUERY_SCALES = "attention_scaling"  # an argument (B or 1, 1, L, 1): what queries are multiplied with, or None
# Classes whose layers without rotation multiply queries with 1 + attn_scale log(1 + floor((p + 1) / floor_scale)), of a
# row's position p in the sequence and its cache.
TUNED = ("Llama4TextAttention",)
OWN_ROTARY = "rotary_emb"  # a module that gives cos and sin of position_ids, where the attention is not given these
ANGLES = "embed_positions"  # a buffer (length, 2 pairs) of each position's sines, then its cosines
ROTATED = "rotary_ndims"  # how many dims of a head are rotated, where the module says so
SINUSOIDS = "sinusoidal_pos"  # an argument (1, 1, L, 2 pairs), of each position's sines, then its cosines
MASK = "bias"  # a buffer (1, 1, length, length), True or 1 = attend: causal, whatever else masks say
WINDOWS = {"local": "window_size"}  # attention_type -> where the config has how many keys a row sees

# Dropout of attention weights: an nn.Dropout or a probability; and of the output: an nn.Dropout.
WEIGHTS_DROPOUT = ("dropout", "attention_dropout", "attn_dropout", "attn_dropout_p")
OUTPUT_DROPOUT = ("resid_dropout", "out_drop", "output_dropout", "projection_dropout")
OUTPUT_NORM = "LayerNorm"  # of the output and the module's input, added
HEADS_NORMS = ("attn_sub_norm",)  # modules of all heads' outputs together, before the output projection
# Of the difference of two softmaxes: vectors of a head's width, of which its rate is made; a number; the norm of that.
LAMBDAS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
LAMBDA_INIT, GROUP_NORM = "lambda_init", "groupnorm"
BIAS_GATE = "gru_rel_pos_linear"  # of a head's part of x: the gate of a bias of the scores
OUTPUT_BIAS = "dense_bias"  # (D,), or None: given behind the weights, for the layer to add

CACHES = ("past_key_values", "layer_past", "cache")
BIASES = ("alibi", "position_bias")  # of the scores
# What is added to the scores: a bias as it is, or scaled as they are, or none, since the mask has it, but where
# attention weights are asked for.
BIASED = ("added", "scaled", "in the mask")
# A table of the bias by distance, of which compute_bias makes position_bias where none is given; layers without a table
# are then given what it made.
BIAS_TABLE = "relative_attention_bias"
# How scores are scaled, by what the module says: nothing, or 1, where it may be that queries are before.
ANY_SCALE = ("as it says", "not", "as usual")
SCALED = {None: ANY_SCALE[:2], 1.0: ANY_SCALE[::2]}
# Classes whose masks are bools with True = hide, and whose position_bias is (h, 1, any number of keys, the last count).
HIDING = ("MptAttention",)
INPUTS = ("hidden_states", "x", "hidden_q", "v", "input")
AGAIN = ("hidden_kv", "k", "q")  # more arguments that are the hidden states
# Classes, and their modules, that give a list, of weights only if asked for; that give their output alone; that give
# back the cache, last; whose masks are (B, S) or (B, L, S), of bools or numbers that are not zero where a key is seen.
LISTING = ("modeling_openai.Attention",)
ALONE = ("modeling_phi4_multimodal.Phi4MultimodalAudioAttention", "modeling_mobilevit.MobileViTSelfAttention")
WITH_CACHE = ("modeling_led.LEDDecoderAttention",)
FLAT = ("modeling_xlm.MultiHeadAttention", "modeling_flaubert.MultiHeadAttention", "modeling_cpmant.CpmAntAttention")
# Classes whose position_embeddings are of one sequence, (L, r), for all.
OF_ONE = ("modeling_pixtral.PixtralAttention",)
# Arguments of attention to sequences that are packed one after the other: where each begins; how long the longest is.
PACKED, LONGEST = "cu_seqlens", "max_seqlen"
# Arguments that mean something to a call, and those that a call without them goes like; no others are known.
MASKS = ("attention_mask", "mask")
SLOT = "cycle_offset"  # how many layers of a KV cache its own is behind the module's number
# Keys and values before all others, which a call has only in models whose config says so.
PROMPT, PROMPTED = "attn_prompt", "use_prompt"
ARGUMENTS = {*INPUTS, *AGAIN, *MASKS, *CACHES, *BIASES, "position_embeddings", SINUSOIDS, "residual"}
ARGUMENTS |= {CALLED_AS, SLOT, PROMPT, CHOSEN, QUERY_SCALES}
# Where layers leave keys and values, by layer_type, for later ones that have none of their own; what says that a module
# takes them, or leaves its own.
SHARED_STATES, TAKES, LEAVES = "shared_kv_states", "is_kv_shared_layer", "store_full_length_kv"
OTHERS = {"output_attentions", "use_cache", "position_ids", "cache_position", "is_causal", "codebook_idx"}
# Of cross-attention: what it is called, and the states that it attends to.
CROSS_NAMES = ("encoder_attn", "encdec", "enc_dec")
STATES = ("key_value_states", "encoder_hidden_states", "kv")
CROSS = (*STATES, "encoder_attention_mask")  # given to what is called otherwise, they are refused


def parameters_of(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Those of its forward, by name; *args and **kwargs are none."""
    named = inspect.signature(module.forward).parameters
    return {name: p for name, p in named.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def paths_of(module: nn.Module, parent: nn.Module | None) -> dict[str, str] | None:
    """Where its projections are, by letter; None for a module that has not all of them."""
    found: dict[str, str] = {}
    for letter, names in PROJECTIONS.items():
        path = next((name for name in names if isinstance(at(module, parent, name), nn.Module)), None)
        if path is not None:
            around = not is_linear(at(module, parent, path)) and is_linear(at(module, parent, f"{path}.{INNER}"))
            found[letter] = f"{path}.{INNER}" if around else path
    without_v = any(getattr(module, name, module) is None for name in PROJECTIONS["v"])  # v is what k is projected to
    kinds = [("q", "k", "v", "o"), ("qkv", "o"), *([("q", "k", "o")] if without_v else [])]
    for letters in [("q", "o")] if takes_shared(module) else kinds:
        if set(letters) <= found.keys():
            paths = {letter: found[letter] for letter in letters}
            gate = gate_of(module)
            wide = gate is not None and features_of(getattr(module, gate))[1] == _width_of_heads(module, parent, paths)
            return paths | ({"g": gate} if gate is not None and wide else {})
    return None


def takes_shared(module: nn.Module) -> bool:
    """Whether its keys and values are another layer's."""
    return getattr(module, TAKES, False) is True


def gate_of(module: nn.Module) -> str | None:
    """Its linear of gates, by name."""
    return next((name for name in GATES if is_linear(getattr(module, name, None))), None)


def heads_norm_of(module: nn.Module) -> str | None:
    """Its module of all heads' outputs, by name."""
    return next((name for name in HEADS_NORMS if isinstance(getattr(module, name, None), nn.Module)), None)


def is_normed(module: nn.Module, parent: nn.Module | None) -> bool:
    """Whether a module is a decoder's attention with a module of all heads' outputs."""
    return heads_norm_of(module) is not None and is_decoder(module, parent)


def is_differential(module: nn.Module, parent: nn.Module | None = None) -> bool:
    """Whether a module is a decoder's attention by the difference of two softmaxes."""
    parts = [getattr(module, name, None) for name in (*LAMBDAS, LAMBDA_INIT, GROUP_NORM)]
    return all(part is not None for part in parts) and is_decoder(module, parent)


def keeps_projection(module: nn.Module, letter: str) -> bool:
    """Whether the projection of a letter, or letters, is one of inputs or outputs of the pass as it is."""
    weights_alone = hasattr(module, BIAS_GATE)  # are used, so that an adapter there does nothing
    return not (is_differential(module) or weights_alone) and (letter != "o" or heads_norm_of(module) is None)


def _width_of_heads(module: nn.Module, parent: nn.Module | None, paths: dict[str, str]) -> int | None:
    out = at(module, parent, paths["o"])
    return features_of(out)[0] if is_linear(out) else None


def at(module: nn.Module, parent: nn.Module | None, path: str) -> object:
    """What is at a path, as in StockTensor.key, or None."""
    found: object = parent if path.startswith("../") else module
    for name in path.removeprefix("../").split("."):
        found = getattr(found, name, None)
    return found


def unknown_argument(module: nn.Module) -> str | None:
    """Why it may be called with what is not known here, or None."""
    named = parameters_of(module)
    for name in named:
        if name == SHARED_STATES and all(hasattr(module, share) for share in (TAKES, LEAVES)):
            continue
        if name not in (*ARGUMENTS, *OTHERS, *CROSS):
            return f"it takes an argument that is not known: {name}"
    required = "position_ids" in named and named["position_ids"].default is not None
    taken = temperature_of(module) is not None or "position_embeddings" in named
    return "it is always called with position_ids" if required and not taken else None


def again(module: nn.Module, x_BLD: torch.Tensor) -> dict[str, torch.Tensor]:
    """The arguments that are the hidden states once more."""
    return {name: x_BLD for name in AGAIN if name in parameters_of(module)}


def hides(module: nn.Module) -> bool:
    """Whether its masks are True where a key is hidden."""
    return type(module).__name__ in HIDING


def layer_of(module: nn.Module) -> int | None:
    """Its layer of a KV cache."""
    layer: int | None = first_of(module, LAYERS)
    return layer


def masks_itself(module: nn.Module) -> bool:
    """Whether it is causal, whatever masks it is given."""
    mask = getattr(module, MASK, None)
    return isinstance(mask, torch.Tensor) and mask.dim() == 4


def window_of(module: nn.Module) -> int | None:
    """How many keys a row sees of a module that masks itself; None: all up to its own."""
    kind: Any = getattr(module, "attention_type", None)
    name = WINDOWS.get(kind)
    return getattr(module.config, name) if name is not None and masks_itself(module) else None


def temperature_of(module: nn.Module) -> Callable[..., Tensor] | None:
    """What gives the factors of its queries, if it has any."""
    found: Callable[..., Tensor] | None = getattr(sys.modules[type(module).__module__], TEMPERATURE, None)
    return found


def tuning_of(module: Any) -> tuple[float, float] | None:
    """attn_scale and floor_scale, if it has such factors."""
    tuned = type(module).__name__ in TUNED and module.attn_temperature_tuning and not module.use_rope
    return (module.attn_scale, module.floor_scale) if tuned else None


def _looks_like(module: nn.Module, parent: nn.Module | None) -> bool:
    first = next(iter(parameters_of(module)), None)
    known = first == INPUTS[0] or (first in INPUTS and type(module).__module__.startswith("transformers."))
    return known and paths_of(module, parent) is not None


def latent_paths(module: nn.Module, parent: nn.Module | None) -> dict[str, str] | None:
    """Where the projections of multi-head latent attention are; None for a module that has not all of its parts."""
    paths = {
        letter: next((name for name in names if is_linear(getattr(module, name, None))), None)
        for letter, names in LATENT_PATHS.items()
    }
    sized = all(isinstance(getattr(module, name, None), int) for name in LATENT_DIMS)
    latents = is_linear(getattr(module, LATENT, None)) and isinstance(
        getattr(module, LATENT_NORMS[LATENT], None), nn.Module
    )
    found = {letter: path for letter, path in paths.items() if path is not None}
    return found if sized and latents and len(found) == len(paths) else None


def is_latent(module: nn.Module, parent: nn.Module | None) -> bool:
    """Whether a module is multi-head latent attention."""
    cached = layer_of(module) is not None and cache_name(module) is not None
    return cached and latent_paths(module, parent) is not None


def latent_sizes(original: nn.Module, projections: dict[str, nn.Module]) -> tuple[int, int, int]:
    """Heads, key/value heads, the wider of q's and v's head. Raises GridError where the widths do not fit."""
    nope, rope, v, rank = (getattr(original, name) for name in LATENT_DIMS)
    h = features_of(projections["o"])[0] // v
    widths = {letter: features_of(linear) for letter, linear in projections.items()}
    fits = widths["q"][1] == h * (nope + rope) and widths["kv"] == (rank, h * (nope + v)) and h > 0
    if getattr(projections["kv"], "bias", None) is not None:  # not taken into queries
        raise GridError("the projection from the latent of keys and values has a bias")
    if not (fits and widths["o"][0] == h * v and features_of(getattr(original, LATENT))[1] == rank + rope):
        raise GridError(f"widths of the projections, {widths}, do not fit {h} heads of {nope} + {rope} and {v}")
    return h, h, max(nope + rope, v)


def rotaries_of(original: nn.Module) -> list[str]:
    """The rotary functions beside a module of multi-head latent attention."""
    return [name for name in ROTARIES if hasattr(sys.modules[type(original).__module__], name)]


def latent_variants(module: nn.Module, paths: Mapping[str, str]) -> list[dict[str, object]]:
    """What the names leave open, as options of LatentAttention."""
    rotaries = rotaries_of(module) if "position_embeddings" in parameters_of(module) else []
    gates = list(GATE_FUNCTIONS) if gate_of(module) is not None else [next(iter(GATE_FUNCTIONS))]
    return [{"rotary": name, "gate_function": gate} for name in (*rotaries, None) for gate in gates]


def cache_name(module: nn.Module) -> str | None:
    """What it calls its KV cache; None: it has no such argument."""
    return next((name for name in CACHES if name in parameters_of(module)), None)


def mask_name(module: nn.Module) -> str:
    """What it calls its mask."""
    return next((name for name in MASKS if name in parameters_of(module)), MASKS[0])


def is_of(module: nn.Module, classes: tuple[str, ...]) -> bool:
    """Whether its class is one of these, of LISTING, ALONE, WITH_CACHE or FLAT."""
    kind = type(module)
    return f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}" in classes


def rotates_itself(module: nn.Module) -> bool:
    """Whether it makes its angles of position_ids."""
    own = isinstance(getattr(module, OWN_ROTARY, None), nn.Module)
    return own and {"position_ids", "position_embeddings"} & parameters_of(module).keys() == {"position_ids"}


def value_dim(module: nn.Module, head_dim: int) -> int:
    """The width of a head of v."""
    known = getattr(module, VALUE_DIM, None)
    return known if isinstance(known, int) else head_dim


def gives_bias(module: nn.Module) -> bool:
    """Whether it gives the bias that it has added, for other layers, between its output and the weights."""
    return hasattr(module, "compute_bias") and "position_bias" in parameters_of(module)


def states_name(module: nn.Module) -> str | None:
    """What it calls the states that cross-attention attends to; None: it has no such argument."""
    return next((name for name in STATES if name in parameters_of(module)), None)


def is_decoder(module: nn.Module, parent: nn.Module | None) -> bool:
    """Whether a module is attention that may be called with a KV cache."""
    known = layer_of(module) is not None or CALLED_AS in parameters_of(module)
    cached = known and cache_name(module) is not None
    return _looks_like(module, parent) and cached


def is_cross_attention(module: nn.Module, parent: nn.Module | None) -> bool:
    """Whether a module is attention that may be called with other states."""
    paths = paths_of(module, parent) if _looks_like(module, parent) else None
    return paths is not None and "k" in paths and states_name(module) is not None


def is_encoder(module: nn.Module, parent: nn.Module | None) -> bool:
    """Whether a module is attention that can be called without one; asked after is_decoder."""
    return _looks_like(module, parent)


def is_called_with_cache(module: nn.Module, generates: bool) -> bool:
    """Whether attention that takes a KV cache may be given one: in a model that generates, or if it is causal."""
    return generates or getattr(module, "is_causal", True)


def may_take_cache(module: nn.Module) -> bool:
    """Whether a module without a layer of a KV cache may be given one: not if it has the attribute, but no number."""
    return cache_name(module) is not None and not any(hasattr(module, name) for name in LAYERS)


def is_cross(module: nn.Module, name: str) -> bool:
    """Whether a module is attention to other states than its own: by its class, an attribute, or what it, or the module
    that it is in, is called.
    """
    called = [part.lower() for part in name.split(".")[-2:]]
    by_name = any("cross" in part or part.startswith(CROSS_NAMES) for part in called)
    by_class = "crossattention" in type(module).__name__.lower()
    return by_name or by_class or bool(getattr(module, "is_cross_attention", False))


def first_of(module: nn.Module, names: tuple[str, ...]) -> Any:
    """The first of these attributes that the module has and that is not None; else None."""
    return next((value for name in names if (value := getattr(module, name, None)) is not None), None)


def heads_of(original: nn.Module, projections: dict[str, nn.Module]) -> tuple[int, int, int]:
    """Heads, key/value heads, head_dim. Raises GridError where the projections' widths do not fit the heads."""
    widths = {letter: features_of(linear)[1] for letter, linear in projections.items() if letter not in "og"}
    widths["o"] = features_of(projections["o"])[0]
    if "k" in widths:
        widths.setdefault("v", widths["k"])
    d, h = first_of(original, HEAD_DIMS), first_of(original, HEADS)
    if not isinstance(d, int):
        h = h or getattr(getattr(original, "config", None), HEADS[0], None) or 1
        d = widths["o"] // h
    v = value_dim(original, d)
    widths |= {letter: widths[letter] * d // v for letter in "vo" if v < d and letter in widths}
    h = widths["o"] // d
    if takes_shared(original):
        groups: Any = original.num_key_value_groups
        widths |= dict.fromkeys("kv", h // groups * d)
    rest = widths["qkv"] - h * d if "qkv" in widths else widths["k"] + widths["v"]
    fits = widths["o"] == h * d and rest % (2 * d) == 0 and rest > 0 and v <= d
    if not fits or ("q" in widths and (widths["q"] not in (h * d, 2 * h * d) or widths["k"] != widths["v"])):
        raise GridError(f"widths of the projections, {widths}, do not fit {h} heads of {d}")
    return h, rest // (2 * d), d


def is_gated(projections: dict[str, nn.Module], h: int, d: int) -> bool:
    """Whether every query head has a gate of the output: a projection of their own, or behind q's heads in its own."""
    return "g" in projections or "q" in projections and features_of(projections["q"])[1] == 2 * h * d


def names_of(
    projections: dict[str, nn.Module], paths: dict[str, str], sizes: tuple[int, int, int], packing: str, v_dim: int
) -> dict[str, StockTensor]:
    """Which part of which projection each parameter is; v_dim: the width of a head of v."""
    h, k, d = sizes
    names: dict[str, StockTensor] = {}
    for letters, linear in projections.items():
        if letters == "qkv":
            names |= fused_names(paths[letters], linear, {"q": h, "k": k, "v": k}, d, packing)
        else:
            width = v_dim if letters in "vo" else d
            names |= linear_names({"o": "out", "g": "gate"}.get(letters, letters), paths[letters], linear, width)
    return names


def store_projections(
    ours: "GridAttention",
    projections: dict[str, nn.Module],
    paths: dict[str, str],
    names: dict[str, StockTensor],
    others: Mapping[str, nn.Parameter] | None = None,
) -> None:
    """Gives a GridAttention the parameters of the original's linears, and others by stock keys, under their names,
    trained where those are.
    """
    ours.stock_names = names
    held = dict(others or {})
    for letter, linear in projections.items():
        held |= {f"{paths[letter]}.{part}": p for part, p in linear.named_parameters()}
    trained = {name: held[stock.key].requires_grad for name, stock in ours.stock_names.items()}
    ours.store(from_stock({key: p.detach() for key, p in held.items()}, ours.stock_names), trained)
    take_stock_keys(ours)


def scale_of(original: nn.Module, head_dim: int, scaled: str) -> float:
    """Of scores; scaled: one of ANY_SCALE."""
    known, usual = first_of(original, SCALES), float(head_dim**-0.5)
    return {"as it says": known if isinstance(known, float) else usual, "as usual": usual, "not": 1.0}[scaled]


def weights_dropout(original: nn.Module) -> tuple[str, nn.Dropout]:
    """Of attention weights, and its name: the original's own where it has one, so that a change of its p counts."""
    known = {name: getattr(original, name, None) for name in WEIGHTS_DROPOUT}
    modules = [(name, one) for name, one in known.items() if isinstance(one, nn.Dropout)]
    p = next((p for p in known.values() if isinstance(p, float)), 0.0)
    return modules[0] if modules else ("weights_dropout", nn.Dropout(p))


def is_known_linear(projection: nn.Module) -> bool:
    """A plain linear, a Conv1D, or transformers' own class of a linear, whose numbers are tried."""
    plain = type(projection) in (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
    return plain or (is_linear(projection) and type(projection).__module__.startswith("transformers."))


def clip_of(module: nn.Module) -> float | None:
    """Between minus which and which its queries, keys and values may be clipped: its own, or its config's."""
    clip: float | None = getattr(module, CLIP, getattr(getattr(module, "config", None), CLIP, None))
    return clip


def variants_of(module: nn.Module, paths: Mapping[str, str]) -> list[dict[str, object]]:
    """What the names leave open, as options of ProjectedAttention, the likelier first."""
    named = parameters_of(module)
    rotates: list[dict[str, object]] = [{"rotates": False}]
    if {"position_embeddings", SINUSOIDS} & named.keys() or hasattr(module, ANGLES) or rotates_itself(module):
        rotates = [{"rotates": True}, *rotates]
        if any(first_of(module, names) is not None for names in NORMS.values()):
            rotates.append({"rotates": True, "norms_last": True})
    packings = PACKINGS.get(paths["qkv"], ANY_PACKING) if "qkv" in paths else ANY_PACKING[:1]
    open_: list[list[dict[str, object]]] = [
        [{"packing": packing} for packing in packings],
        [{"scaled": scaled} for scaled in SCALED.get(first_of(module, SCALES), ANY_SCALE[:1])],
        [{"biased": biased} for biased in BIASED[: None if any(name in named for name in BIASES) else 1]],
        rotates,
        [{"gate_function": name} for name in GATE_FUNCTIONS] if gate_of(module) is not None else [{}],
        [{}] if clip_of(module) is None else [{"clips": True}, {"clips": False}],
    ]
    return [{name: x for one in ways for name, x in one.items()} for ways in itertools.product(*open_)]
