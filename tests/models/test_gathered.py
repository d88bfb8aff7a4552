"""Attention that no replacement reproduces: its own code with gathered weights, on each rank's sequences."""

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers
from harness.calls import mesh
from harness.families import answers, build, inputs, try_family

import two_level_mha as tlm
from two_level_mha.attentions import NO_PLAN
from two_level_mha.blocks import full_tensor
from two_level_mha.gathered import Sequences, whole_weights
from two_level_mha.integrations.gathered import gather_weights
from two_level_mha.mesh import place_on

FAMILIES = ("axk2", "zaya", "doge", "big_bird")


@pytest.mark.parametrize("family", FAMILIES)
def test_family(pool, family):
    """Localises: an argument that is dealt wrongly, a gradient that is not summed once, a cache of other sequences."""
    for found in pool.run(try_family, 4, family, (2, 2), timeout=120):
        assert found["verdict"] == "right", found
        assert found["attentions"] == 0 and found["gathered"] >= 2


def batches(sizes):
    """Greatest differences of logits, and tokens by beams, of batches of these sizes."""
    model = build("doge")
    split = tlm.parallelize(copy.deepcopy(model), mesh((2, 2)))
    found = []
    for size in sizes:
        ids = inputs()["input_ids"][:1].repeat(size, 1)
        ids[:, -1] = torch.arange(3, 3 + size)
        with torch.no_grad():
            off = (split(ids).logits - model(ids).logits).abs().max().item()
            options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
            same = torch.equal(split.generate(ids, **options), model.generate(ids, **options))
        found.append((off, same))
    return found


def test_batches_that_ranks_do_not_divide(pool):
    """Localises: sequences that fill up a batch; a cache of which beams pick sequences of other ranks."""
    for found in pool.run(batches, 4, (1, 2, 5), timeout=120):
        assert all(off < 1e-5 and same for off, same in found), found


class Together(torch.nn.Module):
    """Of whose sequences each one's numbers depend on the others."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(6, 6, dtype=torch.float64))

    def forward(self, hidden_states, bias=None):
        mixed = hidden_states - hidden_states.mean(0, keepdim=True)
        return mixed @ self.weight + (0 if bias is None else bias), None


class Apart(Together):
    def forward(self, hidden_states, bias=None):
        y = hidden_states @ self.weight + (0 if bias is None else bias)
        return y * getattr(self, "added", 1.0), None


class Named(Apart):
    def forward(self, hidden_states, bias=None):
        return {"context": super().forward(hidden_states, bias)[0], "weights": None}


class Strange(Apart):
    """Whose output is of no known kind."""

    def forward(self, hidden_states, bias=None):
        return SimpleNamespace(context=super().forward(hidden_states, bias)[0])


def given_by(output):
    return output[0] if isinstance(output, tuple) else output["context"] if isinstance(output, dict) else output.context


def gradients(kind):
    """Largest differences of output and of the gradients of weight, input and a bias of every sequence."""
    torch.manual_seed(0)
    whole = kind()
    split = copy.deepcopy(whole)
    gather_weights(split, "layer", mesh((2, 2)))
    for module in (whole, split):
        module.added = torch.nn.Parameter(torch.full((6,), 2.0, dtype=torch.float64))
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    results = []
    for module in (whole, split):
        given, bias = x.clone().requires_grad_(), torch.ones(1, 5, 6, dtype=torch.float64, requires_grad=True)
        y = given_by(module(given, bias=bias))
        (y**3).sum().backward()
        grad = module.weight.grad
        results.append([y, grad.full_tensor() if module is split else grad, given.grad, bias.grad])
        if kind is not Together:
            results[-1].append(module.added.grad)
    return [(a - b).abs().max().item() for a, b in zip(*results, strict=True)], split.dealt[False]


@pytest.mark.parametrize("kind, dealt", [(Apart, True), (Together, False), (Named, True), (Strange, False)])
def test_sequences_together_and_apart(pool, kind, dealt):
    """Localises: the trial of the first call; gradients of what every rank has whole, and of what it is dealt;
    outputs in a dict, or of a kind that is not known, which each rank would give of its own sequences alone.
    """
    for off, found in pool.run(gradients, 4, kind, timeout=60):
        assert max(off) < 1e-10 and found is dealt, (off, found)


class Experts(torch.nn.Module):
    """A sequence is one of its experts', as its first entry says; experts without a sequence do not run."""

    def __init__(self):
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(6, 6, dtype=torch.float64) for _ in range(4))

    def forward(self, hidden_states):
        chosen, y = hidden_states[:, 0, 0].long(), torch.zeros_like(hidden_states)
        for number in chosen.unique():
            mine = (chosen == number).nonzero()[:, 0]
            y = y.index_add(0, mine, self.experts[number](hidden_states[mine]).relu() * self.scale)
        return y


