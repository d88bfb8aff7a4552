"""parallelize: a converted model is the unmodified one, values and gradients, in float64.

A failure here with the tests of the pass green is in what is recognised, copied, replaced or split besides attention.
"""

import copy
import pickle
from unittest import mock

import pytest
import torch
from harness.device import DEVICE
from harness.encoders import MODELS, TIGHT, check, errors, first, inputs, make, make_torch, torch_inputs
from harness.families import build as build_family
from torch import nn
from torch.distributed.tensor import DTensor

import two_level_mha as tlm
from two_level_mha.blocks import full_tensor
from two_level_mha.integrations.projected import ProjectedAttention
from two_level_mha.layer import SCHEMES, GridAttention

GRIDS = ((2, 2), (1, 4), (4, 1))


def on_grids(kind: str, grids, options: list[dict], sizes: dict) -> dict[str, float]:
    found = {}
    for grid in grids:
        mesh = tlm.init_mesh(DEVICE, grid)
        for option in options:
            result = errors(make(kind, **sizes).train(), (), inputs(kind), mesh, **option)
            found |= {f"{grid} {option} {name}": error for name, error in result.items()}
    return found


@pytest.mark.parametrize("kind", MODELS)
def test_transformers(pool, kind):
    """Output and every gradient, the padding mask, MLPs split and whole, both ways to combine."""
    options = [{}, {"rest": False, "combine": "concat"}]
    check(pool.run(on_grids, 4, kind, GRIDS, options, {}))


def without_a_mask(kind: str) -> dict[str, float]:
    x = {name: x for name, x in inputs(kind).items() if name != "attention_mask"}
    return errors(make(kind), (), x, tlm.init_mesh(DEVICE, (2, 2)))


@pytest.mark.parametrize("kind", ["BertModel", "ViTModel"])
def test_without_a_mask(pool, kind):
    """Localises: the path of a call without a mask, which transformers drops before attention."""
    check(pool.run(without_a_mask, 4, kind))


def test_more_ranks_than_heads(pool):
    """Localises: slices of heads inside a converted model: eight ranks for four heads."""
    check(pool.run(on_grids, 8, "BertModel", [(2, 4)], [{}], {}))


def test_schemes(pool):
    """`scheme` reaches the replacements: the exact ones are exact, "independent" is another model."""
    exact = [{"scheme": scheme} for scheme in SCHEMES if scheme != "independent"]
    check(pool.run(on_grids, 4, "BertModel", [(2, 2)], exact, {}))
    for found in pool.run(on_grids, 4, "BertModel", [(2, 2)], [{"scheme": "independent"}], {}):
        assert max(found.values()) > 1e-4


def attention_weights(kind: str, implementation: str) -> tuple:
    model = make(kind, implementation).eval()
    split = tlm.parallelize(copy.deepcopy(model), tlm.init_mesh(DEVICE, (2, 2)))
    with torch.no_grad():
        expected, got = (one(**inputs(kind), output_attentions=True) for one in (model, split))
    by_config = None
    if implementation == "eager":
        split.config.output_attentions = True
        with torch.no_grad():
            by_config = split(**inputs(kind)).attentions
    return expected[0] - got[0], expected.attentions, got.attentions, by_config


@pytest.mark.parametrize("kind", ["BertModel", "ViTModel"])
def test_output_attentions(pool, kind):
    """Eager attention: stock's weights, layer by layer; asked for by the call or by the config."""
    for difference, expected, got, by_config in pool.run(attention_weights, 4, kind, "eager"):
        assert difference.abs().max() <= 1e-6  # ViT's eager softmax is in float32
        assert len(expected) == len(got) == len(by_config) == 2
        for weights in zip(expected, got, by_config, strict=True):
            torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=1e-6)
            torch.testing.assert_close(weights[2], weights[0], rtol=0, atol=1e-6)


def test_output_attentions_of_sdpa(pool):
    """Where stock has no weights with "sdpa", ours are there: never an empty tuple."""
    for _, expected, got, _ in pool.run(attention_weights, 4, "BertModel", "sdpa"):
        assert not expected and len(got) == 2
        torch.testing.assert_close(got[0].sum(-1), torch.ones(2, 4, 6, dtype=torch.float64))


def torch_models(mesh_shape: tuple[int, int]) -> dict[str, float]:
    mesh = tlm.init_mesh(DEVICE, mesh_shape)
    found = {}
    for norm_first, batch_first in ((False, True), (True, False)):
        args, masks = torch_inputs(batch_first)
        model = make_torch(norm_first, batch_first).train()
        what = f"norm_first={norm_first}"
        found |= {f"{what} {name}": e for name, e in errors(model, args, masks, mesh).items()}
        split = tlm.parallelize(copy.deepcopy(model), mesh).eval()
        with torch.no_grad():
            difference = model.eval()(*args, **masks) - split(*args, **masks)
        found[f"{what} eval"] = difference.abs().max().item()
    return found


