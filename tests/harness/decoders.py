"""Tiny random decoders of transformers, in float64: the stock model, a split copy, and what they are compared by."""

import copy
from functools import lru_cache

import torch
import transformers
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM

import two_level_mha as tlm
from two_level_mha.blocks import full_tensor
from two_level_mha.stock import put, resolve

from .calls import mesh

BASE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None,
}  # fmt: skip
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}

# name -> (config class, what it has beyond BASE)
MODELS = {
    "llama": ("LlamaConfig", {"attention_bias": True}),
    "mistral": ("MistralConfig", {"sliding_window": 8}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "qwen3 moe": ("Qwen3MoeConfig", {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
                                     "moe_intermediate_size": 16}),
    "gemma": ("GemmaConfig", {"head_dim": 16}),
    "gemma2": ("Gemma2Config", _GEMMA),
    "gemma3": ("Gemma3TextConfig", _GEMMA | {"layer_types": ["sliding_attention", "full_attention",
                                                             "sliding_attention"]}),
    "granite": ("GraniteConfig", {}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0, 1]}),
    "exaone4": ("Exaone4Config", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention",
                                                                       "sliding_attention"]}),
    "28 heads": ("Qwen2Config", {"num_attention_heads": 28, "num_key_value_heads": 4, "hidden_size": 56,
                                 "head_dim": 8}),
    "2 kv heads": ("Qwen2Config", {"num_attention_heads": 14, "hidden_size": 56, "head_dim": 8}),
    "apertus": ("ApertusConfig", {}),
    "head_dim 512": ("Qwen3Config", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 512}),
}  # fmt: skip


