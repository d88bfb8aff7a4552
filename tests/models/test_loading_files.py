"""Bad files that load_pretrained is given: refused by name before a weight changes; an error after that, on all ranks.

A failure is in pretrained_files.py, or in the votes of load_pretrained.
"""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from harness.calls import mesh
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

import two_level_mha as tlm
from two_level_mha import loading

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}
CONFIG = BertConfig(**SIZES, vocab_size=30, max_position_embeddings=16)
QUERY, DENSE = "encoder.layer.0.attention.self.query.weight", "encoder.layer.0.output.dense.weight"
INDEX = "model.safetensors.index.json"
METADATA = {"format": "pt"}


@pytest.fixture
def saved(tmp_path) -> Path:
    """A directory with a model in two files and their index."""
    torch.manual_seed(0)
    BertModel(CONFIG).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    halves = {"1.safetensors": list(state)[::2], "2.safetensors": list(state)[1::2]}
    for file, names in halves.items():
        save_file({name: state[name] for name in names}, tmp_path / file, metadata=METADATA)
    index(tmp_path, {name: file for file, names in halves.items() for name in names})
    return tmp_path


def index(directory: Path, weight_map: object) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def file_of(directory: Path, name: str) -> Path:
    return directory / json.loads((directory / INDEX).read_text())["weight_map"][name]


def change(directory: Path, name: str, x: torch.Tensor) -> None:
    file = file_of(directory, name)
    save_file(load_file(file) | {name: x}, file, metadata=METADATA)


def hashes(directory: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.glob("*.safetensors")}


def bits(model) -> list:
    full = tlm.full_state_dict(model)
    return [x.tolist() for x in full.values()]


def refused(directory: Path, **options) -> str:
    model = tlm.parallelize(BertModel(CONFIG), None)
    before = bits(model)
    with pytest.raises(tlm.GridError) as caught:
        tlm.load_pretrained(model, directory, **options)
    assert bits(model) == before
    return str(caught.value)


def test_a_tensor_in_two_files(saved):
    """Localises: the second of two tensors of one name, taken without a word."""
    first, second = (saved / f"{n}.safetensors" for n in (1, 2))
    name = next(iter(load_file(first)))
    save_file(load_file(second) | {name: load_file(first)[name]}, second, metadata=METADATA)
    assert f"2.safetensors has tensors that 1.safetensors has too, {name}: remove one" in refused(saved)


@pytest.mark.parametrize("name", [QUERY, DENSE])
@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn], ids=str)
def test_dtypes_that_are_no_conversion(saved, name, dtype):
    """Localises: numbers that mean something else than the weight, converted to it."""
    change(saved, name, torch.ones_like(load_file(file_of(saved, name))[name]).to(dtype))
    assert re.search(rf"has another dtype: {name} is \w+ and should be one of F64, F32, BF16, F16; ", refused(saved))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_that_are_converted(saved, dtype):
    """Localises: the check of dtypes, too strict."""
    x = load_file(file_of(saved, QUERY))[QUERY].to(dtype)
    change(saved, QUERY, x)
    model = tlm.load_pretrained(tlm.parallelize(BertModel(CONFIG), None), saved)
    assert torch.equal(tlm.full_state_dict(model)[QUERY], x.float())


def test_damaged_files(saved):
    """Localises: a reader's own error, which does not say of which file; an index that leads outside."""
    file = saved / "2.safetensors"
    whole = file.read_bytes()
    for data in (whole[:-5], whole[:40], b"", b"\xff" * 8 + whole[8:], whole + b"0"):
        file.write_bytes(data)
        assert f"{file} is no whole safetensors file: " in refused(saved)
    file.write_bytes(whole)
    for text in ("", "[]", "{}", '{"weight_map": 3}'):
        (saved / INDEX).write_text(text)
        assert f"{saved / INDEX} is no index of safetensors files: " in refused(saved)
    for outside in ("../x.safetensors", "a/../../x.safetensors", "/x.safetensors"):
        index(saved, {QUERY: "1.safetensors", DENSE: outside})
        assert f"{saved / INDEX} names {outside}: the files of a model must be in its directory" in refused(saved)


def test_hashes(saved):
    """Localises: a hash that is not compared, or given for nothing."""
    given = hashes(saved)
    model = tlm.parallelize(BertModel(CONFIG), None)
    tlm.load_pretrained(model, saved, sha256={name: digest.upper() for name, digest in given.items()})
    stock = BertModel.from_pretrained(saved).state_dict()
    assert all(torch.equal(x, stock[name]) for name, x in tlm.full_state_dict(model).items())
    change(saved, QUERY, load_file(file_of(saved, QUERY))[QUERY] + 1)
    assert f"{file_of(saved, QUERY)} has the SHA-256 " in refused(saved, sha256=given)
    assert "sha256 has no hash of 2.safetensors" in refused(saved, sha256={"1.safetensors": ""})
    assert "sha256 has hashes of ../y, x, which" in refused(saved, sha256=given | {"x": "", "../y": ""})
    assert "sha256 must be a dict of file names" in refused(saved, sha256=[1])


def on_ranks(directory: Path, given: dict[str, str], fault: str) -> tuple[str, bool]:
    """What this rank is told, and whether its weights are as they were, where rank 1 alone meets a fault."""
    rank = torch.distributed.get_rank()
    torch.manual_seed(1)
    model = tlm.parallelize(BertModel(CONFIG), mesh((1, 2)))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.MonkeyPatch.context() as patch:
        if fault == "reading" and rank == 1:
            patch.setattr(loading.StockSlice, "__getitem__", lambda *_: (_ for _ in ()).throw(OSError("disk is gone")))
        sha256 = given | {"1.safetensors": "0"} if fault == "argument" and rank == 1 else given
        try:
            tlm.load_pretrained(model, directory, sha256=sha256)
            text = "no error"
        except tlm.GridError as error:
            text = str(error)
    same = all(torch.equal(x, p) for x, p in zip(before, model.parameters(), strict=True))
    return text, same


def test_ranks(pool, saved):
    """Localises: files that no rank compares; a rank that returns though another could not read."""
    given = hashes(saved)
    assert pool.run(on_ranks, 2, saved, given, "none") == [("no error", False)] * 2
    for text, _ in pool.run(on_ranks, 2, saved, given, "reading"):
        assert re.match(r"(rank 1 of the grid: )?reading .* failed, .*disk is gone.*; the model is partly", text), text
    for text, same in pool.run(on_ranks, 2, saved, given, "argument"):
        assert text.startswith("sha256 differs between ranks of the grid") and same
    for number in (1, 2):
        wrong = given | {f"{number}.safetensors": "0" * 64}
        for text, same in pool.run(on_ranks, 2, saved, wrong, "none"):
            assert f"{number}.safetensors has the SHA-256 {given[f'{number}.safetensors']}, and" in text and same
