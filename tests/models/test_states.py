"""Layers that keep a state for each head, split by heads and by what heads give. T, where models compute in float64."""

import copy
import sys
from functools import wraps
from inspect import signature

import pytest
import torch
import transformers
from harness.calls import mesh, text_of
from harness.families import build, inputs, stock_gradients
from harness.wide import in_float64
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import two_level_mha as tlm
from two_level_mha.attentions import NO_PLAN
from two_level_mha.testing import record_collectives

DELTA = {"_experts_implementation": "eager", "linear_num_value_heads": 4, "linear_value_head_dim": 12}
# Family, the grid that its layers with states take of (2, 2), and sizes that make it so.
CASES = [
    ("qwen3_next", (2, 2), DELTA | {"linear_num_key_heads": 2}),
    ("qwen3_next", (2, 2), DELTA | {"linear_num_key_heads": 2, "linear_num_value_heads": 2}),
    ("qwen3_next", (1, 4), DELTA | {"linear_num_key_heads": 1}),
    ("qwen3_next", (1, 4), DELTA | {"linear_num_key_heads": 1, "linear_num_value_heads": 2}),
    ("qwen3_next", (4, 1), DELTA | {"linear_num_key_heads": 4}),
    ("qwen3_5_text", (2, 2), DELTA | {"linear_num_key_heads": 2, "linear_num_value_heads": 2}),
    ("olmo_hybrid", (1, 4), DELTA | {"linear_num_key_heads": 1, "linear_num_value_heads": 1}),
    ("kimi_linear", (4, 1), DELTA | {"linear_num_heads": 8, "linear_head_dim": 12}),
    ("bailing_hybrid", (4, 1), DELTA | {"linear_num_heads": 4, "linear_head_dim": 12}),
    ("mamba2", (1, 4), {"n_groups": 1}),
    ("mamba2", (2, 2), {"n_groups": 2}),
    ("mamba2", (4, 1), {"n_groups": 4}),
    ("bamba", (1, 4), {"mamba_n_heads": 2, "mamba_d_head": 64, "mamba_proj_bias": True}),
    ("nemotron_h", (1, 4), DELTA | {"n_groups": 1, "mamba_num_heads": 6, "mamba_head_dim": 22, "use_bias": True}),
    ("falcon_h1", (2, 2), {"mamba_n_groups": 2, "mamba_rms_norm": True, "mamba_norm_before_gate": False}),
    ("falcon_h1", (1, 4), {"mamba_rms_norm": True, "mamba_norm_before_gate": True}),
    ("falcon_h1", (1, 4), {"mamba_rms_norm": False}),
    ("zamba2", (2, 2), {"mamba_ngroups": 2}),
    ("zamba", (4, 1), {"n_mamba_heads": 4}),
    ("zamba", (2, 2), {"n_mamba_heads": 2}),
    ("zamba", (1, 4), {"n_mamba_heads": 1}),
    ("recurrent_gemma", (4, 1), {}),
    ("rwkv", (4, 1), {"rescale_every": 1}),
    ("granitemoehybrid", (1, 4), DELTA),
    ("minimax", (4, 1), DELTA | {"num_attention_heads": 8}),
    ("mamba", (4, 1), {}),
    ("falcon_mamba", (4, 1), {}),
    ("jamba", (4, 1), DELTA),
    ("lfm2", (4, 1), {"conv_bias": True, "layer_types": ["conv", "full_attention"]}),
    ("lfm2_moe", (4, 1), DELTA),
    ("lfm3", (4, 1), DELTA),
]


def steps(model):
    """Logits of a padded batch, at once and with a cache in two parts and a step; and that cache."""
    only = 1 if model.config.model_type == "rwkv" else None  # whose step takes no more, and mixes up what it is given
    batch = {name: x[:only] for name, x in inputs().items()}
    ids, keep = batch["input_ids"], batch["attention_mask"]
    found = {"logits": model(**batch, use_cache=False).logits}
    with torch.no_grad():
        name = next(x for x in ("past_key_values", "cache_params", "state") if x in signature(model.forward).parameters)
        cache, last, logits = None, 0, []
        if model.config.model_type == "recurrent_gemma":  # which gives none
            cache = transformers.DynamicCache(config=model.config)
        for end in (9, 10, 11):
            output = model(ids[:, last:end], attention_mask=keep[:, :end], use_cache=True, **{name: cache})
            cache, last = output.get(name, cache), end
            logits.append(output.logits)
    found["with a cache"] = torch.cat(logits, 1)
    kept = keep[:, :, None].bool()
    return {name: x.masked_fill(~kept, 0.0) for name, x in found.items()}, cache