_NO_GROUPS = {"num_key_value_heads": None}
_OPT = _NO_GROUPS | {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}
_FALCON = _NO_GROUPS | {"attention_dropout": 0.0}
_GPT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_GEMMA4 = {
    "head_dim": 8,
    "global_head_dim": 16,
    "sliding_window": 8,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_SHARED = {
    "num_hidden_layers": 5,
    "num_kv_shared_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 64,
}
_LLAMA4 = {"head_dim": 8, "attention_chunk_size": 8, "no_rope_layers": [1, 0, 1], "intermediate_size_mlp": 48}
_MIMO = {"head_dim": 12, "v_head_dim": 8, "sliding_window": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
         "moe_intermediate_size": 16, "layer_types": ["full_attention", "sliding_attention", "full_attention"],
         "num_attention_heads": 8}  # fmt: skip
_NEOX = _NO_GROUPS | {"hidden_dropout": 0.0}
# What other decoders have that Llama has not: other names, fused projections, norms over heads, sinks, gates. None: it
# has no such field.
FORMS = {
    "opt": ("OPTConfig", _OPT),
    "biogpt": ("BioGptConfig", _NO_GROUPS | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    "phi": ("PhiConfig", {}),
    "phi with norms": ("PhiConfig", {"qk_layernorm": True}),
    "phi3": ("Phi3Config", {}),
    "gpt neox": ("GPTNeoXConfig", _NEOX | {"rotary_pct": 0.5}),
    "falcon": ("FalconConfig", _FALCON | {"multi_query": False}),
    "falcon 40b": ("FalconConfig", _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon 7b": ("FalconConfig", _FALCON),
    "bigcode": ("GPTBigCodeConfig", _GPT),
    "bloom": ("BloomConfig", {"hidden_dropout": 0.0}),
    "stablelm": ("StableLmConfig", {}),
    "persimmon": ("PersimmonConfig", _NO_GROUPS),
    "hunyuan": ("HunYuanDenseV1Config", {"head_dim": 8}),
    "cohere": ("CohereConfig", {"use_qk_norm": True}),
    "olmo clipped": ("OlmoConfig", {"clip_qkv": 0.2}),
    "olmoe clipped": ("OlmoeConfig", {"clip_qkv": 0.2, "num_experts": 4, "num_experts_per_tok": 2}),
    "olmo2": ("Olmo2Config", {}),
    "gpt oss": ("GptOssConfig", {"head_dim": 8, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
                                 "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "granite swa": ("GraniteSWAConfig", {"sliding_window": 8}),
    "ministral3": ("Ministral3Config", {"head_dim": 8}),
    "qwen3 next": ("Qwen3NextConfig", {"head_dim": 16, "layer_types": ["full_attention"] * 3, "num_experts": 4,
                                       "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                                       "shared_expert_intermediate_size": 16}),
    "afmoe": ("AfmoeConfig", {"head_dim": 8, "sliding_window": 8, "num_dense_layers": 3,
                              "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "laguna": ("LagunaConfig", {"head_dim": 8, "num_hidden_layers": 2, "sliding_window": 8, "gating": "per-head",
                                "layer_types": ["full_attention", "sliding_attention"], "num_experts": 4,
                                "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                                "shared_expert_intermediate_size": 16, "num_attention_heads_per_layer": [4, 8],
                                "mlp_layer_types": ["dense", "sparse"]}),
    "gemma4": ("Gemma4TextConfig", _GEMMA4),
    "gemma4 k = v": ("Gemma4TextConfig", _GEMMA4 | {"attention_k_eq_v": True, "num_global_key_value_heads": 2}),
    "lfm3": ("Lfm3Config", {"head_dim": 8, "layer_types": ["full_attention"] * 3}),
    "falcon rw": ("FalconConfig", _FALCON | {"alibi": True, "multi_query": False}),
    "stablelm 2": ("StableLmConfig", {"qk_layernorm": True}),
    "nanochat": ("NanoChatConfig", {"head_dim": 8}),
    "gptj": ("GPTJConfig", _NO_GROUPS | _GPT | {"rotary_dim": 4}),
    "codegen": ("CodeGenConfig", _NO_GROUPS | _GPT | {"rotary_dim": 4}),
    "gpt neo": ("GPTNeoConfig", _NO_GROUPS | {"attention_types": [[["global", "local"], 1]], "window_size": 8,
                                              "num_hidden_layers": 2, "embed_dropout": 0.0}),
    "xglm": ("XGLMConfig", _NO_GROUPS | {"ffn_dim": 48, "dropout": 0.0, "attention_dropout": 0.0}),
    "mpt": ("MptConfig", _NO_GROUPS | {"max_seq_len": 64}),
    "mpt clipped": ("MptConfig", _NO_GROUPS | {"max_seq_len": 64, "attn_config": {"clip_qkv": 0.2}}),
    "olmo3": ("Olmo3Config", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2,
                              "num_hidden_layers": 4}),
    "llama4": ("Llama4TextConfig", _LLAMA4 | {"moe_layers": [], "floor_scale": 3, "attn_scale": 0.4}),
    "gpt neox japanese": ("GPTNeoXJapaneseConfig", _NEOX | {"rotary_pct": 0.5, "intermediate_multiple_size": 2}),
    "gemma4 shared": ("Gemma4TextConfig", _GEMMA4 | _SHARED),
    "gemma3n": ("Gemma3nTextConfig", _SHARED | {"head_dim": 8, "sliding_window": 8, "laurel_rank": 4,
                                                "altup_num_inputs": 2, "activation_sparsity_pattern": None}),
    "roformer": ("RoFormerConfig", _NO_GROUPS | {"is_decoder": True, "hidden_dropout_prob": 0.0,
                                                 "attention_probs_dropout_prob": 0.0, "embedding_size": 32}),
}  # fmt: skip


# What goes by other names or comes in another way: inputs given three times, a linear inside a module, narrower values,
# layers that run again with other slots of a cache, MLPs that write to what a part of them gives.
CALLED = {
    "ctrl": ("CTRLConfig", _NO_GROUPS | {"dff": 48, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "moshi": ("MoshiConfig", {"ffn_dim": 48, "sliding_window": 64}),
    "hrm text": ("HrmTextConfig", _NO_GROUPS | {"num_hidden_layers": 2, "head_dim": 8, "H_cycles": 2, "L_cycles": 2,
                                                "embedding_scale": 1.0}),
    "mvp": ("MvpConfig", _NO_GROUPS | {"decoder_layers": 3, "encoder_layers": 3, "decoder_attention_heads": 4,
                                       "encoder_attention_heads": 4, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48,
                                       "d_model": 32, "dropout": 0.0, "num_hidden_layers": None,
                                       "num_attention_heads": None, "hidden_size": None}),
    "mimo": ("MiMoV2FlashConfig", _MIMO),
    "mimo, wide values": ("MiMoV2FlashConfig", _MIMO | {"v_head_dim": 12}),
    "llama4 moe": ("Llama4TextConfig", _LLAMA4 | {"moe_layers": [1], "num_local_experts": 4}),
}  # fmt: skip

_BEAM = {"head_dim": 8, "num_hidden_layers": 2, "sliding_window": 8, "mlp_layer_types": ["dense"] * 2}
# What acts on heads' outputs before the output projection: a norm over all heads, a difference of two softmaxes, gates
# with a number more for each.
BEHIND = {
    "bitnet": ("BitNetConfig", {"attention_bias": True}),
    "diffllama": ("DiffLlamaConfig", {"attention_bias": True, "num_key_value_heads": 4, "num_attention_heads": 8}),
    "beam, sliding": ("BeamConfig", _BEAM | {"layer_types": ["sliding_attention"] * 2}),
    "beam": ("BeamConfig", _BEAM | {"layer_types": ["sliding_attention", "full_attention"]}),
}  # fmt: skip

_MLA = {
    "num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 8,
    "v_head_dim": 7, "head_dim": 8,
}  # fmt: skip
_MOE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
        "num_hidden_layers": 2}  # fmt: skip
_HYBRID = {"layer_types": ["full_attention"] * 2, "num_local_experts": 4}
# Multi-head latent attention: with and without a latent of queries, rotary functions of every kind and none, gates.
LATENT = {
    "deepseek v2": ("DeepseekV2Config", _MLA | _MOE),
    "deepseek v3": ("DeepseekV3Config", _MLA | _MOE | {"first_k_dense_replace": 1, "attention_bias": True}),
    "deepseek v3 without q's": ("DeepseekV3Config", _MLA | _MOE | {"first_k_dense_replace": 2, "q_lora_rank": None,
                                                                   "rope_interleave": False}),
    "glm4 moe lite": ("Glm4MoeLiteConfig", _MLA | _MOE),
    "minicpm3": ("MiniCPM3Config", _MLA | {"v_head_dim": 12}),
    "youtu": ("YoutuConfig", _MLA),
    "axk1": ("AXK1Config", _MLA | _MOE),
    "kimi linear": ("KimiLinearConfig", _MLA | _MOE | _HYBRID | {"q_lora_rank": None}),
    "longcat flash": ("LongcatFlashConfig", _MLA | _MOE | {"num_layers": 1, "num_hidden_layers": None, "moe_topk": 2,
                                                           "zero_expert_num": 1, "expert_ffn_hidden_size": 16,
                                                           "ffn_hidden_size": 48}),
    "mistral4": ("Mistral4Config", _MLA | _MOE | {"head_dim": None}),
    "bailing hybrid": ("BailingHybridConfig", _MLA | _MOE | _HYBRID | {"q_lora_rank": None}),
    "deepseek v32": ("DeepseekV32Config", _MLA | _MOE | {"index_topk": 5, "index_n_heads": 2, "index_head_dim": 12}),
    "glm dsa": ("GlmMoeDsaConfig", _MLA | _MOE | {"index_topk": 5, "index_n_heads": 2, "index_head_dim": 12,
                                                  "indexer_types": ["full", "shared"]}),
    "6 heads": ("DeepseekV3Config", _MLA | _MOE | {"first_k_dense_replace": 2, "num_attention_heads": 6,
                                                   "num_key_value_heads": 6}),
}  # fmt: skip


EXACT = {"exact": True}
MAY_BE_NONE = ("q_lora_rank",)  # of others None says that there is no such field
EAGER_ONLY = (
    "bloom",
    "gpt oss",
    "granite swa",
    "gptj",
    "codegen",
    "gpt neo",
    "xglm",
    "mpt",
    "mpt clipped",
    "roformer",
    "gpt neox japanese",
    "mvp",
    "mimo",
    "mimo, wide values",
)


class Norm(nn.Module):
    """A model's RMSNorm without its rounding to float32, which would hide what differs."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.shift = getattr(norm, "weight", None), float("Gemma" in type(norm).__name__)
        self.eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return y if self.weight is None else y * (self.shift + self.weight)


def make_config(name: str, **changes) -> transformers.PretrainedConfig:
    kind, options = (MODELS | FORMS | LATENT | CALLED | BEHIND)[name]
    given = (BASE | options | changes).items()
    options = {field: value for field, value in given if value is not None or field in MAY_BE_NONE}
    return getattr(transformers, kind)(**options)


def make(
    name: str,
    dtype: torch.dtype = torch.float64,
    implementation: str = "sdpa",
    exact: bool = False,
    seed: int = 0,
    **changes,
) -> nn.Module:
    """The stock model, the same on every rank, in eval mode; changes: of its config.

    exact: its norms do not round to float32.
    """
    config = make_config(name, **changes)
    config._experts_implementation = "eager"  # the default takes no float64
    implementation = "eager" if name in EAGER_ONLY else implementation
    torch.manual_seed(seed)
    kind = AutoModelForCausalLM
    if type(config) not in kind._model_mapping:  # such as Mistral 4's
        kind = getattr(transformers, type(config).__name__.removesuffix("Config") + "ForCausalLM")
    make_model = kind.from_config if kind is AutoModelForCausalLM else kind._from_config
    model = make_model(config, attn_implementation=implementation).to(dtype).eval()
    for p in model.parameters():
        p.data.normal_(1.0 if p.ndim == 1 else 0.0, 0.15)
    for module in list(model.modules()) if exact else []:
        for child, norm in list(module.named_children()):
            if type(norm).__name__.endswith("RMSNorm"):
                setattr(module, child, Norm(norm))
    return model


def make_meta(name: str, dtype: torch.dtype = torch.float64, **changes) -> nn.Module:
    """The same model without weights, in train mode, as a user makes it."""
    config = make_config(name, **changes)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="eager")


@lru_cache(maxsize=2)
def pair(name: str, grid: tuple[int, int], make_options: tuple = (), rest=False, **options) -> tuple[nn.Module, ...]:
    """The stock model and a split copy, by default of its attention only; make_options: of make, as items."""
    stock = make(name, **dict(make_options))
    return stock, tlm.parallelize(copy.deepcopy(stock), mesh(grid), rest=rest, **options)


def prompt(rows: int = 2, length: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (rows, length) and their attention mask: the first row is padded on the left by 4."""
    torch.manual_seed(1)
    ids = torch.randint(2, 64, (rows, length))
    keep = torch.ones_like(ids)
    if rows > 1:
        keep[0, :4] = 0
        ids[0, :4] = 0
    return ids, keep


def full_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """By stock's names and shapes."""
    found = {}
    for name, p in model.named_parameters():
        if p.grad is None:
            continue
        owner, _, own = name.rpartition(".")
        names = getattr(model.get_submodule(owner), "stock_names", {})
        if own in names:
            put(found, resolve(owner, names[own].key), names[own], full_tensor(p.grad))
        else:
            found[name] = full_tensor(p.grad)
    return found


def logits_off(names, grid, options, make):
    """Largest difference of logits by model: left padding and none, in one call, with a cache, and in two steps."""
    found = {}
    ids, keep = prompt()
    for name in names:
        stock, ours = pair(name, grid, tuple(make.items()), **options)
        errors = []
        with torch.no_grad():
            for ids_, mask in ((ids, keep), (ids[1:], None)):
                for use_cache in (False, True):
                    a, b = (model(ids_, attention_mask=mask, use_cache=use_cache).logits for model in (stock, ours))
                    errors.append(difference(a, b, mask))
                a, b = (two_steps(model, ids_, mask) for model in (stock, ours))
                errors.append(difference(a, b, mask))
        found[name] = errors
    return found


def two_steps(model, ids, mask):
    first = model(ids[:, :6], attention_mask=None if mask is None else mask[:, :6], use_cache=True)
    second = model(ids[:, 6:], attention_mask=mask, past_key_values=first.past_key_values)
    return torch.cat([first.logits, second.logits], 1)


def compiled_steps(grid: tuple, layout: str = "position") -> tuple[list[int], bool]:
    """Graphs after each of 12 steps of a compiled model, and whether its tokens are stock's."""
    torch._dynamo.reset()  # what this rank compiled before counts against the limit of graphs
    stock, ours = pair("llama", grid)
    ids, _ = prompt()
    cache, counter = tlm.KVCache(ours.config, mesh(grid), layout=layout, max_length=64), CompileCounter()
    step, counts = torch.compile(ours, fullgraph=True, backend=counter), []
    with torch.no_grad():
        logits = ours(ids, past_key_values=cache).logits
        drawn = [logits[:, -1:].argmax(-1)]
        for _ in range(12):
            drawn.append(step(drawn[-1], past_key_values=cache).logits[:, -1:].argmax(-1))
            counts.append(counter.frame_count)
    expected = stock.generate(ids, attention_mask=None, max_new_tokens=13, do_sample=False, pad_token_id=0)
    return counts, torch.equal(torch.cat([ids, *drawn], 1), expected)


def difference(a, b, mask):
    rows = slice(None) if mask is None else mask.bool()
    return (a - b)[rows].abs().max().item()


def gradient_differences(stock, ours):
    """Relative, of each parameter, after both had a backward pass; of a router's correction no gradient reaches."""
    grads = full_gradients(ours)
    return [
        (grads[key] - p.grad).abs().max().item() / max(1.0, p.grad.abs().max().item())
        for key, p in stock.named_parameters()
        if p.grad is not None
    ]


def differences(stock, ours):
    """Of logits, and of each gradient, for more rows and tokens than ranks."""
    ids, keep = prompt(rows=4, length=16)
    logits = []
    for model in (stock, ours):
        model.zero_grad()
        logits.append(model(ids, attention_mask=keep, use_cache=False).logits)
        (logits[-1].log_softmax(-1)[..., 3] * keep).sum().backward()
    return [difference(*logits, keep), *gradient_differences(stock, ours)]


def check(found, limit):
    for per_model in found:
        for name, errors in per_model.items():
            assert max(errors) <= limit, (name, errors)


def gradients_off(names, grid, use_cache, options, make=EXACT):
    """Largest relative difference of gradients by model, over all parameters."""
    found = {}
    ids, keep = prompt()
    for name in names:
        models = pair(name, grid, tuple(make.items()), **options)
        for model in models:
            model.zero_grad()
            logits = model(ids, attention_mask=keep, use_cache=use_cache).logits
            (logits.log_softmax(-1)[..., 3] * keep).sum().backward()
        found[name] = gradient_differences(*models)
    return found
