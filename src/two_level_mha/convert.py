"""parallelize: every attention of a model on a grid, in place."""

import logging
import os
from collections.abc import Callable, Collection
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from two_level_mha.activations import check_activations
from two_level_mha.agreement import ModelInputs, NoteOfFailure, check_same_weights, same_on_all_ranks
from two_level_mha.attentions import Attentions, Found, add_whole, find_attentions, gather_adapted, gather_beside_mixers
from two_level_mha.cache_layer import CACHE_LAYOUTS, check_shares
from two_level_mha.copies import copies_as_one
from two_level_mha.errors import GridError
from two_level_mha.families import later
from two_level_mha.integrations.lora import adapters_aside, check_adapters, is_projection, refusal_of
from two_level_mha.integrations.private import pretrained_models, private_method
from two_level_mha.layer import GridAttention, check_options, check_overlap, stores_whole_heads
from two_level_mha.low_rank import Projection
from two_level_mha.mesh import Grid, control_on, mesh_of, place_on
from two_level_mha.names import Activations, CacheLayout, Combine, Model, Scheme
from two_level_mha.probe import HOOKS, drops
from two_level_mha.profile import Profile, resolve_profile
from two_level_mha.replaced import note_replaced
from two_level_mha.report import keep_report
from two_level_mha.rest import Rest, find_rest, plan_trials, split_rest
from two_level_mha.stacks import Stack, find_stacks, split_stack
from two_level_mha.state_trial import take_states
from two_level_mha.stock import resolve, take_stock_keys
from two_level_mha.whole_trial import WholeTrial, whole_trials

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def parallelize(
    model: Model,
    mesh: DeviceMesh | None,
    *,
    scheme: Scheme = "auto",
    combine: Combine = "reduce",
    rest: bool = True,
    cache: CacheLayout = "position",
    debug: bool | None = None,
    reduce_dtype: torch.dtype | None = None,
    profile: Profile | str | os.PathLike[str] | None = None,
    activations: Activations = "replicated",
    overlap: int | None = None,
    skip: Collection[str] = (),
    only: Collection[str] = ("*",),
) -> Model:
    """Replaces every supported attention of `model` by its split form, in place; returns the model.

    Supported: nn.MultiheadAttention, and transformers' self-attention, of decoders and encoders, whose parts are called
    as in integrations/forms.py (Llama, Qwen, Gemma, GPT-2, OPT, Phi, GPT-NeoX, Falcon, Bloom, OLMo, gpt-oss, DeepSeek,
    BERT, ViT, CLIP and many others), model.generate() included. A replacement must give the original's numbers on a
    small random input, once per class and configuration.
    rest: also split over the flattened grid what is not attention: a transformers model by its own tensor-parallel plan
    and transformers' code (MLPs, experts, embeddings, head); a weight that embeddings and heads share; what no plan has
    a word of, MLPs whose linears are called as in rest.py (nn.TransformerEncoderLayer / DecoderLayer, BERT, ViT, BART,
    towers), by torch's ColwiseParallel and RowwiseParallel, where P divides the width and a copy, run in parts, gives
    its numbers.
    Attention of a transformers model that no replacement reproduces keeps its own code: its weights are stored split
    over all ranks and gathered for each call, in which every rank runs its sequences of the batch, and caches theirs.
    Attention with one key/value head, which head groups cannot share, is split over the grid's ranks as one of (1, P);
    multi-head latent attention as one of the most head groups that its heads allow.
    skip, only: patterns of names of modules, as of fnmatch ("model.vision_tower*"): what a skip pattern matches, or no
    only pattern, stays whole, with all that is in it, and is named in the report.
    cache: how such decoders keep a KV cache that transformers made: "position" or "batch" (two_level_mha.cache).
    reduce_dtype: torch.float32 sums outputs and gradients over ranks in it, None in the tensors' own dtype.
    profile, overlap: the rates by which scheme="auto" chooses, and chunks, as for TwoLevelMultiheadAttention.
    activations: "sequence" or "batch": hidden states stay split from the first layer to behind the last, each rank has
    its rows or its sequences (shard_activations). Norms, dropout and residuals act on parts; attention and MLPs gather
    what they are given and sum into parts what they give. The model takes and gives what it did. Short calls without
    gradients, as the steps of a generation, stay replicated. What cannot stay split is in the report.
    A collective over the grid. Raises GridError, on every rank and before anything is changed, when nothing is found,
    when an attention is found that is not supported, when the grid does not fit one, or when the ranks' arguments or
    weights differ. Last, a transformers model runs on two tokens, forward and backward, as it did before the split: it
    must run, and in float32 and float64 give the same output and the same gradients of what every rank has whole. Where
    it does not, GridError names what failed; the model is then changed, and of no use. Of a model that cannot be called
    with two tokens alone, or has no weights yet, the report says that it was not tried. What was split is told by
    two_level_mha.report(model), which the grid's first rank also logs (logger "two_level_mha", level INFO). Attributes,
    forward and backward hooks, and the training mode of the originals are kept, and load_state_dict takes the original
    model's state dict; an optimizer is made afterwards, one that holds a parameter which was replaced raises GridError
    in its first step. A transformers model becomes one of a subclass, of the same name: generate() takes the token that
    the grid's first rank drew on every rank, save_pretrained(folder) writes whole tensors on the first rank, and is
    called on every one.
    PEFT's LoRA layers stay, around what is split then: adapters whole on every rank (two_level_mha.adaptable adds some
    afterwards).
    """
    with adapters_aside(model) as layers, copies_as_one(model):
        return _parallelize(
            model, mesh, layers, scheme=scheme, combine=combine, rest=rest, cache=cache, debug=debug,
            reduce_dtype=reduce_dtype, profile=profile, activations=activations, overlap=overlap, skip=skip, only=only,
        )  # fmt: skip