def states(cache):
    """Numbers of the states of a cache that are kept instead of keys."""
    kept = [
        getattr(layer, kind, {})
        for layer in getattr(cache, "layers", ())
        for kind in ("conv_states", "recurrent_states")
    ]
    kept.append(dict(enumerate(getattr(cache, "linear_cache", ()))))  # MiniMax's
    return sum(x.numel() for one in kept for x in one.values() if isinstance(x, torch.Tensor))


def compared_in_parts(family, activations, sizes):
    return compared(family, (2, 2), sizes, activations=activations)


def compared(family, grid, sizes, **options):
    """Largest differences from the unsplit model, relative, by what they are of; shares of what a rank keeps."""
    model = build(family, grid[0], **sizes).double()
    split = tlm.parallelize(copy.deepcopy(model), mesh(grid), **options)
    report = tlm.report(split)
    layers = [part for part in split.modules() if hasattr(part, "cut")]
    found = {"states": report.states, "gathered": [name for name, why in report.gathered.items() if why != NO_PLAN]}
    found["left out"] = report.left_out
    found["grids"] = {(part.place.grid.head_groups, part.place.grid.slices) for part in layers}
    offs, results, sizes_kept = {}, [], []
    for one in (model, split):
        with in_float64(one):
            outputs, cache = steps(one)
            outputs["logits"].square().mean().backward()
        results.append(outputs)
        sizes_kept.append(states(cache))
    for name, x in results[0].items():
        offs[name] = ((x - results[1][name]).abs().max() / x.abs().max()).item()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    least = 1e-3 * max(x.abs().max().item() for x in grads.values())
    ours = stock_gradients(split)
    for name in grads if ours else ():
        offs[name] = ((grads[name] - ours[name]).abs().max() / grads[name].abs().max().clamp(min=least)).item()
    found["share of states"] = sizes_kept[1] / max(sizes_kept[0], 1)  # some layers keep their own
    return found | {"off": max(offs.values()), "worst": max(offs, key=offs.get)}


@pytest.mark.parametrize("family, own, sizes", CASES)
def test_split_as_unsplit(pool, family, own, sizes):
    """Localises: a part of a fused projection, a norm's squares, a gradient that is not summed, states of others."""
    for found in pool.run(compared, 4, family, (2, 2), sizes, timeout=120):
        assert found["states"] and not found["gathered"], found
        assert found["grids"] == {own}, found
        assert found["off"] < 1e-10, found


@pytest.mark.parametrize(
    "ranks, grid, own, family, sizes",
    [
        (8, (2, 4), (2, 4), "qwen3_next", DELTA | {"linear_num_key_heads": 2, "linear_num_value_heads": 2}),
        (8, (2, 4), (1, 8), "mamba2", {"n_groups": 1}),
        pytest.param(
            *(16, (2, 8), (4, 4), "qwen3_5_text", DELTA | {"linear_num_key_heads": 4}), marks=pytest.mark.slow
        ),
    ],
)
def test_more_ranks(pool, ranks, grid, own, family, sizes):
    """Localises: places of head groups and slices that a square grid hides; a grid that is not the mesh's."""
    for found in pool.run(compared, ranks, family, grid, sizes, timeout=120):
        assert found["states"] and not found["gathered"] and found["grids"] == {own}, found
        assert found["off"] < 1e-10, found


@pytest.mark.parametrize(
    "family, activations, sizes",
    [
        ("olmo_hybrid", "sequence", DELTA | {"linear_num_key_heads": 1}),
        ("falcon_h1", "sequence", {"mamba_rms_norm": True}),
        ("bamba", "batch", {}),
        ("mamba2", "batch", {}),
        ("lfm2", "sequence", {"layer_types": ["conv", "full_attention"]}),
    ],
)
def test_hidden_states_in_parts(pool, family, activations, sizes):
    """Localises: parts that a layer with states takes for whole sequences, or gives as a whole."""
    for found in pool.run(compared_in_parts, 4, family, activations, sizes, timeout=120):
        assert found["states"] and not found["gathered"] and not any("hidden" in name for name in found["left out"]), (
            found
        )
        assert found["off"] < 1e-10, found


