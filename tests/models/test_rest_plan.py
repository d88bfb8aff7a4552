"""What is not attention in a transformers model, split by its own plan: the model computes what it computed.

Attention stays as it is here, so a failure is in the choice of the plan's rules, in how they are applied, or in
transformers' own tensor parallelism; not in the pass.
"""

import pytest
import torch
import transformers
from harness.decoders import full_gradients, make
from harness.device import DEVICE
from harness.encoder_families import build
from torch import nn
from torch.distributed.tensor import DTensor

import two_level_mha as tlm
from two_level_mha.blocks import full_tensor
from two_level_mha.integrations import private
from two_level_mha.rest import find_rest, split_rest

TIGHT = {"mixtral": 1e-6}  # its router differentiates in float32


def attentions(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_modules() if name.endswith("self_attn")}


def run(model: nn.Module) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    tokens = torch.randint(3, 30, (2, 6))
    logits = model(input_ids=tokens, use_cache=False).logits
    (logits * torch.randn(logits.shape, dtype=torch.float64)).sum().backward()
    found = full_gradients(model)
    with torch.no_grad():
        found["logits without grad"] = model(input_ids=tokens, use_cache=False).logits
    return {"logits": logits.detach(), **found}


def differences(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest difference of each, over its largest number where that is above 1."""
    assert got.keys() == expected.keys()
    return {name: (got[name] - x).abs().max().item() / max(1.0, x.abs().max().item()) for name, x in expected.items()}


def split(kind: str, grid: tuple[int, int], changes: dict) -> tuple[dict[str, float], dict[str, int], dict[str, str]]:
    """What differs from stock; how many numbers of each DTensor this rank has; what stayed unsplit and why."""
    expected = run(make(kind, **changes))
    model = make(kind, **changes)
    rest = find_rest(model, 4, attentions(model))
    split_rest(rest, tlm.init_mesh(DEVICE, grid))
    local = {name: p._local_tensor for name, p in model.named_parameters() if isinstance(p, DTensor)}
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in local.values())
    got = run(model)
    errors = differences(got, expected)
    other = make(kind, seed=2, **changes).state_dict()
    model.load_state_dict(other)
    assert all(torch.equal(full_tensor(x), other[name]) for name, x in model.state_dict().items())
    off = {name: error for name, error in errors.items() if not error <= TIGHT.get(kind, 1e-10)}
    return off, {name: x.numel() for name, x in local.items()}, rest.left_out


def narrow(width: int) -> tuple[dict[str, float], dict[str, str], str]:
    """Experts of so many columns, by grouped_mm unless the split chooses otherwise, against unsplit ones by turns; and
    the report on another such model.
    """
    mesh = tlm.init_mesh(DEVICE, (2, 2))
    model, other = (make("qwen3 moe", moe_intermediate_size=width) for _ in range(2))
    model.config._experts_implementation = "grouped_mm"
    rest = find_rest(model, 4, attentions(model))
    split_rest(rest, mesh)
    assert model.config._experts_implementation == "grouped_mm"
    if not rest.other_ways:  # grouped_mm takes no float64
        return {}, {}, ""
    errors = differences(run(model), run(other))
    another = make("qwen3 moe", dtype=torch.float32, moe_intermediate_size=width)
    another.config._experts_implementation = "grouped_mm"
    return errors, rest.other_ways, str(tlm.report(tlm.parallelize(another, mesh)))


CASES = {
    "Llama": ("llama", (2, 2), {}),
    "Gemma3": ("gemma3", (1, 4), {}),
    "Qwen3-MoE": ("qwen3 moe", (2, 2), {}),
    "Mixtral": ("mixtral", (4, 1), {}),
    "biased": ("llama", (2, 2), {"mlp_bias": True}),
    "tied": ("llama", (2, 2), {"tie_word_embeddings": True}),
    "uneven": ("llama", (2, 2), {"intermediate_size": 22, "vocab_size": 30}),
    "fewer columns than ranks": ("llama", (2, 2), {"intermediate_size": 5}),
    "uneven experts": ("qwen3 moe", (2, 2), {"moe_intermediate_size": 6}),
}


@pytest.mark.parametrize("case", CASES)
def test_split(pool, case):
    """Logits, with and without grad, and every gradient; nothing twice; load_state_dict takes the stock model's.

    Where P does not divide a width, transformers deals it unevenly.
    """
    kind, grid, changes = CASES[case]
    found = pool.run(split, 4, kind, grid, changes)
    model = make(kind, **changes)
    tied = model.config.tie_word_embeddings
    vocabulary = {"model.embed_tokens.weight"} if tied else {"model.embed_tokens.weight", "lm_head.weight"}
    for off, held, left in found:
        assert not off
        mlps = {name for name, _ in model.named_parameters() if ".mlp." in name and "mlp.gate.weight" not in name}
        assert held.keys() == mlps | vocabulary and not left
    for name in found[0][1]:
        copies = 4 if name.endswith("down_proj.bias") else 1
        assert sum(held[name] for _, held, _ in found) == copies * model.get_parameter(name).numel(), name


@pytest.mark.parametrize("width", (4, 6, 8))
def test_narrow_experts(pool, width):
    """Localises: experts whose part grouped_mm does not take, and dies of; others that leave grouped_mm."""
    for errors, ways, report in pool.run(narrow, 4, width, timeout=240):
        experts = {f"model.layers.{layer}.mlp.experts" for layer in range(3)}
        assert ways.keys() == (set() if width == 8 else experts)
        assert all(error <= 1e-10 for error in errors.values()), errors
        assert width == 8 or "; model.layers.*.mlp.experts multiplies one expert after the other: of its " in report


def hook(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda *_: None)
    return module


class Adapter(nn.Module):
    """As a LoRA layer: what the plan names is not its own weight."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.out_features = base, base.out_features

    def forward(self, x):
        return self.base(x)


def adapt(model: nn.Module) -> None:
    model.model.layers[1].mlp.up_proj = Adapter(model.model.layers[1].mlp.up_proj)


def tie(model: nn.Module) -> None:
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight


REFUSED = {
    "hook": (lambda model: hook(model.model.layers[1].mlp.down_proj), "layers.1.mlp.down_proj.* it has hooks"),
    "adapter": (adapt, "layers.1.mlp.up_proj .*no rule for its base.weight"),
    "tied": (tie, "layers.0.mlp.up_proj.* its weight is tied"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    """Where leaving a rule out would leave its neighbours wrong."""
    change, reason = REFUSED[case]
    model = make("llama")
    change(model)
    with pytest.raises(tlm.GridError, match=reason):
        find_rest(model, 4, attentions(model))


def test_left_out():
    """What takes and gives full activations stays unsplit alone; so does an attention that nobody replaced. Hooks of a
    head see all columns where it is split without the plan.
    """
    model = make("qwen3 moe")
    hook(model.lm_head)
    rest = find_rest(model, 4, {"model.layers.0.self_attn"})
    assert rest.shared() == {"lm_head"}
    replaced = make("qwen3 moe")
    hook(replaced.lm_head).forward = replaced.lm_head.forward
    assert find_rest(replaced, 4, attentions(replaced)).left_out == {"lm_head": "its forward was replaced"}
    assert set(rest.left_out) == {
        f"model.layers.{layer}.self_attn.{name}"
        for layer in (1, 2)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    }
    assert all("is not replaced" in why for why in rest.left_out.values())
    ((_, plan),) = rest.tp_plans.values()
    assert {name.rpartition(".")[2] for name in plan} == {
        "embed_tokens",
        "weight",
        "experts",
        "gate_up_proj",
        "down_proj",
    }


def test_parameters_between_split_linears():
    """Localises: a trained activation on a part of the columns, whose gradient would be of that part."""
    model = make("apertus")
    rest = find_rest(model, 4, attentions(model))
    assert set(rest.left_out) == {f"model.layers.{layer}.mlp" for layer in range(3)}
    assert "the gradient of model.layers.0.mlp.act_fn.alpha_p, which has no rule" in rest.left_out["model.layers.0.mlp"]
    ((_, plan),) = rest.tp_plans.values()
    assert not any(".mlp." in name for name in plan) and "lm_head" in plan


def test_a_part_of_a_model():
    """A transformers model inside another module goes by its plan, what is beside it by its structure."""
    mlp = nn.TransformerEncoderLayer(16, 4, 24)
    rest = find_rest(nn.ModuleDict({"decoder": make("llama"), "encoder": mlp}), 4, {"decoder.model.layers.0.self_attn"})
    assert list(rest.tp_plans) == ["decoder"] and list(rest.mlps) == ["encoder"]
    assert not any("layers.0.self_attn" in name for name in [*rest.tp_plans["decoder"][1], *rest.left_out])


def test_beside_a_plan():
    """Localises: a tower that its model's plan has no word of, whose MLPs are not split by their structure; one that it
    has, by both.
    """
    model = build("image-text", "qwen2_5_vl")
    rest = find_rest(model, 4, attentions(model))
    assert list(rest.mlps) == [*(f"model.visual.blocks.{layer}.mlp" for layer in range(2)), "model.visual.merger.mlp"]
    assert list(rest.tp_plans) == [""] and any("language_model.layers.0.mlp" in name for name in rest.tp_plans[""][1])


def test_without_a_plan():
    """Localises: a transformers model that has no plan, left unsplit in place of going by its structure."""
    config = transformers.BertConfig(hidden_size=16, num_attention_heads=4, intermediate_size=24, num_hidden_layers=1)
    rest = find_rest(transformers.BertModel(config), 4, set())
    assert not rest.tp_plans and list(rest.mlps) == ["encoder.layer.0"]


def test_versions(monkeypatch):
    """A transformers that is too old, and one that has lost a private name, are refused with a sentence."""
    for version in ("5.23.0", "5.24.0.dev0", "6.0"):
        private.check_version(version)
    with pytest.raises(tlm.GridError, match="transformers 5.22.1 is too old.* 5.23 or newer"):
        private.check_version("5.22.1")
    monkeypatch.delattr("transformers.core_model_loading.rename_source_key")
    with pytest.raises(tlm.GridError, match="has no transformers.core_model_loading.rename_source_key"):
        private.private("rename_source_key")


def end_to_end(kind: str, grid: tuple[int, int]) -> tuple[dict[str, float], str]:
    """parallelize with everything split: what differs from stock, and the report."""
    expected = run(make(kind, exact=True))
    model = tlm.parallelize(make(kind, exact=True), tlm.init_mesh(DEVICE, grid))
    got = run(model)
    errors = differences(got, expected)
    limit = 1e-6 if kind in ("mixtral", "qwen3 moe") else 1e-10  # routers in float32, of inputs that are not bit-equal
    return {name: error for name, error in errors.items() if not error <= limit}, str(tlm.report(model))


CLASSES = {
    "llama": "LlamaForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "qwen3 moe": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
}


@pytest.mark.parametrize("kind", CLASSES)
def test_parallelize(pool, kind):
    """Logits and every gradient of a model whose attention and all else is split; the report says what is kept."""
    for off, report in pool.run(end_to_end, 4, kind, (2, 2)):
        assert not off
        assert f"the tensor-parallel plan of {CLASSES[kind]} names split" in report
        assert " kB split, " in report and "model.layers.*.input_layernorm" in report
        assert "embed_tokens" not in report and "lm_head" not in report