def _parallelize(
    model: Model,
    mesh: DeviceMesh | None,
    layers: dict[str, nn.Module],
    *,
    scheme: str,
    combine: str,
    rest: bool,
    cache: str,
    debug: bool | None,
    reduce_dtype: torch.dtype | None,
    profile: Profile | str | os.PathLike[str] | None,
    activations: str,
    overlap: int | None,
    skip: Collection[str],
    only: Collection[str],
) -> Model:
    """parallelize, of a model whose LoRA layers are aside."""
    options: dict[str, Any] = {"scheme": scheme, "combine": combine, "debug": debug, "cache": cache}
    options |= {"reduce_dtype": reduce_dtype, "overlap": overlap}
    place = place_on(mesh)
    grid = place.grid
    attentions, others = Attentions(), Rest()
    pretrained: dict[str, PreTrainedModel] = {}
    stacks: list[Stack] = []
    refusal: Exception | None = None
    rates: tuple[int, ...] | None = None
    try:
        check_options(scheme, combine)
        check_activations(activations)
        check_overlap(overlap)
        options["profile"] = resolve_profile(profile, "cpu" if mesh is None else mesh.device_type)
        rates = options["profile"].numbers
        if cache not in CACHE_LAYOUTS:
            raise GridError(f"cache must be one of {', '.join(CACHE_LAYOUTS)}, got {cache!r}")
        check_shares(cache, place)
        pretrained = pretrained_models(model)
        for part in pretrained.values():
            if part.can_generate():
                for name in ("_get_stopping_criteria", "_prepare_static_cache"):
                    private_method(part, name)  # or it is refused
        skips = _skips(model, skip, only)
        attentions = find_attentions(model, skips, options)
        found = attentions.found
        gather_adapted(attentions, layers)
        _check_grid(found, grid, scheme)
        if (unadapted := refusal_of(layers, found, activations)) is not None:
            raise unadapted
        if grid.size > 1:
            take_states(attentions, grid)
            gather_beside_mixers(attentions)
        if rest and grid.size > 1:
            others = find_rest(model, grid.size, attentions.names(), skips)
            if activations == "replicated" and scheme != "independent":
                add_whole(model, attentions, others.splits, skips)
        others.left_out |= dict.fromkeys(attentions.skipped, "skip= or only= says so")
        if activations != "replicated" and grid.size > 1:
            stacks, whole = find_stacks(model, found, others, attentions.states)
            others.left_out |= whole
            stacks = [stack for stack in stacks if not _holds(stack.layers, attentions, others, grid)]
    except Exception as error:  # whatever it is, the others would wait for this rank
        refusal = error
    arguments: dict[str, object] = {"refusal": refusal, "scheme": scheme, "combine": combine, "rest": rest}
    arguments |= {
        "cache": cache,
        "skip": list(skip),
        "only": list(only),
        "activations": activations,
        "overlap": overlap,
        "reduce_dtype": str(reduce_dtype),
        "profile": rates,
        "LoRA layers": list(layers),
    }
    same_on_all_ranks(arguments, mesh, "call parallelize alike on every rank")
    if layers:
        check_adapters(layers.values(), mesh)
    if mesh is not None:
        check_same_weights(model, mesh, drops(model))
        kinds: dict[str, object] = {
            "which MLPs can be split": list(others.mlps),
            "which embeddings and heads share a split weight": [sorted(one.names()) for one in others.vocabularies],
            "the tensor-parallel plan": [rules for _, rules in others.tp_plans.values()],
            "which hidden states can stay split": [stack.name for stack in stacks],
            "what attention does": [(one.adapter.name, one.variant) for one in attentions.found],
            "whose weights are gathered": list(attentions.gathered),
            "which states are split": [(name, one.gate_first) for name, one in attentions.states.items()],
        }
        same_on_all_ranks(kinds, mesh, "build the model alike on every rank")
    whole_models: list[WholeTrial] = []
    if mesh is not None and grid.size > 1 and not control_on(mesh).alone:
        whole_models, others.untried = whole_trials(pretrained, mesh, control_on(mesh), scheme != "independent")
    before = dict(model.named_parameters())
    split = {module for stack in stacks for module in stack.attentions}
    for one in attentions.found:
        _replace(one, mesh, options | ({"activations": activations} if one.module in split else {}))
    for part in pretrained.values():
        later("on_grid", "put_on_grid")(part, mesh)
    if grid.size > 1:
        assert mesh is not None
        control = control_on(mesh)
        model.register_forward_pre_hook(ModelInputs(control), with_kwargs=True)
        model.register_forward_hook(NoteOfFailure(control), always_call=True)
        for name, (module, _) in attentions.gathered.items():
            later("gathered", "gather_weights")(module, name, mesh)
        for _, module, gate_first in attentions.states.values():
            later("states", "split_states")(module, mesh, gate_first, reduce_dtype)
        trials = plan_trials(others) if not stacks else []
        split_rest(others, mesh, {linear for stack in stacks for linear in stack.linears})
        for stack in stacks:
            split_stack(stack, mesh, activations, reduce_dtype)
        for trial in trials:
            trial.check()
        for whole_model in whole_models:
            whole_model.check(control)
    note_replaced(before, model, "parallelize")
    report = keep_report(model, attentions, others)
    if mesh is None or not any(mesh.get_coordinate() or ()):
        logging.getLogger("two_level_mha").info("%s", report)
    return model


