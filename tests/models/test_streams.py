"""Whole models whose hidden states stay split, against the stock model, float64."""

import copy

import pytest
import torch
import transformers
from harness import encoders, image_text
from harness.calls import mesh
from harness.decoders import MODELS, full_gradients, make, pair, prompt
from harness.encoder_families import build
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.distributed.tensor import DTensor

import two_level_mha as tlm

EXACT = {"exact": True}
SDPA = [name for name in MODELS if name not in ("gemma2", "28 heads", "2 kv heads", "head_dim 512")]


def differences(grid, names, activations: str, rest: bool, lengths) -> dict[str, float]:
    """Of logits and gradients, the largest by model."""
    found = {}
    for name in names:
        models = pair(name, grid, tuple(EXACT.items()), rest=rest, activations=activations)
        report = tlm.report(models[1])
        if split := [what for what in report.left_out if "hidden states" in what]:
            found[name] = {what: report.left_out[what] for what in split}
            continue
        for rows, length in lengths:
            ids, keep = prompt(rows, length)
            outputs = []
            for model in models:
                model.zero_grad()
                logits = model(ids, attention_mask=keep, use_cache=False).logits
                (logits.log_softmax(-1)[..., 3] * keep).sum().backward()
                outputs.append(logits.detach())
            grads = full_gradients(models[1])
            errors = {
                key: (grads[key] - p.grad).abs().max().item() / max(1.0, p.grad.abs().max().item())
                for key, p in models[0].named_parameters()
            }
            errors["logits"] = (outputs[0] - outputs[1])[keep.bool()].abs().max().item()
            limit = 1e-6 if name == "mixtral" else 1e-10  # its router rounds to float32
            wrong = {key: error for key, error in errors.items() if not error <= limit}
            if wrong:
                found[f"{name} {rows} {length}"] = dict(sorted(wrong.items(), key=lambda item: -item[1])[:4])
    return found


@pytest.mark.parametrize("rest", [True, False])
@pytest.mark.parametrize("activations", ["sequence", "batch"])
def test_decoders(pool, activations, rest):
    """T. Localises: an exchange at a module's border, a gradient that is not summed or summed twice, a part's order."""
    lengths = ((2, 11), (4, 16), (3, 5))
    for found in pool.run(differences, 4, (2, 2), ["llama", "qwen3 moe"], activations, rest, lengths, timeout=240):
        assert not found


@pytest.mark.parametrize("grid", [(2, 2), (1, 4), pytest.param((2, 4), marks=pytest.mark.slow)])
def test_families(pool, grid):
    """T. Localises: a family whose layers hold what does not act on single rows, or whose head takes parts."""
    names = [name for name in SDPA if name not in ("llama", "qwen3 moe")]
    for found in pool.run(differences, grid[0] * grid[1], (grid), names, "sequence", True, ((2, 19),), timeout=400):
        assert not found


@pytest.mark.slow
@pytest.mark.parametrize("grid", [(2, 1), (1, 2), (4, 1), (1, 8), (2, 8), (1, 16)])
def test_grids(pool, grid):
    """T. As test_decoders, when only a grid fails; fewer rows than ranks too."""
    names = ["llama", "qwen3"] if grid[0] < 4 and grid[1] < 16 else ["28 heads"] if grid[0] == 4 else ["qwen3"]
    for activations in ("sequence", "batch"):
        for found in pool.run(
            differences, grid[0] * grid[1], grid, names, activations, True, ((2, 19), (17, 3)), timeout=500
        ):
            assert not found


def encoders_off(grid, activations) -> dict[str, dict]:
    found = {}
    for kind in encoders.MODELS:
        args = encoders.make(kind), (), encoders.inputs(kind), mesh(grid)
        found[kind] = encoders.errors(*args, activations=activations)
    for norm_first in (False, True):
        for batch_first in (False, True):
            args = (
                encoders.make_torch(norm_first, batch_first, num_decoder_layers=2),
                *encoders.torch_inputs(batch_first),
            )
            found[f"torch {norm_first} {batch_first}"] = encoders.errors(*args, mesh(grid), activations=activations)
    return found


