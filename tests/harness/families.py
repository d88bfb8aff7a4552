"""Every causal language model of transformers, small, split over 4 ranks and not: what is right, what is refused.

    cd tests && python -m harness.families [--only llama gpt_oss] --json ../docs/models.json
    cd tests && python -m harness.families --ranks 8 --kv-heads 1 --ours --json ../docs/models_8.json
    cd tests && python -m harness.families --missing --json ../docs/models_8.json --docs ../docs/models.md

Of each family of transformers' mapping one model with random weights and 2 key/value heads where it lets one choose, on
a grid of as many head groups. Right: logits of a padded batch, the gradient of every parameter, and 8 greedy tokens
with a cache are the unsplit model's. Beside it what transformers' own tensor parallelism does with the same model,
saved and read again: right if the logits and the tokens are. Families of which no small model can be made have the
reason.
"""

import argparse
import copy
import datetime
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from torch.distributed.tensor import DTensor
from transformers.models.auto import modeling_auto

import two_level_mha as tlm
from harness.calls import mesh
from harness.pool import Pool, RankFailure
from two_level_mha.attentions import NO_PLAN

STOCK = "right under transformers' own"
PAGE_OF = ("models.json", "models_8.json")  # beside transformers' own, and past the key/value heads
TIMEOUT = 120.0  # seconds of a family
TOKENS = 8
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-4}  # relative; float64 models may take norms in float32
# Fields of configurations -> what a small model has, whichever of them there are.
SIZES = {
    "hidden_size": 64, "n_embd": 64, "d_model": 64, "embed_dim": 64, "dim": 64, "embedding_size": 64,
    "word_embed_proj_dim": 64, "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2,
    "decoder_layers": 2, "encoder_layers": 1, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "decoder_attention_heads": 4, "encoder_attention_heads": 4, "num_key_value_heads": 2, "num_kv_heads": 2,
    "n_kv_heads": 2, "multi_query_group_num": 2, "head_dim": 16, "attention_head_dim": 16, "kv_channels": 16,
    "global_head_dim": 16, "swa_head_dim": 16, "intermediate_size": 64, "ffn_hidden_size": 64, "n_inner": 64,
    "decoder_ffn_dim": 64, "encoder_ffn_dim": 64, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
    "ffn_dim": 64, "d_ff": 64, "d_inner": 64, "vocab_size": 96, "vocab_size_per_layer_input": 96,
    "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "max_target_positions": 64, "num_local_experts": 4,
    "num_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_k": 2,
    "top_k_experts": 2, "n_group": 1, "topk_group": 1, "num_expert_group": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "qk_head_dim": 16, "rotary_dim": 8, "sliding_window": 8, "attention_chunk_size": 8, "mamba_d_head": 16,
    "mamba_n_heads": 8, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_expand": 2, "ssm_state_size": 16,
    "state_size": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "hidden_size_per_layer_input": 16, "time_step_rank": 4, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 64, "lru_width": 64,
    "encoder_hash_byte_group_vocab": 96,
}  # fmt: skip
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "multi_query_group_num")
LEAST_KV_HEADS = {"diffllama": 2}
SHARED = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2}
_ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
_INDEXER = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 64,
    "indexer_compress_ratio": 2,
}  # fmt: skip
# What single families need besides; None: their own default.
MORE = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {kind: _ROTARY for kind in ("full_attention", "sliding_attention")}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 0.5},
        "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 64},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon": {"new_decoder_architecture": True},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": SHARED,
    "gpt_bigcode": {"multi_query": False},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 16},
    "prophetnet": {"num_hidden_layers": None, "num_encoder_layers": 2, "num_decoder_layers": 2},
    "qwen4_exp_text": _INDEXER,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "xmod": {"default_language": "en_XX"},
    "xlstm": {"qk_dim_factor": 1.0},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "hybrid"]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}


def small(family: str, kv_heads: int = SIZES[KV_HEADS[0]]) -> transformers.PretrainedConfig:
    """A small configuration of a family, with so many key/value heads where it lets one choose."""
    made = transformers.AutoConfig.for_model(family)
    options = sizes_of(made)
    for name, part in vars(made).items():
        if isinstance(part, transformers.PretrainedConfig):
            options[name] = sizes_of(part)
    options |= MORE.get(family, {})
    kv_heads = max(kv_heads, LEAST_KV_HEADS.get(family, 1))
    if kv_heads == 1 and "multi_query" in options:
        options["multi_query"] = True
    for part in (options, *(part for part in options.values() if isinstance(part, dict))):
        part |= {name: kv_heads for name in KV_HEADS if part.get(name) == SIZES[name]}
    return type(made)(**{name: value for name, value in options.items() if value is not None})


