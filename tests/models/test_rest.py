"""What is split besides attention: MLPs, and which of them stay unsplit, in float64.

A failure here with test_convert green is in what is taken for an MLP, or in how it is split.
"""

import copy

import pytest
import torch
from harness.calls import mesh
from harness.device import DEVICE
from harness.encoders import check, errors, inputs, make
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

import two_level_mha as tlm
from two_level_mha.rest import find_rest, split_rest


def local_shapes(rest: bool, width: int) -> tuple:
    model = make("BertModel", intermediate_size=width)
    tlm.parallelize(model, tlm.init_mesh(DEVICE, (2, 2)), rest=rest)
    linear = model.encoder.layer[1].intermediate.dense.weight
    held = sum((p._local_tensor if isinstance(p, DTensor) else p).numel() for p in model.parameters())
    error = errors(make("BertModel", intermediate_size=width), (), inputs("BertModel"), tlm.init_mesh(DEVICE, (2, 2)))
    shape = (linear._local_tensor if isinstance(linear, DTensor) else linear).shape
    return tuple(shape), held, tlm.report(model), error


@pytest.mark.parametrize("rest, width, rows, mlps", [(True, 24, 6, 2), (False, 24, 24, 0)])
def test_rest_and_report(pool, rest, width, rows, mlps):
    """MLPs are split on request and where P divides them; the report says so, and names what stayed unsplit."""
    for shape, held, report, error in pool.run(local_shapes, 4, rest, width):
        assert shape == (rows, 16)
        check([error])
        assert (report.attentions, report.mlps, report.held_parameters) == (2, mlps, held)
        assert report.split_bytes + report.unsplit_bytes == 8 * held and report.total_bytes == 8 * report.parameters
        assert ("embeddings.word_embeddings" in report.unsplit) == (not rest)
        assert ("encoder.layer.*.intermediate.dense" in report.unsplit) == (mlps == 0)
        assert f"2 attention modules and {mlps} MLPs split; parameters per rank {held:,} of" in str(report)


def test_mlps_of_a_width_that_ranks_do_not_divide(pool):
    """Localises: rows of a gathered weight that are on no rank or on two; numbers that depend on it."""
    found = pool.run(local_shapes, 4, True, 22)
    assert [shape for shape, *_ in found] == [(6, 16), (6, 16), (6, 16), (4, 16)]
    for _, held, report, error in found:
        check([error])
        assert (report.attentions, report.mlps, report.held_parameters) == (2, 0, held)
        assert "encoder.layer.1.intermediate" in report.gathered


class MLP(nn.Module):
    """As ViT's."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        return self.fc2(self.between(self.fc1(x)))

    def between(self, x):
        return nn.functional.gelu(x)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Softmax(MLP):
    def between(self, x):
        return x.softmax(-1)


class Normed(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(24)

    def between(self, x):
        return self.norm(x)


class Dropping(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.4)

    def between(self, x):
        return self.dropout(super().between(x))


class DroppingItself(MLP):
    def between(self, x):
        return nn.functional.dropout(super().between(x), 0.4, self.training)


class Scaled(MLP):
    """Its own parameter acts between."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)  # for now

    def between(self, x):
        return self.scale * x


class Mixed(MLP):
    """Columns change places."""

    def between(self, x):
        return x.roll(1, -1)


class Wide(MLP):
    """Knows its width."""

    def between(self, x):
        return x.view(*x.shape[:-1], 24)


class Twice(MLP):
    """What the first linear gives is used besides."""

    def forward(self, x):
        y = self.fc1(x)
        return self.fc2(y.relu()) + y.sum(-1, keepdim=True)


class Reader(MLP):
    """Passes its linears by."""

    def forward(self, x):
        return nn.functional.linear(self.fc1(x).relu(), self.fc2.weight, self.fc2.bias)


class Pair(MLP):
    """Adds what the layer gives it besides."""

    def forward(self, x, y):
        return super().forward(x) + y


