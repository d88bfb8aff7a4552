"""parallelize: what it refuses, by module name and reason, on every rank, with the model left as it was."""

import copy
import re

import pytest
import torch
from harness import RankFailure
from harness.device import DEVICE
from harness.encoders import make, make_torch
from torch import nn
from transformers import (
    FunnelConfig,
    FunnelModel,
    MvpConfig,
    MvpModel,
)
from transformers.models.bert.modeling_bert import BertSelfAttention

import two_level_mha as tlm
from two_level_mha.integrations.cross import CrossAttention

NAME = "encoder.layer.1.attention.self"


def bert() -> tuple[nn.Module, nn.Module]:
    """A model and its second attention."""
    model = make("BertModel").eval()
    return model, model.get_submodule(NAME)


def changed(change) -> nn.Module:
    model, attention = bert()
    change(model, attention)
    return model


class LoRA(nn.Module):
    """As PEFT: wraps the linear."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.a, self.b = base, nn.Linear(16, 2, bias=False), nn.Linear(2, 16, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.b(self.a(x))


class MyLinear(nn.Linear):
    pass


class Scaled(BertSelfAttention):
    """The right structure, another function."""

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        out, weights = super().forward(hidden_states, attention_mask, **kwargs)
        return out * 1.0001, weights


class Clipped(BertSelfAttention):
    """Differs for big numbers only."""

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        out, weights = super().forward(hidden_states, attention_mask, **kwargs)
        return out.clamp(-20, 20), weights


class Causal(BertSelfAttention):
    """Differs with a mask only."""

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        if attention_mask is not None:
            attention_mask = attention_mask & torch.ones(hidden_states.shape[1], hidden_states.shape[1]).bool().tril()
        return super().forward(hidden_states, attention_mask, **kwargs)


class Biased(BertSelfAttention):
    """A trained relative bias that starts at zero: nothing a run could see."""

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        return super().forward(hidden_states, attention_mask, **kwargs)


class Picky(BertSelfAttention):
    """Cannot be called like BERT's."""

    def forward(self, hidden_states, attention_mask=None, *, rotary, **kwargs):
        return super().forward(hidden_states, attention_mask, **kwargs)


class MyMHA(nn.MultiheadAttention):
    pass


def _class(cls):
    def change(model, attention):
        attention.__class__ = cls
        if cls is Biased:
            attention.bias = nn.Parameter(torch.zeros(5, 5))

    return change


def _hooked(model, attention):
    attention.value.register_forward_hook(lambda *_: None)


def _lora(model, attention):
    attention.query = LoRA(attention.query)


def _subclass(model, attention):
    attention.key.__class__ = MyLinear


def _quantised(model, attention):
    layer = model.encoder.layer[1].attention
    layer.float()
    layer.self = torch.ao.quantization.quantize_dynamic(layer.self, {nn.Linear}, dtype=torch.qint8)


def _parametrized(model, attention):
    nn.utils.parametrizations.weight_norm(model.encoder.layer[1].attention.output.dense)


def _weight_norm(model, attention):
    nn.utils.weight_norm(attention.query)


def _tied(model, attention):
    attention.query.weight = model.encoder.layer[0].attention.self.key.weight


def _flash(model, attention):
    attention.config = copy.deepcopy(attention.config)
    attention.config._attn_implementation = "flash_attention_2"


def _two_outputs(model, attention):
    model.encoder.layer[0].attention.self = attention


BERT = {
    "hooks": (_hooked, "v projection, value, has hooks"),
    "LoRA": (_lora, "q projection, query, is a test_convert_refusals.LoRA, not a plain nn.Linear (merge adapters"),
    "a subclass of nn.Linear": (_subclass, "k projection, key, is a test_convert_refusals.MyLinear, not a plain"),
    "quantised": (_quantised, "q projection, query, is a torch.ao.nn.quantized"),
    "parametrized": (_parametrized, "o projection, output.dense, is parametrized: call torch.nn.utils.parametrize"),
    "weight_norm": (_weight_norm, "q projection, query, has its weight recomputed by WeightNorm"),
    "tied": (_tied, "shares a parameter between encoder.layer.0.attention.self.key, encoder.layer.1.attention.self."),
    "flash": (_flash, "is 'flash_attention_2': call model.set_attn_implementation(\"sdpa\") first"),
    "two outputs": (_two_outputs, "it is used in several places, with an output projection"),
}
OWN_CODE = {
    "scaled": (_class(Scaled), "its numbers differ from it by"),
    "clipped": (_class(Clipped), "its numbers differ from it by"),
    "another mask": (_class(Causal), "its numbers differ from it by"),
    "a bias of its own": (_class(Biased), "it has a parameter that encoder attention has not: bias"),
    "another call": (_class(Picky), "it takes an argument that is not known: rotary"),
}


