"""PEFT's LoRA on a split model. Its layers stay PEFT's, around what is split, with what they compute and merge ours.

The adapters A (r, in) and B (out, r) are whole and the same on every rank, as PEFT makes them: it draws, saves and
loads them as of the unsplit model. A rank computes with the rows of B, or the columns of A, that go with its part.
"""

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.functional import linear

from two_level_mha.agreement import digest, same_on_all_ranks
from two_level_mha.class_like import become
from two_level_mha.errors import GridError, UsageRuntimeError
from two_level_mha.low_rank import Cut, Projection, Term
from two_level_mha.mesh import Place, place_on
from two_level_mha.probe import has_hooks

_WAY_OUT = "put it there inside two_level_mha.adaptable(model), or before parallelize"
# Styles of a tensor-parallel plan -> what a rank takes and gives. Those of embeddings take and give all, as PEFT's
# layers around them do.
_STYLES = {
    "colwise": "columns", "rowwise": "rows", "colwise_gather_output": "whole", "colwise_rep": "whole",
    "rowwise_split_input": "whole", "rowwise_rep": "whole",
}  # fmt: skip
_UNCHANGED = ("embedding_rowwise", "embedding_colwise")

_ops = torch.ops.two_level_mha


class Split(NamedTuple):
    """How a module is split besides attention; kept on it under `split_as`."""

    kind: str  # "columns", "rows", "whole" (takes and gives whole features); another: takes no adapter
    mesh: DeviceMesh


def mark(owner: nn.Module, styles: dict[str, str], mesh: DeviceMesh) -> None:
    """Notes on modules, path in `owner` -> style, how they were split; lets what calls them refuse adapters that came
    another way than by this file.
    """
    watched: dict[nn.Module, list[str]] = {}
    modules = dict(owner.named_modules())
    for path, style in styles.items():
        if path not in modules or style in _UNCHANGED:
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

    def __call__(self, module: nn.Module, args: tuple) -> None:
        for name in self.names:
            child = module._modules[name]
            if "split_as" not in vars(child) and (hasattr(child, "base_layer") or hasattr(child, "original_module")):
                raise UsageRuntimeError(
                    f"{name} of {type(module).__name__} is split, and now inside a {type(child).__name__}, which would "
                    f"see this rank's part of it: {_WAY_OUT}"
                )


class Adapted(nn.Module):
    """A LoRA layer of PEFT around what is split: made of one by `become`. Below, what PEFT's own would do otherwise."""

    def terms(self) -> list[Term]:
        """Those of the active adapters; none of merged ones."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return []
        return [] if self.merged else [self.term(name) for name in self.active_adapters if name in self.lora_A]

    def term(self, name: str) -> Term:
        if self.lora_variant.get(name) is not None or self.lora_bias[name]:
            raise UsageRuntimeError(f"adapter {name!r}: {_plain_only()}")
        return Term(self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name], self.lora_dropout[name])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As PEFT's, into this rank's part of the weight."""
        for name in _peft("tuners.tuners_utils").check_adapters_to_merge(self, adapter_names):
            if name not in self.lora_A:
                continue
            term = self.term(name)
            if safe_merge and not all(torch.isfinite(x).all() for x in (term.a, term.b)):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            with torch.no_grad():
                self.add(term, term.scale)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """As PEFT's."""
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.lora_A:
                with torch.no_grad():
                    self.add(self.term(name), -self.scaling[name])

    def add(self, term: Term, scale: float) -> None:
        """Adds scale * B A to the weight."""
        raise NotImplementedError