def chosen_experts():
    """Differences of the output and of all gradients, and which there are of none, whole and split, called twice."""
    torch.manual_seed(0)
    whole = Experts()
    split = copy.deepcopy(whole)
    gather_weights(split, "layer", mesh((2, 2)))
    x = torch.randn(5, 3, 6, dtype=torch.float64)
    x[:, 0, 0] = torch.tensor([0.0, 2.0, 2.0, 3.0, 0.0])  # of rank 0 to 2, with one that fills up
    found = []
    for module in (whole, split):
        module.scale = torch.nn.Parameter(torch.full((6,), 2.0, dtype=torch.float64))
        ys = [module(x), module(x.flip(0))]
        sum((y**2).sum() for y in ys).backward()
        grads = {name: p.grad for name, p in module.named_parameters()}
        found.append((ys, {name: full_tensor(x) for name, x in grads.items() if x is not None}))
    (ys, grads), (split_ys, split_grads) = found
    offs = [(a - b).abs().max().item() for a, b in zip(ys, split_ys, strict=True)]
    return max(
        offs + [(grads[name] - x).abs().max().item() for name, x in split_grads.items()]
    ), grads.keys() ^ split_grads


def test_what_a_rank_runs_hangs_on_its_sequences(pool):
    """Localises: a rank that gathers, or sums, what the others do not; gradients of experts that no sequence had."""
    for off, unlike in pool.run(chosen_experts, 4, timeout=60):
        assert off < 1e-10 and not unlike, (off, unlike)


def kept_for_backward():
    """Bytes that autograd keeps of a module's weights, and the error of a weight that changed before backward."""
    torch.manual_seed(0)
    module = Apart()
    gather_weights(module, "layer", mesh((2, 2)))
    x = torch.randn(4, 5, 6, dtype=torch.float64, requires_grad=True)
    y = module(x)[0].sum()
    with torch.no_grad():
        module.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.backward()
    with whole_weights(module, place_on(mesh((2, 2))), torch.distributed.tensor.Partial()):
        whole = module.weight
    return tuple(whole.shape), tuple(module.weight.to_local().shape)


def test_weights_are_whole_in_the_call_alone(pool):
    """Localises: a weight that stays whole after the call; a gradient of weights that are others by then."""
    shapes = pool.run(kept_for_backward, 4, timeout=60)
    assert all(whole == (6, 6) for whole, _ in shapes) and sum(own[0] for _, own in shapes) == 6


def dealt_shapes():
    sequences = Sequences(4, place_on(mesh((2, 2))))
    tensors = {
        "hidden": torch.zeros(4, 3, 8), "mask": torch.zeros(4, 1, 3, 3), "position_ids": torch.zeros(4, 3).long(),
        "alibi": torch.zeros(8, 1, 3), "table": torch.zeros(4, 8), "attention_mask": torch.zeros(4, 3),
        "one": torch.zeros(1, 3, 8), "positions": torch.arange(4),
    }  # fmt: skip
    return {name: tuple(sequences.deal(x, name).shape) for name, x in tensors.items()}


def test_what_is_dealt(pool):
    """Localises: a rule of which arguments are of sequences."""
    assert pool.run(dealt_shapes, 4, timeout=60)[0] == {
        "hidden": (1, 3, 8), "mask": (1, 1, 3, 3), "position_ids": (1, 3), "alibi": (2, 1, 3), "table": (4, 8),
        "attention_mask": (1, 3), "one": (1, 3, 8), "positions": (4,),
    }  # fmt: skip


def loaded(folder):
    """A gathered model on meta, filled from files, and its state dict again; whether both are the stock model's."""
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(stock.config)
    tlm.load_pretrained(tlm.parallelize(model, mesh((2, 2))), folder)
    ids = inputs()["input_ids"]
    with torch.no_grad():
        off = (model(ids).logits - stock.eval()(ids).logits).abs().max().item()
    state = tlm.full_state_dict(model)
    return off, all(torch.equal(x, stock.state_dict()[name]) for name, x in state.items())


