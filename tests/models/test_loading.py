"""load_pretrained: a split model is filled with the file's weights, bit by bit; and written back.

A failure here with the tests of the split green is in what is read of a tensor, under which name, or by whom.
"""

import json
import math

import pytest
import torch
import transformers
from harness import decoders, encoders
from harness.device import DEVICE
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, GPT2Config

import two_level_mha as tlm

GPT2 = GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=30, n_positions=16)


def make(kind: str, changes: dict, dtype: torch.dtype) -> nn.Module:
    if kind in decoders.MODELS:
        return decoders.make(kind, dtype, **changes)
    if kind in encoders.MODELS:
        return encoders.make(kind).to(dtype)
    torch.manual_seed(0)
    return getattr(transformers, kind)(GPT2).to(dtype)


def make_meta(kind: str, changes: dict, dtype: torch.dtype) -> nn.Module:
    if kind in decoders.MODELS:
        return decoders.make_meta(kind, dtype, **changes)
    config = encoders.make_config(kind) if kind in encoders.MODELS else GPT2
    with torch.device("meta"):
        return getattr(transformers, kind)._from_config(config, dtype=dtype)


def mesh_of(grid: tuple[int, ...]):
    """A grid of all ranks, or, of three axes, one of several."""
    if len(grid) == 2:
        return tlm.init_mesh(DEVICE, grid)
    return init_device_mesh(DEVICE, grid, mesh_dim_names=("data", "head", "slice"))["head", "slice"]


def local(x: torch.Tensor) -> torch.Tensor:
    return x._local_tensor if isinstance(x, DTensor) else x


def load(
    kind: str, changes: dict, directory: str, grid, options: dict, start: str, out: str | None
) -> dict[str, object]:
    """Loads into a model that is on meta, or has other weights or the same; what is wrong with it."""
    stock = getattr(transformers, json.loads(open(f"{directory}/config.json").read())["architectures"][0])
    stock = stock.from_pretrained(directory, experts_implementation="eager")  # that works in float64
    if start == "meta":
        model = make_meta(kind, changes, stock.dtype)
    else:
        model = make(kind, changes, stock.dtype)
        for p in model.parameters():
            nn.init.ones_(p)
    model = tlm.parallelize(model, mesh_of(grid), **options)
    frozen = [p for name, p in model.named_parameters() if "norm" in name.lower() or "ln_" in name]
    for p in frozen:
        p.requires_grad_(False)
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    assert tlm.load_pretrained(model, directory) is model
    assert trained == {name: p.requires_grad for name, p in model.named_parameters()} and not all(trained.values())
    assert not any(module.training for module in model.modules())
    for x in [*model.parameters(), *model.buffers()]:
        assert local(x).untyped_storage().nbytes() == local(x).nbytes  # not a view of the file
    full, expected = tlm.full_state_dict(model), stock.state_dict()
    wrong = {}
    if full:
        assert full.keys() == expected.keys()
        wrong |= {name: "differs" for name, x in expected.items() if not torch.equal(x, full[name])}
        wrong |= {name: "dtype" for name, x in expected.items() if x.dtype != full[name].dtype}
    buffers = dict(model.named_buffers())
    assert buffers.keys() == dict(stock.named_buffers()).keys()
    wrong |= {name: "buffer" for name, x in stock.named_buffers() if not torch.equal(x, buffers[name])}
    if model.can_generate():
        wrong |= (
            {} if model.generation_config.to_dict() == stock.generation_config.to_dict() else {"generation": "config"}
        )
    model.save_pretrained(out, state_dict=full)
    return {"wrong": wrong, "same": same_output(model, stock)}


def same_output(model: nn.Module, stock: nn.Module) -> float:
    torch.manual_seed(1)
    inputs = {"input_ids": torch.randint(3, 30, (2, 6))}
    if stock.main_input_name == "pixel_values":
        inputs = {"pixel_values": torch.randn(2, 1, 8, 8, dtype=stock.dtype)}
    with torch.no_grad():
        return (model(**inputs)[0] - stock(**inputs)[0]).abs().max().item()


