"""The stubs of what is compiled, against what the libraries say of themselves: a stub that lies is worse than none.

mypy itself runs by `make types`.
"""

import ast
import importlib.util
import inspect
import re
from pathlib import Path

import pytest

from two_level_mha import _C

ROOT = Path(__file__).resolve().parents[2]
NAMES = [name for name in dir(_C) if not name.startswith("_")]
FUNCTIONS = [name for name in NAMES if inspect.isbuiltin(getattr(_C, name))]
CLASSES = [name for name in NAMES if inspect.isclass(getattr(_C, name))]
TREE = ast.parse((ROOT / "src" / "two_level_mha" / "_C.pyi").read_text())
STUBS = {one.name: one for one in TREE.body if isinstance(one, (ast.FunctionDef, ast.ClassDef))}


def test_operators():
    """E. Localises: operators.pyi is not that of the schemas in csrc: run tools/operator_stub.py."""
    spec = importlib.util.spec_from_file_location("operator_stub", ROOT / "tools" / "operator_stub.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.STUB.read_text() == tool.stub()


def test_names():
    """E. Localises: _C.pyi lacks a name of the library, or has one more."""
    variables = [one.target.id for one in TREE.body if isinstance(one, ast.AnnAssign)]
    assert sorted([*STUBS, *variables]) == NAMES


def parameters_of(function: ast.FunctionDef) -> list[tuple[str | None, str]]:
    """(name, or None where it goes by position alone; type), without self."""
    a = function.args
    known = [(None, one) for one in a.posonlyargs] + [(one.arg, one) for one in (*a.args, *a.kwonlyargs)]
    return [(name, ast.unparse(one.annotation)) for name, one in known if one.arg != "self"]


def signature_of(doc: str) -> tuple[list[tuple[str | None, str]], str]:
    """The same of the line that pybind11 writes, and what is returned."""
    line = re.sub(r"typing\.SupportsInt( \| typing\.SupportsIndex)?", "int", doc.split("\n")[0])
    line = re.sub(r'typing\.Annotated\[([\w.]+\[int\]), "FixedSize\(\d+\)"\]', r"\1", line)
    line = line.replace("two_level_mha::CallSizes<long>", "Call")  # of functions that are bound before the class is
    stub = ast.parse(f"def {line.replace('collections.abc.', '').replace('two_level_mha._C.', '')}: ...").body[0]
    found = [(None if re.fullmatch(r"arg\d+", name) else name, kind) for name, kind in parameters_of(stub)]
    return found, ast.unparse(stub.returns)


def fits(stub: str, compiled: str) -> bool:
    """Whether a type is the compiled one, or says more: pybind11 knows no more than list, dict and Callable of some."""
    pattern = re.sub(r"(list|dict|Callable)(?!\\\[)", r"\1(\\[.*\\])?", re.escape(compiled))
    return re.fullmatch(pattern, stub) is not None


@pytest.mark.parametrize("name", [*FUNCTIONS, *(f"{name}.__init__" for name in CLASSES)])
def test_signature(name):
    """E. Localises: _C.pyi and csrc/python.cpp differ in a function's parameters or in what it returns."""
    owner, _, method = name.rpartition(".")
    function = getattr(getattr(_C, owner), method) if owner else getattr(_C, name)
    methods = {one.name: one for one in STUBS[owner].body if isinstance(one, ast.FunctionDef)} if owner else STUBS
    stub = methods[method]
    expected, returned = signature_of(function.__doc__)
    found = parameters_of(stub)
    assert [one for one, _ in found] == [one for one, _ in expected]
    for (_, kind), (_, compiled) in zip(found, expected, strict=True):
        assert fits(kind, compiled), (kind, compiled)
    assert fits(ast.unparse(stub.returns), returned), (ast.unparse(stub.returns), returned)


@pytest.mark.parametrize("name", CLASSES)
def test_attributes(name):
    """E. Localises: _C.pyi and csrc differ in an attribute of a class, or in its type."""
    sizes = dict.fromkeys("BLSHKdm", 1) if name == "Call" else {}
    made = getattr(_C, name)(**sizes)
    body = STUBS[name].body
    fields = {one.target.id: ast.unparse(one.annotation) for one in body if isinstance(one, ast.AnnAssign)}
    properties = [one for one in body if isinstance(one, ast.FunctionDef) and not one.name.startswith("_")]
    fields |= {one.name: ast.unparse(one.returns) for one in properties}
    compiled = {one: type(getattr(made, one)).__name__ for one in vars(type(made)) if not one.startswith("_")}
    assert fields.keys() == compiled.keys()
    for one, kind in compiled.items():
        assert fits(fields[one], kind), (one, fields[one], kind)