class Conv(nn.Module):
    """GPT-2's shape: linears that store (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.c_proj = Conv1D(24, 16), Conv1D(16, 24)
        for linear in (self.c_fc, self.c_proj):
            nn.init.normal_(linear.bias)

    def forward(self, x):
        return self.c_proj(nn.functional.gelu(self.c_fc(x)))


class Plain(nn.TransformerEncoderLayer):
    pass


class Other(nn.TransformerEncoderLayer):
    def _ff_block(self, x):
        return self.linear2(self.linear1(x).softmax(-1))


def layer(cls=nn.TransformerEncoderLayer, **options) -> nn.Module:
    return cls(16, 4, 24, 0.0, batch_first=True, **options)


def with_(change, module: nn.Module) -> nn.Module:
    change(module)
    return module


def bert_layer() -> nn.Module:
    return make("BertModel").encoder.layer[0]


def hook(*names: str):
    return lambda module: [module.get_submodule(name).register_forward_hook(lambda *_: None) for name in names]


def tie(module: nn.Module) -> None:
    module.extra = nn.Linear(24, 16)
    module.extra.weight = module.fc2.weight


def wrap(module: nn.Module) -> None:
    module.fc1 = nn.Sequential(module.fc1)


def widen(module: nn.Module) -> None:
    module.fc1 = nn.Linear(16, 48)


SPLIT = {
    "ViT's shape": MLP,
    "gated": Gated,
    "Conv1D": Conv,
    "sequential": lambda: nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)),
    "residual": Pair,
    "encoder layer": layer,
    "norm_first": lambda: layer(norm_first=True),
    "without biases": lambda: layer(bias=False),
    "decoder layer": lambda: layer(nn.TransformerDecoderLayer),
    "subclass": lambda: layer(Plain),
    "BERT": bert_layer,
    "hooks around it": lambda: with_(hook("", "output.LayerNorm", "attention"), bert_layer()),
}
WHOLE = {
    "softmax": (Softmax, "its numbers differ by"),
    "norm": (Normed, "not with a part of its columns: RuntimeError"),
    "scale": (Scaled, "the gradient of scale, which acts between them"),
    "trained activation": (lambda: layer(activation=nn.PReLU()), "the gradient of activation.weight, which acts"),
    "functional dropout": (DroppingItself, "something drops columns between them that is no nn.Dropout"),
    "moved columns": (Mixed, "its numbers differ by"),
    "fixed width": (Wide, "not with a part of its columns: RuntimeError"),
    "used twice": (Twice, "its numbers differ by"),
    "linears passed by": (Reader, "cannot be called like an MLP"),
    "another forward": (lambda: layer(Other), "its numbers differ by"),
    "hooked linear": (lambda: with_(hook("fc1"), MLP()), "fc1 has hooks"),
    "hook between": (lambda: with_(hook("intermediate"), bert_layer()), "intermediate has hooks"),
    "hooked activation": (
        lambda: with_(hook("intermediate.intermediate_act_fn"), bert_layer()),
        "intermediate.intermediate_act_fn has hooks",
    ),
    "tied": (lambda: with_(tie, MLP()), "fc2 shares a parameter"),
    "wrapped": (lambda: with_(wrap, MLP()), "fc1 is a Sequential, not a plain nn.Linear"),
    "gated": (lambda: with_(widen, MLP()), "fc1 gives 48 features and fc2 takes 24"),
}


@pytest.mark.parametrize("case", SPLIT)
def test_is_split(case):
    """Localises: an MLP of a known form that is no longer taken for one."""
    rest = find_rest(nn.ModuleDict({"one": SPLIT[case](), "two": SPLIT[case]()}), 4, set())
    assert list(rest.mlps) == ["one", "two"] and not rest.left_out_mlps


@pytest.mark.parametrize("case", WHOLE)
def test_stays_unsplit(case):
    """With the reason; a good one of the same class beside it does not change that, and is split."""
    build, reason = WHOLE[case]
    model = nn.ModuleDict({"good": MLP(), "bad": build()})
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    rest = find_rest(model, 4, set())
    assert list(rest.mlps) == ["good"] and list(rest.left_out_mlps) == ["bad"]
    assert reason in rest.left_out_mlps["bad"]
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert torch.equal(torch.rand(1), expected)


def dropped_off() -> float:
    torch.manual_seed(0)
    whole = nn.ModuleDict({"one": Dropping().double()})
    split = copy.deepcopy(whole)
    split_rest(find_rest(split, 4, set()), mesh((2, 2)))
    x, found = torch.randn(3, 5, 16, dtype=torch.float64), []
    for model in (whole, split):
        torch.manual_seed(7)
        given = x.clone().requires_grad_()
        y = model.train()["one"](given)
        y.square().sum().backward()
        found.append((y.detach(), given.grad))
    return max((a - b).abs().max().item() for a, b in zip(*found, strict=True))


def test_dropout_of_columns(pool):
    """T. Localises: elements that are dropped by their place among a rank's columns, not among all."""
    assert max(pool.run(dropped_off, 4)) <= 1e-10


