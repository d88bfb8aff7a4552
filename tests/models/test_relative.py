"""Attention whose scores have more of relative positions: DeBERTa's, WavLM's and the conformers', in float64 against
the stock model.

A failure here with test_convert green is in integrations/relative.py, or in what `leave` adds to scores (csrc/pass).
"""

import copy

import pytest
import torch
from harness.calls import mesh
from harness.decoders import full_gradients
from harness.relative import CASES, SIZES, answers, farthest, inputs, make, make_config, off
from torch import nn

import two_level_mha as tlm
from two_level_mha.integrations.relative import DisentangledAttention
from two_level_mha.layer import SCHEMES

TIGHT = 1e-10
DISENTANGLED = [name for name in CASES if name.startswith("deberta")]
OF_EACH = ["deberta", "deberta-v3", "wavlm", "conformer", "bert of sound"]
FAST = ("deberta-v3", "wavlm")  # in test_grids; other tests on ranks take long
FEW = [pytest.param(name, marks=pytest.mark.slow) for name in OF_EACH]
EXACT = [scheme for scheme in SCHEMES if scheme != "independent"]


def on_grids(name: str, grids: list[tuple[int, int]], options: list[dict]) -> dict[str, float]:
    return {f"{grid} {option}": off(name, grid, **option) for grid in grids for option in options}


def check(pool, ranks: int, *args) -> None:
    for found in pool.run(on_grids, ranks, *args, timeout=400):
        assert max(found.values()) <= TIGHT, found


@pytest.mark.parametrize("name", CASES)
def test_one_process(name):
    """T. Localises: the formula of a kind, its names and its masks, of rows too that see no key."""
    assert off(name, None) <= TIGHT


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in CASES])
def test_grids(pool, name):
    """T. Localises: which heads, and which slices of relative positions' projections, a rank's are; a gradient that is
    one rank's or summed twice; MLPs split and whole, both ways to combine.
    """
    check(pool, 4, name, [(2, 2), (1, 4), (4, 1)], [{}, {"rest": False, "combine": "concat"}])


@pytest.mark.parametrize("name", FEW)
def test_schemes(pool, name):
    """T. Localises: the rows that scores are of, in a layout where they are elsewhere, or whole heads."""
    check(pool, 4, name, [(2, 2), (1, 4)], [{"scheme": scheme, "rest": False} for scheme in EXACT])


@pytest.mark.parametrize("name", FEW)
def test_chunks_of_the_batch(pool, name):
    """T. Localises: what is added to the scores of another chunk."""
    options = [
        {"scheme": scheme, "rest": False, "overlap": 2, "batch": 4} for scheme in ("slices", "sequence", "batch")
    ]
    check(pool, 4, name, [(2, 2)], options)


@pytest.mark.parametrize("name", FEW)
def test_slices_that_differ(pool, name):
    """T. Localises: slices of relative positions' projections that are narrower than others, 2, 2 and none."""
    check(pool, 3, name, [(1, 3)], [{"rest": False}, {"rest": False, "scheme": "sequence"}])


def in_streams(name: str, activations: str) -> tuple[float, dict[str, str]]:
    report = tlm.report(tlm.parallelize(make(name), mesh((2, 2)), activations=activations))
    return off(name, (2, 2), batch=4, activations=activations), report.left_out


@pytest.mark.parametrize("activations", ["sequence", "batch"])
@pytest.mark.parametrize("name", FEW)
def test_split_activations(pool, name, activations):
    """T. Localises: gates or masks of a rank's own rows that are taken for all."""
    for error, _ in pool.run(in_streams, 4, name, activations, timeout=400):
        assert error <= TIGHT


