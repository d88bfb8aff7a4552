"""What acts on attention's output before the output projection: a norm over all heads, a difference of two softmaxes,
what a head adds to its gates.

In float64 against the stock model. A failure here with test_forms green is in integrations/behind.py, in `gate_shift`
(layer.py), or in factors of queries that are an argument (integrations/positions.py).
"""

import copy

import pytest
import torch
from harness.calls import mesh
from harness.decoders import BEHIND, EXACT, check, gradients_off, logits_off, make, make_config, make_meta

import two_level_mha as tlm

LIMITS = dict.fromkeys(BEHIND, 1e-10) | {"beam": 1e-5}  # whose factors of queries are float32
TIMEOUT = 400


def compare(pool, function, names, *args) -> None:
    for per_model in pool.run(function, 4, names, *args, EXACT, timeout=TIMEOUT):
        for name, errors in per_model.items():
            check([{name: errors}], LIMITS[name])


@pytest.mark.parametrize("name", BEHIND)
def test_split(name):
    """Localises: a form that the trial refuses: gathered, it would give the right numbers in all that is below."""
    report = tlm.report(tlm.parallelize(make(name), None))
    assert report.attentions == make_config(name).num_hidden_layers and not report.gathered


@pytest.mark.parametrize("cache", ["position", "batch"])
def test_logits(pool, cache):
    """T. Localises: which heads and columns a rank's are among all, with a cache and without."""
    for grid in ((2, 2), (1, 4)):
        compare(pool, logits_off, list(BEHIND), grid, {"cache": cache})


@pytest.mark.parametrize("use_cache", [False, True])
def test_gradients(pool, use_cache):
    """T. Localises: a gradient of the norm, or of what a head adds, that is one rank's or is summed twice."""
    compare(pool, gradients_off, list(BEHIND), (2, 2), use_cache, {})


@pytest.mark.parametrize(
    "scheme",
    [
        "slices",
        "sequence",
        pytest.param("batch", marks=pytest.mark.slow),
        "heads",
        pytest.param("weights", marks=pytest.mark.slow),
    ],
)
def test_schemes(pool, scheme):
    """T. Localises: the same, where heads and rows are elsewhere."""
    names = BEHIND.keys() - {"beam"} - ({"diffllama"} if scheme == "heads" else set())  # which gathers that
    compare(pool, logits_off, sorted(names), (2, 2), {"scheme": scheme})
    compare(pool, gradients_off, sorted(names), (2, 2), False, {"scheme": scheme})


def uneven(name: str) -> list[float]:
    return logits_off([name], (1, 3), {}, EXACT)[name] + gradients_off([name], (1, 3), False, {})[name]


@pytest.mark.parametrize("name", ["bitnet", "beam, sliding", "diffllama"])
def test_uneven_slices(pool, name):
    """T. Localises: columns of a slice that is narrower than the others."""
    assert max(map(max, pool.run(uneven, 3, name, timeout=TIMEOUT))) <= LIMITS[name]


def others(name: str, folder: str) -> tuple[bool, dict[str, str], dict[str, str], dict[str, str]]:
    """Whether files give back the weights; why layers are gathered that are asked for the concatenation, which stacks
    are left whole, and why layers are gathered that have an adapter of the output projection.
    """
    stock = make(name)
    ours = tlm.parallelize(copy.deepcopy(stock), mesh((2, 2)))
    ours.save_pretrained(folder)
    torch.distributed.barrier()
    state = tlm.full_state_dict(tlm.load_pretrained(tlm.parallelize(make_meta(name), mesh((2, 2))), folder))
    expected = stock.state_dict()
    same = not state or (state.keys() == expected.keys() and all(torch.equal(state[k], x) for k, x in expected.items()))
    gathered = tlm.report(tlm.parallelize(copy.deepcopy(stock), mesh((2, 2)), combine="concat")).gathered
    whole = tlm.report(tlm.parallelize(copy.deepcopy(stock), mesh((2, 2)), activations="sequence")).left_out
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(copy.deepcopy(stock), peft.LoraConfig(r=2, target_modules=["o_proj"]))
    return same, gathered, whole, tlm.report(tlm.parallelize(adapted, mesh((2, 2)))).gathered


def test_what_goes_with_a_norm_over_heads(pool, tmp_path):
    """Localises: names in files; options that this layer has not, taken as if it had them."""
    for same, gathered, whole, adapted in pool.run(others, 4, "bitnet", str(tmp_path), timeout=TIMEOUT):
        assert same
        assert 'needs combine="reduce"' in gathered["model.layers.0.self_attn"]
        assert "acts on all heads together" in whole["the hidden states of model.layers"]
        assert "it has a LoRA adapter" in adapted.values()


def test_files_of_shifts(pool, tmp_path):
    """Localises: the name in files of what a head adds to its gates."""
    for same, *_ in pool.run(stored, 4, "beam, sliding", str(tmp_path), timeout=TIMEOUT):
        assert same


def stored(name: str, folder: str) -> tuple[bool]:
    stock = make(name)
    tlm.parallelize(copy.deepcopy(stock), mesh((2, 2))).save_pretrained(folder)
    torch.distributed.barrier()
    state = tlm.full_state_dict(tlm.load_pretrained(tlm.parallelize(make_meta(name), mesh((2, 2))), folder))
    expected = stock.state_dict()
    return (not state or all(torch.equal(state[key], x) for key, x in expected.items()),)