def written_to(build, frozen: bool) -> tuple[bool, float]:
    torch.manual_seed(0)
    whole = nn.ModuleDict({"one": build().double()}).requires_grad_(not frozen)
    split = copy.deepcopy(whole)
    split_rest(find_rest(split, 4, set()), mesh((2, 2)))
    x, found = torch.randn(3, 5, 16, dtype=torch.float64), []
    for model in (whole, split):
        given = x.clone().requires_grad_()
        y = model["one"](x if frozen else given)
        y += given
        y.square().sum().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        weights = [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in grads]
        found.append((y.detach(), given.grad, *weights))
    parts = all(p.to_local().numel() < p.numel() for p in split.parameters() if p.dim() > 1)
    return parts, max((a - b).abs().max().item() for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("build", [MLP, Conv])
def test_an_output_that_is_written_to(pool, build, frozen):
    """Localises: an output that autograd lets nobody write to; of a Conv1D rows for columns, or a bias added twice."""
    for parts, off in pool.run(written_to, 4, build, frozen):
        assert parts and off <= 1e-10


def test_experts():
    """Localises: experts of a list, which not all tokens go to, each with a sum over the ranks."""
    rest = find_rest(nn.ModuleDict({"experts": nn.ModuleList([Gated(), Gated()]), "shared": Gated()}), 4, set())
    assert list(rest.mlps) == ["shared"]


def test_width():
    """Localises: a width that the ranks do not divide: dealt unevenly, where only plans can."""
    rest = find_rest(MLP(), 16, set())
    assert not rest.mlps and rest.left_out_mlps == {"": "16 does not divide its width 24"}


def test_meta():
    """Localises: trials of MLPs whose weights are not there yet."""
    with torch.device("meta"):
        rest = find_rest(nn.ModuleList([layer(), layer(Other)]), 4, set())
    assert list(rest.mlps) == ["0"] and list(rest.left_out_mlps) == ["1"]


def unusual_mlps() -> tuple[list[bool], str, dict[str, float]]:
    """Of five layers the first four are unusual."""
    torch.manual_seed(0)
    layers = [layer().double() for _ in range(5)]
    layers[0].linear1.register_forward_hook(lambda module, args, y: y * 2)
    layers[1].linear2.weight = layers[2].linear2.weight
    layers[3].__class__ = Other
    model = nn.Sequential(*layers)
    mesh, x_BLD = tlm.init_mesh(DEVICE, (2, 2)), torch.randn(2, 5, 16, dtype=torch.float64)
    split = tlm.parallelize(copy.deepcopy(model), mesh)
    is_split = [isinstance(layer.linear1.weight, DTensor) for layer in split]
    return is_split, str(tlm.report(split)), errors(model, (x_BLD,), {}, mesh)


def test_unusual_mlps_stay_unsplit(pool):
    """Hooks, tied weights or another function between: left alone and named, and the model is the same."""
    for split, report, found in pool.run(unusual_mlps, 4):
        assert split == [False, False, False, False, True]
        check([found])
        assert "; the MLP 0 stays unsplit: linear1 has hooks; the MLP *" in report
        assert "the MLP * stays unsplit: linear2 shares a parameter; the MLP 3 stays unsplit: its numbers" in report