@pytest.mark.parametrize("activations", ["sequence", pytest.param("batch", marks=pytest.mark.slow)])
def test_encoders(pool, activations):
    """T. Localises: cross-attention's memory, batch_first, an MLP whose linears are the layer's own."""
    for per_rank in pool.run(encoders_off, 4, (2, 2), activations, timeout=240):
        for name, one in per_rank.items():
            assert max(one.values()) <= 1e-10, (name, one)


def normed_off(activations: str) -> float:
    stock = build("masked", "albert").double()
    ours = tlm.parallelize(copy.deepcopy(stock), mesh((2, 2)), activations=activations)
    assert not [what for what in tlm.report(ours).left_out if "hidden states" in what]
    ids, outputs = torch.arange(26).view(2, 13) % 11 + 3, []
    for model in (stock, ours):
        outputs.append(model(ids).logits)
        outputs[-1].square().mean().backward()
    grads = full_gradients(ours)
    errors = [(grads[name] - p.grad).abs().max().item() for name, p in stock.named_parameters() if p.grad is not None]
    return max((outputs[0] - outputs[1]).abs().max().item(), *errors)


@pytest.mark.parametrize("activations", ["sequence", "batch"])
def test_a_norm_behind_attention(pool, activations):
    """T. Localises: the gradient of a norm that is part of the attention, of a rank's part alone."""
    assert max(pool.run(normed_off, 4, activations, timeout=240)) <= 1e-10


def exact_loss(logits, labels, vocab_size, num_items_in_batch=None, **_):
    """transformers' loss without its rounding to float32."""
    target = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:].reshape(-1)
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = nn.functional.cross_entropy(logits.view(-1, vocab_size), target, ignore_index=-100, reduction=reduction)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def exact_pair(name: str, grid, activations: str, rest: bool = True, **changes) -> list[nn.Module]:
    stock = make(name, exact=True, **changes)
    stock.loss_function = exact_loss
    return [stock, tlm.parallelize(copy.deepcopy(stock), mesh(grid), rest=rest, activations=activations)]


def trained(model, ids, keep, checkpointed: bool = False) -> dict[str, torch.Tensor]:
    """Gradients of a loss of the next token, by stock's names, and the loss."""
    model.train().zero_grad()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointed == "reentrant"})
    torch.manual_seed(7)
    loss = model(ids, attention_mask=keep, labels=ids, use_cache=False).loss
    loss.backward()
    model.eval()
    if checkpointed:
        model.gradient_checkpointing_disable()
    return {"loss": loss.detach(), **{key: grad.clone() for key, grad in full_gradients(model).items()}}


def worst(expected: dict, got: dict) -> float:
    assert expected.keys() == got.keys()
    return max((got[key] - x).abs().max().item() / max(1.0, x.abs().max().item()) for key, x in expected.items())


HEADS = {
    "its own": ("llama", {}),
    "tied": ("gemma", {}),
    "a vocabulary that ranks do not divide": ("qwen2", {"vocab_size": 67}),
    "tied, and such a vocabulary, scaled logits": ("granite", {"tie_word_embeddings": True, "vocab_size": 70}),
}


def losses_off(grid, activations, rest) -> dict[str, float]:
    """Of the loss and gradients of a call with labels, some ignored; and of logits, which are a DTensor then."""
    found = {}
    ids, keep = prompt(3, 9)
    labels = ids.masked_fill(keep == 0, -100)
    for case, (name, changes) in HEADS.items():
        models = exact_pair(name, grid, activations, rest, **changes)
        outputs = [
            [model(ids, attention_mask=keep, labels=labels, use_cache=False, **count) for model in models]
            for count in ({}, {"num_items_in_batch": torch.tensor(31)})
        ]
        for stock, ours in outputs:
            assert isinstance(ours.logits, DTensor) and ours.logits.to_local().shape[-1] < stock.logits.shape[-1]
            difference = (stock.logits - ours.logits.full_tensor())[keep.bool()]
            found[f"{case}: logits"] = difference.abs().max().item()
        for model, of_model in zip(models, zip(*outputs, strict=True), strict=True):
            model.zero_grad()
            sum(output.loss for output in of_model).backward()
        expected, got = ({"loss": output[0].loss.detach()} for output in zip(*outputs, strict=True))
        expected |= {key: p.grad for key, p in models[0].named_parameters()}
        found[case] = worst(expected, got | full_gradients(models[1]))
        with torch.no_grad():
            stock, ours = (model(ids, attention_mask=keep, labels=labels) for model in models)
        found[f"{case}: no grad"] = (stock.logits - ours.logits)[keep.bool()].abs().max().item()
    return found


