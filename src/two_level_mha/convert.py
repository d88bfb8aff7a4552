"""parallelize: every attention of a model on a grid, in place. Structure proposes, a probe decides."""

import logging
import os
import re
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from two_level_mha.activations import check_activations
from two_level_mha.adapters import Adapter, adapters_with
from two_level_mha.agreement import ModelInputs, NoteOfFailure, check_same_weights, same_on_all_ranks
from two_level_mha.cache_layer import CACHE_LAYOUTS
from two_level_mha.errors import GridError
from two_level_mha.families import FAMILIES, later
from two_level_mha.integrations.private import pretrained_models, private_method
from two_level_mha.integrations.projected import IMPLEMENTATIONS
from two_level_mha.layer import GridAttention, check_options, check_overlap, stores_whole_heads
from two_level_mha.mesh import Grid, control_on, place_on
from two_level_mha.probe import HOOKS, changed_linear, has_hooks, layer_settings, random_copy, settings
from two_level_mha.profile import Profile, resolve_profile
from two_level_mha.replaced import note_replaced
from two_level_mha.report import keep_report
from two_level_mha.rest import Rest, find_rest, split_rest
from two_level_mha.stacks import find_stacks, split_stack
from two_level_mha.stock import resolve, take_stock_keys

# Names of projections: q, kv_b_proj, query_key_value, linear_v, c_attn and so on.
_PROJECTION = re.compile(r"(^|_)(q|k|v|kv|qkv|Wqkv|query|key|value)(_|$)|^(c_attn|in_proj)$")

# Gain of the random weights, and the difference allowed. Some models take the softmax in float32; what clips shows at
# the big numbers, where such a softmax is nearly one of its inputs.
TRIALS = ((1.0, 1e-6), (30.0, 1e-2))


