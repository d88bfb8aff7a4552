"""Mistakes of the first day with a layer: each is one sentence, and none is silent."""

import warnings

import pytest
import torch
from harness.calls import mesh, text_of
from harness.device import DEVICE
from torch import nn

import two_level_mha as tlm

NOT_GIVEN = [
    "mesh was not given, in a job of 2 ranks: mesh=two_level_mha.init_mesh(..) splits the layer over them, mesh=None, "
    "which is taken now, keeps all of it on each rank"
]
PLACE = "{} was given a mesh, which goes by its name: mesh=mesh"
DEVICE_TYPE = (
    'device_type must be a type of device without a number, "cuda" for GPUs or "cpu", got {!r}; the grid comes after '
    'it: init_mesh("cuda", (n, m))'
)


def warnings_of(make, *args) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        make(*args)
    return [str(one.message) for one in found]


def on_two_ranks(grid) -> dict[str, str]:
    mha, decoder = tlm.TwoLevelMultiheadAttention, tlm.TwoLevelAttention
    layer, x = mha(8, 2, mesh=mesh(grid)), torch.zeros(3, 2, 8)
    whole = mha(8, 2, mesh=None)
    return {
        "no mesh": warnings_of(mha, 8, 2),
        "no mesh, decoder": warnings_of(decoder, 8, 2),
        "no mesh, from_torch": warnings_of(mha.from_torch, nn.MultiheadAttention(8, 2)),
        "mesh=None": text_of(whole, x, x, x),
        "third": text_of(mha, 8, 2, mesh(grid)),
        "third, decoder": text_of(decoder, 8, 2, mesh(grid)),
        "gpu": text_of(tlm.init_mesh, "gpu", grid),
        "a number": text_of(tlm.init_mesh, "cuda:0", grid),
        "no device": text_of(tlm.init_mesh, grid),
        "a list": text_of(layer, [[1.0]], x, x),
        "a list, decoder": text_of(decoder(8, 2, mesh=mesh(grid)), [[1.0]]),
        "a mask of a list": text_of(layer, x, x, x, attn_mask=[[True]]),
    }


def test_arguments(pool):
    """Localises: an argument that is forgotten, or in another's place; a layer that is silently whole on every rank."""
    for texts in pool.run(on_two_ranks, 2, (1, 2)):
        assert texts == {
            "no mesh": NOT_GIVEN,
            "no mesh, decoder": NOT_GIVEN,
            "no mesh, from_torch": NOT_GIVEN,
            "mesh=None": "no error",
            "third": PLACE.format("dropout"),
            "third, decoder": PLACE.format("num_kv_heads"),
            "gpu": DEVICE_TYPE.format("gpu"),
            "a number": DEVICE_TYPE.format("cuda:0"),
            "no device": DEVICE_TYPE.format((1, 2)),
            "a list": "query must be a tensor, got a list: torch.as_tensor(..)",
            "a list, decoder": "x must be a tensor, got a list: torch.as_tensor(..)",
            "a mask of a list": "attn_mask must be a tensor, got a list: torch.as_tensor(..)",
        }


def test_no_mesh_before_a_process_group(monkeypatch):
    """Localises: a job whose process group is not there yet, as torchrun starts it."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert warnings_of(tlm.TwoLevelAttention, 8, 2) == NOT_GIVEN
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert warnings_of(tlm.TwoLevelAttention, 8, 2) == []


@pytest.mark.parametrize("name", ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"])
def test_tensors_that_went_elsewhere(name):
    """Localises: an attribute of stock's that has no sentence, or that says None where there is something."""
    layer = tlm.TwoLevelMultiheadAttention(8, 2, device=DEVICE)
    for use in (lambda x: x.shape, lambda x: x.detach(), torch.sum):
        text = text_of(use, getattr(layer, name))
        assert text.startswith(f"{name} is split over the grid: this rank has its blocks, "), text
        own = text.partition("its blocks, ")[2].partition(";")[0].replace(" and ", ", ").split(", ")
        assert all(isinstance(getattr(layer, block), nn.Parameter) for block in own)
    assert not hasattr(getattr(layer, name), "shape")
    assert tlm.TwoLevelMultiheadAttention(8, 2, bias=False).in_proj_bias is None


def test_errors_of_a_checkpoint_name_its_keys():
    """Localises: an error that calls a tensor by a name which the user's checkpoint has not."""
    layer = nn.ModuleDict({"attention": tlm.TwoLevelMultiheadAttention(8, 2)})
    stock = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)}).state_dict()

    def said(changes: dict, *left_out: str) -> str:
        with pytest.raises(RuntimeError) as error:
            layer.load_state_dict({key: x for key, x in (stock | changes).items() if key not in left_out})
        return str(error.value).partition(":\n\t")[2]

    wrong = {"attention.in_proj_weight": torch.zeros(5, 8), "attention.out_proj.bias": torch.zeros(3)}
    copying = "size mismatch for attention.{}: copying a param with shape torch.Size({}) from checkpoint, the shape in "
    copying += "current model is torch.Size({})."
    lines = [copying.format("in_proj_weight", [5, 8], [24, 8]), copying.format("out_proj.bias", [3], [8])]
    assert said(wrong).split("\n\t") == lines
    missing = said({"attention.other": torch.zeros(1)}, "attention.in_proj_weight", "attention.out_proj.bias")
    assert 'Missing key(s) in state_dict: "attention.in_proj_weight", "attention.out_proj.bias"' in missing
    assert 'Unexpected key(s) in state_dict: "attention.other"' in missing
    before = {key: x.clone() for key, x in layer.state_dict().items()}
    found = layer.load_state_dict({"attention.out_proj.bias": torch.ones(8)}, strict=False)
    assert found.missing_keys == ["attention.in_proj_weight", "attention.in_proj_bias", "attention.out_proj.weight"]
    after = layer.state_dict()
    changed = [key for key, x in before.items() if not torch.equal(x, after[key])]
    assert changed == ["attention.out_bias"]
    own = {key: x for key, x in after.items() if key != "attention.out_bias"}
    with pytest.raises(RuntimeError, match='Missing key.*"attention.out_bias"'):
        layer.load_state_dict(own)