def weights_off(name: str, grid: tuple[int, int]) -> float:
    stock = make(name, attn_implementation="eager")
    ours = tlm.parallelize(copy.deepcopy(stock), mesh(grid))
    with torch.no_grad():
        expected, got = (model(**inputs(name), output_attentions=True).attentions for model in (stock, ours))
    assert len(expected) == len(got) == 2
    return max((a - b).abs().max().item() for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("name", FEW)
def test_attention_weights(pool, name):
    """T. Localises: weights without what is added, or of rows that see no key."""
    assert max(pool.run(weights_off, 4, name, (2, 2), timeout=400)) <= TIGHT


def under_autocast(name: str) -> tuple[float, float]:
    """Relative errors of the output of the split model, and of stock's, in bfloat16."""
    stock = make(name)
    exact = stock(**inputs(name))[0]
    stock, given = stock.float(), {key: x.float() if x.is_floating_point() else x for key, x in inputs(name).items()}
    ours = tlm.parallelize(copy.deepcopy(stock), mesh((2, 2)))
    with torch.autocast("cpu", torch.bfloat16):
        found = [model(**given)[0] for model in (ours, stock)]
    errors = [((y.double() - exact).norm() / exact.norm()).item() for y in found]
    return errors[0], errors[1]


@pytest.mark.parametrize("name", FEW[1:])  # the first dies of it in stock's own code
def test_autocast(pool, name):
    """R. Localises: a product of relative positions in another dtype than stock's."""
    for ours, stock in pool.run(under_autocast, 4, name, timeout=400):
        assert ours <= 2 * stock


def trained(name: str, grid: tuple[int, int] | None) -> list[float]:
    """Losses of a few steps with dropout of everything that the attention drops."""
    model = tlm.parallelize(make(name, **DROPS[name]), mesh(grid), rest=False).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    found = []
    for step in range(3):
        torch.manual_seed(step)
        loss = model(**inputs(name))[0].square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


OF_TEXT = {"attention_probs_dropout_prob": 0.3, "hidden_dropout_prob": 0.2}
DROPS = {name: OF_TEXT if name in DISENTANGLED else {"attention_dropout": 0.3} for name in OF_EACH}


@pytest.mark.parametrize("name", FEW)
def test_training_with_dropout(pool, name):
    """T. Localises: dropout, of attention weights or of relative positions, that depends on the grid."""
    expected = trained(name, None)
    for losses in pool.run(trained, 4, name, (2, 2), timeout=400):
        torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-9)


def stored(name: str, folder: str, scheme: str) -> bool:
    stock = make(name)
    tlm.parallelize(copy.deepcopy(stock), mesh((2, 2)), scheme=scheme).save_pretrained(folder)
    torch.distributed.barrier()
    with torch.device("meta"):
        model = type(stock)(make_config(name)).double()
    state = tlm.full_state_dict(tlm.load_pretrained(tlm.parallelize(model, mesh((2, 2)), scheme=scheme), folder))
    expected = stock.state_dict()
    return not state or (state.keys() == expected.keys() and all(torch.equal(state[k], x) for k, x in expected.items()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "scheme"), [*((name, "auto") for name in CASES), ("deberta", "heads"), ("deberta-v3", "heads")]
)
def test_files(pool, tmp_path, name, scheme):
    """E. Localises: names of projections of relative positions, or of biases beside a fused one, in files."""
    assert all(pool.run(stored, 4, name, str(tmp_path), scheme, timeout=400))


def compiled(name: str) -> float:
    stock = make(name)
    ours = tlm.parallelize(copy.deepcopy(stock), mesh((2, 2)), rest=False)
    run = torch.compile(ours, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        return (stock(**inputs(name))[0] - run(**inputs(name))[0]).abs().max().item()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deberta-v3", "bert of sound"])
def test_compiled(pool, name):
    """T. Localises: what a graph cannot hold of a call's relative positions."""
    assert max(pool.run(compiled, 4, name, timeout=400)) <= TIGHT


def lora_off(name: str, targets: list[str], scheme: str, dropout: float = 0.0) -> tuple[float, dict[str, str]]:
    """The largest difference of outputs and adapters' gradients, and which attention is gathered."""
    peft = pytest.importorskip("peft")

    def adapted() -> nn.Module:
        torch.manual_seed(5)
        config = peft.LoraConfig(r=2, target_modules=targets, lora_dropout=dropout, init_lora_weights=False)
        return peft.get_peft_model(make(name), config).double()

    whole, ours = adapted(), tlm.parallelize(adapted(), mesh((2, 2)), rest=False, scheme=scheme)
    found = [answers(model, inputs(name)) for model in (ours, whole)]
    return farthest(*found), tlm.report(ours).gathered


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["auto", "sequence", "heads"])
@pytest.mark.parametrize(
    ("name", "targets"),
    [("deberta", ["in_proj"]), ("deberta-v3", ["query_proj", "key_proj", "value_proj"]),
     ("bert of sound", ["linear_q", "linear_k", "linear_out"])],
)  # fmt: skip
def test_lora(pool, name, targets, scheme):
    """T. Localises: adapters of projections that relative positions go through as well."""
    for error, gathered in pool.run(lora_off, 4, name, targets, scheme, timeout=400):
        assert error <= TIGHT and not gathered