@pytest.mark.parametrize("grid", [(2, 2), (1, 4)])
def test_torch_transformer(pool, grid):
    """nn.Transformer: self and cross attention, causal and padding masks; training, and eval where stock has a fast
    path that would pass by our forward.
    """
    check(pool.run(torch_models, 4, grid))


class Shared(nn.Module):
    """As ALBERT: one layer object, in three places."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([layer] * 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def shared_layers() -> tuple:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, 0.0, batch_first=True).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    mesh = tlm.init_mesh(DEVICE, (2, 2))
    split = tlm.parallelize(Shared(copy.deepcopy(layer)), mesh)
    bare = nn.ModuleList([copy.deepcopy(layer.self_attn)] * 2)
    tlm.parallelize(bare, mesh)
    return errors(Shared(layer), (x,), {}, mesh), len(set(split.layers)), bare[0] is bare[1]


def test_shared_layers(pool):
    """A module used in several places is replaced by one module, used in the same places."""
    for found, layers, same in pool.run(shared_layers, 4):
        check([found])
        assert layers == 1 and same


def test_modules_with_one_anothers_parameters():
    """Localises: layers of Zamba that hold one's parameters, split apart, or changed by a call that raises."""
    model = build_family("zamba")
    layers = model.model.layers
    with pytest.raises(tlm.GridError):
        tlm.parallelize(model, None, cache="no layout")
    assert layers[1].shared_transf is not layers[2].shared_transf
    hooked = build_family("zamba")
    hooked.model.layers[2].shared_transf.self_attn.register_forward_hook(print)
    with pytest.raises(tlm.GridError, match="shares a parameter"):
        tlm.parallelize(hooked, None)
    tlm.parallelize(model, None)
    assert layers[1].shared_transf is layers[2].shared_transf


def on_meta() -> tuple:
    mesh = tlm.init_mesh(DEVICE, (2, 2))
    shapes = []
    for build in (lambda: make("BertModel"), make_torch):
        with torch.device("meta"):
            model = build()
        tlm.parallelize(model, mesh)
        real = tlm.parallelize(build(), mesh)
        for (name, p), q in zip(model.named_parameters(), real.parameters(), strict=True):
            assert p.is_meta and isinstance(p, DTensor) == isinstance(q, DTensor), name
            if isinstance(p, DTensor):
                assert p._local_tensor.shape == q._local_tensor.shape and p.placements == q.placements, name
        shapes.append(len(list(model.parameters())))
    with torch.device("meta"):
        model = tlm.parallelize(make("BertModel"), mesh)
    stock = make("BertModel").eval()
    model.load_state_dict({**stock.state_dict()}, assign=True)
    for module in (stock, model):  # buffers that are not in a state dict
        module.embeddings.position_ids = torch.arange(16).expand(1, -1)
        module.embeddings.token_type_ids = torch.zeros(1, 16, dtype=torch.long)
    return shapes, (first(model.eval()(**inputs("BertModel"))) - first(stock(**inputs("BertModel")))).abs().max().item()


def test_meta(pool):
    """A meta model stays meta, with the local shapes of a real one, and takes weights afterwards."""
    for shapes, error in pool.run(on_meta, 4):
        assert min(shapes) > 0
        assert error <= TIGHT


def load_stock() -> dict[str, float]:
    mesh = tlm.init_mesh(DEVICE, (2, 2))
    found = {}
    models = {kind: (lambda kind=kind: make(kind)) for kind in MODELS} | {"torch": make_torch}
    for name, build in models.items():
        model = tlm.parallelize(build(), mesh)
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(7.0)
        stock = build()
        model.load_state_dict(stock.state_dict())  # strict
        model = copy.deepcopy(model)
        model.load_state_dict(model.state_dict())
        args, kwargs = torch_inputs() if name == "torch" else ((), inputs(name))
        with torch.no_grad():
            found[name] = (first(model(*args, **kwargs)) - first(stock(*args, **kwargs))).abs().max().item()
    own = {k: full_tensor(v) for k, v in model.state_dict().items()}
    model.load_state_dict(own)
    return found


def test_loads_a_stock_state_dict(pool):
    """The original model's state dict goes in, strictly; so does its own."""
    check(pool.run(load_stock, 4))