def sizes_of(config: transformers.PretrainedConfig) -> dict:
    options = {name: size for name, size in SIZES.items() if has(config, name)}
    if options.keys() >= {"kv_lora_rank", "head_dim"}:  # there it is the width of what is rotated
        options["head_dim"] = options["qk_rope_head_dim"]
        options |= {"num_key_value_heads": 4} if "num_key_value_heads" in options else {}
    if "layer_types" in vars(config) and config.layer_types:
        kinds = list(dict.fromkeys(config.layer_types))
        options["layer_types"] = [kinds[i % len(kinds)] for i in range(2)]
    return options


def has(config: transformers.PretrainedConfig, name: str) -> bool:
    own = getattr(type(config), name, None)
    if isinstance(own, property) and own.fset is None:
        return False
    try:
        return getattr(config, name, None) not in (None, -1)
    except Exception:  # of transformers' own: one that differs between layers
        return True


def build(family: str, kv_heads: int = SIZES[KV_HEADS[0]], **sizes: object) -> torch.nn.Module:
    """A small model of a family, random; sizes: what its configuration has besides."""
    torch.manual_seed(0)
    config = small(family, kv_heads)
    for name, value in sizes.items():
        setattr(config, name, value)
    return drawn(transformers.AutoModelForCausalLM, config)


def drawn(auto: type, config: transformers.PretrainedConfig) -> torch.nn.Module:
    """A model of a configuration, by one of transformers' Auto classes, with weights that are not small."""
    config._attn_implementation = "sdpa"
    try:
        model = auto.from_config(config)
    except ValueError:
        model = auto.from_config(config, attn_implementation="eager")
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.6 * p.shape[-1] ** -0.5)
        else:
            p.data.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def inputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(3, 96, (3, 11))
    keep = torch.ones_like(ids)
    keep[1, :4] = 0
    return {"input_ids": ids, "attention_mask": keep}


