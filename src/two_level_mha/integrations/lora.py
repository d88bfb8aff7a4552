"""PEFT's LoRA on a split model, put there before or after the split; what came another way is refused.

Adapters are whole and the same on every rank: PEFT draws, saves and loads them as of the unsplit model.
"""

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from two_level_mha.agreement import digest, same_on_all_ranks
from two_level_mha.blocks import dealt
from two_level_mha.class_like import become
from two_level_mha.errors import GridError, UsageRuntimeError
from two_level_mha.integrations.forms import CALLED_WHOLE, keeps_projection
from two_level_mha.integrations.lora_layers import ADAPTED, PLAIN_ONLY, STATES, Adapted, AdaptedProjection
from two_level_mha.low_rank import Projection, blank_like, is_linear
from two_level_mha.mesh import Place, place_on
from two_level_mha.names import Model

_WAY_OUT = "put it there inside two_level_mha.adaptable(model), or before parallelize"
# Styles of a tensor-parallel plan -> what a rank takes and gives.
_STYLES = {
    "colwise": "columns", "rowwise": "rows", "colwise_gather_output": "whole", "colwise_rep": "whole",
    "rowwise_split_input": "whole", "rowwise_rep": "whole", "moe_tp_experts": "experts",
    "embedding_rowwise": "embedding", "embedding_colwise": "embedding", "gathered": "whole",
}  # fmt: skip
_AS_THEY_ARE = ("experts", "embedding")  # PEFT sees their whole sizes


class Split(NamedTuple):
    """How a module is split besides attention; kept on it under `split_as`."""

    kind: str  # "columns", "rows", "whole", "embedding" (whole features), "experts"; another: takes no adapter
    mesh: DeviceMesh


def mark(owner: nn.Module, styles: dict[str, str], mesh: DeviceMesh) -> None:
    """Notes on modules, path in `owner` -> style, how they were split; lets what calls them refuse adapters that came
    another way than by this file.
    """
    watched: dict[nn.Module, list[str]] = {}
    modules = dict(owner.named_modules())
    for path, style in styles.items():
        if path not in modules:
            continue
        parent, _, name = path.rpartition(".")
        modules[path].split_as = Split(_STYLES.get(style, style), mesh)
        watched.setdefault(modules[parent], []).append(name)
    for module, names in watched.items():
        module.register_forward_pre_hook(_Watch(tuple(names)))