def test_load_state_dict_is_strict():
    """A missing and a misspelt key, and a wrong shape, are reported."""
    model, state = tlm.parallelize(make("BertModel"), None), make("BertModel").state_dict()
    prefix = "encoder.layer.0.attention."
    missing = {k: v for k, v in state.items() if k != prefix + "output.dense.weight"}
    with pytest.raises(RuntimeError, match="Missing key.*0.attention.output.dense.weight"):
        model.load_state_dict(missing)
    with pytest.raises(RuntimeError, match="Unexpected key.*0.attention.self.querry.weight"):
        model.load_state_dict({**state, prefix + "self.querry.weight": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="size mismatch for encoder.layer.0.attention.self.query.weight"):
        model.load_state_dict({**state, prefix + "self.query.weight": torch.zeros(6, 16)})


def test_keeps_what_others_use():
    """Attributes stay readable, hooks run, training mode, requires_grad and the class (for isinstance) stay."""
    model = make("BertModel").eval()
    attention = model.encoder.layer[0].attention.self
    attention.note, calls = "mine", []
    attention.register_forward_hook(lambda *_: calls.append("after"))
    attention.register_forward_pre_hook(lambda *_: calls.append("before"))
    attention.register_full_backward_hook(lambda *_: calls.append("backward"))
    attention.query.bias.requires_grad_(False)
    tlm.parallelize(model, None)
    assert not calls  # the probe runs a copy without them
    ours = model.encoder.layer[0].attention.self
    assert isinstance(ours, ProjectedAttention) and isinstance(ours, type(attention))
    names = ("note", "layer_idx", "attention_head_size", "num_attention_heads", "is_decoder", "config", "dropout")
    assert all(getattr(ours, name) == getattr(attention, name) for name in names)
    assert not ours.training and not ours.q_bias.requires_grad and ours.k_bias.requires_grad
    model(**inputs("BertModel"))[0].sum().backward()
    assert calls == ["before", "after", "backward"]
    mha = make_torch()
    mha.encoder.layers[0].self_attn.note = "mine"
    mha.encoder.layers[0].self_attn.register_forward_hook(lambda *_: calls.append("torch"))
    args, masks = torch_inputs()
    tlm.parallelize(mha, None)(*args, **masks)
    assert mha.encoder.layers[0].self_attn.note == "mine" and calls[-1] == "torch"


def test_dropout():
    """Dropout of attention is on in training, and follows a later change of the original's attribute."""
    model = tlm.parallelize(make("BertModel", attention_probs_dropout_prob=0.5), None).train()
    x = inputs("BertModel")
    assert not torch.equal(first(model(**x)), first(model(**x)))
    for layer in model.encoder.layer:
        layer.attention.self.dropout.p = 0.0
    assert torch.equal(first(model(**x)), first(model(**x)))


def digests(model: nn.Module) -> int:
    """How many tensors parallelize reads to compare them over the grid."""
    read = []
    with pytest.MonkeyPatch.context() as patch:
        digest = tlm.agreement.digest
        patch.setattr(tlm.agreement, "digest", lambda tensors: read.extend(tensors) or digest(tensors))
        tlm.parallelize(model, tlm.init_mesh(DEVICE, (2, 2)))
    return len(read)


def test_weights_are_compared_once(pool):
    """By parallelize for the whole model, and not again by each from_torch."""
    model = make_torch()
    assert pool.run(digests, 4, model) == [len(list(model.parameters()))] * 4


def random_state_after(grid) -> tuple[bool, int]:
    """Whether the CPU's generator is where it was, and how often those of GPUs were seeded."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    model, mesh = make("BertModel"), grid and tlm.init_mesh(DEVICE, grid)
    torch.manual_seed(5)
    with mock.patch.object(torch.cuda, "manual_seed_all") as seeded:
        tlm.parallelize(model, mesh)
    return torch.equal(torch.rand(3), expected), seeded.call_count


def test_random_state_is_left_alone(pool):
    """E. Localises: the trials before a replacement, of attention and of MLPs, which draw inputs and weights."""
    assert [random_state_after(None), *pool.run(random_state_after, 2, (1, 2))] == [(True, 0)] * 3


@pytest.mark.parametrize("kind", ["BertModel", "ViTModel"])
def test_pickle(kind):
    """E. Localises: replacements whose class, made at run time, cannot be found again."""
    attentions = [m for m in tlm.parallelize(make(kind), None).modules() if isinstance(m, GridAttention)]
    assert len(attentions) == 2
    for ours in attentions:
        again = pickle.loads(pickle.dumps(ours))
        assert type(again) is type(ours) and again.state_dict().keys() == ours.state_dict().keys()
        x_BLD = torch.randn(1, 3, ours.q_weight.shape[2], dtype=ours.q_weight.dtype)
        assert torch.equal(again.eval()(x_BLD)[0], ours.eval()(x_BLD)[0])