def state(model: nn.Module) -> dict:
    """What a half-done conversion would change."""
    found = {name: (id(module), type(module)) for name, module in model.named_modules(remove_duplicate=False)}
    return found | {f"parameter {name}": id(p) for name, p in model.named_parameters(remove_duplicate=False)}


def check_refused(model: nn.Module, *texts: str) -> None:
    before = state(model)
    with pytest.raises(tlm.GridError) as caught:
        tlm.parallelize(model, None)
    for text in texts:
        assert text in str(caught.value)
    assert state(model) == before


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning", "ignore:.*:DeprecationWarning")
@pytest.mark.parametrize("case", BERT)
def test_changed_bert(case):
    """One attention of two was changed: its name and the reason, and the first stays too."""
    change, reason = BERT[case]
    name = "encoder.layer.0.attention.self" if case == "two outputs" else NAME
    check_refused(changed(change), name, reason)


def check_own_code(model: nn.Module, name: str, reason: str) -> None:
    module = model.get_submodule(name)
    report = tlm.report(tlm.parallelize(model, None))
    assert (
        reason in report.gathered[name]
        and "has its weights gathered" in str(report)
        and model.get_submodule(name) is module
    )


@pytest.mark.parametrize("case", OWN_CODE)
def test_other_bert(case):
    """Localises: an attention that does something else, taken for what it looks like, or named without the reason."""
    change, reason = OWN_CODE[case]
    check_own_code(changed(change), NAME, reason)