class _Watch:
    """Pre-hook of a module whose children `names` are split."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        for name in self.names:
            child = module._modules[name]
            if "split_as" not in vars(child) and (hasattr(child, "base_layer") or hasattr(child, "original_module")):
                raise UsageRuntimeError(
                    f"{name} of {type(module).__name__} is split, and now inside a {type(child).__name__}, which would "
                    f"see this rank's part of it: {_WAY_OUT}"
                )


@contextlib.contextmanager
def adaptable(model: Model) -> Iterator[Model]:
    """Inside, PEFT can put LoRA around what parallelize has split of `model`, as if it were whole:

        with tlm.adaptable(model):
            peft_model = get_peft_model(model, LoraConfig(r=16, target_modules=["q_proj", "v_proj", "down_proj"]))

    So do PeftModel.from_pretrained(model, folder), load_adapter and add_adapter. Projections of attention, and linears
    split by a tensor-parallel plan or in an MLP, are whole nn.Linear's there, without their numbers; at its end what
    PEFT put around them is around the split ones. Adapters are whole on every rank, and trained to the unsplit model's.
    A collective over each grid. Raises GridError where adapters differ between ranks, are of another kind than plain
    LoRA (no DoRA, no bias, none drawn from the weights), or are on a model with split activations.
    """
    stands = []
    for parent, name, child in list(_split_places(model)):
        module = _inside(child)
        stand = module if vars(module).get("split_as", (None,))[0] in _AS_THEY_ARE else _stand_in(module)
        stands.append((parent, name, stand, module))
        _fill(parent, name, stand)
    refusal: GridError | None = None
    adapted: list[nn.Module] = []
    try:
        yield model
    finally:
        for parent, name, stand, module in stands:
            held = dict(module.named_parameters())
            for own in held.keys() & dict(stand.named_parameters()).keys():
                held[own].requires_grad_(stand.get_parameter(own).requires_grad)  # PEFT freezes what it sees
            found = getattr(parent, name)
            if found is not stand:
                refusal = refusal or _refusal(found, stand)
            _fill(parent, name, module)
            if isinstance(getattr(parent, name), Adapted):
                adapted.append(getattr(parent, name))
    mesh = next((mesh for *_, module in stands if (mesh := _mesh_of(module)) is not None), None)
    check_adapters(adapted, mesh, refusal)


@contextlib.contextmanager
def adapters_aside(model: nn.Module) -> Iterator[dict[str, nn.Module]]:
    """Takes plain LoRA layers out of a model while it is split, and puts them around what is then in their place.

    Gives them, by name. Where nothing was split there, they are as they were.
    """
    outermost: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if hasattr(module, "base_layer") and not any(name.startswith(f"{outer}.") for outer in outermost):
            outermost[name] = module
    layers = {name: module for name, module in outermost.items() if _takes(module)}
    for name, layer in layers.items():
        _put(model, name, _inside(layer))
    try:
        yield layers
    finally:
        for name, layer in layers.items():
            module = model.get_submodule(name)
            _put(model, name, layer)
            _fill(*_place(model, name), module)


def refusal_of(layers: dict[str, nn.Module], attentions: list[Any], activations: str) -> GridError | None:
    """Why a model with these LoRA layers, taken aside, cannot be split; attentions: what convert found."""
    if layers and activations != "replicated":
        return GridError(_not_split(activations))
    bases = {id(_inside(layer)): name for name, layer in layers.items()}
    for one in attentions:
        if "base_layer" in one.name.split("."):
            return GridError(
                f"{one.name} is inside a layer of PEFT that is not supported around attention: merge it first"
            )
        known = {id(part) for letter, part in one.projections.items() if is_projection(one.module, one.paths, letter)}
        children = [one.module._modules.get(name) for name in CALLED_WHOLE]
        kept = {part for child in children if child is not None for part in child.modules()}
        known |= {id(part) for part in kept.difference(one.projections.values())}
        parts = [*one.module.modules(), *one.projections.values()]
        if other := next((bases[id(part)] for part in parts if id(part) in bases and id(part) not in known), None):
            return GridError(
                f"{other} has a LoRA adapter, which a split attention of kind {one.adapter.name!r} does not take "
                "there: merge it first"
            )
    return None


def is_projection(module: nn.Module, paths: dict[str, str], letter: str) -> bool:
    """Whether the projection stays a child of the split attention: not outside, nor fused with what is no linear, nor
    used by it in another way.
    """
    alone = "." not in paths[letter] and set("".join(paths)) in (set("qkvo"), set("qo"))
    return alone and keeps_projection(module, letter)


def check_adapters(layers: Iterable[nn.Module], mesh: DeviceMesh | None, refusal: Exception | None = None) -> None:
    """Raises GridError on every rank, for the refusal of one or where adapters, meta ones aside, differ; notes on the
    layers which were compared.
    """
    adapted: list[Any] = [part for layer in layers for part in layer.modules() if hasattr(part, "base_layer")]
    own = [p for layer in adapted for name, p in layer.named_parameters() if "lora_" in name and not p.is_meta]
    advice = "seed every rank alike before adapters are made, or load them from one file"
    same_on_all_ranks({"refusal": refusal, "what the adapters hold": digest(own)}, mesh, advice)
    for layer in adapted:
        layer.compared = {*layer.lora_A, *layer.lora_embedding_A}


def _fill(parent: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` at its place in `parent`: inside the layers of PEFT that are there, which become ours if it is
    split and they are plain LoRA.
    """
    found = outer = getattr(parent, name)
    if not hasattr(outer, "base_layer"):
        setattr(parent, name, module)
        return
    split = vars(module).get("split_as")
    while hasattr(found, "base_layer"):
        inner = found.base_layer
        if not hasattr(inner, "base_layer"):
            found.base_layer = module
        if _takes(found) and not isinstance(found, Adapted):
            _adapt(found, module, split)
        found = inner
    if isinstance(outer, Adapted) and split is not None:
        outer.split_as = split


