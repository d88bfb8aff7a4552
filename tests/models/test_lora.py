"""LoRA of PEFT on split models, put there before and after the split: trained, merged and stored as on the unsplit one.

4 ranks, most on a grid of (2, 2) with 2 KV heads, in float64. A failure is in `low_rank.py` (attention), in
`integrations/lora_layers.py` (what else is split) or, if only one of before and after fails, in `integrations/lora.py`.
"""

import math
import re
import warnings

import pytest
import torch
from harness import RankFailure
from harness.calls import mesh
from torch import nn

import two_level_mha as tlm

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from harness.lora import ALL, ATTENTION, adapted, compare, logits, set_b, split, stock, tokens  # noqa: E402

LATENTS = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
EXPERTS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


CASES = {
    "Llama": ("llama", {}),
    "only q and v, the rest whole": ("llama", {"targets": ("q_proj", "v_proj"), "rest": False}),
    "slices": ("llama", {"targets": ATTENTION, "rest": False, "scheme": "slices"}),
    "sequence": ("llama", {"targets": ATTENTION, "rest": False, "scheme": "sequence"}),
    "batch": ("llama", {"targets": ATTENTION, "rest": False, "scheme": "batch", "cache": "batch"}),
    "weights": ("llama", {"targets": ATTENTION, "rest": False, "scheme": "weights"}),
    "heads": ("llama", {"targets": ATTENTION, "rest": False, "scheme": "heads"}),
    "one row of slices": ("llama", {"targets": ATTENTION, "rest": False, "scheme": "slices", "grid": (1, 4)}),
    "slices of 3, 3 and 2": ("llama", {"targets": ATTENTION, "rest": False, "scheme": "slices", "grid": (1, 3)}),
    "weights, on 6 ranks": ("llama", {"targets": ATTENTION, "rest": False, "scheme": "weights", "grid": (2, 3)}),
    "concat": ("llama", {"targets": ATTENTION, "rest": False, "combine": "concat"}),
    "dropout": ("llama", {"targets": tuple(t for t in ALL if t != "o_proj"), "lora": {"lora_dropout": 0.3}}),
    "embedding": ("llama", {"targets": ("embed_tokens", "q_proj")}),
    "a shared vocabulary": ("gemma3", {"targets": ("embed_tokens", "lm_head", "q_proj")}),
    "widths that 4 does not divide": ("28 heads", {"lora": {"use_rslora": True}}),
    "gathered weights": ("doge", {"targets": ("q_proj", "v_proj", "o_proj", "down_proj")}),
    "blocks of one projection": ("phi3", {"targets": ("qkv_proj", "o_proj", "down_proj")}),
    "heads of one projection": ("gpt neox", {"targets": ("query_key_value", "dense")}),
    "groups of one projection": ("falcon 40b", {"targets": ("query_key_value", "dense"), "scheme": "heads"}),
    "queries and gates": ("qwen3 next", {"targets": ATTENTION, "rest": False}),
    "gates of heads": ("lfm3", {"targets": (*ATTENTION, "g_proj"), "rest": False}),
    "one key/value head": ("falcon 7b", {"targets": ("query_key_value", "dense"), "rest": False}),
    "another layer's keys": ("gemma4 shared", {"targets": ATTENTION, "rest": False}),
    "narrower values": ("mimo", {"targets": ATTENTION, "rest": False}),
    "latents": ("youtu", {"targets": LATENTS}),
    "latents, cached by batch": ("minicpm3", {"targets": LATENTS, "rest": False, "cache": "batch"}),
    "latents, 6 heads, concat": ("6 heads", {"targets": LATENTS, "rest": False, "combine": "concat"}),
    "latents, slices filled up": ("6 heads", {"targets": LATENTS, "rest": False, "grid": (1, 4)}),
    "latents, none of queries": ("deepseek v3 without q's", {"targets": ("q_proj", "kv_b_proj"), "rest": False}),
    "latents, dropout": ("youtu", {"targets": (LATENTS[0], *LATENTS[2:4]), "lora": {"lora_dropout": 0.3}}),
    "GPT-2": ("gpt2", {"targets": r".*\.attn\.c_(attn|proj)", "lora": {"fan_in_fan_out": True}}),
    "GPT-2's MLP": ("gpt2", {"targets": r".*\.mlp\.c_(fc|proj)", "lora": {"fan_in_fan_out": True}}),
}


IN_BOTH_ORDERS = ("Llama", "embedding", "gathered weights")


@pytest.mark.parametrize(
    ("case", "before"),
    [
        pytest.param(case, before, marks=() if before or case in IN_BOTH_ORDERS else pytest.mark.slow)
        for case in CASES
        for before in (True, False)
    ],
)
def test_as_unsplit(pool, case, before):
    """T: the start that PEFT draws, losses, adapters after training, tokens, merging and unmerging, stock's format."""
    kind, options = CASES[case]
    for off in pool.run(compare, math.prod(options.get("grid", (2, 2))), kind, before, options):
        assert not off