def answers(model: torch.nn.Module, of_rank: bool = True) -> dict[str, object]:
    """Logits, gradients by name and tokens of a model."""
    batch = inputs()
    output = model(**batch, use_cache=False)
    keep = batch["attention_mask"].bool()
    model.zero_grad()
    (output.logits[keep].float() ** 2).mean().backward()
    grads = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            grads[name] = (p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad).detach().clone()
    model.zero_grad()
    with torch.no_grad():
        tokens = model.generate(**batch, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
    return {"logits": output.logits.detach()[keep], "grads": grads, "tokens": tokens}


def stock_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients of a split model under stock names, on the first rank: they take the parameters' places."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
    return tlm.full_state_dict(model)


def try_family(family: str, grid: tuple[int, int]) -> dict[str, object]:
    """On every rank."""
    try:
        model = build(family, grid[0])
        whole = answers(copy.deepcopy(model))
    except Exception as error:
        return {"verdict": "not built", "why": f"{type(error).__name__}: {str(error)[:200]}"}
    parameters = sum(p.numel() for p in model.parameters())
    try:
        model = tlm.parallelize(model, mesh(grid))
    except tlm.GridError as error:
        return {"verdict": "refused", "why": str(error)[:300]}
    report = tlm.report(model)
    mlps = sum(why == NO_PLAN for why in report.gathered.values())
    found = {
        "attentions": report.attentions + report.states,
        "gathered": len(report.gathered) - mlps,
        "gathered_mlps": mlps,
        "held": report.held_parameters / parameters,
    }
    batch, problems = inputs(), []
    keep = batch["attention_mask"].bool()
    output = model(**batch, use_cache=False)
    tolerance = TOLERANCE[output.logits.dtype]
    off = off_by(output.logits.detach()[keep], whole["logits"])
    if not off <= tolerance:
        problems.append(f"logits differ by {off:.1e}")
    (output.logits[keep].float() ** 2).mean().backward()
    with torch.no_grad():
        tokens = model.generate(**batch, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
    if not torch.equal(tokens, whole["tokens"]):
        problems.append("tokens differ")
    grads = stock_gradients(model)
    least = 1e-3 * max(x.abs().max().item() for x in whole["grads"].values())  # some are zero but for rounding
    offs = [(off_by(grads[name], x, least), name) for name, x in whole["grads"].items() if name in grads]
    worst = max(offs, default=(0.0, ""))
    if grads and not worst[0] <= 10 * tolerance:
        problems.append(f"the gradient of {worst[1]} differs by {worst[0]:.1e}")
    if grads and (missing := whole["grads"].keys() - grads.keys() - {k for k in whole["grads"] if "lm_head" in k}):
        problems.append(f"no gradient of {sorted(missing)[:3]}")
    return found | {
        "verdict": "wrong" if problems else "right",
        "why": "; ".join(problems),
        "logits": off,
        "grads": worst[0],
    }


def off_by(got: torch.Tensor, expected: torch.Tensor, least: float = 1e-9) -> float:
    if got.shape != expected.shape:
        return float("inf")
    return ((got - expected).abs().max() / expected.abs().max().clamp(min=least)).item()


def try_stock(family: str, folder: str) -> dict[str, object]:
    """transformers' own tensor parallelism, on every rank, of the model that the first rank saves in `folder`."""
    model, batch = build(family), inputs()
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    if torch.distributed.get_rank() == 0:
        model.save_pretrained(folder)
    torch.distributed.barrier()
    config = transformers.distributed.DistributedConfig(tp_size=torch.distributed.get_world_size())
    split = type(model).from_pretrained(folder, distributed_config=config).eval()
    if not any(isinstance(p, DTensor) for p in split.parameters()):
        return {"verdict": "refused", "why": "it has no plan: every rank holds all"}
    with torch.no_grad():
        keep = batch["attention_mask"].bool()
        logits = [(one(**batch, use_cache=False).logits)[keep] for one in (model, split)]
        tokens = [one.generate(**batch, **options) for one in (model, split)]
    off = off_by(logits[1], logits[0])
    right = off <= TOLERANCE[logits[0].dtype] and torch.equal(*tokens)
    return {"verdict": "right" if right else "wrong", "why": "" if right else f"logits differ by {off:.1e}"}


def survey(
    families: list[str],
    ranks: int,
    stock: bool = True,
    kv_heads: int = SIZES[KV_HEADS[0]],
    timeout: float = TIMEOUT,
) -> Iterator[tuple[str, dict]]:
    """Of each family what try_family found, with a head group for each of kv_heads, and, if asked for, under "stock"
    what try_stock did.
    """
    from harness.families import (
        try_family,
        try_stock,
    )  # ranks import it by this name, also where this module is __main__

    pool = Pool(alive=1)

    def on_ranks(*call) -> dict[str, object]:
        try:
            results = pool.run(call[0], ranks, *call[1:], timeout=timeout)
        except RankFailure as error:
            if error.__cause__ is None:  # a time-out, a dead rank: its text goes on with stacks and logs
                return {"verdict": "crash", "why": str(error).partition("\n")[0]}
            lines = str(error.__cause__).strip().splitlines()
            return {"verdict": "crash", "why": lines[-1][-300:] if lines else type(error.__cause__).__name__}
        return next((one for one in results if one["verdict"] != "right"), results[0])

    try:
        for family in families:
            start = time.monotonic()
            one = on_ranks(try_family, family, (kv_heads, ranks // kv_heads))
            if stock and one["verdict"] != "not built":
                with tempfile.TemporaryDirectory() as folder:
                    one["stock"] = on_ranks(try_stock, family, folder)
            one["seconds"] = round(time.monotonic() - start, 1)
            ways = f"{one.get('attentions', '')} + {one.get('gathered', '')}"
            print(
                f"{family:28} {one['verdict']:10} {ways:8}",
                one.get("stock", {}).get("verdict"),
                one["why"][:120],
                flush=True,
            )
            yield family, one
    finally:
        pool.close()


def counts(found: dict[str, dict]) -> dict[str, int]:
    """How many families are right, and so on; and of those that are right how many under transformers' own."""
    verdicts = [one["verdict"] for one in found.values()]
    known = {verdict: verdicts.count(verdict) for verdict in dict.fromkeys(verdicts)}
    right = [one for one in found.values() if one["verdict"] == "right"]
    known["right by split attention alone"] = sum(one["attentions"] > 0 and not one["gathered"] for one in right)
    if any("stock" in one for one in right):
        known[STOCK] = sum(one.get("stock", {}).get("verdict") == "right" for one in right)
    return known


def built(made: dict) -> dict[str, dict]:
    return {family: one for family, one in made["families"].items() if one["verdict"] != "not built"}


def sentence(made: dict, past: dict) -> str:
    """README's, of PAGE_OF."""
    number = made["counts"]
    return (
        f"Of transformers' {len(built(made))} causal language models of which a small one can be made, with 2 key/value"
        f" heads on {made['ranks']} ranks, {number['right']} give the unsplit logits, gradients and tokens here, "
        f"{number['right by split attention alone']} of them with all of their attention split; under transformers' "
        f"own tensor parallelism {number[STOCK]} of those do. With one key/value head on {past['ranks']} ranks "
        f"{past['counts']['right']} do here (`make models`, {made['date']}, transformers {made['transformers']}, "
        f"torch {made['torch'].partition('+')[0]}: [the table](docs/models.md))."
    )


def page(made: dict, past: dict) -> str:
    """docs/models.md, of PAGE_OF."""
    ranks, rows = made["ranks"], []
    for family, one in built(made).items():
        held = f"{one['held']:.2f}" if "held" in one else ""
        stock = one["stock"]["verdict"].replace("crash", "dies")
        verdict, at_past = one["verdict"], past["families"][family]
        rows.append(f"| {family} | {verdict} | {how(one)} | {held} | {_beside(at_past, one)} | {stock} |")
    left = [f"{family} ({cell(one['why'])})" for family, one in made["families"].items() if family not in built(made)]
    split, past_split = (each["counts"]["right by split attention alone"] for each in (made, past))
    return f"""# Models

Made by `make models` on {made["date"]}, torch {made["torch"]}, transformers {made["transformers"]}.

Every causal language model of transformers, small and with random weights, with {made["kv_heads"]} key/value heads
where the family lets one choose, on {ranks} Gloo ranks in a grid of {made["kv_heads"]} head groups.
Of {len(built(made))} families {made["counts"]["right"]} are right: logits of a padded batch, the gradient of every
parameter and {TOKENS} greedy tokens with a cache are the unsplit model's. Of those, {split} have all of their attention
split, or the layers that keep states in its place; in the others some or all keeps its own code, with weights that are
stored split and gathered for each call, as MLPs do that neither a plan of transformers nor their structure splits.
Under transformers' own tensor parallelism, on as many ranks, {made["counts"][STOCK]} of them are right in logits and
tokens.

Past the key/value heads, with one of them where the family lets one choose, on {past["ranks"]} ranks in a grid of one
head group (made on {past["date"]}), {past["counts"]["right"]} of {len(built(past))} families are right, {past_split} of
them by split attention alone. "As is" there: as on {ranks} ranks.

Kept is the share of all parameters that the first rank holds: 1/{ranks} is {1 / ranks:.2f}. Small models have large
norms, and embeddings that stay whole where no plan has a word of them and no head shares their weight.

| family | here | attention | kept | {past["ranks"]} ranks, 1 KV head | transformers' own |
|---|---|---|---|---|---|
{chr(10).join(rows)}

No small model was made of {len(left)}: {"; ".join(left)}.
"""


def how(one: dict) -> str:
    ways = [(one.get("attentions"), "split"), (one.get("gathered"), "gathered")]
    ways_text = " and ".join(way for count, way in ways if count) if one["verdict"] == "right" else one["why"]
    return cell(ways_text + "; MLPs gathered" * (one.get("gathered_mlps", 0) > 0))


def _beside(one: dict, other: dict) -> str:
    """What one survey found where the other found `other`."""
    if (one["verdict"], how(one)) == (other["verdict"], how(other)):
        return "as is"
    return f"{one['verdict']}: {how(one)}"


def cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())[:160]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=SIZES[KV_HEADS[0]])
    parser.add_argument("--ours", action="store_true", help="not transformers' own tensor parallelism")
    parser.add_argument("--only", nargs="*", default=[], help="these anew; the others stay as the JSON file has them")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds of a family; more on a busy machine")
    parser.add_argument("--missing", action="store_true", help="of these the ones that the JSON file has not")
    parser.add_argument("--json", type=Path, help="all that was found, written after each family")
    parser.add_argument("--docs", type=Path, help=f"a page, in Markdown, of {' and '.join(PAGE_OF)} beside it")
    args = parser.parse_args()
    families = args.only or sorted(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    known = (args.only or args.missing) and args.json and args.json.is_file()
    found = json.loads(args.json.read_text())["families"] if known else {}
    if args.missing:
        families = [family for family in families if family not in found]
    made = {}
    for family, one in survey(families, args.ranks, not args.ours, args.kv_heads, args.timeout):
        found = dict(sorted((found | {family: one}).items()))
        made = {
            "date": str(datetime.date.today()),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "ranks": args.ranks,
            "kv_heads": args.kv_heads,
            "counts": counts(found),
            "families": found,
        }
        if args.json:
            args.json.write_text(json.dumps(made, indent=1) + "\n")
    print(made.get("counts", "nothing new"))
    if args.docs:
        args.docs.write_text(page(*(json.loads(args.docs.with_name(name).read_text()) for name in PAGE_OF)))


if __name__ == "__main__":
    main()
