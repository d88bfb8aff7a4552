"""TwoLevelParallel: attention on a grid by torch's parallelize_module, of models that are not transformers' too."""

import copy
import math

import pytest
import torch
import transformers
from harness import titan
from harness.calls import mesh
from harness.device import DEVICE
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import two_level_mha as tlm
from two_level_mha.blocks import full_tensor
from two_level_mha.layer import GridAttention


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return transformers.LlamaModel(config)


# name -> (model, where its attention is, its input by x)
MODELS = {
    "encoder": (encoder, "layers.*.self_attn", lambda x: {"src": x}),
    "titan": (titan.Decoder, "layers.*.attention", lambda x: {"x": x}),
    "llama": (llama, "layers.*.self_attn", lambda x: {"inputs_embeds": x, "use_cache": False}),
}


def output(name: str, model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = model(**MODELS[name][2](x))
    return getattr(y, "last_hidden_state", y)


def differences(name: str, axes: str, options: dict) -> dict[str, float]:
    """Of the output, the input's gradient, and weights read back and forth."""
    make, path, _ = MODELS[name]
    torch.manual_seed(0)
    stock = make().double()
    ours = copy.deepcopy(stock)
    if axes == "grid":
        place = mesh((2, 2))
    else:
        shape, names = ((4,), ("tp",)) if axes == "tp" else ((2, 4), ("dp", "tp"))
        place = init_device_mesh(DEVICE, shape, mesh_dim_names=names)["tp"]
    parallelize_module(ours, place, {path: tlm.TwoLevelParallel(**options)})
    assert sum(isinstance(module, GridAttention) for module in ours.modules()) == 2
    x, found, inputs = torch.randn(3, 7, 32, dtype=torch.float64), {}, []
    ys = []
    for model in (stock, ours):
        inputs.append(x.clone().requires_grad_())
        ys.append(output(name, model, inputs[-1]))
        (ys[-1] ** 3).sum().backward()
    found["output"] = (ys[0] - ys[1]).abs().max().item()
    found["input"] = ((inputs[0].grad - inputs[1].grad).abs().max() / inputs[0].grad.abs().max()).item()
    state = tlm.full_state_dict(ours)
    if state:
        found["state"] = max((state[key] - p).abs().max().item() for key, p in stock.state_dict().items())
    changed = {key: p + 1.0 for key, p in stock.state_dict().items()}
    ours.load_state_dict(changed)
    if state := tlm.full_state_dict(ours):
        found["loaded"] = max((state[key] - p).abs().max().item() for key, p in changed.items())
    return found


CASES = [
    (4, "grid", {}),
    (4, "tp", {"grid": (1, 4)}),
    (4, "tp", {}),
    (8, "dp and tp", {"grid": (2, 2), "scheme": "heads"}),
]


@pytest.mark.parametrize("ranks, axes, options", CASES)
@pytest.mark.parametrize("name", MODELS)
def test_style(pool, name, ranks, axes, options):
    """T. Localises: a module that keeps something of what it was; the grid that is made of one axis."""
    for found in pool.run(differences, ranks, name, axes, options, timeout=120):
        assert max(found.values()) < (1e-6 if name == "llama" else 1e-10), found


def sequence_parallel(use_local_output: bool) -> dict[str, float]:
    """torchtitan's plan, hidden states split by rows: differences of the output and of gradients."""
    torch.manual_seed(torch.distributed.get_rank())  # the first rank's weights count
    ours = titan.Decoder().double()
    tp = init_device_mesh(DEVICE, (4,), mesh_dim_names=("tp",))
    rows = {"output_layouts": Shard(1), "use_local_output": use_local_output}
    plan = {
        "layers.*.attention_norm": SequenceParallel(),
        "layers.*.attention": tlm.TwoLevelParallel((2, 2), **rows),
        "layers.*.ffn_norm": SequenceParallel(),
        "layers.*.feed_forward": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
        "layers.*.feed_forward.w1": ColwiseParallel(),
        "layers.*.feed_forward.w2": RowwiseParallel(**rows),
    }
    parallelize_module(ours, tp, plan)
    torch.manual_seed(0)
    stock = titan.Decoder().double()
    x = torch.randn(2, 8, 32, dtype=torch.float64)
    part = DTensor.from_local(x, tp, [Replicate()]).redistribute(placements=[Shard(1)])
    y = ours(part if not use_local_output else part.to_local())
    whole = y if isinstance(y, DTensor) else DTensor.from_local(y, tp, [Shard(1)])
    expected = stock(x)
    (full_tensor(whole) ** 3).sum().backward()
    (expected**3).sum().backward()
    state = tlm.full_state_dict(ours)
    found = {
        "state": max([0.0, *((state[key] - p).abs().max().item() for key, p in stock.named_parameters() if state)])
    }
    for layer in stock.layers:
        a, b = (model.layers[layer].attention for model in (stock, ours))
        grad = full_tensor(b.q_weight.grad).flatten(0, 1)
        found[f"{layer} q"] = ((a.wq.weight.grad - grad).abs().max() / grad.abs().max()).item()
        grad = full_tensor(ours.layers[layer].feed_forward.w1.weight.grad)
        found[f"{layer} w1"] = (
            (stock.layers[layer].feed_forward.w1.weight.grad - grad).abs().max() / grad.abs().max()
        ).item()
    return found | {"output": (full_tensor(whole) - expected).abs().max().item()}


@pytest.mark.parametrize("use_local_output", [False, True])
def test_a_plan_by_rows(pool, use_local_output):
    """T. Localises: DTensors at an attention's entry and exit, and whose weights count."""
    for found in pool.run(sequence_parallel, 4, use_local_output, timeout=120):
        assert max(found.values()) < 1e-10, found


class Noted(titan.Attention):
    """Called with more than is known."""

    def forward(self, x, freqs_cis, start_pos):
        return super().forward(x, freqs_cis)


def refusals() -> list[str]:
    """What is said of modules and meshes that do not fit, before anything was changed."""
    grid, tp = mesh((2, 2)), init_device_mesh(DEVICE, (4,), mesh_dim_names=("tp",))
    cases = [
        (nn.ModuleDict({"a": nn.Linear(4, 4)}), grid, {}),
        (nn.ModuleDict({"a": Noted(32, 4, 2)}), grid, {}),
        (nn.ModuleDict({"a": titan.Attention(32, 4, 2)}), tp, {"grid": (2, 4)}),
        (nn.ModuleDict({"a": titan.Attention(32, 4, 2)}), grid, {"grid": (4, 1)}),
    ]
    said = []
    for model, place, options in cases:
        try:
            parallelize_module(model, place, {"a": tlm.TwoLevelParallel(**options)})
        except tlm.GridError as error:
            said.append(str(error))
        assert not any(isinstance(module, GridAttention) for module in model.modules())
    model = parallelize_module(titan.Decoder(), grid, {"layers.*.attention": tlm.TwoLevelParallel()})
    x = torch.randn(1, 4, 32)
    for call in (lambda one: one(x, model.freqs_cis, x), lambda one: one(x, model.freqs_cis[:3])):
        with pytest.raises((tlm.GridError, RuntimeError)) as caught:
            call(model.layers["0"].attention)
        said.append(str(caught.value))
    return said


def test_refusals(pool):
    """Localises: a message that no longer says what to do, or differs between ranks."""
    answers = pool.run(refusals, 4, timeout=120)
    assert all(said == answers[0] for said in answers)
    nothing, called, size, other, masks, table = answers[0]
    assert "no attention was found" in nothing
    assert "it is called with x, freqs_cis, start_pos: only x and a table of rotations are known" in called
    assert "grid 2 x 4 needs 8 ranks, the mesh has 4" in size
    assert "is for a mesh of one axis" in other and "leave it out" in other
    assert "attention_masks is not supported" in masks and "leave it out" in masks
    assert "freqs_cis must be (positions, r), with a row for each of 4 positions, got (3, 4)" in table


def few_columns() -> tuple[tuple[int, int], float]:
    """The grid that two heads of 3 take on 4 ranks, and the difference from the unsplit layer."""
    stock = nn.MultiheadAttention(6, 2, batch_first=True, dtype=torch.float64)
    model = nn.ModuleDict({"a": copy.deepcopy(stock)})
    tp = init_device_mesh(DEVICE, (4,), mesh_dim_names=("tp",))
    parallelize_module(model, tp, {"a": tlm.TwoLevelParallel()})
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    return tuple(model["a"].mesh.shape), (model["a"](x, x, x)[0] - stock(x, x, x)[0]).abs().max().item()


def test_heads_that_no_grid_divides(pool):
    """Localises: a style that asks for slices of equal width, where layers do not."""
    for grid, difference in pool.run(few_columns, 4):
        assert math.prod(grid) == 4 and difference < 1e-10