@pytest.mark.parametrize(
    ("kind", "before"),
    [("mixtral", True), ("qwen3 moe", False), *(pytest.param(*case, marks=pytest.mark.slow)
                                                for case in (("mixtral", False), ("qwen3 moe", True)))],
)  # fmt: skip
def test_experts(pool, kind, before):
    """As above, with adapters of packed parameters; at 1e-6, since routers differentiate in float32."""
    options = {"targets": ("q_proj", "gate"), "lora": EXPERTS}
    for off in pool.run(compare, 4, kind, before, options):
        assert all(distance <= 1e-6 for distance in off.values()), off


def encoder(targets: tuple[str, ...]) -> float:
    def bert() -> nn.Module:
        torch.manual_seed(0)
        config = transformers.BertConfig(
            hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=48, vocab_size=64
        )
        return transformers.BertModel(config).double().eval()

    whole, ours = adapted(bert(), targets), tlm.parallelize(adapted(bert(), targets), mesh((2, 2)))
    y, got = (set_b(model).eval()(input_ids=tokens()).last_hidden_state for model in (whole, ours))
    return (y - got).abs().max().item()


def test_encoder(pool):
    """T: BERT, whose MLPs are split by torch's styles. Its output projection lies outside the attention: refused."""
    assert all(error <= 1e-10 for error in pool.run(encoder, 4, ("query", "value", "intermediate.dense")))
    with pytest.raises(RankFailure, match="output.dense has a LoRA adapter, which a split attention of kind 'encoder'"):
        pool.run(encoder, 4, ("dense",))


def stored(folder: str) -> dict[str, float]:
    """What PEFT and full_state_dict write, read unsplit and split."""
    targets, distances = (*ATTENTION, "down_proj", "up_proj"), {}
    ours = set_b(split("llama", True, targets=targets)).eval()
    y = logits(ours)
    if torch.distributed.get_rank() == 0:
        ours.save_pretrained(folder)
    states = [tlm.full_state_dict(ours)]
    torch.distributed.broadcast_object_list(states)
    unsplit = peft.PeftModel.from_pretrained(stock("llama"), folder).eval()
    distances["PEFT's file, unsplit"] = (logits(unsplit) - y).abs().max().item()
    base = tlm.parallelize(stock("llama"), mesh((1, 4)))
    with tlm.adaptable(base):
        again = peft.PeftModel.from_pretrained(base, folder).eval()
    distances["PEFT's file, split"] = (logits(again) - y).abs().max().item()
    distances["merged before a call"] = (logits(again.merge_and_unload()) - y).abs().max().item()
    other = adapted(stock("llama", 3), targets)
    other.load_state_dict(states[0])
    distances["all of it, unsplit"] = (logits(other) - y).abs().max().item()
    other = split("llama", True, targets=targets, seed=3).eval()
    other.load_state_dict(states[0])
    distances["all of it, split"] = (logits(other) - y).abs().max().item()
    return {name: distance for name, distance in distances.items() if not distance <= 1e-10}


@pytest.mark.slow
def test_stored(pool, tmp_path):
    """T: the adapters' file is PEFT's, and keys are those of the unsplit model with the same LoRA layers."""
    assert pool.run(stored, 4, str(tmp_path)) == [{}] * 4


def two_adapters() -> tuple[float, float, list[str]]:
    ours = split("llama", True, targets=("q_proj",))
    with tlm.adaptable(ours):
        ours.add_adapter("two", peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "up_proj", "down_proj"]))
    ours.set_adapter("two")
    whole = adapted(stock("llama"), ("q_proj",))
    whole.add_adapter("two", peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "up_proj", "down_proj"]))
    whole.set_adapter("two")
    peft.set_peft_model_state_dict(whole, peft.get_peft_model_state_dict(set_b(ours), adapter_name="two"), "two")
    trained = [name for name, p in ours.named_parameters() if p.requires_grad and "lora_" not in name]
    second = (logits(ours) - logits(whole)).abs().max().item()
    for model in (ours, whole):
        model.set_adapter("default")
    peft.set_peft_model_state_dict(whole, peft.get_peft_model_state_dict(ours))
    return second, (logits(ours) - logits(whole)).abs().max().item(), trained


def test_two_adapters(pool):
    """T: a second one, on more modules, added to a split model that has one; nothing but adapters is trained."""
    for second, first, trained in pool.run(two_adapters, 4):
        assert max(first, second) <= 1e-10
        assert not trained


def low_precision(amp: bool) -> tuple[float, float]:
    """Relative errors of the unsplit model and of ours, whose adapters PEFT keeps in float32."""
    whole, reference = (set_b(adapted(stock("llama"))) for _ in range(2))
    ours = set_b(split("llama", True))
    dtype = torch.float32 if amp else torch.bfloat16
    y, found = logits(reference.eval()), []
    for model in (whole, ours):
        for name, p in model.to(dtype).named_parameters():
            p.data = p.data.float() if "lora_" in name else p.data
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            found.append(((logits(model.eval()) - y).norm() / y.norm()).item())
            model.train()(input_ids=tokens(), use_cache=False).logits.sum().backward()
    return tuple(found)