@dataclass
class Found:
    """An attention module, and wherever the model refers to it."""

    module: nn.Module
    adapter: Adapter
    projections: dict[str, nn.Module]
    uses: list[tuple[nn.Module, str]]  # parent and name of the child
    name: str  # at the first use
    variant: dict[str, object] = field(default_factory=dict)  # of the adapter's, the one that the probe chose

    @property
    def parent(self) -> nn.Module:
        return self.uses[0][0]

    def names(self) -> list[str]:
        """Of what is split with it: the module, and projections outside it."""
        outside = [path for path in self.adapter.paths.values() if path.startswith("../")]
        return [self.name, *(resolve(self.name, path) for path in outside)]

    def sizes(self) -> tuple[int, int, int]:
        """Heads, key/value heads, head_dim."""
        return self.adapter.sizes(self.module, self.projections)


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh | None,
    *,
    scheme: str = "auto",
    combine: str = "reduce",
    rest: bool = True,
    cache: str = "position",
    debug: bool | None = None,
    reduce_dtype: torch.dtype | None = None,
    profile: Profile | str | os.PathLike | None = None,
    activations: str = "replicated",
    overlap: int | None = None,
) -> nn.Module:
    """Replaces every supported attention of `model` by its split form, in place; returns the model.

    Supported: nn.MultiheadAttention, and transformers' BERT, RoBERTa, ViT, GPT-2 and Llama attention and what has their
    shape (of Llama: Mistral, Mixtral, Qwen2, Qwen3, Gemma and others), model.generate() included. A replacement must
    give the original's numbers on a small random input, once per class and configuration, or GridError names it.
    rest: also split over the flattened grid what is not attention: a transformers model by its own tensor-parallel plan
    and transformers' code (MLPs, experts, embeddings unless tied, head); where there is no plan, the MLPs of
    nn.TransformerEncoderLayer / DecoderLayer, BERT and ViT by torch's ColwiseParallel and RowwiseParallel, where P
    divides the width and a copy, run in parts, gives its numbers.
    cache: how such decoders keep a KV cache that transformers made: "position" or "batch" (two_level_mha.cache).
    reduce_dtype: torch.float32 sums outputs and gradients over ranks in it, None in the tensors' own dtype.
    profile, overlap: the rates by which scheme="auto" chooses, and chunks, as for TwoLevelMultiheadAttention.
    activations: "sequence" or "batch": hidden states stay split from the first layer to behind the last, each rank has
    its rows or its sequences (shard_activations). Norms, dropout and residuals act on parts; attention and MLPs gather
    what they are given and sum into parts what they give. The model takes and gives what it did. Short calls without
    gradients, as the steps of a generation, stay replicated. What cannot stay split is in the report.
    A collective over the grid. Raises GridError, on every rank and before anything is changed, when nothing is found,
    when an attention is found that is not supported, when the grid does not fit one, or when the ranks' arguments or
    weights differ. What was split is told by two_level_mha.report(model), which the grid's first rank also logs (logger
    "two_level_mha", level INFO). Attributes, forward and backward hooks, and the training mode of the originals are
    kept, and load_state_dict takes the original model's state dict; an optimizer is made afterwards, one that holds a
    parameter which was replaced raises GridError in its first step. A transformers model becomes one of a subclass, of
    the same name: generate() takes the token that the grid's first rank drew on every rank, save_pretrained(folder)
    writes whole tensors on the first rank, and is called on every one.
    """
    options = {"scheme": scheme, "combine": combine, "debug": debug, "cache": cache, "reduce_dtype": reduce_dtype}
    options["overlap"] = overlap
    grid = place_on(mesh).grid
    found, pretrained, others, stacks, refusal, rates = [], [], Rest(), [], None, None
    try:
        check_options(scheme, combine)
        check_activations(activations)
        check_overlap(overlap)
        options["profile"] = resolve_profile(profile, "cpu" if mesh is None else mesh.device_type)
        rates = options["profile"].numbers
        if cache not in CACHE_LAYOUTS:
            raise GridError(f"cache must be one of {', '.join(CACHE_LAYOUTS)}, got {cache!r}")
        pretrained = list(pretrained_models(model).values())
        for part in pretrained:
            if part.can_generate():
                private_method(part, "_get_stopping_criteria")  # or it is refused
        found = _find(model)
        _check_grid(found, grid, scheme)
        _probe_all(found, options)
        if rest and grid.size > 1:
            others = find_rest(model, grid.size, {name for one in found for name in one.names()})
        if activations != "replicated" and grid.size > 1:
            stacks, whole = find_stacks(model, found, others)
            others.left_out |= whole
    except Exception as error:  # whatever it is, the others would wait for this rank
        refusal = error
    arguments = {"refusal": refusal, "scheme": scheme, "combine": combine, "rest": rest, "cache": cache}
    arguments |= {"activations": activations, "overlap": overlap, "reduce_dtype": str(reduce_dtype), "profile": rates}
    same_on_all_ranks(arguments, mesh, "call parallelize alike on every rank")
    if mesh is not None:
        check_same_weights(model, mesh, any(_dropout(module) > 0.0 for module in model.modules()))
        kinds = {
            "which MLPs can be split": list(others.mlps),
            "the tensor-parallel plan": [rules for _, rules in others.tp_plans.values()],
            "which hidden states can stay split": [stack.name for stack in stacks],
            "what attention does": [(one.adapter.name, one.variant) for one in found],
        }
        same_on_all_ranks(kinds, mesh, "build the model alike on every rank")
    before = dict(model.named_parameters())
    split = {module for stack in stacks for module in stack.attentions}
    for one in found:
        _replace(one, mesh, options | ({"activations": activations} if one.module in split else {}))
    for part in pretrained:
        later("on_grid", "put_on_grid")(part, mesh)
    if grid.size > 1:
        control = control_on(mesh)
        model.register_forward_pre_hook(ModelInputs(control), with_kwargs=True)
        model.register_forward_hook(NoteOfFailure(control), always_call=True)
        split_rest(others, mesh, {linear for stack in stacks for linear in stack.linears})
        for stack in stacks:
            split_stack(stack, mesh, activations, reduce_dtype)
    note_replaced(before, model, "parallelize")
    report = keep_report(model, len(found), others)
    if mesh is None or not any(mesh.get_coordinate()):
        logging.getLogger("two_level_mha").info("%s", report)
    return model


def _dropout(module: nn.Module) -> float:
    values = (getattr(module, name, 0.0) for name in ("p", "dropout", "attention_dropout"))
    return max(value if isinstance(value, float) else 0.0 for value in values)