@pytest.mark.parametrize("rest", [True, False])
@pytest.mark.parametrize("activations", ["sequence", "batch"])
def test_losses(pool, activations, rest):
    """T. Localises: the head on vocabulary shards, a tied weight's gradient from both ends, ignored labels."""
    for found in pool.run(losses_off, 4, (2, 2), activations, rest, timeout=240):
        assert max(found.values()) <= 1e-10, found


def checkpoints_off(grid, activations) -> dict[str, float]:
    """Against the stock model without checkpoints; lengths that change between the forward passes of one backward."""
    stock, ours = exact_pair("llama", grid, activations)
    found = {}
    for kind in ("reentrant", "not reentrant"):
        for length in (16, 9):
            found[f"{kind} {length}"] = worst(
                trained(stock, *prompt(4, length)), trained(ours, *prompt(4, length), kind)
            )
    two = []
    for model in (stock, ours):
        model.train().zero_grad()
        if model is ours:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = sum(model(prompt(4, length)[0], labels=prompt(4, length)[0]).loss for length in (9, 10, 16))
        with torch.no_grad():
            model(prompt(1, 2)[0])  # replicated, before layers of the others run again
        loss.backward()
        two.append({key: grad.clone() for key, grad in full_gradients(model).items()})
    return found | {"three lengths": worst(*two)}


@pytest.mark.parametrize("activations", ["sequence", "batch"])
def test_checkpoints(pool, activations):
    """T. Localises: sizes of wholes that are not known when layers run again in backward."""
    for found in pool.run(checkpoints_off, 4, (2, 2), activations, timeout=240):
        assert max(found.values()) <= 1e-10, found


def dropout_off(grid, activations) -> dict[str, float]:
    """Of models that drop elements of hidden states, in training with one seed, against stock."""
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64}
    config = transformers.GPT2Config(**sizes, embd_pdrop=0.2, attn_pdrop=0.0, resid_pdrop=0.4)
    torch.manual_seed(0)
    found, stock = {}, transformers.GPT2LMHeadModel(config).double()
    stock.loss_function = exact_loss
    ours = tlm.parallelize(copy.deepcopy(stock), mesh(grid), activations=activations)
    found["gpt2"] = worst(*(trained(model, *prompt(2, 9)) for model in (stock, ours)))
    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.3, batch_first=True, dtype=torch.float64)
    stock, outputs = nn.TransformerEncoder(layer, 2), []
    for kind in ("replicated", activations):  # stock's output lies in memory in another order, in which it is dropped
        model = tlm.parallelize(copy.deepcopy(stock), mesh(grid), activations=kind, rest=False)
        torch.manual_seed(3)
        outputs.append(model(torch.randn(3, 7, 16, dtype=torch.float64)))
    return found | {"torch": (outputs[0] - outputs[1]).abs().max().item()}


@pytest.mark.parametrize("activations", ["sequence", "batch"])
def test_dropout(pool, activations):
    """T. Localises: elements that are dropped by their place in a part, not in the whole."""
    for found in pool.run(dropout_off, 4, (2, 2), activations, timeout=240):
        assert max(found.values()) <= 1e-10, found


def generated(grid, activations) -> list[str]:
    wrong = []
    for name in ("llama", "gemma3", "qwen3 moe"):
        stock, ours = pair(name, grid, (), rest=True, activations=activations)
        for rows, length in ((2, 11), (4, 16), (1, 3)):
            ids, keep = prompt(rows, length)
            options = {"attention_mask": keep, "max_new_tokens": 8, "do_sample": False}
            if not torch.equal(stock.generate(ids, **options), ours.generate(ids, **options)):
                wrong.append(f"{name} {rows} {length}")
    return wrong