class AdaptedProjection(Adapted):
    """Of a split attention, which asks for the terms."""

    def terms(self) -> list[Term]:
        if has_hooks(self):  # as those by which PEFT passes adapter_names
            raise UsageRuntimeError(
                "a LoRA layer of a split attention has hooks, which would not run (adapter_names= of a call are such): "
                "remove them, or call with one set of active adapters"
            )
        return super().terms()

    def forward(self, *args, **kwargs) -> Tensor:
        return self.base_layer(*args, **kwargs)  # says what is wrong

    def add(self, term: Term, scale: float) -> None:
        layer, letters = self.base_layer.whose
        cut, d = Cut(layer.place, layer.head_dim), layer.head_dim
        if letters == "o":
            own = _local(layer.out_weight)  # (D, heads, width)
            a = cut.of(term.a.unflatten(1, (-1, d)), 1, *own.shape[1:])
            own.add_(torch.einsum("or,rhd->ohd", term.b.to(own.dtype), a.to(own.dtype)), alpha=scale)
            return
        first = 0
        for letter in letters:
            own = _local(getattr(layer, f"{letter}_weight"))  # (heads, width, D)
            heads = layer.num_heads if letter == "q" else layer.num_kv_heads
            b = term.b.narrow(0, first, heads * d).unflatten(0, (heads, d))
            b = cut.of(b, 0, *own.shape[:2])
            own.add_(torch.einsum("hdr,ri->hdi", b.to(own.dtype), term.a.to(own.dtype)), alpha=scale)
            first += heads * d


class AdaptedLinear(Adapted):
    """Of a linear that takes and gives whole features, whose weight is split; PEFT's own forward is right for it."""

    own: tuple[tuple[int, int], tuple[int, int]]  # rows and columns of the weight that this rank has: first, count
    place: Place

    def add(self, term: Term, scale: float) -> None:
        own = _local(self.base_layer.weight)
        b, a = term.b.narrow(0, *self.own[0]), term.a.narrow(1, *self.own[1])
        own.add_(b.to(own.dtype) @ a.to(own.dtype), alpha=scale)

    def alone(self, adapter_names: object) -> None:
        """Refuses what is not done here."""
        if adapter_names is not None:
            raise UsageRuntimeError("adapter_names= is not supported by a split linear: call with one set of adapters")

    def everywhere(self, xs: list[Tensor]) -> list[Tensor]:
        return _ops.replicated(xs, self.place.grid.size, self.place.groups[2])


class AdaptedColumns(AdaptedLinear):
    """Gives this rank's columns."""

    def forward(self, x: Tensor, *args, adapter_names: list[str] | None = None, **kwargs) -> Tensor:
        self.alone(adapter_names)
        result = y = self.base_layer(x, *args, **kwargs)
        for term in self.terms():
            a, b = self.everywhere([linear(term.dropout(x).to(term.a.dtype), term.a), term.b])
            result = result + linear(a, b.narrow(0, *self.own[0])) * term.scale
        return result.to(y.dtype)


class AdaptedRows(AdaptedLinear):
    """Takes this rank's columns of its input, gives the sum."""

    def forward(self, x: Tensor, *args, adapter_names: list[str] | None = None, **kwargs) -> Tensor:
        self.alone(adapter_names)
        result = y = self.base_layer(x, *args, **kwargs)
        for term in self.terms():
            (a,) = self.everywhere([term.a])
            inner = linear(self._dropped(x, term).to(a.dtype), a.narrow(1, *self.own[1]))
            inner = _ops.all_reduce(inner, self.place.grid.size, self.place.groups[2])
            result = result + linear(inner, term.b) * term.scale
        return result.to(y.dtype)

    def _dropped(self, x: Tensor, term: Term) -> Tensor:
        """x without the elements that would be dropped of the whole."""
        p = getattr(term.dropout, "p", 0.0)
        if not term.dropout.training or p == 0.0:
            return x
        kept = torch.empty((*x.shape[:-1], term.a.shape[1]), dtype=torch.bool, device=x.device).bernoulli_(1.0 - p)
        scale = 0.0 if p == 1.0 else 1.0 / (1.0 - p)
        return x * kept.narrow(-1, *self.own[1]).to(x.dtype).mul_(scale)


_ADAPTED = {"columns": AdaptedColumns, "rows": AdaptedRows, "whole": AdaptedLinear}