def _adapt(layer: Any, module: Any, split: Split | None) -> None:
    if isinstance(module, Projection):
        become(layer, AdaptedProjection)
    elif split is not None and split.kind == STATES:
        become(layer, ADAPTED[STATES], within=module.within)
    elif split is not None and split.kind in ADAPTED:
        place = place_on(split.mesh)
        become(layer, ADAPTED[split.kind], place=place)
        if split.kind != "experts":
            layer.own = _own(module.weight, place)


def _inside(layer: nn.Module) -> nn.Module:
    """What PEFT's layers are around; a module that is none is that itself."""
    inner: Any = layer
    while hasattr(inner, "base_layer"):
        inner = inner.base_layer
    found: nn.Module = inner
    return found


def _refusal(layer: nn.Module, stand: nn.Module) -> GridError | None:
    """Why what PEFT put around a stand-in cannot be used."""
    module = f"{type(layer).__module__}.{type(layer).__name__}"
    if not _takes(layer) or _inside(layer) is not stand:
        return GridError(f"a {module} was put around what is split: {PLAIN_ONLY}")
    for name, x in layer.named_parameters():
        if "lora_" in name and x.isnan().any():
            return GridError(f"an adapter was drawn from weights that are split: {PLAIN_ONLY}")
    return None


def _not_split(activations: str) -> str:
    return (
        f"adapters are not supported on a model with activations={activations!r}: parallelize with "
        'activations="replicated"'
    )


def _takes(module: Any) -> bool:
    """Whether it is one of PEFT's LoRA layers that can be around what is split, with plain adapters alone."""
    layers = sys.modules.get("peft.tuners.lora.layer")  # where it was not imported, no module is of it
    known = () if layers is None else (layers.Linear, layers.Embedding, layers.ParamWrapper)
    if not (type(module) in known or isinstance(module, Adapted)):
        return False
    return not module.lora_variant and not any(module.lora_bias.values())


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, child = name.rpartition(".")
    return model.get_submodule(parent), child


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    setattr(*_place(model, name), module)


def _split_places(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Parent, name and module of what is split and can be adapted; a layer of ours stands for what is in it."""
    for parent in list(model.modules()):
        activations = getattr(parent, "activations", "replicated")
        if getattr(parent, "projection_names", None) and activations != "replicated":
            raise GridError(_not_split(activations))
        for name, child in parent._modules.items():
            if child is None:
                continue
            split = vars(child).get("split_as")
            if isinstance(child, Projection | AdaptedProjection) and not isinstance(parent, Adapted):
                yield parent, name, child
            elif split is not None and split.kind in ADAPTED and not isinstance(parent, Adapted):
                if split.kind == STATES and (stream := vars(_inside(child))["within"].layer.stream) is not None:
                    raise GridError(_not_split(stream.activations))
                if split.kind in _AS_THEY_ARE or is_linear(_inside(child)):
                    yield parent, name, child


def _stand_in(module: Any) -> nn.Module:
    """A linear of whole features without numbers, on the device and of the dtype of what it stands for."""
    made: nn.Module
    like: Any
    if isinstance(module, Projection):
        layer, letters = module.whose
        made, like = module.whole(), layer._parameters["out_weight" if letters == "o" else f"{letters[0]}_weight"]
    elif (within := vars(module).get("within")) is not None and module in within.layer.stored:
        made, like = blank_like(module), within.layer.get_parameter(within.layer.stored[module]["weight"][0])
    else:
        made, like = blank_like(module), module.weight
    nan = torch.full((), torch.nan, dtype=like.dtype, device=like.device)
    held = dict(module.named_parameters())
    for name, p in list(made.named_parameters()):
        made.register_parameter(name, nn.Parameter(nan.expand(p.shape), held.get(name, p).requires_grad))
    return made


def _mesh_of(module: Any) -> DeviceMesh | None:
    mesh: DeviceMesh | None = module.whose[0].mesh if isinstance(module, Projection) else module.split_as.mesh
    return mesh


def _own(p: DTensor, place: Place) -> tuple[tuple[int, int], tuple[int, int]]:
    """First and count of the rows and of the columns that this rank has, as torch deals them."""
    rank = place.head_group * place.grid.slices + place.slice
    rows, columns = (
        dealt(size, place.grid.size, rank) if p.placements[-1] == Shard(dim) else (0, size)
        for dim, size in enumerate(p.shape)
    )
    return rows, columns