def _looks_like_attention(module: nn.Module) -> bool:
    return "Attention" in type(module).__name__ and any(_PROJECTION.search(name) for name in module._modules)


def _find(model: nn.Module) -> list[Found]:
    """Every attention of the model. Raises GridError, naming it, for one that is not supported."""
    owners: dict[int, list[str]] = {}  # parameter -> modules that own it; a module used in several places is one
    uses: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    adapters = adapters_with(FAMILIES)
    supported = "supported: " + ", ".join(adapter.name for adapter in adapters)
    for name, module in model.named_modules():
        for p in module._parameters.values():
            owners.setdefault(id(p), []).append(name)
        for child_name, child in module._modules.items():
            uses.setdefault(child, []).append((module, child_name))
    found: list[Found] = []
    for name, module in model.named_modules():
        parent = uses[module][0][0] if name else None
        if isinstance(module, GridAttention):  # split already
            continue
        adapter = next((one for one in adapters if one.matches(module, parent)), None)
        if adapter is None and not _looks_like_attention(module):
            continue
        where = f"{name or 'the model'} ({type(module).__name__})"
        if not name:
            raise GridError(
                f"{where} is itself an attention, and has no place in a model: put it into an nn.ModuleList, or use "
                "TwoLevelMultiheadAttention.from_torch"
            )
        if adapter is None:
            raise GridError(
                f"{where} looks like attention of a structure that is not supported; {supported}; a part of the model "
                "without it can be split by itself: parallelize(model.part, mesh)"
            )
        one = Found(module, adapter, adapter.projections(module, parent), uses[module], name)
        if problem := _problem(one, owners):
            raise GridError(f"{where} is not supported: {problem}")
        found.append(one)
    if not found:
        done = any(isinstance(module, GridAttention) for module in model.modules())
        known = "it is split already" if done else supported
        raise GridError(f"no attention was found in {type(model).__name__} that could be split; {known}")
    return found


def _check_grid(found: list[Found], grid: Grid, scheme: str) -> None:
    for one in found:
        try:
            h, k, d = one.sizes()
            grid.check(h, k, d)
            stores_whole_heads(scheme, h, k, grid)
        except GridError as error:
            raise GridError(f"{one.name} ({type(one.module).__name__}): {error}") from None


def _problem(one: Found, owners: dict[int, list[str]]) -> str | None:
    """Why a module of a known structure cannot be replaced, or None."""
    module = one.module
    kind = f"{type(module).__module__}.{type(module).__name__}"
    if problem := changed_linear(module):
        return f"it {problem}"
    if isinstance(module, nn.MultiheadAttention) and type(module) is not nn.MultiheadAttention:
        return f"it is a subclass of nn.MultiheadAttention ({kind})"
    if "CrossAttention" in type(module).__name__:
        return "it is cross-attention"
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", "sdpa")
    if implementation not in IMPLEMENTATIONS:
        return f'its attention implementation is {implementation!r}: call model.set_attn_implementation("sdpa") first'
    if problem := one.adapter.problem(module):
        return problem
    for letter, projection in one.projections.items():
        what = f"its {letter} projection, {one.adapter.paths[letter].removeprefix('../')},"
        if problem := changed_linear(projection):
            return f"{what} {problem}"
        if not one.adapter.is_plain(projection):
            return (
                f"{what} is a {type(projection).__module__}.{type(projection).__name__}, not a plain "
                f"{one.adapter.linear} (merge adapters, or undo quantisation, first)"
            )
        if has_hooks(projection):
            return f"{what} has hooks, which would no longer run: remove them first"
    known = {id(p) for projection in one.projections.values() for p in projection.parameters()}
    for name, p in [*module.named_parameters(), *((path, p) for path, projection in one.projections.items()
                                                   for p in projection.parameters())]:  # fmt: skip
        if len(owners[id(p)]) > 1:
            return f"it shares a parameter between {', '.join(owners[id(p)])}: untie it first"
        if isinstance(p, DTensor):
            return "its parameters are DTensors already"
        if id(p) not in known and name not in one.adapter.parameters:
            return f"it has a parameter that {one.adapter.name} attention has not: {name}"
    if one.adapter.out_in_parent and len({id(parent) for parent, _ in one.uses}) > 1:
        return "it is used in several places, with an output projection at each"
    return None