TIED = {"tie_word_embeddings": True}
CASES = {
    "Llama": ("llama", {"attention_bias": False}, (2, 2), {}, "meta", "5GB"),
    "tied Llama": ("llama", TIED, (1, 4), {"scheme": "heads"}, "meta", "2KB"),
    "biased Llama": ("llama", {"mlp_bias": True}, (2, 2), {"combine": "concat"}, "meta", "5GB"),
    "Gemma3": ("gemma3", {}, (2, 2), {"scheme": "heads"}, "weights", "5GB"),
    "Qwen3-MoE": ("qwen3 moe", {}, (1, 4), {}, "meta", "2KB"),
    "Mixtral": ("mixtral", {}, (2, 2), {}, "weights", "5GB"),
    "several grids": ("qwen3 moe", {}, (2, 1, 2), {}, "meta", "5GB"),
    "BERT": ("BertModel", {}, (2, 2), {}, "meta", "2KB"),
    "ViT": ("ViTModel", {}, (1, 4), {"combine": "concat"}, "weights", "5GB"),
    "GPT-2": ("GPT2LMHeadModel", {}, (2, 2), {}, "meta", "2KB"),
    "Qwen3 on 6 ranks": ("qwen3", {}, (2, 3), {}, "meta", "2KB"),  # slices of 6, 6 and 4 columns
    "GPT-2 on 7 ranks": ("GPT2LMHeadModel", {}, (1, 7), {}, "meta", "5GB"),  # three have none of 4 columns
    "GPT-2, whole heads": ("GPT2LMHeadModel", {}, (1, 4), {"scheme": "heads"}, "weights", "5GB"),
}


@pytest.mark.parametrize("case", CASES)
def test_load_and_save(pool, case, tmp_path):
    """Every tensor, buffer, dtype and requires_grad, generation_config, eval(); then stock loads what was saved."""
    kind, changes, grid, options, start, shard = CASES[case]
    source, out = str(tmp_path / "source"), str(tmp_path / "out")
    stock = make(kind, changes, torch.float64)
    stock.save_pretrained(source, max_shard_size=shard)
    (tmp_path / "source" / "generation_config.json").unlink(missing_ok=True)
    if stock.can_generate() and changes != TIED:
        GenerationConfig(do_sample=True, top_k=7, max_new_tokens=5).save_pretrained(source)
    for found in pool.run(load, math.prod(grid), kind, changes, source, grid, options, start, out):
        assert not found["wrong"]
        assert found["same"] <= (1e-6 if kind == "mixtral" else 1e-10)  # its router is in float32
    again = type(stock).from_pretrained(out).state_dict()
    files = type(stock).from_pretrained(source).state_dict()
    assert again.keys() == files.keys() and all(torch.equal(again[name], x) for name, x in files.items())


def save(kind: str, changes: dict, out: str) -> None:
    model = tlm.parallelize(decoders.make(kind, **changes), tlm.init_mesh(DEVICE, (2, 2)))
    model.save_pretrained(out, state_dict=tlm.full_state_dict(model))


@pytest.mark.parametrize("kind, changes", [("llama", TIED), ("qwen3 moe", {}), ("mixtral", {})], ids=str)
def test_save_what_was_not_loaded(pool, kind, changes, tmp_path):
    """Fused experts are written apart, and tied weights once, as the unsplit model writes them."""
    stock = decoders.make(kind, **changes)
    stock.save_pretrained(tmp_path / "stock")
    pool.run(save, 4, kind, changes, str(tmp_path / "split"))
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("stock", "split")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(x, files[1][name]) for name, x in files[0].items())
    again = type(stock).from_pretrained(tmp_path / "split").state_dict()
    assert all(torch.equal(x, again[name]) for name, x in stock.state_dict().items())


def low_precision(directory: str) -> list[str]:
    """Of a bf16 file in a bf16 model, and of a float32 one: what is not the file's numbers."""
    wrong = []
    for dtype in (torch.bfloat16, torch.float32):
        stock = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=dtype).state_dict()
        model = tlm.parallelize(decoders.make_meta("llama", dtype), tlm.init_mesh(DEVICE, (2, 2)))
        full = tlm.full_state_dict(tlm.load_pretrained(model, directory))
        wrong += [f"{dtype} {name}" for name, x in full.items() if x.dtype != dtype or not torch.equal(x, stock[name])]
    return wrong


def test_dtype(pool, tmp_path):
    """The model's dtype counts, whatever the file's."""
    decoders.make("llama", torch.bfloat16).save_pretrained(tmp_path)
    assert pool.run(low_precision, 4, str(tmp_path)) == [[]] * 4
