"""Weights of embeddings and heads, shared or a transformers model's own, split by the vocabulary, in float64.

A failure here with test_rest green is in vocabulary.py: whose weight is split, the lookup, or the columns of logits.
"""

import copy

import pytest
import torch
import transformers
from harness.calls import mesh
from torch import nn
from torch.distributed.tensor import DTensor

import two_level_mha as tlm
from two_level_mha.probe import owners_of
from two_level_mha.vocabulary import find_vocabularies

EXACT = 1e-10


def found_in(model, ranks, is_taken):
    return find_vocabularies(model, ranks, owners_of(model), is_taken)


class Scaled(nn.Embedding):
    """As Gemma's."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.register_buffer("scale", torch.tensor(4.0), persistent=False)

    def forward(self, ids):
        return super().forward(ids) * self.scale.to(self.weight.dtype)


class Normed(nn.Embedding):
    """Uses its weight besides."""

    def forward(self, ids):
        return super().forward(ids) / self.weight.norm()


class Model(nn.Module):
    """A language model of one layer, whose head may have a bias of its own, or the model's."""

    def __init__(self, rows: int = 97, cls: type = nn.Embedding, bias: str = "", **options) -> None:
        super().__init__()
        self.embed = cls(rows, 16, **options)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, rows, bias=bool(bias))
        self.head.weight = self.embed.weight
        if bias == "shared":
            self.bias = self.head.bias

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])


class Twice(Model):
    """Two embeddings and a head of one weight, as in encoder-decoders."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.other = nn.Embedding(97, 16)
        self.other.weight = self.embed.weight

    def forward(self, ids):
        return super().forward(ids) + self.head(self.other(ids.flip(1)))


CASES = {
    "plain": (Model, {}),
    "as many rows on every rank": (Model, {"rows": 96}),
    "padding on another rank than the first": (Model, {"padding_idx": 60}),
    "its own class": (Model, {"cls": Scaled}),
    "a bias": (Model, {"bias": "own"}),
    "a bias of two modules": (Model, {"bias": "shared"}),
    "three owners": (Twice, {}),
}


def tokens() -> torch.Tensor:
    return torch.tensor([[0, 24, 25, 60, 60, 95], [49, 50, 74, 75, 3, 3]])


def built(case: str) -> nn.Module:
    torch.manual_seed(0)
    cls, options = CASES[case]
    return cls(**options).double()


def run(model: nn.Module) -> dict[str, torch.Tensor]:
    y = model(tokens())
    y.square().mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if name.split(".")[0] in ("embed", "head", "bias")}
    return {"": y.detach()} | {
        name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in grads.items() if g is not None
    }


def errors(case: str, grid: tuple[int, int], scheme: str) -> tuple[dict[str, float], tuple[int, ...], bool]:
    whole = built(case)
    split = tlm.parallelize(copy.deepcopy(whole), mesh(grid), scheme=scheme)
    one = all(module.weight is split.head.weight for module in split.modules() if isinstance(module, nn.Embedding))
    expected, got = run(whole), run(split)
    assert expected.keys() == got.keys()
    found = {name: (x - got[name]).abs().max().item() for name, x in expected.items()}
    return found, tuple(split.embed.weight.to_local().shape), one


@pytest.mark.parametrize("case", CASES)
def test_as_unsplit(pool, case):
    """Output and gradients. Localises: the lookup of other ranks' rows, or a gradient of a part of the columns."""
    rows = {"as many rows on every rank": [24] * 4}.get(case, [25, 25, 25, 22])
    for (found, shape, one), own in zip(pool.run(errors, 4, case, (2, 2), "auto"), rows, strict=True):
        assert max(found.values()) <= EXACT, found
        assert shape == (own, 16) and one


@pytest.mark.parametrize("scheme", ["slices", "weights"])
def test_other_grids(pool, scheme):
    """Localises: rows that are dealt by another order of ranks than the sums are of."""
    for found, shape, one in pool.run(errors, 3, "a bias", (1, 3), scheme):
        assert max(found.values()) <= EXACT and shape[0] in (33, 31) and one


def used() -> dict[str, object]:
    whole = built("its own class")
    split = tlm.parallelize(copy.deepcopy(whole), mesh((2, 2)))
    copied = copy.deepcopy(split)
    stored = split.state_dict()
    again = tlm.parallelize(built("its own class"), mesh((2, 2)))
    again.load_state_dict({name: x * 2 for name, x in whole.state_dict().items()})
    wrong = {}
    for bad in (-1, 97):
        try:
            split(torch.tensor([[3, bad]]))
            wrong[bad] = None
        except IndexError as error:
            wrong[bad] = str(error)
    return {
        "copy": torch.equal(copied(tokens()), split(tokens())) and copied.embed.weight is copied.head.weight,
        "one in the state": torch.equal(stored["embed.weight"].full_tensor(), whole.embed.weight),
        "loaded": torch.equal(again.embed.weight.full_tensor(), 2 * whole.embed.weight),
        "wrong tokens": wrong,
        "is still": isinstance(split.embed, Scaled) and isinstance(split.head, nn.Linear),
        "report": str(tlm.report(split)),
    }