def _features(one: Found) -> tuple:
    """What makes two modules of one class behave differently."""
    shapes = tuple((letter, tuple(p.weight.shape), p.bias is None) for letter, p in one.projections.items())
    own = tuple((name, tuple(p.shape)) for name, p in one.module.named_parameters())
    config, layer = getattr(one.module, "config", None), getattr(one.module, "layer_idx", None)
    implementation = getattr(config, "_attn_implementation", None)
    return type(one.module), implementation, shapes, own, settings(one.module), layer_settings(config, layer)


def _probe_all(found: list[Found], options: dict) -> None:
    """Probes one module of each kind, and notes for all of them which variant gives its numbers."""
    variants: dict[tuple, dict[str, object]] = {}
    for one in found:
        kind = _features(one)
        if kind not in variants:
            variants[kind] = _agreeing(one, options)
        one.variant = variants[kind]


def _agreeing(one: Found, options: dict) -> dict[str, object]:
    """The first of the adapter's variants that gives the original's numbers. Raises the GridError of the first if none
    does.
    """
    refusals = []
    for variant in one.adapter.variants:
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("cpu"):
                torch.default_generator.manual_seed(0)  # torch.manual_seed would seed those of GPUs too
                for gain, tolerance in TRIALS:
                    _probe(one, options | variant, gain, tolerance)
            return variant
        except GridError as error:
            refusals.append(error)
    raise refusals[0]


def _probe(one: Found, options: dict, gain: float, tolerance: float) -> None:
    """Runs a copy of the original and its replacement on small random inputs; raises GridError if they differ."""
    where, known = f"{one.name} ({type(one.module).__name__})", one.adapter.name
    try:
        original, *copies = random_copy([one.module, *one.projections.values()], gain)
    except Exception as error:
        raise GridError(f"{where} is not supported: it cannot be copied for a trial: {error!r}") from error
    projections = dict(zip(one.projections, copies, strict=True))
    try:
        ours = one.adapter.new(original, projections, None, options).eval()
    except GridError as error:
        raise GridError(f"{where} is not supported: {error}") from None
    calls = []  # twice the same: a cache in them is written to
    for _ in range(2):
        torch.default_generator.manual_seed(1)
        calls.append(one.adapter.inputs(original, torch.float64))
    for (args, kwargs), (our_args, our_kwargs) in zip(*calls, strict=True):
        try:
            expected = original(*args, **kwargs)[0]
            if one.adapter.out_in_parent:
                expected = projections["o"](expected)
        except Exception as error:
            raise GridError(
                f"{where} has the structure of {known} attention, but cannot be called like it: {error!r}"
            ) from error
        try:
            got = ours(*our_args, **our_kwargs)[0]
        except Exception as error:
            raise GridError(
                f"{where} has the structure of {known} attention, but its parts do not work like it: {error!r}"
            ) from error
        difference = (expected - got).abs().max().item() if expected.shape == got.shape else float("inf")
        if not difference <= tolerance * expected.abs().max().item():
            raise GridError(
                f"{where} has the structure of {known} attention, but its numbers differ from it by {difference:.1e} "
                "on a small input: it does something else, and is not supported"
            )


def _replace(one: Found, mesh: DeviceMesh | None, options: dict) -> None:
    ours = one.adapter.new(one.module, one.projections, mesh, options | one.variant).train(one.module.training)
    for part in ours.modules() if mesh is not None else ():
        if isinstance(part, GridAttention) and part.calls is not None:
            part.calls.name = one.names()[0]
    for name, value in vars(one.module).items():  # what others may read or hook stays
        if name in (*HOOKS, "_is_full_backward_hook") or (not name.startswith("_") and name not in vars(ours)):
            vars(ours)[name] = value
    for parent, child in one.uses:
        setattr(parent, child, ours)
    if one.adapter.out_in_parent:
        child = one.uses[0][1]
        holder, _, linear = resolve(child, one.adapter.paths["o"]).rpartition(".")
        setattr(one.parent.get_submodule(holder), linear, nn.Identity())
        take_stock_keys(one.parent, child)