@pytest.mark.parametrize("amp", [False, True], ids=["bfloat16", "autocast"])
def test_low_precision(pool, amp):
    """R: against the unsplit model's own error."""
    for theirs, ours in pool.run(low_precision, 4, amp):
        assert 1e-4 < theirs < 0.1
        assert ours <= 2 * theirs


def outside(targets: tuple[str, ...] | str, options: dict, lora: dict) -> None:
    adapted(tlm.parallelize(stock("llama"), mesh((2, 2)), **options), targets, **lora)(input_ids=tokens())


def inside(targets: tuple[str, ...], lora: dict, options: dict | None = None, seeds: bool = False) -> None:
    model = tlm.parallelize(stock("llama"), mesh((2, 2)), **(options or {}))
    seed = torch.distributed.get_rank() if seeds else 5
    with tlm.adaptable(model):
        model = adapted(model, targets, seed=seed, **lora)
    model.train()(input_ids=tokens())


def given_before(targets: tuple[str, ...], lora: dict, options: dict) -> None:
    tlm.parallelize(adapted(stock("llama"), targets, **lora), mesh((2, 2)), **options)


def around_attention() -> None:
    """PEFT's layer for nn.MultiheadAttention has the module, and its projection in a layer of its own, inside."""
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, dtype=torch.float64)
    tlm.parallelize(adapted(nn.Sequential(layer), ("self_attn",)), mesh((2, 2)))


def added_outside() -> None:
    model = split("llama", True, targets=("q_proj", "down_proj"))
    torch.manual_seed(torch.distributed.get_rank())
    model.add_adapter("two", peft.LoraConfig(r=2, target_modules=["down_proj"]))
    model.set_adapter("two")
    model(input_ids=tokens())


def names_of_call() -> None:
    model = split("llama", True, targets=("q_proj", "down_proj"))
    model.add_adapter("two", peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    model.eval()(input_ids=tokens(), adapter_names=["default", "two"])


def dropped_of_latents() -> None:
    model = split("youtu", True, targets=("kv_b_proj",), lora={"lora_dropout": 0.1}, rest=False).train()
    past = model(input_ids=tokens(), use_cache=True).past_key_values
    model(input_ids=tokens()[:, :1], past_key_values=past)


PLAIN = "only plain LoRA is supported on what is split"
REFUSED = {
    "attention": (outside, (("q_proj",), {}, {}), r"Target module Projection\(32, 32, split; adapters: inside"),
    "attention and MLP": (outside, (("q_proj", "gate_proj"), {}, {}), r"Target module Projection\(32, 32, split"),
    "columns": (outside, (("gate_proj",), {}, {}), "gate_proj of LlamaMLP is split, and now inside a Linear"),
    "rows": (outside, (("down_proj",), {}, {"task_type": "CAUSAL_LM"}), "down_proj of LlamaMLP is split"),
    "head": (outside, (("lm_head",), {}, {}), "lm_head of LlamaForCausalLM is split"),
    "all linears": (outside, ("all-linear", {}, {}), "gate_proj of LlamaMLP is split"),
    "columns of split activations": (outside, (("down_proj",), {"activations": "sequence"}, {}), "down_proj of"),
    "a variant": (inside, (("q_proj",), {"use_dora": True}), PLAIN),
    "a variant on an MLP": (inside, (("down_proj",), {"use_dora": True}), PLAIN),
    "a bias": (inside, (("up_proj",), {"lora_bias": True}), PLAIN),
    "a trained copy": (inside, (("q_proj",), {"modules_to_save": ["lm_head"]}), PLAIN),
    "dropout": (inside, (("o_proj",), {"lora_dropout": 0.1}), "lora_dropout > 0 on the output projection"),
    "dropout of latents in a cache": (dropped_of_latents, (), "lora_dropout > 0 in training is not supported in a"),
    "activations": (inside, (("q_proj",), {}, {"activations": "batch"}), "adapters are not supported on a model with"),
    "seeds": (inside, (("q_proj",), {}, {}, True), "what the adapters hold differs between ranks"),
    "a variant before": (given_before, (("q_proj",), {"use_dora": True}, {}), "is a peft.tuners.lora.layer.Linear"),
    "a variant on an MLP before": (given_before, (("down_proj",), {"use_dora": True}, {}), "has no rule for its"),
    "activations before": (given_before, (("q_proj",), {}, {"activations": "sequence"}), "adapters are not supported"),
    "a second adapter": (added_outside, (), "adapter 'two' was added to a split model outside"),
    "a layer around attention before": (around_attention, (), r"self_attn.base_layer \(MultiheadAttention\) is not"),
    "an adapter for each sequence": (names_of_call, (), r"has hooks, which would not run \(adapter_names="),
}


def refused(function, args: tuple) -> str:
    """The sentence with which a rank refuses."""
    warnings.simplefilter("ignore")
    with pytest.raises(ValueError) as caught:  # UsageRuntimeError too
        function(*args)
    return str(caught.value)


@pytest.mark.parametrize("case", REFUSED)
def test_refused(pool, case):
    """By one sentence on every rank, and none is left waiting: what would be silently wrong otherwise."""
    function, args, text = REFUSED[case]
    found = pool.run(refused, 4, function, args)
    assert len(set(found)) == 1
    assert re.search(text, found[0])