# Of which transformers converts what a checkpoint has, and of which not.
STORED = [
    ("qwen3_next", DELTA | {"linear_num_key_heads": 2, "linear_num_value_heads": 2}),
    ("olmo_hybrid", DELTA | {"linear_num_key_heads": 1}),
    ("falcon_h1", {"mamba_rms_norm": True}),
    ("minimax", DELTA),
    ("zamba", {}),
]


def stored(folder, family, sizes):
    """What differs of a model that came back from its own state dict, from files, and through save and load."""
    stock = type(build(family, 2, **sizes)).from_pretrained(folder).eval()
    wanted = stock.state_dict()
    other = tlm.parallelize(build(family, 2, **sizes).apply(_blank), mesh((2, 2)), rest=False)
    other.load_state_dict(wanted)
    with torch.device("meta"):
        read = type(stock)._from_config(stock.config)
    read = tlm.load_pretrained(tlm.parallelize(read, mesh((2, 2))), folder)
    tlm.save(f"{folder}/run", other, step=1)
    again = tlm.parallelize(build(family, 2, **sizes).apply(_blank), mesh((2, 2)), rest=False)
    tlm.load(f"{folder}/run", again)
    ids, offs, unlike = inputs()["input_ids"], [], []
    for model in (other, read, again):
        with torch.no_grad():
            offs.append((model(ids).logits - stock(ids).logits).abs().max().item())
        state = tlm.full_state_dict(model)
        unlike += [
            name for name in (state and wanted.keys() | state.keys()) if not torch.equal(state[name], wanted[name])
        ]
    return offs, unlike, tlm.report(read).states


def reloaded(folder, family, sizes):
    """What differs of a model that two ranks read of what four have saved."""
    wanted = build(family, 2, **sizes).state_dict()
    model = tlm.parallelize(build(family, 2, **sizes).apply(_blank), mesh((1, 2)), rest=False)
    tlm.load(f"{folder}/run", model)
    state = tlm.full_state_dict(model)
    return [name for name in (state and wanted) if not torch.equal(state[name], wanted[name])]


def _blank(module):
    for p in module.parameters(recurse=False):
        p.data.zero_()


@pytest.mark.parametrize("family, sizes", STORED)
def test_stored_as_unsplit(pool, tmp_path, family, sizes):
    """Localises: names and parts of fused tensors in the state dict, in files, in shares; buffers made again."""
    build(family, 2, **sizes).save_pretrained(tmp_path)
    for offs, unlike, states in pool.run(stored, 4, str(tmp_path), family, sizes, timeout=120):
        assert max(offs) < 1e-5 and not unlike and states, (offs, unlike)
    assert not any(pool.run(reloaded, 2, str(tmp_path), family, sizes, timeout=120))


def sent():
    """Group sizes and elements of what one layer's call and its backward pass exchange; (2, 2), and v is cut."""
    sizes = DELTA | {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
    layer = tlm.parallelize(build("qwen3_next", 2, **sizes), mesh((2, 2))).model.layers[0].linear_attn
    x_BLD = torch.randn(3, 11, 64, requires_grad=True)
    with record_collectives() as record:
        layer(x_BLD).sum().backward()
    return [sorted((c.group_size, c.elements) for c in record.calls if c.backward is after) for after in (False, True)]


def test_what_is_sent(pool):
    """Localises: an exchange more than the norm's squares, the sum of outputs, and gradients of what is shared."""
    forward, backward = pool.run(sent, 4, timeout=120)[0]
    squares, x = (2, 33), (4, 33 * 64)  # of 33 rows and one head; of all rows
    assert forward == [squares, x]
    weights = 64 * (2 * 16 + 2)  # rows of a head's q, k, b and a, which both slices have
    vectors = 4 * (2 * 2 * 16 + 2 * 12) + 2 + 2 + 12  # conv1d, A_log, dt_bias, norm
    assert backward == sorted([squares, (2, weights), (4, vectors), x])


def generated(family, sizes):
    """Whether tokens of a padded batch by beams are the unsplit model's, and the error for a cache of that."""
    model = build(family, 2, **sizes)
    split = tlm.parallelize(copy.deepcopy(model), mesh((2, 2)))
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3}
    tokens = [one.generate(**inputs(), **options) for one in (model, split)]
    with torch.no_grad():
        cache = model(**inputs(), use_cache=True).past_key_values
        foreign = text_of(lambda: split(**inputs(), past_key_values=cache))
    return torch.equal(*tokens), foreign


