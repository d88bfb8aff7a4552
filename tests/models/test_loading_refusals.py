"""What load_pretrained refuses, by name and before any weight changes; and how it reads a part of a tensor."""

import itertools
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from harness.calls import mesh
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter

import two_level_mha as tlm
from two_level_mha.loading import Heap, StockSlice
from two_level_mha.stock import StockTensor


@pytest.fixture
def saved(tmp_path):
    """A directory with a model, and the model with other weights, split for one process."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}
    config = BertConfig(**sizes, vocab_size=30, max_position_embeddings=16)
    BertModel(config).save_pretrained(tmp_path)
    return tmp_path, tlm.parallelize(BertModel(config), None)


def change(directory, change) -> None:
    state = load_file(directory / "model.safetensors")
    change(state)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


QUERY, DENSE = "encoder.layer.0.attention.self.query.weight", "encoder.layer.0.output.dense.weight"
BROKEN = {
    "missing projection": (lambda state: state.pop(QUERY), f"has no {QUERY}"),
    "missing": (lambda state: state.pop(DENSE), f"has no {DENSE}"),
    "extra": (lambda state: state.update(other=torch.ones(2)), "has tensors that the model has not: other"),
    "projection's shape": (
        lambda state: state.update({QUERY: state[QUERY][:8].clone()}),
        rf"another shape: {QUERY} is \(8, 16\) and should be \(16, 16\)",
    ),
    "shape": (
        lambda state: state.update({DENSE: state[DENSE].t().contiguous()}),
        rf"another shape: {DENSE} is \(24, 16\) and should be \(16, 24\)",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_files(saved, case):
    """Localises: names or shapes of a file looked at too late, or left to transformers, which draws at random."""
    directory, model = saved
    broken, message = BROKEN[case]
    change(directory, broken)
    refuses(model, directory, message)


def refuses(model, path, message: str) -> None:
    before = pickle.dumps(model.state_dict())
    model.train()
    with pytest.raises(tlm.GridError, match=message):
        tlm.load_pretrained(model, path)
    assert pickle.dumps(model.state_dict()) == before and model.training


def test_paths(saved, tmp_path_factory):
    """Localises: a path or a model that load_pretrained cannot read: named, and nothing changed."""
    directory, model = saved
    refuses(model, tmp_path_factory.mktemp("empty"), "has no model.safetensors: load_pretrained reads a directory")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    refuses(model, directory, "has no model-2.safetensors")
    with pytest.raises(tlm.GridError, match="takes a transformers model, got Linear"):
        tlm.load_pretrained(torch.nn.Linear(2, 2), directory)


def on_one_rank(directory: Path, cut: Path, file: str) -> tuple[str, bool]:
    """The error where one rank's copy of a file ends early; whether the model is as it was."""
    config = transformers.LlamaConfig.from_pretrained(directory)
    model = tlm.parallelize(transformers.LlamaForCausalLM(config), mesh((1, 2)), rest=False)
    before = pickle.dumps(model.state_dict())
    if torch.distributed.get_rank() == 1:
        directory = shutil.copytree(directory, cut, dirs_exist_ok=True)
        (directory / file).write_bytes((directory / file).read_bytes()[:50])
    try:
        tlm.load_pretrained(model, directory)
        text = "no error"
    except Exception as error:  # rank 1's own comes from whoever reads the file
        text = str(error)
    return text, pickle.dumps(model.state_dict()) == before


@pytest.mark.parametrize("file", ["model.safetensors", "generation_config.json"])
def test_a_file_cut_short_on_one_rank(pool, tmp_path, file):
    """Localises: an error that is not ours, on one rank, while the others wait for it."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}
    config = transformers.LlamaConfig(**sizes, vocab_size=30, max_position_embeddings=16, num_key_value_heads=2)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "whole")
    found = pool.run(on_one_rank, 2, tmp_path / "whole", tmp_path / "cut", file)
    assert found[0][0].startswith("rank 1 of the grid: ") and all(unchanged for _, unchanged in found), found
    assert found[1][0] != "no error"


def test_packed_projections(saved, monkeypatch):
    """A converter that would split a packed q, k, v is refused: transformers reads a share of it wrong, silently."""
    directory, model = saved

    def pack(state):
        parts = [state.pop(QUERY.replace("query", name)) for name in ("query", "key", "value")]
        state[QUERY.replace("query", "qkv")] = torch.cat(parts)

    change(directory, pack)
    names = [f"attention.self.{name}.weight" for name in ("query", "key", "value")]
    converter = WeightConverter("attention.self.qkv.weight", names, [Chunk(dim=0)])
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: [converter])
    refuses(
        model, directory, f"converts {QUERY.replace('query', 'qkv')} to {QUERY}, .*key.weight, .*value.weight, which"
    )


def test_experts_of_another_shape(tmp_path):
    """What a converter makes is checked too: here one expert is missing."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = transformers.MixtralConfig(**sizes, intermediate_size=24, vocab_size=32, num_local_experts=4)
    model = transformers.MixtralForCausalLM(config)
    model.save_pretrained(tmp_path)
    change(tmp_path, lambda state: state.pop("model.layers.0.block_sparse_moe.experts.3.w2.weight"))
    name = "model.layers.0.mlp.experts.down_proj"
    refuses(model, tmp_path, rf"another shape: {name} is \(3, 16, 24\) and should be \(4, 16, 24\)")


STOCK = {
    "rows": StockTensor("", (8, 6), (2, 4, 6)),
    "columns": StockTensor("", (6, 8), (6, 2, 4)),
    "bias": StockTensor("", (8,), (2, 4)),
    "one head": StockTensor("", (4, 6), (1, 4, 6)),
    "heads of one": StockTensor("", (4, 6), (4, 1, 6)),
    "whole": StockTensor("", (6,), (6,)),
    "fused": StockTensor("", (24, 6), (2, 4, 6), 0, 8),
    "fused bias": StockTensor("", (24,), (2, 4), 0, 16),
    "fused, transposed": StockTensor("", (6, 24), (2, 4, 6), 1, 8, True),
    "transposed": StockTensor("", (8, 6), (6, 2, 4), transposed=True),
    "of groups": StockTensor("", (24, 6), (2, 4, 6), 0, 8, groups=2),
    "of groups, several heads each": StockTensor("", (32, 6), (4, 4, 6), groups=2),
    "of groups, transposed": StockTensor("", (6, 24), (2, 4, 6), 1, 4, True, groups=2),
    "bias_k": StockTensor("", (1, 1, 8), (2, 4), 2),
}


@pytest.mark.parametrize("case", STOCK)
def test_part_of_a_tensor(case):
    """Every block of a parameter is the same block of StockTensor.read, in memory of its own."""
    stock = STOCK[case]
    source = torch.arange(float(torch.Size(stock.shape).numel())).view(stock.shape)
    lazy, expected = StockSlice(source, True, Heap(), stock), stock.read(source)
    assert lazy.get_shape() == list(expected.shape)
    cuts = [[slice(0, n), slice(0, (n + 1) // 2), slice(n // 2, n)] for n in expected.shape]
    for index in [..., *itertools.product(*cuts)]:
        got = lazy[index]
        assert torch.equal(got, expected[index])
        assert got.is_contiguous() and got.untyped_storage().nbytes() == got.nbytes
        assert got.untyped_storage().data_ptr() != source.untyped_storage().data_ptr()