@contextlib.contextmanager
def adaptable(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, PEFT can put LoRA around what parallelize has split of `model`, as if it were whole:

        with tlm.adaptable(model):
            peft_model = get_peft_model(model, LoraConfig(r=16, target_modules=["q_proj", "v_proj", "down_proj"]))

    So do PeftModel.from_pretrained(model, folder), load_adapter and add_adapter. Projections of attention, and linears
    split by a tensor-parallel plan or in an MLP, are whole nn.Linear's there, without their numbers; at its end what
    PEFT put around them is around the split ones. Adapters are whole on every rank, and trained to the unsplit model's.
    A collective over each grid. Raises GridError where adapters differ between ranks, are of another kind than plain
    LoRA (no DoRA, no bias, none drawn from the weights), or are on a model with split activations.
    """
    places = list(_split_places(model))
    stands = []
    for parent, name, module in places:
        stand = _stand_in(module.base_layer if isinstance(module, Adapted) else module)
        if isinstance(module, Adapted):
            stands.append((parent, name, stand, module.base_layer))
            module.base_layer = stand
        else:
            stands.append((parent, name, stand, module))
            setattr(parent, name, stand)
    error: Exception | None = None
    wrapped: list[nn.Module] = []
    try:
        yield model
    finally:
        for parent, name, stand, module in stands:
            for own, p in stand.named_parameters() if not isinstance(module, Projection) else ():
                module.get_parameter(own).requires_grad_(p.requires_grad)  # PEFT freezes what it sees
            found = getattr(parent, name)
            if found is not stand:
                error = error or _refusal(found, stand)
            settle(found, module)
            if isinstance(found, Adapted):
                wrapped.append(found)
            elif not hasattr(found, "base_layer"):
                setattr(parent, name, module)
    mesh = next((mesh for *_, module in stands if (mesh := _mesh_of(module)) is not None), None)
    check_adapters(wrapped, mesh, error)


@contextlib.contextmanager
def adapters_aside(model: nn.Module) -> Iterator[dict[str, nn.Module]]:
    """Takes plain LoRA layers out of a model while it is split, and puts them around what is then in their place.

    Gives them, by name. Where nothing was split there, they are as they were.
    """
    layers = {name: module for name, module in model.named_modules() if _takes(module)}
    for name, layer in layers.items():
        _put(model, name, layer.base_layer)
    try:
        yield layers
    finally:
        for name, layer in layers.items():
            settle(layer, model.get_submodule(name))
            _put(model, name, layer)


def refusal_of(layers: dict[str, nn.Module], attentions: list, activations: str) -> GridError | None:
    """Why a model with these LoRA layers, taken aside, cannot be split; attentions: what convert found."""
    if layers and activations != "replicated":
        return GridError(_not_split(activations))
    bases = {id(layer.base_layer): name for name, layer in layers.items()}
    for one in attentions:
        known = {id(part) for letter, part in one.projections.items() if is_projection(one.adapter.paths, letter)}
        parts = [*one.module.modules(), *one.projections.values()]
        if other := next((bases[id(part)] for part in parts if id(part) in bases and id(part) not in known), None):
            return GridError(
                f"{other} has a LoRA adapter, which a split attention of {one.adapter.name}'s kind does not take "
                "there: merge it first"
            )
    return None


def is_projection(paths: dict[str, str], letter: str) -> bool:
    """Whether the projection stays a child of the split attention: not outside, nor fused with what is no linear."""
    return "." not in paths[letter] and set("".join(paths)) == set("qkvo")


def check_adapters(layers: Iterable[nn.Module], mesh: DeviceMesh | None, refusal: Exception | None = None) -> None:
    """Raises GridError on every rank, for the refusal of one or where adapters, meta ones aside, differ."""
    own = [p for layer in layers for name, p in layer.named_parameters() if "lora_" in name and not p.is_meta]
    advice = "seed every rank alike before adapters are made, or load them from one file"
    same_on_all_ranks({"refusal": refusal, "what the adapters hold": digest(own)}, mesh, advice)


def settle(layer: nn.Module, module: nn.Module) -> None:
    """Puts `module`, which may be split, inside a layer of PEFT, and makes that one of ours if it is."""
    if not hasattr(layer, "base_layer"):
        return
    layer.base_layer = module
    if not _takes(layer) or isinstance(layer, Adapted):
        return
    if isinstance(module, Projection):
        become(layer, AdaptedProjection)
    elif (split := vars(module).get("split_as")) is not None:
        place = place_on(split.mesh)
        become(layer, _ADAPTED[split.kind], own=_own(module.weight, place), place=place)
        layer.split_as = split


def _refusal(layer: nn.Module, stand: nn.Module) -> GridError | None:
    """Why what PEFT put around a stand-in cannot be used."""
    module = f"{type(layer).__module__}.{type(layer).__name__}"
    if not _takes(layer) or layer.base_layer is not stand:
        return GridError(f"a {module} was put around what is split: {_plain_only()}")
    for name, x in layer.named_parameters():
        if "lora_" in name and x.isnan().any():
            return GridError(f"an adapter was drawn from weights that are split: {_plain_only()}")
    return None


def _plain_only() -> str:
    return (
        "only plain LoRA is supported on what is split (no DoRA or other variant, no lora_bias, no init_lora_weights "
        "that reads the weights, no modules_to_save): merge it before parallelize, or leave those modules out"
    )


def _not_split(activations: str) -> str:
    return (
        f"adapters are not supported on a model with activations={activations!r}: parallelize with "
        'activations="replicated"'
    )


def _takes(module: nn.Module) -> bool:
    """Whether it is a LoRA layer of PEFT around one linear, with plain adapters alone."""
    layers = sys.modules.get("peft.tuners.lora.layer")  # where it was not imported, no module is of it
    if layers is None or not (type(module) is layers.Linear or isinstance(module, Adapted)):
        return False
    return not module.lora_variant and not any(module.lora_bias.values())


def _peft(name: str):
    return sys.modules[f"peft.{name}"]


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _split_places(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Parent, name and module of what is split and can be adapted; a layer of ours stands for what is in it."""
    for parent in list(model.modules()):
        activations = getattr(parent, "activations", "replicated")
        if getattr(parent, "projection_names", None) and activations != "replicated":
            raise GridError(_not_split(activations))
        for name, child in list(parent._modules.items()):
            if isinstance(parent, Adapted):
                continue
            if isinstance(child, (Projection, AdaptedProjection)):
                yield parent, name, child
            elif getattr(vars(child).get("split_as") if child is not None else None, "kind", None) in _ADAPTED:
                if isinstance(child, (nn.Linear, Adapted)):
                    yield parent, name, child


def _stand_in(module: nn.Module) -> nn.Module:
    """A linear of whole features without numbers, on the device and of the dtype of what it stands for."""
    if isinstance(module, Projection):
        layer, letters = module.whose
        made, like = module.whole(), layer._parameters["out_weight" if letters == "o" else f"{letters[0]}_weight"]
    else:
        made = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
        like = module.weight
    nan = torch.full((), torch.nan, dtype=like.dtype, device=like.device)
    for name, p in list(made.named_parameters()):
        trained = p.requires_grad if isinstance(module, Projection) else module.get_parameter(name).requires_grad
        made.register_parameter(name, nn.Parameter(nan.expand(p.shape), trained))
    return made


def _mesh_of(module: nn.Module) -> DeviceMesh | None:
    return module.whose[0].mesh if isinstance(module, Projection) else module.split_as.mesh


def _own(p: DTensor, place: Place) -> tuple[tuple[int, int], tuple[int, int]]:
    """First and count of the rows and of the columns that this rank has, as torch deals them."""
    rank, found = place.head_group * place.grid.slices + place.slice, []
    for dim, size in enumerate(p.shape):
        share = -(-size // place.grid.size) if p.placements[-1] == Shard(dim) else size
        first = min(rank * share, size) if share < size else 0
        found.append((first, min(share, size - first)))
    return tuple(found)


def _local(p: Tensor) -> Tensor:
    return p.to_local() if isinstance(p, DTensor) else p
