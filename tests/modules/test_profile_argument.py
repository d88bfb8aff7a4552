"""profile= of the modules and of parallelize: what scheme="auto" chooses by."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from harness.calls import mesh, text_of
from harness.device import DEVICE
from torch import nn

import two_level_mha as tlm
from two_level_mha.profile import Profile
from two_level_mha.testing import record_collectives

CPU = Profile.named("cpu")
# Where a collective costs nothing but its bytes, or everything: other schemes for one call.
FREE, DEAR = (replace(CPU, name=name, latency_ns=ns) for name, ns in (("free", 0), ("dear", 10**9)))


def collectives(profile, kind: str) -> dict[str, int]:
    """What a call sends whose cheapest scheme depends on what a collective costs."""
    torch.manual_seed(0)
    if kind == "mha":
        layer = tlm.TwoLevelMultiheadAttention(64, 2, batch_first=True, mesh=mesh((1, 4)), profile=profile)
    elif kind == "own":
        layer = tlm.TwoLevelAttention(64, 2, mesh=mesh((1, 4)), profile=profile)
    else:
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 2, 16, batch_first=True), 1).eval()
        layer = tlm.parallelize(model, mesh((1, 4)), rest=False, profile=profile)
    x = torch.randn(4, 256, 64)
    call = (lambda: layer(x, x, x, need_weights=False)) if kind == "mha" else lambda: layer(x)
    with torch.no_grad():
        call()
        with record_collectives() as record:
            call()
    return record.counts()


@pytest.mark.parametrize("kind", ["mha", "own", "parallelize"])
def test_auto_chooses_by_it(pool, kind):
    """E. Localises: an argument that does not reach the operators, or the device's profile whatever is said."""
    default = Profile.for_device(DEVICE).name
    free, dear, plain, named = (pool.run(collectives, 4, profile, kind) for profile in (FREE, DEAR, None, default))
    assert free != dear and plain == named
    assert all(one == found[0] for found in (free, dear, plain) for one in found)


def refused(tmp_path: str, rank_differs: bool) -> list[str]:
    """The sentences for what is no profile, and for ranks whose profiles differ."""
    broken = f"{tmp_path}/broken.json"
    texts = []
    for profile in ("gpu of tomorrow", broken, 3):
        texts.append(text_of(tlm.TwoLevelAttention, 16, 2, mesh=mesh((1, 2)), profile=profile))
    if rank_differs:
        profile = FREE if torch.distributed.get_rank() else DEAR
        layer = tlm.TwoLevelAttention(16, 2, mesh=mesh((1, 2)), profile=profile)
        texts.append(text_of(layer, torch.zeros(1, 2, 16)))
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 16), 1)
        texts.append(text_of(tlm.parallelize, model, mesh((1, 2)), profile=profile))
    return texts


def test_refusals(pool, tmp_path):
    """Localises: a profile that one rank has and another has not, which would let them send different things."""
    (tmp_path / "broken.json").write_text(json.dumps({**asdict(CPU), "flops": -1}))
    for texts in pool.run(refused, 2, str(tmp_path), True):
        name, file, number, differs, of_model = texts
        assert "profile must be one of h100, cpu, or a JSON file, got 'gpu of tomorrow'" in name
        assert "broken.json" in file and "flops of profile 'cpu' must be an integer" in file
        assert "profile must be a Profile, a name, a JSON file or None, got 3" in number
        assert "profile differs between ranks of the grid" in differs
        assert "profile differs between ranks of the grid" in of_model