def test_in_use(pool):
    """Localises: a copy with another's rows, a state dict, and tokens that no rank has, which gave zeros."""
    for found in pool.run(used, 4):
        wrong = found.pop("wrong tokens")
        assert all(text and "out of range" in text for text in wrong.values()), wrong
        assert "embed" not in found.pop("report").split("unsplit (")[-1].split(")")[0]
        assert all(found.values()), found


WHOLE = {
    "a norm of rows": ({"max_norm": 1.0}, "max_norm, scale_grad_by_freq and sparse"),
    "a class that uses its weight besides": ({"cls": Normed}, "its Normed uses its weight besides"),
    "fewer rows than ranks": ({"rows": 5}, "of its 5 rows the last of 4 ranks would have none"),
}


@pytest.mark.parametrize("case", WHOLE)
def test_stays_whole(case):
    """Localises: a weight that is split although its owners' numbers would be others."""
    options, why = WHOLE[case]
    found, left_out = found_in(Model(**options), 4, lambda name: False)
    assert not found and left_out.keys() == {"embed", "head"}
    assert all(why in text for text in left_out.values())


def untied(**sizes) -> transformers.GPTJForCausalLM:
    """A head with a bias, no plan, and tables that nobody shares."""
    torch.manual_seed(0)
    config = transformers.GPTJConfig(
        vocab_size=97, n_embd=16, n_layer=1, n_head=4, rotary_dim=4, n_positions=128, n_inner=24, **sizes
    )
    return transformers.GPTJForCausalLM(config).double().eval()


def answers(model: nn.Module) -> dict[str, torch.Tensor]:
    logits = model(tokens()).logits
    logits.square().mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {"": logits.detach()} | {
        name: grads[name].full_tensor() if isinstance(grads[name], DTensor) else grads[name]
        for name in ("transformer.wte.weight", "lm_head.weight", "lm_head.bias")
    }


def errors_untied() -> tuple[dict[str, float], dict[str, tuple[int, ...]]]:
    whole = untied()
    split = tlm.parallelize(copy.deepcopy(whole), mesh((2, 2)))
    expected, got = answers(whole), answers(split)
    found = {name: (x - got[name]).abs().max().item() for name, x in expected.items()}
    shapes = {name: tuple(split.get_parameter(name).to_local().shape) for name in expected if name.endswith("weight")}
    return found, shapes


def test_tables_of_their_own(pool):
    """Localises: embeddings and heads without a plan's rule that every rank holds, or a gradient of their rows."""
    for (found, shapes), rows in zip(pool.run(errors_untied, 4), [25, 25, 25, 22], strict=True):
        assert max(found.values()) <= EXACT, found
        assert set(shapes.values()) == {(rows, 16)}


class Mixes(nn.Embedding):
    """Rows of tokens, or a mixture of rows: as Ovis 2's table of what is seen."""

    def forward(self, x):
        return x @ self.weight if x.is_floating_point() else super().forward(x)


def test_which_tables():
    """Localises: tables of positions, or of a model without words, that are taken for a vocabulary; a plan's own."""
    found, left_out = found_in(untied(), 4, lambda name: False)
    assert [one.names() for one in found] == [{"transformer.wte"}, {"lm_head"}] and not left_out
    found, left_out = found_in(untied(), 4, lambda name: name == "lm_head")
    assert [one.names() for one in found] == [{"transformer.wte"}]
    read = untied()
    cls = type("Reads", (type(read),), {"bigger": lambda self: self.transformer.wte.weight.sum()})
    read.__class__ = cls
    found, left_out = found_in(read, 4, lambda name: False)
    assert [one.names() for one in found] == [{"lm_head"}] and "reads wte.weight" in left_out["transformer.wte"]
    own = untied()
    own.transformer.wte.__class__ = Mixes
    found, left_out = found_in(own, 4, lambda name: False)
    assert [one.names() for one in found] == [{"lm_head"}]
    assert left_out["transformer.wte"] == "Mixes.forward reads self.weight"
    tables = untied()
    tables.transformer.more, tables.transformer.few = nn.Embedding(97, 64), nn.Embedding(97, 8)
    found, _ = found_in(tables, 4, lambda name: False)
    assert {name for one in found for name in one.names()} == {"transformer.wte", "transformer.more", "lm_head"}
    images = transformers.ViTModel(
        transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=24)
    )
    assert found_in(images, 4, lambda name: False) == ([], {})


def test_whose_weight():
    """Localises: what is taken for a vocabulary: on "meta", alone, in a third module, skipped, or of a subclass."""
    with torch.device("meta"):
        (one,), left_out = found_in(Model(cls=Scaled), 4, lambda name: False)
    assert one.names() == {"embed", "head"} and not left_out
    alone = Model()
    alone.head.weight = nn.Parameter(alone.head.weight.detach().clone())
    third = Model()
    third.register_parameter("weight", third.embed.weight)
    for model in (alone, third):
        assert found_in(model, 4, lambda name: False) == ([], {})
    assert found_in(Model(), 4, lambda name: name == "head") == ([], {})
    sub = Model()
    sub.head.__class__ = type("Sub", (nn.Linear,), {})
    assert "is that of a Sub, not a plain" in found_in(sub, 4, lambda name: False)[1]["head"]