@pytest.mark.parametrize("activations", ["sequence", pytest.param("batch", marks=pytest.mark.slow)])
def test_generate(pool, activations):
    """E. Localises: a prefill whose parts are not those of the cache, steps that are not replicated."""
    assert pool.run(generated, 4, (2, 2), activations, timeout=240) == [[]] * 4


def autocast_off(grid) -> dict[str, float]:
    """Errors of bf16 against float64, those of the split model over stock's."""
    stock, ours = pair("llama", grid, (("dtype", torch.float32),), rest=True, activations="sequence")
    exact = copy.deepcopy(stock).double()
    ids, keep = prompt(4, 16)
    expected = trained(exact, ids, keep)
    errors = []
    for model in (stock, ours):
        with torch.autocast("cpu", torch.bfloat16):
            got = trained(model, ids, keep)
        errors.append({key: (x - expected[key]).norm().item() for key, x in got.items()})
    scale = {key: x.norm().item() for key, x in expected.items()}
    return {key: errors[1][key] / max(errors[0][key], 1e-3 * scale[key]) for key in scale}


def test_autocast(pool):
    """Localises: sums of gradients in a dtype that stock does not sum in, a weight that autocast does not cast."""
    for found in pool.run(autocast_off, 4, (2, 2), timeout=240):
        assert sorted(found.values())[-1] <= 3.0, found


class Around(nn.Module):
    """As an adapter wraps a linear."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.base, self.weight, self.bias = linear, linear.weight, linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x)


def recorded_off(activations: str) -> dict[str, float]:
    """Of what a model gives of the states between its layers, and of the gradients through them."""
    found = {}
    for labels, as_tuple in ((False, False), (True, False), (False, True)):
        models = pair("llama", (2, 2), tuple(EXACT.items()), rest=True, activations=activations)
        ids, keep = prompt(3, 11)
        states = []
        for model in models:
            more = {"labels": ids} if labels else {}
            output = model(
                ids, attention_mask=keep, use_cache=False, output_hidden_states=True, return_dict=not as_tuple, **more
            )
            states.append(output[-1] if as_tuple else output.hidden_states)
            sum((i + 1) * (x[keep.bool()] ** 2).mean() for i, x in enumerate(states[-1])).backward()
        grads = full_gradients(models[1])
        kept = [[x[keep.bool()] for x in of_model] for of_model in states]
        errors = [(a - b).abs().max().item() for a, b in zip(*kept, strict=True)]
        errors += [
            (grads[name] - p.grad).abs().max().item() for name, p in models[0].named_parameters() if p.grad is not None
        ]
        found[f"labels {labels}, a tuple {as_tuple}"] = max(errors)
    bert = encoders.make("BertModel").double()
    ours = tlm.parallelize(copy.deepcopy(bert), mesh((2, 2)), activations=activations)
    ids = torch.arange(26).view(2, 13) % 11 + 3
    calls = {"encoder": ours, "compiled": torch.compile(ours, backend="eager")}
    expected = bert(ids, output_hidden_states=True).hidden_states
    for name, call in calls.items():
        got = call(ids, output_hidden_states=True).hidden_states
        found[name] = max((a - b).abs().max().item() for a, b in zip(expected, got, strict=True))
    torch.compiler.reset()
    both = build("image-text", "internvl").double()  # which asks its tower for them too
    ours = tlm.parallelize(copy.deepcopy(both), mesh((2, 2)), activations=activations)
    given = {name: x.double() if x.is_floating_point() else x for name, x in image_text.inputs(both).items()}
    states = [model(**given, output_hidden_states=True).hidden_states for model in (both, ours)]
    found["beside a tower"] = max((a - b).abs().max().item() for a, b in zip(*states, strict=True))
    return found


@pytest.mark.parametrize("activations", ["sequence", pytest.param("batch", marks=pytest.mark.slow)])
def test_hidden_states_between_layers(pool, activations):
    """T. Localises: parts that a user would take for whole, and the gradient of them."""
    for found in pool.run(recorded_off, 4, activations, timeout=240):
        assert max(found.values()) <= 1e-10, found


def refused(grid) -> list[str]:
    texts = []
    ids = prompt()[0]
    _, ours = pair("llama", grid, (), rest=False, activations="sequence")
    ours(ids, use_cache=False, output_hidden_states=True)  # transformers' own hooks cannot be traced the first time
    wrapped = copy.deepcopy(pair("llama", grid, (), rest=True)[0])
    tlm.parallelize(wrapped, mesh(grid), activations="sequence")
    wrapped.model.layers[1].mlp.up_proj = Around(wrapped.model.layers[1].mlp.up_proj)
    for call in (
        lambda: torch.compile(ours, backend="eager", fullgraph=True)(ids, use_cache=False, output_hidden_states=True),
        lambda: wrapped(ids),
        lambda: tlm.parallelize(nn.ModuleList([nn.MultiheadAttention(8, 2)]), mesh(grid), activations="rows"),
    ):
        try:
            call()
            texts.append("")
        except Exception as error:
            texts.append(str(error))
    torch.compiler.reset()
    model = tlm.parallelize(
        nn.Sequential(nn.ModuleList([nn.MultiheadAttention(8, 2, batch_first=True)])), mesh((2, 2)),
        activations="sequence",
    )  # fmt: skip
    return [*texts, str(tlm.report(model))]


def test_refusals(pool):
    """Localises: what a graph records of parts; an adapter that is not seen; the report's reasons."""
    for graph, adapter, name, report in pool.run(refused, 4, (2, 2)):
        assert "Observed exception" in graph and "output_hidden_states is not available in a graph" in graph
        assert "such as an adapter, does not work with activations='sequence'" in adapter
        assert name == "activations must be one of replicated, sequence, batch, got 'rows'"
        assert "the hidden states of 0.0 stays unsplit: it is no part of a layer in an nn.ModuleList" in report