def test_load_pretrained(pool, tmp_path):
    """Localises: reading in shares for parameters that no adapter names; the names of the whole state dict."""
    build("phi3").save_pretrained(tmp_path)
    for off, same in pool.run(loaded, 4, str(tmp_path), timeout=120):
        assert off < 1e-5 and same


def chosen(skip, only):
    model = build("llama")
    tlm.parallelize(model, mesh((2, 2)), skip=skip, only=only)
    report = tlm.report(model)
    same = answers(model)["logits"], answers(build("llama"))["logits"]
    return report.attentions, sorted(report.left_out), (same[0] - same[1]).abs().max().item(), report.unsplit


def test_skip_and_only(pool):
    """Localises: a module that is split although the user leaves it whole, or the other way round."""
    attentions, left_out, off, unsplit = pool.run(chosen, 4, ["model.layers.0"], ["*"], timeout=60)[0]
    assert (attentions, left_out) == (1, ["model.layers.0.self_attn"]) and off < 1e-5
    assert "model.layers.*.mlp.up_proj" in unsplit
    attentions, left_out, off, unsplit = pool.run(chosen, 4, [], ["*.self_attn"], timeout=60)[0]
    assert attentions == 2 and left_out == [] and off < 1e-5 and "lm_head" in unsplit


def refused(**patterns):
    with pytest.raises(tlm.GridError) as error:
        tlm.parallelize(build("llama"), mesh((2, 2)), **patterns)
    return str(error.value)


def wrong_patterns():
    return refused(skip="model"), refused(only=["vision*"]), refused(skip=["*"])


def test_wrong_patterns(pool):
    """Localises: the sentence for a pattern that means nothing."""
    text, nothing, everything = pool.run(wrong_patterns, 4, timeout=60)[0]
    assert "skip must be a list of patterns" in text and "no module of LlamaForCausalLM" in nothing
    assert "all are left out by skip= or only=" in everything


def with_wrong_plan():
    """The error for a model whose plan, another library's, gives other numbers."""
    model = build("llama")
    plan = {
        name: "rowwise_split_input" if name.endswith("gate_proj") else style for name, style in model.tp_plan.items()
    }
    model._tp_plan = plan
    with pytest.raises(tlm.GridError) as error:
        tlm.parallelize(model, mesh((2, 2)))
    return str(error.value)


def test_wrong_plan(pool):
    """Localises: a tensor-parallel plan that is taken for right."""
    for text in pool.run(with_wrong_plan, 4, timeout=60):
        assert "model.layers.0.mlp" in text


@pytest.mark.parametrize("family", ["dbrx", "zamba2"])
def test_mlps_without_a_plan(pool, family):
    """Localises: what no plan splits, kept whole on every rank; inside of a part that holds attention too (Zamba2)."""
    found = pool.run(try_family, 4, family, (2, 2), timeout=120)[0]
    assert found["verdict"] == "right" and found["gathered_mlps"] and found["held"] < 0.35, found


def birds():
    """Of BigBird: logits' differences of a long, a short and again the long call, then what its attention is; how many
    attentions are split of one that is a decoder.
    """
    model = build("big_bird", block_size=2, num_random_blocks=1)
    split, offs = tlm.parallelize(copy.deepcopy(model), mesh((2, 2))), []
    for length in (24, 11, 24):
        ids = torch.randint(3, 96, (3, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            offs.append((split(ids).logits - model(ids).logits).abs().max().item())
    kind = type(split.bert.encoder.layer[0].attention.self).__name__
    decoder = build("big_bird", attention_type="original_full", is_decoder=True)
    report = tlm.report(tlm.parallelize(decoder, mesh((2, 2))))
    return offs, kind, report.attentions, [name for name, why in report.gathered.items() if why != NO_PLAN]


def test_a_module_that_puts_another_in_its_place(pool):
    """Localises: weights that are whole where BigBird's sparse attention has become another, or that it lost."""
    for offs, kind, attentions, gathered in pool.run(birds, 4, timeout=120):
        assert max(offs) < 1e-5 and kind == "BigBirdSelfAttention"
        assert attentions == 2 and not gathered