def test_lora_of_positions(pool):
    """T. Localises: an adapter of relative positions alone, which a split attention has not: it is gathered."""
    for error, gathered in pool.run(lora_off, 4, "deberta", ["in_proj", "pos_proj"], "auto", timeout=400):
        assert error <= TIGHT and len(gathered) == 2


def ignored(name: str, targets: list[str]) -> tuple[float, dict[str, str]]:
    peft = pytest.importorskip("peft")
    found = []
    for split in (True, False):
        torch.manual_seed(5)
        model = peft.get_peft_model(make(name), peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        model = tlm.parallelize(model.double(), mesh((2, 2)), rest=False) if split else model.double()
        with torch.no_grad():
            found.append((model, model(**inputs(name))[0]))
    (ours, y), (_, expected) = found
    return (y - expected).abs().max().item(), tlm.report(ours).gathered


def test_lora_that_a_model_ignores(pool):
    """T. Localises: adapters of projections whose weights alone are used, that take effect in a split model."""
    for error, gathered in pool.run(ignored, 4, "wavlm", ["q_proj", "v_proj"], timeout=400):
        assert error <= TIGHT and len(gathered) == 2


def test_a_bias_of_each_sequence():
    """T. Localises: another layer's position_bias of which a sequence has its own."""
    stock = make("wavlm")
    ours = tlm.parallelize(copy.deepcopy(stock), None)
    found = []
    for model in (stock, ours):
        torch.manual_seed(3)
        bias = torch.randn(2 * SIZES["num_attention_heads"], 7, 7).double().requires_grad_()
        x = torch.randn(2, 7, 16).double()
        y, _, given = model.encoder.layers[1].attention(x, position_bias=bias)
        y.square().sum().backward()
        assert given is bias
        found.append((y, bias.grad, full_gradients(model)))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=TIGHT)


REFUSED = {
    "no mask": ({"attention_mask": None}, "attention_mask must be"),
    "a mask of two dims": ({"attention_mask": torch.ones(2, 7)}, "attention_mask must be"),
    "a mask of each head": ({"attention_mask": torch.ones(2, 4, 7, 7)}, "attention_mask must be"),
    "other queries": ({"query_states": torch.zeros(2, 7, 16)}, "query_states is not supported"),
    "no positions": ({"relative_pos": None}, "relative_pos must be given"),
    "no embeddings": ({"rel_embeddings": None}, "rel_embeddings must be given"),
    "positions of each head": ({"relative_pos": torch.zeros(1, 4, 7, 7)}, "relative_pos must be"),
    "fewer positions": ({"relative_pos": torch.zeros(6, 7)}, "relative_pos must be"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals(what):
    """Localises: an argument that would be taken for another, or die in a product."""
    model = tlm.parallelize(make("deberta-v3"), None)
    attention = next(module for module in model.modules() if isinstance(module, DisentangledAttention))
    given = {
        "attention_mask": torch.ones(2, 1, 7, 7),
        "relative_pos": torch.zeros(1, 7, 7),
        "rel_embeddings": torch.zeros(6, 16),
    }
    wrong, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        attention(torch.zeros(2, 7, 16).double(), **given | wrong)


@pytest.mark.parametrize(("name", "why"), [("deberta-v3", "whole head_dim"), ("wavlm", "whole heads")])
def test_independent_slices(name, why):
    """Localises: the paper's scheme, which has no whole heads, taken for an exact one."""
    with pytest.raises(tlm.GridError, match=why):
        tlm.parallelize(make(name), None, scheme="independent")


def test_a_rotary_conformer_is_gathered():
    """Localises: positions that act before the projections, taken for none."""
    report = tlm.report(tlm.parallelize(make("conformer", position_embeddings_type="rotary"), None))
    assert set(report.gathered.values()) >= {"it rotates its input before the projections"}