def compiled_off(grid, activations) -> tuple[dict[int, float], int]:
    """By length; and the graphs. Attention only: transformers' own parallel linears compile for one length."""
    stock, ours = exact_pair("llama", grid, activations, rest=False)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(ours, backend=aot_autograd(fw_compiler=backend), fullgraph=True)
    found = {}
    for length in (16, 24, 32, 40, 9):
        ids, keep = prompt(4, length)
        for model in (stock, compiled):
            model.zero_grad()
            model(ids, attention_mask=keep, labels=ids, use_cache=False).loss.backward()
        expected = {key: p.grad for key, p in stock.named_parameters()}
        found[length] = worst(expected, full_gradients(ours))
    torch.compiler.reset()
    return found, len(graphs)


@pytest.mark.slow
@pytest.mark.parametrize("activations", ["sequence", "batch"])
def test_compiled(pool, activations):
    """T. Localises: hooks that break a graph, sizes that a graph takes for those of one call."""
    for found, graphs in pool.run(compiled_off, 4, (2, 2), activations, timeout=400):
        assert max(found.values()) <= 1e-10, found
        assert graphs <= 2 * (2 if activations == "batch" else 3)  # forward and backward


def peaks(activations: str) -> int:
    import activations as benchmark

    return benchmark.peak_bytes(activations, 2)


@pytest.mark.slow
def test_memory(pool):
    """Localises: a whole tensor that is kept for backward, or whole logits."""
    (alone,) = pool.run(peaks, 1, "sequence", timeout=240)
    for activations in ("sequence", "batch"):
        assert max(pool.run(peaks, 4, activations, timeout=240)) <= 0.36 * alone


def copied(grid) -> dict[str, float]:
    """Of a copy of a split model, against its original; and how far the original moves with it."""
    ours = exact_pair("llama", grid, "sequence", rest=False)[1]
    inputs = prompt(4, 16)
    expected = trained(ours, *inputs)
    ours.zero_grad()  # torch cannot copy the gradient of a DTensor
    other = copy.deepcopy(ours)
    found = {"copy": worst(expected, trained(other, *inputs))}
    found["original"] = float(any(p.grad is not None for p in ours.parameters()))
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2.0)
    found["moved"] = worst(expected, trained(ours, *inputs))
    return found


def test_copies(pool):
    """E. Localises: a copy whose modules run those of the original."""
    for found in pool.run(copied, 4, (2, 2), timeout=120):
        assert max(found.values()) == 0.0, found