@pytest.mark.parametrize("family, sizes", [("qwen3_next", DELTA | {"linear_num_key_heads": 1}), ("falcon_h1", {})])
def test_beams_and_foreign_caches(pool, family, sizes):
    """Localises: states that do not follow their beams; states of all heads taken for a rank's."""
    for same, foreign in pool.run(generated, 4, family, sizes, timeout=120):
        assert same
        assert foreign == "past_key_values was filled by a model that is not split so: fill it again by this one"


def trained():
    """In training: what a kernel would be called with, that the layer's numbers are those in eval, its copy's too."""
    split = tlm.parallelize(build("mamba2", n_groups=1), mesh((2, 2)))
    layer = split.backbone.layers[0].mixer
    module = sys.modules["transformers.models.mamba2.modeling_mamba2"]
    x, calls = torch.randn(2, 5, 64), []
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(module, "mamba2_split_conv1d_scan_combined", lambda *args, **kwargs: calls.append(args) or x)
        y = layer.eval()(x)
        same = [torch.equal(one(x), y) for one in (layer.train(), copy.deepcopy(layer))]
    whole = {name: getattr(layer, name) for name in ("num_heads", "intermediate_size", "n_groups")}
    return same, len(calls), layer.training, whole, str(tlm.report(split))


def test_training_copies_and_attributes(pool):
    """Localises: a fused kernel, which sums nothing, in training; a copy that holds another's parts; sizes left cut."""
    for same, calls, training, whole, report in pool.run(trained, 4, timeout=120):
        assert all(same) and not calls and training
        assert whole == {"num_heads": 8, "intermediate_size": 128, "n_groups": 1}
        assert "2 layers with states" in report


def hooked_beside_attention():
    """Whether a model of layers with both gives the unsplit tokens with hooks in its mixers; what is gathered."""
    whole = build("falcon_h1")
    for layer in whole.model.layers:
        layer.mamba.out_proj.register_forward_hook(lambda *_: None)
    split = tlm.parallelize(copy.deepcopy(whole), mesh((2, 2)))
    options = {**inputs(), "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        tokens = [model.generate(**options) for model in (whole, split)]
    return torch.equal(*tokens), {name.rpartition(".")[2] for name in tlm.report(split).gathered}


def test_attention_beside_a_gathered_mixer(pool):
    """Localises: a layer of a cache whose states are dealt by sequences and whose keys are not."""
    for same, gathered in pool.run(hooked_beside_attention, 4, timeout=120):
        assert same and gathered == {"mamba", "self_attn"}


def with_a_package():
    """How many layers are split where transformers has found a package whose kernels want a GPU."""
    model = build("qwen3_next")
    module = sys.modules["transformers.models.qwen3_next.modeling_qwen3_next"]

    @wraps(module.torch_chunk_gated_delta_rule)
    def on_a_gpu(*args, **kwargs):
        raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "torch_chunk_gated_delta_rule", on_a_gpu)
        return tlm.report(tlm.parallelize(model, mesh((2, 2)))).states


def test_tried_without_kernels(pool):
    """Localises: a trial, which is on the CPU, that asks kernels for a GPU."""
    assert pool.run(with_a_package, 4, timeout=120) == [1] * 4


def low_precision(family, sizes):
    """Errors of logits in bfloat16, of the unsplit model and of the split one, with sums in float32 and without."""
    exact = build(family, 2, **sizes).double()
    with torch.no_grad():
        expected = exact(**inputs()).logits
        low = [copy.deepcopy(exact).bfloat16() for _ in range(3)]
        low[1:] = [
            tlm.parallelize(low[1], mesh((2, 2))),
            tlm.parallelize(low[2], mesh((2, 2)), reduce_dtype=torch.float32),
        ]
        return [(model(**inputs()).logits - expected).square().mean().sqrt().item() for model in low]


@pytest.mark.parametrize(
    "family, sizes", [("qwen3_5_text", DELTA | {"linear_num_key_heads": 1}), ("mamba2", {"n_groups": 1})]
)
def test_low_precision(pool, family, sizes):
    """R. Localises: a norm or a sum that rounds more often than the unsplit layer."""
    for stock, *ours in pool.run(low_precision, 4, family, sizes, timeout=120):
        assert max(ours) < 2 * stock, (stock, ours)