SMALL = {"vocab_size": 30, "d_model": 16, "block_sizes": [1], "n_head": 4, "d_head": 4, "d_inner": 24}
UNKNOWN = {
    "Funnel": (lambda: FunnelModel(FunnelConfig(**SMALL)), "encoder.blocks.0.0.attention"),
    "MVP": (
        lambda: MvpModel(
            MvpConfig(
                vocab_size=30, use_prompt=True, **dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim"), 16)
            )
        ),
        "encoder.layers.0.self_attn",
        "it is called with attn_prompt",
    ),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_unknown_structure(kind):
    """Localises: attention of transformers that is left whole without a word."""
    build, name, *reasons = UNKNOWN[kind]
    check_own_code(build(), name, *(reasons or ["no adapter knows its structure"]))


def test_unknown_structure_elsewhere():
    """Localises: attention of somebody's own, of which nobody knows how it is called, that is not refused."""

    class OtherAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.to_q, self.to_k, self.to_v = (nn.Linear(8, 8) for _ in range(3))

    text = "structure that is not supported; supported: nn.MultiheadAttention, cross, normed"
    check_refused(nn.Sequential(OtherAttention()), "0 (OtherAttention)", text)


def test_cross_attention():
    """Localises: cross-attention taken for self-attention of the same shape."""
    model = tlm.parallelize(make("BertModel", is_decoder=True, add_cross_attention=True), None)
    layer = model.encoder.layer[0]
    kinds = [isinstance(one.self, CrossAttention) for one in (layer.attention, layer.crossattention)]
    assert kinds == [False, True] and not tlm.report(model).gathered


def test_nothing_found():
    """Localises: a model without attention, or split already, returned as if it had been split."""
    check_refused(nn.Sequential(nn.Linear(4, 4)), "no attention was found in Sequential")
    converted = tlm.parallelize(make_torch(), None)
    check_refused(converted, "no attention was found", "it is split already")


def test_attention_itself():
    """Localises: an attention given in place of a model: it has no parent that it could be replaced in."""
    check_refused(nn.MultiheadAttention(16, 4), "is itself an attention", "TwoLevelMultiheadAttention.from_torch")


def test_changed_torch_attention():
    """Localises: nn.MultiheadAttention that is not quite it: subclassed, parametrized, tied."""
    model = make_torch()
    model.encoder.layers[1].self_attn.__class__ = MyMHA
    check_refused(model, "encoder.layers.1.self_attn (MyMHA)", "it is a subclass of nn.MultiheadAttention")
    model = make_torch()
    nn.utils.parametrizations.weight_norm(model.decoder.layers[0].multihead_attn, "in_proj_weight")
    check_refused(model, "decoder.layers.0.multihead_attn", "parametrized")
    model = make_torch()
    model.encoder.layers[1].self_attn.in_proj_weight = model.encoder.layers[0].self_attn.in_proj_weight
    check_refused(model, "encoder.layers.0.self_attn", "shares a parameter between")


def test_options():
    """Localises: options that are looked at after the first module was replaced."""
    for options, text in (({"scheme": "fast"}, "scheme must be"), ({"combine": "sum"}, "combine must be")):
        model = make_torch()
        before = state(model)
        with pytest.raises(tlm.GridError, match=f"^{text}"):
            tlm.parallelize(model, None, **options)
        assert state(model) == before
    with pytest.raises(tlm.GridError, match="mesh must be a DeviceMesh or None, got tuple"):
        tlm.parallelize(make_torch(), (2, 2))


def test_calls():
    """What a converted attention cannot take is refused at the call."""
    attention = tlm.parallelize(make("BertModel"), None).encoder.layer[0].attention.self
    x_BLD = torch.randn(1, 3, 16, dtype=torch.float64)
    for name in ("past_key_values", "encoder_hidden_states", "position_bias"):
        with pytest.raises(tlm.GridError, match=name):
            attention(x_BLD, **{name: x_BLD})
    attention.config._attn_implementation = "flash_attention_2"  # without a mask it is causal, or has one of (B, S)
    with pytest.raises(tlm.GridError, match="is now 'flash_attention_2', .*set_attn_implementation"):
        attention(x_BLD)


def refused(case: str, grid: tuple[int, int]) -> tuple[str, bool, bool]:
    """The message, whether the model is as it was, and whether it still works with the grid that fits."""
    rank = torch.distributed.get_rank()
    options = {}
    model = make("BertModel")
    if case == "second does not fit":
        model = nn.Sequential(make_torch().encoder, make_torch(nhead=2).encoder)
    if case == "scheme does not fit the second":
        model = nn.Sequential(make_torch().encoder, make_torch(nhead=2).encoder)
        options["scheme"] = "heads"
    if case == "hooks on one rank" and rank == 1:
        model.get_submodule(NAME).value.register_forward_hook(lambda *_: None)
    if case == "MLP on one rank" and rank == 1:
        model.encoder.layer[0].intermediate.register_forward_hook(lambda *_: None)
    if case == "weights" and rank == 2:
        model.encoder.layer[0].attention.self.key.weight.data[0, 0] += 1e-9
    if case == "norms" and rank == 2:
        model.encoder.layer[0].output.LayerNorm.bias.data[0] += 1e-9
    if case == "an error of its own" and rank == 1:
        model.encoder.layer[0].attention.self.config = 1
    if case == "layers" and rank == 3:
        del model.encoder.layer[1]
    if case == "scheme":
        options["scheme"] = "slices" if rank else "sequence"
    if case == "random generator":
        model = nn.ModuleList([nn.MultiheadAttention(16, 4), nn.MultiheadAttention(16, 4, dropout=0.1)])
        torch.manual_seed(rank)
        for p in model.parameters():
            nn.init.constant_(p, 0.5)
    before = state(model)
    mesh = tlm.init_mesh(DEVICE, grid)
    try:
        tlm.parallelize(model, mesh, **options)
    except (tlm.GridError, TypeError) as error:
        return str(error), state(model) == before
    return "", False


ON_RANKS = {
    "second does not fit": ((4, 1), r"1\.layers\.0\.self_attn \(MultiheadAttention\).*\(2, 2\)"),
    "scheme does not fit the second": ((1, 4), r"1\.layers\.0\.self_attn \(MultiheadAttention\): scheme 'heads' deals"),
    "hooks on one rank": ((2, 2), "encoder.layer.1.attention.self .*v projection, value, has hooks"),
    "weights": ((2, 2), "source parameters differs between ranks.*rank 2; seed every rank alike.*or broadcast it"),
    "norms": ((2, 2), "source parameters differs between ranks.*rank 2"),
    "an error of its own": ((2, 2), "vars.. argument must have __dict__"),
    "layers": ((2, 2), "source parameters differs between ranks.*rank 3"),
    "MLP on one rank": ((2, 2), "which MLPs can be split differs .* rank 0, .'encoder.layer.1'. on rank 1; build"),
    "scheme": ((2, 2), "scheme differs between ranks of the grid: sequence on rank 0, slices on rank 1"),
    "random generator": ((2, 2), "random generator differs between ranks"),
}


@pytest.mark.parametrize("case", ON_RANKS)
def test_on_every_rank(pool, case):
    """All ranks refuse, and none has changed anything: otherwise the others would hang, or go on apart."""
    grid, pattern = ON_RANKS[case]
    answers = pool.run(refused, 4, case, grid)
    for message, unchanged in answers:
        assert re.search(pattern, message, re.DOTALL), message
        assert unchanged
    if case not in ("hooks on one rank", "an error of its own"):  # there the others say whose it is
        assert len({message for message, _ in answers}) == 1


def test_a_mesh_of_other_axes(pool):
    """Localises: a mesh whose axes have other names, taken in the order it has."""
    with pytest.raises(RankFailure) as caught:
        pool.run(on_other_axes, 4)
    assert isinstance(caught.value.__cause__, tlm.GridError)
    assert 'mesh must have the axes ("head", "slice")' in str(caught.value)


def on_other_axes() -> None:
    mesh = torch.distributed.init_device_mesh(DEVICE, (2, 2), mesh_dim_names=("dp", "tp"))
    tlm.parallelize(make("BertModel"), mesh)
