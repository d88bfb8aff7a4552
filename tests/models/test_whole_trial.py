"""The trial of a whole split model on two tokens: what it finds, what it leaves as it was, which models are not run.

E. A failure is in `whole_trial.py`, or, where a model of transformers is refused, in what the sentence names.
"""

import pytest
import torch
import transformers
from harness.calls import mesh, text_of
from harness.decoders import BASE, make
from harness.encoders import make as make_encoder
from torch import nn

import two_level_mha as tlm
from two_level_mha.layer import GridAttention
from two_level_mha.mesh import place_on


def told(model: nn.Module) -> float:
    """A number that a module's code may take of what it is made of, and that is another since it is split."""
    return 0.1 * sum(p is not None for p in model.model.layers[0].self_attn._parameters.values())


class Reads(transformers.LlamaForCausalLM):
    """Reads a weight of what is replaced."""

    def forward(self, *args, **kwargs):
        self.model.layers[1].self_attn.o_proj.weight.sum()
        return super().forward(*args, **kwargs)


class Adds(transformers.LlamaForCausalLM):
    """Gives other numbers once it is split."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + told(self)
        return output


class Bends(transformers.LlamaForCausalLM):
    """Gives the same numbers, and on one rank other gradients once it is split."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        bent = told(self) * (torch.distributed.get_rank() == 1)
        output.logits = output.logits + bent * (output.logits - output.logits.detach())
        return output


class Needs(transformers.LlamaForCausalLM):
    """Cannot be called with tokens alone."""

    def forward(self, *args, images, **kwargs):
        return super().forward(*args, **kwargs)


def llama(kind: type[nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return kind(transformers.LlamaConfig(**BASE)).to(dtype)


def refused(kind: type[nn.Module], dtype: torch.dtype) -> str:
    return text_of(lambda: tlm.parallelize(llama(kind, dtype), mesh((2, 2))))


@pytest.mark.parametrize(
    "kind, dtype, text",
    [
        (Reads, torch.bfloat16, "Reads was split, but for two tokens it dies of AttributeError"),
        (
            Reads,
            torch.float64,
            "in model.layers.*.self_attn.o_proj: make the model again, and leave model.layers.*.self",
        ),
        (Adds, torch.float32, "Adds was split, but for two tokens it gives other numbers: its output is off by"),
        (Bends, torch.float64, "it gives other numbers: the gradient of model.norm.weight is off by"),
    ],
)
def test_refused(pool, kind, dtype, text):
    """Localises: a model that is silently wrong, or dies in its first call; one sentence, whichever rank it is of."""
    found = pool.run(refused, 4, kind, dtype)
    assert len(set(found)) == 1 and text in found[0], found
    assert found[0].endswith("or all but attention by rest=False")


def left(frozen: bool) -> dict[str, object]:
    """What the trial of a model in training has left as it was, and not."""
    model, called = make("gpt oss" if frozen else "llama", attention_dropout=0.5).train(), []
    for module in [model, *model.model.layers, model.model.norm, *(layer.self_attn for layer in model.model.layers)]:
        module.register_forward_hook(lambda *_: called.append(1))
        module.register_full_backward_hook(lambda *_: called.append(1))
    for p in model.parameters():
        p.requires_grad_(not frozen)
        p.register_hook(lambda *_: called.append(1)) if p.requires_grad else None
    norm = model.model.norm.weight
    norm.grad = torch.ones_like(norm)
    buffers = {name: x.clone() for name, x in model.named_buffers()}
    random, control = torch.get_rng_state(), place_on(mesh((2, 2))).control
    calls = control.call  # of other tests on this mesh
    ours = tlm.parallelize(model, mesh((2, 2)), rest=False)
    layers = [module for module in ours.modules() if isinstance(module, GridAttention)]
    assert all(layer.place.control is control for layer in layers)
    return {
        "hooks called": len(called),
        "random": torch.equal(random, torch.get_rng_state()),
        "gradients": [name for name, p in ours.named_parameters() if p.grad is not None],
        "the norm's": norm is ours.model.norm.weight and torch.equal(norm.grad, torch.ones_like(norm)),
        "trained": {p.requires_grad for p in ours.parameters()},
        "in training": all(module.training for module in ours.modules()),
        "buffers": all(torch.equal(x, buffers[name]) for name, x in ours.named_buffers()),
        "counted": [
            control.call - calls,
            *(layer.calls.count for layer in layers),
            *(layer._compared for layer in layers),
        ],
        "untried": tlm.report(ours).untried,
    }


@pytest.mark.parametrize("frozen", [False, True])
def test_left_as_it_was(pool, frozen):
    """Localises: what a user would find changed: gradients, calls of his hooks, random numbers, counters of calls."""
    for found in pool.run(left, 4, frozen):
        assert not found["hooks called"] and not any(found["counted"]) and found["gradients"] == ["model.norm.weight"]
        assert found["trained"] == {not frozen} and found["untried"] == {}
        assert all(found[name] for name in ("random", "the norm's", "in training", "buffers")), found


def untried() -> dict[str, str]:
    """By model, why it is not run as a whole; "" of one that is."""
    with torch.device("meta"):
        blank = llama(transformers.LlamaForCausalLM)
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    models = {
        "meta": blank, "ViT": make_encoder("ViTModel"), "torch's": nn.Sequential(layer), "needs": llama(Needs),
        "inside": nn.ModuleDict({"part": llama(Needs), "other": llama(transformers.LlamaForCausalLM)}),
        "BERT": make_encoder("BertModel"),
    }  # fmt: skip
    return {name: str(tlm.report(tlm.parallelize(model, mesh((2, 2))))) for name, model in models.items()}


def test_untried(pool):
    """Localises: a model that is refused since nobody knows how it is called, or that is not run without a word."""
    found = pool.run(untried, 4)[0]
    assert "; the whole was not tried on two tokens: it has weights on meta" in found["meta"]
    assert "; the whole was not tried on two tokens: its input is pixel_values" in found["ViT"]
    assert "; the whole was not tried on two tokens: how it is called is not known" in found["torch's"]
    assert "tokens: unsplit it cannot be called with two tokens alone: TypeError" in found["needs"]
    assert "; part was not tried on two tokens" in found["inside"] and "; other was" not in found["inside"]
    assert "not tried" not in found["BERT"]


def independent() -> str:
    return str(tlm.report(tlm.parallelize(make_encoder("BertModel"), mesh((2, 2)), scheme="independent")))


def test_another_model(pool):
    """Localises: numbers of scheme "independent", which are others, compared with those of the model as it was."""
    assert all("not tried" not in report for report in pool.run(independent, 4))
