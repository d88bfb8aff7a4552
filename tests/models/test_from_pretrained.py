"""A folder of config.json and safetensors, split and loaded in one call."""

import json

import pytest
import torch
import transformers
from harness.calls import mesh
from harness.families import build, inputs

import two_level_mha as tlm


def loaded(folder, dtype):
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model = tlm.from_pretrained(folder, mesh((2, 2)), dtype=dtype, cache="batch")
    ids = inputs()["input_ids"]
    with torch.no_grad():
        off = (model(ids).logits - stock(ids).logits).abs().max().item()
    same = torch.equal(model.generate(ids, max_new_tokens=4), stock.generate(ids, max_new_tokens=4))
    return type(model).__name__, model.dtype, tlm.report(model).attentions, off, same, model.training


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_one_call(pool, tmp_path, dtype):
    """Localises: the class, the dtype or an option that is lost on the way."""
    build("llama").save_pretrained(tmp_path)
    name, found, attentions, off, same, training = pool.run(loaded, 4, str(tmp_path), dtype, timeout=120)[0]
    assert (name, found, attentions) == ("LlamaForCausalLM", dtype or torch.float32, 2)
    assert off < 1e-5 and same and not training


def refused(folder):
    with pytest.raises(tlm.GridError) as error:
        tlm.from_pretrained(folder, mesh((2, 2)))
    return str(error.value)


def refused_on_one_rank(folder):
    return refused(folder if torch.distributed.get_rank() else f"{folder}/nowhere")


def test_wrong_folders(pool, tmp_path):
    """Localises: a raw error, or ranks that wait, for a folder that is none, on one rank or on all; other classes."""
    assert all("snapshot_download" in text for text in pool.run(refused, 4, "meta-llama/Llama-3-8B", timeout=60))
    build("llama").save_pretrained(tmp_path)
    assert all("nowhere" in text for text in pool.run(refused_on_one_rank, 4, str(tmp_path), timeout=60))
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"architectures": ["MyModel"]}))
    assert (
        "must name a class of transformers in architectures, got ['MyModel']" in pool.run(refused, 4, str(tmp_path))[0]
    )
    path.write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    assert "quantised weights cannot be split" in pool.run(refused, 4, str(tmp_path))[0]