def _skips(model: nn.Module, skip: Collection[str], only: Collection[str]) -> Callable[[str], bool]:
    """Whether the module of a name stays whole. Raises GridError for a pattern that no module has."""
    for argument, patterns in (("skip", skip), ("only", only)):
        if isinstance(patterns, str):
            raise GridError(f"{argument} must be a list of patterns of names of modules, got the text {patterns!r}")
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name, _ in model.named_modules()):
                raise GridError(f"{argument}: no module of {type(model).__name__} has a name like {pattern!r}")

    def matches(name: str, patterns: Collection[str]) -> bool:
        parts = name.split(".")
        return any(fnmatchcase(".".join(parts[: i + 1]), pattern) for i in range(len(parts)) for pattern in patterns)

    return lambda name: matches(name, skip) or not matches(name, only)


def _holds(layers: list[nn.Module], attentions: Attentions, others: Rest, grid: Grid) -> bool:
    """Whether there is attention in these layers which takes whole hidden states; then the report will say so."""
    inside = {module for layer in layers for module in layer.modules()}
    names = [name for name, (module, _) in attentions.gathered.items() if module in inside]
    left_out = {name: "hidden states are whole around it, since its weights are gathered" for name in names}
    for one in attentions.found:
        own = one.own_grid(grid)
        if one.module in inside and not own.deals_parts_as(grid):
            left_out[f"the hidden states of {one.name}"] = (
                f"attention takes the ranks as a grid ({own.head_groups}, {own.slices}), whose ranks have other parts "
                "of them: give the model a mesh of that grid"
            )
    others.left_out |= left_out
    return bool(left_out)


def _check_grid(found: list[Found], grid: Grid, scheme: str) -> None:
    for one in found:
        try:
            h, k, d = one.sizes()
            own = one.own_grid(grid)
            own.check(h, k, d)
            stores_whole_heads(scheme, h, k, own)
        except GridError as error:
            raise GridError(f"{one.name} ({type(one.module).__name__}): {error}") from None


def _replace(one: Found, mesh: DeviceMesh | None, options: dict[str, Any]) -> None:
    own = mesh_of(mesh, one.own_grid)
    ours = one.adapter.new(one.module, one.projections, one.paths, own, options | one.variant)
    ours.train(one.module.training)
    for inside in ours.modules() if mesh is not None else ():
        if isinstance(inside, GridAttention) and inside.calls is not None:
            inside.calls.name = one.names()[0]
    for name, value in vars(one.module).items():  # what others may read or hook stays
        if name in (*HOOKS, "_is_full_backward_hook") or (not name.startswith("_") and name not in vars(ours)):
            vars(ours)[name] = value
    for letters, projection in one.projections.items():
        if isinstance(ours, GridAttention) and is_projection(one.module, one.paths, letters):
            ours.add_module(one.paths[letters], Projection(ours, letters, projection))
            ours.projection_names[letters] = one.paths[letters]
    for name in one.module._modules:  # in the original's order, in which adapters are put to them and drawn
        part = ours._modules.pop(name, None)
        if part is not None:
            ours.add_module(name, part)
    for parent, child in one.uses:
        setattr(parent, child, ours)
    if one.out_in_parent:
        child = one.uses[0][1]
        holder, _, linear = resolve(child, one.paths["o"]).rpartition(".")
        setattr(one.parent.get_submodule(holder), linear, nn.Identity())
        take_stock_keys(one.parent, child)