def gathered(family, sizes, attention=None):
    """Why what is gathered is; attention: modules of this name have a parameter that nobody knows."""
    model = build(family, 2, **sizes)
    for name, module in model.named_modules():
        if attention is not None and name.endswith(attention):
            module.register_parameter("unknown", torch.nn.Parameter(torch.zeros(3)))
    return list(tlm.report(tlm.parallelize(model, mesh((2, 2)))).gathered.values())


def test_what_ranks_do_not_divide(pool):
    """Localises: heads that no grid of the ranks can share, split all the same; the reason in the report."""
    reasons = pool.run(gathered, 4, "kimi_linear", DELTA | {"linear_num_heads": 6}, timeout=120)[0]
    assert reasons == ["its 6 groups of heads cannot be shared by 4 ranks"]


def test_beside_gathered_attention(pool):
    """Localises: states of all sequences in a layer of a cache whose keys are dealt by sequences."""
    reasons = pool.run(gathered, 4, "falcon_h1", {}, "self_attn", timeout=120)[0]
    assert reasons.count("its cache also has keys of attention whose weights are gathered") == 2, reasons


def compiled(family, sizes):
    """Largest differences of a compiled layer's output and gradients, one graph, from those without."""
    model = tlm.parallelize(build(family, 2, **sizes), mesh((2, 2)))
    layer = next(part for part in model.modules() if hasattr(part, "cut"))
    x_BLD, results = torch.randn(2, 7, 64), []
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        given = x_BLD.clone().requires_grad_()
        layer.zero_grad()
        y = call(given)
        (y**2).sum().backward()
        results.append([y, given.grad, *(p.grad.to_local() for p in layer.parameters() if isinstance(p, DTensor))])
    return max((a - b).abs().max().item() for a, b in zip(*results, strict=True))


@pytest.mark.slow
def test_compiled(pool):
    """Of a family whose unsplit layer can be. Localises: what of a call torch.compile cannot trace."""
    assert max(pool.run(compiled, 4, "mamba2", {"n_groups": 1}, timeout=120)) < 1e-5


def sharded():
    """The largest relative difference of gradients from the unsplit model, on a mesh of dp, head and slice."""
    axes = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("dp", "head", "slice"))
    model = build("mamba2", n_groups=1).double()
    split = tlm.parallelize(copy.deepcopy(model), axes["head", "slice"], rest=False)
    for layer in (*(part for part in split.modules() if hasattr(part, "cut")), split):
        fully_shard(layer, mesh=axes["dp"], shard_placement_fn=tlm.shard_embed_dim)
    for one in (model, split):
        with in_float64(model):
            one(inputs()["input_ids"], use_cache=False).logits.square().mean().backward()
    ours, least = stock_gradients(split), 1e-3 * max(p.grad.abs().max().item() for p in model.parameters())
    offs = {
        name: ((p.grad - ours[name]).abs().max() / p.grad.abs().max().clamp(min=least)).item()
        for name, p in model.named_parameters()
        if ours
    }
    return max(offs.values(), default=0.0)


def test_fully_shard(pool):
    """Localises: a dim of a weight's part that FSDP2 shards, vectors that it does."""
    assert max(pool.run(sharded, 4, timeout=120)) < 1e-10


def seen():
    """How a split tower of images differs in output and gradients; the grid of its attention; what is gathered."""
    model = build("got_ocr2").double()
    split = tlm.parallelize(copy.deepcopy(model), mesh((2, 2)))
    towers, offs = [one.model.vision_tower for one in (model, split)], []
    side = towers[0].config.image_size
    for tower in towers:
        for p in tower.parameters():
            p.requires_grad_()
        with in_float64(tower):
            y = tower(torch.randn(2, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
            y.last_hidden_state.square().mean().backward()
        offs.append(y.last_hidden_state)
    found = [(offs[0] - offs[1]).abs().max() / offs[0].abs().max()]
    ours = stock_gradients(split)
    for name, p in towers[0].named_parameters() if ours else ():
        found.append((p.grad - ours[f"model.vision_tower.{name}"]).abs().max() / p.grad.abs().max())
    grids = {(x.place.grid.head_groups, x.place.grid.slices) for x in towers[1].modules() if hasattr(x, "cut")}
    return max(found).item(), grids, [k for k, why in tlm.report(split).gathered.items() if why != NO_PLAN]


@pytest.mark.slow
def test_attention_of_images(pool):
    """Localises: heads of a fused projection, tables of distances that all heads share, of a form without states."""
    for off, grids, gathered in pool.run(seen, 4, timeout=120):
        assert off < 1e-10 and grids == {(4, 1)} and not gathered
