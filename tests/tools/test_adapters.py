"""Kinds of attention that other packages add to parallelize: by an entry point, by the decorator, and what goes wrong.

Each case is a program of its own, with packages in a folder on its path: what is registered stays for a process.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from harness.programs import environment

TOY = """
import torch
from torch import nn
from two_level_mha.layer import GridAttention
from two_level_mha.stock import from_stock, linear_names, take_stock_keys

PATHS = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out"}


class ToyAttention(nn.Module):
    num_attention_heads = 4
    causal = False

    def __init__(self):
        super().__init__()
        for path in PATHS.values():
            self.add_module(path, nn.Linear(16, 16))

    def forward(self, x_BLD):
        q, k, v = (p(x_BLD).unflatten(2, (4, 4)).transpose(1, 2) for p in (self.to_q, self.to_k, self.to_v))
        o = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return (self.to_out(o.transpose(1, 2).flatten(2)),)


class CausalToyAttention(ToyAttention):
    causal = True


class SplitToy(GridAttention):
    def __init__(self, original, projections, paths, mesh, **options):
        super().__init__(num_heads=4, num_kv_heads=4, head_dim=4, mesh=mesh, **options)
        self.causal, self.stock_names = original.causal, {}
        for letter, linear in projections.items():
            self.stock_names |= linear_names("out" if letter == "o" else letter, paths[letter], linear, 4)
        state = {f"{paths[letter]}.{name}": p.detach() for letter, linear in projections.items()
                 for name, p in linear.named_parameters()}
        self.store(from_stock(state, self.stock_names))
        take_stock_keys(self)

    def forward(self, x_BLD):
        self.check_call(dict, {"x": x_BLD})
        return self.attend(x_BLD, x_BLD, x_BLD, causal=0 if self.causal else None)


def inputs(module, dtype):
    return [((torch.randn(2, 5, 16, dtype=dtype),), {})]
"""
ENTRY = """
from two_level_mha.adapters import Adapter
from toy import PATHS, SplitToy, ToyAttention, inputs

ADAPTER = Adapter("toy", lambda module, parent: type(module) is ToyAttention, PATHS, SplitToy, inputs)
DECODER = Adapter("decoder", lambda module, parent: False, PATHS, SplitToy, inputs)
NOTHING = object()
"""
DECORATED = """
import two_level_mha as tlm
from toy import PATHS, CausalToyAttention, SplitToy, inputs

matches = lambda module, parent: type(module) is CausalToyAttention
assert tlm.register_adapter("causal toy", matches=matches, paths=PATHS, inputs=inputs)(SplitToy) is SplitToy
"""
RUN = """
import copy, torch
import two_level_mha as tlm
from torch import nn
import toy

def attempt(what):
    try:
        what()
    except tlm.GridError as error:
        print(error)

"""


def program(folder: Path, code: str, **points: str) -> str:
    """What a program prints that finds the toy packages, `points` of one of them in its metadata."""
    (folder / "toy.py").write_text(TOY)
    (folder / "entry.py").write_text(ENTRY)
    (folder / "decorated.py").write_text(DECORATED)
    for package, value in points.items():
        info = folder / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[two_level_mha.adapters]\nmine = {value}\n")
    done = subprocess.run(
        [sys.executable, "-c", RUN + code], env=environment(folder), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


BOTH = """
import decorated
torch.manual_seed(0)
model = nn.Sequential(toy.ToyAttention(), nn.ModuleList([toy.CausalToyAttention()])).double()
x_BLD = torch.randn(2, 5, 16, dtype=torch.float64)
split = tlm.parallelize(copy.deepcopy(model), None)
for ours, theirs in ((split[0], model[0]), (split[1][0], model[1][0])):
    assert isinstance(ours, toy.SplitToy)
    assert (ours(x_BLD)[0] - theirs(x_BLD)[0]).abs().max() <= 1e-10
found, expected = tlm.full_state_dict(split), model.state_dict()
assert found.keys() == expected.keys() and all(torch.equal(found[key], x) for key, x in expected.items())
attempt(lambda: tlm.parallelize(nn.Sequential(nn.Linear(2, 2)), None))
"""


def test_an_entry_point_and_the_decorator(tmp_path):
    """Localises: a kind of attention of another package that is not found, not split, or gives other numbers."""
    shown = program(tmp_path, BOTH, toy_package="entry:ADAPTER")
    assert "supported: causal toy, toy, nn.MultiheadAttention, cross, normed over heads, " in shown


WRONG = {
    "absent": ("no_such_module:ADAPTER", "of the package wrong_package in group .* cannot be loaded: ModuleNotFound"),
    "no adapter": ("entry:NOTHING", "of the package wrong_package in group .* must be a .*Adapter, got object"),
    "our name": (
        "entry:DECODER",
        "are called 'decoder': one of the package wrong_package, one of two_level",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_an_entry_point(tmp_path, case):
    """Localises: an error of another package's entry point that does not name the package, or is not raised."""
    value, message = WRONG[case]
    shown = program(tmp_path, "attempt(lambda: tlm.parallelize(nn.Sequential(), None))", wrong_package=value)
    assert re.search(message, shown), shown


TWICE = """
import decorated
attempt(lambda: tlm.register_adapter("causal toy", matches=None, paths={}, inputs=None)(toy.SplitToy))
tlm.register_adapter("toy", matches=decorated.matches, paths=toy.PATHS, inputs=toy.inputs)(toy.SplitToy)
attempt(lambda: tlm.parallelize(nn.Sequential(toy.CausalToyAttention()), None))
"""


def test_a_name_twice(tmp_path):
    """Localises: an adapter that silently takes another's place."""
    first, second = program(tmp_path, TWICE, toy_package="entry:ADAPTER").splitlines()
    assert first == "an adapter 'causal toy' is registered already: give this one another name"
    assert second.startswith("two adapters are called 'toy': one of register_adapter, one of the package toy_package;")


def test_nothing_is_registered_by_import(tmp_path):
    """Localises: an import of the package that loads entry points, or fills the registry."""
    code = "import sys; from two_level_mha import adapters; print(adapters._registered, 'entry' in sys.modules)"
    assert program(tmp_path, code, toy_package="entry:ADAPTER").strip() == "{} False"
