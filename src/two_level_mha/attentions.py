"""Every attention of a model, and what will become of it: structure proposes, a probe decides."""

import re
from collections.abc import Callable, Collection, Container
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from two_level_mha.adapters import Adapter, adapters_with
from two_level_mha.errors import GridError
from two_level_mha.families import FAMILIES
from two_level_mha.integrations.forms import (
    PROMPT,
    PROMPTED,
    is_called_with_cache,
    is_cross,
    is_known_linear,
    keeps_projection,
    layer_of,
    may_take_cache,
    parameters_of,
)
from two_level_mha.integrations.private import pretrained_models
from two_level_mha.integrations.projected import IMPLEMENTATIONS
from two_level_mha.integrations.relative import POSITION_PROJECTIONS
from two_level_mha.mesh import Grid
from two_level_mha.probe import changed_linear, has_hooks, is_inside, layer_settings, named_layers, owners_of, settings
from two_level_mha.state_trial import States
from two_level_mha.stock import HoldsStock, resolve
from two_level_mha.trial import Unlike, agreeing

IS_CROSS = "it is cross-attention"
NO_PLAN = "no plan splits it"  # why an MLP is gathered

# Names of projections: q, kv_b_proj, query_key_value, linear_v, c_attn and so on.
_PROJECTION = re.compile(r"(^|_)(q|k|v|kv|qkv|Wqkv|Wq|query|key|value)(_|$)|^(c_attn|in_proj)$")

# Classes of what stands in the place of attention: MambaMixer, Qwen3NextGatedDeltaNet, Lfm2ShortConv and so on.
_MIXER = re.compile(
    r"Mixer$|MambaLayer$|DeltaNet$|DeltaAttention$|ShortConv$|LightningAttention$|RecurrentBlock$|mLSTMLayer$|^Rwkv\w*Attention$"
)

# Of what is gathered beside attention: the least share of its layer, one in so many; classes inside a module that is
# split in part.
_LEAST = 20
_OF_LAYERS = re.compile(r"MLP|Mlp|Moe|MoE|Expert|FeedForward")

# Classes that die or do something else with transformers' plan for them, and why: they are gathered as well.
_UNPLANNED = {
    "Inkling2SparseMoeBlock": "its plan gives other numbers",
    "InklingMoE": "it multiplies tensors with what its plan makes DTensors",
}

# Classes in whose place their parent puts others, and when: the parent is gathered, with whatever it then has.
_BECOMING = dict.fromkeys(
    ("BigBirdBlockSparseAttention", "BigBirdPegasusBlockSparseAttention"), "in short calls it becomes another"
)

# Classes whose weights cannot be gathered for a call, and why.
_NOT_GATHERED = {
    "XmodOutput": "its parts are used apart from its calls",
    "Qwen4ExpTextAttention": "its layer of a cache also has states of a module that runs before it",
}


@dataclass
class Found:
    """An attention module, and wherever the model refers to it."""

    module: nn.Module
    adapter: Adapter
    projections: dict[str, nn.Module]
    paths: dict[str, str]  # where those are, as in StockTensor.key
    uses: list[tuple[nn.Module, str]]  # parent and name of the child
    name: str  # at the first use
    variant: dict[str, object] = field(default_factory=dict)  # of the adapter's, the one that the probe chose

    @property
    def parent(self) -> nn.Module:
        return self.uses[0][0]

    def names(self) -> list[str]:
        """Of what is split with it: the module, and projections outside it."""
        outside = [path for path in self.paths.values() if path.startswith("../")]
        return [self.name, *(resolve(self.name, path) for path in outside)]

    @property
    def out_in_parent(self) -> bool:
        return self.paths["o"].startswith("../")

    def sizes(self) -> tuple[int, int, int]:
        """Heads, key/value heads, head_dim."""
        return self.adapter.sizes(self.module, self.projections)

    def own_grid(self, grid: Grid) -> Grid:
        """As which it takes the ranks of a model's grid."""
        return self.adapter.grid(grid, self.sizes()[1])


def _looks_like_attention(module: nn.Module) -> bool:
    names = (*module._modules, *module._parameters)
    called = type(module).__name__
    return ("Attention" in called or called.endswith("MLA")) and any(_PROJECTION.search(name) for name in names)


def _mixes_tokens(module: nn.Module) -> bool:
    """Whether a module's class is called like one of linear attention, a state space or a recurrence."""
    return bool(_MIXER.search(type(module).__name__)) and any(p is not None for p in module.parameters())


@dataclass
class Attentions:
    """Of a model: those that are replaced, by name those in whose place a state is kept, which are split, and those
    whose weights are gathered for each call, and why, and those that the user leaves whole.
    """

    found: list[Found] = field(default_factory=list)
    states: dict[str, States] = field(default_factory=dict)
    gathered: dict[str, tuple[nn.Module, str]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    def names(self) -> set[str]:
        return {*self.states, *self.gathered, *(name for one in self.found for name in one.names())}

    def gather(self, one: Found, why: str) -> None:
        """Moves one that was to be replaced to those whose weights are gathered."""
        self.found.remove(one)
        self.gathered[one.name] = one.module, why


def find_attentions(model: nn.Module, skips: Callable[[str], bool], options: dict[str, Any]) -> Attentions:
    """Every attention of the model whose name `skips` does not say; each kind is tried against its replacement.

    Inside a transformers model, those that no adapter reproduces are gathered, and with them all of the same class,
    which may share keys, as cross-attention does with none. Raises GridError, naming it, for one that is not supported.
    """
    parts, gathers = pretrained_models(model).values(), set()
    if options["scheme"] != "independent":  # another model
        gathers = {module for part in parts for module in part.modules() if module is not part}
    generates = {module for part in parts if part.can_generate() for module in part.modules()}
    prompted = {module for part in parts if getattr(part.config, PROMPTED, False) for module in part.modules()}
    attentions = _find(model, gathers, generates, skips)
    variants: dict[tuple[object, ...], dict[str, object] | Unlike] = {}
    for one in list(attentions.found):
        kind = _features(one)
        if kind not in variants:
            variants[kind] = agreeing(one, options)
        variant = variants[kind]
        if one.module in prompted and PROMPT in parameters_of(one.module):
            variant = Unlike(f"it is called with {PROMPT}")
        if not isinstance(variant, Unlike):
            one.variant = variant
        elif one.module in gathers:
            attentions.gather(one, str(variant))
        else:
            raise variant
    classes = {type(module): why for name, (module, why) in attentions.gathered.items() if not is_cross(module, name)}
    for one in list(attentions.found):
        if one.adapter.crosses is not True and (why := classes.get(type(one.module))) is not None:
            attentions.gather(one, why)
    return attentions


def gather_beside_mixers(attentions: Attentions) -> None:
    """Moves to those whose weights are gathered attention whose layer of a KV cache has states of a gathered mixer too:
    these are dealt by sequences, and so must its keys be.
    """
    layers = {layer_of(module) for module, _ in attentions.gathered.values() if _mixes_tokens(module)} - {None}
    for one in list(attentions.found):
        if layer_of(one.module) in layers:
            attentions.gather(one, "its layer of a cache also has states of a mixer whose weights are gathered")


def by_structure(model: nn.Module, gathers: Container[nn.Module] = ()) -> list[Found]:
    """Every attention that an adapter takes by its structure alone; gathers: modules that may be of another one.

    Raises GridError as find_attentions.
    """
    return _find(model, gathers, set(), lambda name: False).found


def gather_adapted(attentions: Attentions, adapted: Collection[str]) -> None:
    """Moves to those whose weights are gathered the ones that use a projection otherwise than its adapter would.

    adapted: names of LoRA layers.
    """
    for one in list(attentions.found):
        others = [path for letters, path in one.paths.items() if not keeps_projection(one.module, letters)]
        others += sum(POSITION_PROJECTIONS.values(), ())
        if any(resolve(one.name, path) in adapted for path in others):
            attentions.gather(one, "it has a LoRA adapter")


def add_whole(
    model: nn.Module, attentions: Attentions, split: Callable[[str], bool], skips: Callable[[str], bool]
) -> None:
    """Adds to those whose weights are gathered what else stays whole in layers of transformers' models: MLPs without a
    plan. split: whether the parameter of a name is split otherwise.
    """
    owners, inside = owners_of(model), attentions.names()
    names = {module: name for name, module in model.named_modules()}  # of what is in several places its first
    for prefix, part in pretrained_models(model).items():
        for name, layer in named_layers(part, prefix):
            if not is_inside(name, inside) and any(is_inside(other, (name,)) for other in inside):
                size = sum(p.numel() for p in layer.parameters())
                for module in layer.children():
                    _add_whole_module(names[module], module, size, attentions, split, skips, owners)


def _add_whole_module(
    name: str, module: nn.Module, size: int, attentions: Attentions, split: Callable[[str], bool],
    skips: Callable[[str], bool], owners: dict[int, list[str]],
) -> None:  # fmt: skip
    held, others = dict(module.named_parameters(prefix=name)), attentions.names()
    if skips(name) or is_inside(name, others):
        return
    if sum(p.numel() for p in held.values()) * _LEAST < size or all(p.dim() < 2 for p in held.values()):
        return
    has_attention = any(is_inside(other, (name,)) for other in others)
    if has_attention or any(map(split, held)):
        for child, part in module.named_children():
            if has_attention or _OF_LAYERS.search(type(part).__name__):
                _add_whole_module(f"{name}.{child}", part, size, attentions, split, skips, owners)
    elif not _not_gathered(module, owners) and not has_hooks(module):
        attentions.gathered[name] = module, NO_PLAN


def _find(
    model: nn.Module, gathers: Container[nn.Module], generates: set[nn.Module], skips: Callable[[str], bool]
) -> Attentions:
    """Every attention by its structure alone. generates: modules of models that generate."""
    owners = owners_of(model)
    uses: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    adapters = adapters_with(FAMILIES)
    supported = "supported: " + ", ".join(adapter.name for adapter in adapters)
    for module in model.modules():
        for child_name, child in module._modules.items():
            if child is not None:
                uses.setdefault(child, []).append((module, child_name))
    attentions = Attentions()
    for name, module in model.named_modules():
        parent = uses[module][0][0] if name else None
        if isinstance(module, HoldsStock):  # split already
            continue
        crosses = is_cross(module, name)
        cached = crosses or is_called_with_cache(module, module in generates)
        fitting = (one for one in adapters if one.crosses in (crosses, None) and (cached or not one.cached))
        adapter = next((one for one in fitting if one.matches(module, parent)), None)
        mixer = module in gathers and _mixes_tokens(module)
        unplanned = _gathered_by_name(module) if module in gathers else None
        if adapter is None and not (_looks_like_attention(module) or mixer or unplanned):
            continue
        if is_inside(name, attentions.gathered):
            continue
        if skips(name):
            attentions.skipped.append(name)
            continue
        where = f"{name or 'the model'} ({type(module).__name__})"
        if not name:
            raise GridError(
                f"{where} is itself an attention, and has no place in a model: put it into an nn.ModuleList, or use "
                "TwoLevelMultiheadAttention.from_torch"
            )
        if adapter is None and module in gathers:
            if problem := _not_gathered(module, owners):
                raise GridError(f"{where} is not supported: {problem}")
            unknown = IS_CROSS if crosses else f"no adapter knows its structure ({type(module).__name__})"
            attentions.gathered[name] = module, unplanned or unknown
            continue
        if adapter is None:
            raise GridError(
                f"{where} looks like attention of a structure that is not supported; {supported}; a part of the model "
                "without it can be split by itself: parallelize(model.part, mesh)"
            )
        assert parent is not None
        one = _found(module, parent, adapter, uses[module], name)
        unlike = _unlike(one, module in generates)
        gathered = unlike is not None and module in gathers
        if problem := _not_gathered(module, owners) if gathered else _problem(one, owners) or unlike:
            raise GridError(f"{where} is not supported: {problem}")
        if gathered and unlike is not None:
            attentions.gathered[name] = module, unlike
        else:
            attentions.found.append(one)
    if not (attentions.found or attentions.gathered):
        done = any(isinstance(module, HoldsStock) for module in model.modules())
        known = (
            "it is split already" if done else "all are left out by skip= or only=" if attentions.skipped else supported
        )
        raise GridError(f"no attention was found in {type(model).__name__} that could be split; {known}")
    return attentions


def _gathered_by_name(module: nn.Module) -> str | None:
    """Why the tables above have a module's weights gathered, or None."""
    becoming = (_BECOMING.get(type(child).__name__) for child in module.children())
    return _UNPLANNED.get(type(module).__name__) or next(filter(None, becoming), None)


def _found(
    module: nn.Module, parent: nn.Module, adapter: Adapter, uses: list[tuple[nn.Module, str]], name: str
) -> Found:
    paths = adapter.paths_in(module, parent)
    projections = {
        letter: (parent if path.startswith("../") else module).get_submodule(path.removeprefix("../"))
        for letter, path in paths.items()
    }
    return Found(module, adapter, projections, paths, uses, name)


def _problem(one: Found, owners: dict[int, list[str]]) -> str | None:
    """Why a module of a known structure cannot be replaced, or None."""
    module = one.module
    kind = f"{type(module).__module__}.{type(module).__name__}"
    if problem := changed_linear(module):
        return f"it {problem}"
    if isinstance(module, nn.MultiheadAttention) and type(module) is not nn.MultiheadAttention:
        return f"it is a subclass of nn.MultiheadAttention ({kind})"
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", "sdpa")
    if implementation not in IMPLEMENTATIONS:
        return f'its attention implementation is {implementation!r}: call model.set_attn_implementation("sdpa") first'
    for letter, projection in one.projections.items():
        what = f"its {letter} projection, {one.paths[letter].removeprefix('../')},"
        if problem := changed_linear(projection):
            return f"{what} {problem}"
        if not is_known_linear(projection):
            return (
                f"{what} is a {type(projection).__module__}.{type(projection).__name__}, not a plain nn.Linear (merge "
                "adapters, or undo quantisation, first)"
            )
        if has_hooks(projection):
            return f"{what} has hooks, which would no longer run: remove them first"
    if problem := _not_its_own([module, *one.projections.values()], owners):
        return problem
    if one.out_in_parent and len({id(parent) for parent, _ in one.uses}) > 1:
        return "it is used in several places, with an output projection at each"
    return None


def _unlike(one: Found, generates: bool) -> str | None:
    """What a module has that the adapter of its structure has not, or None. generates: whether its model does."""
    if generates and may_take_cache(one.module) and not one.adapter.cached:
        return "it is called with a KV cache"
    if problem := one.adapter.problem(one.module):
        return problem
    for letter, projection in one.projections.items():
        if not is_known_linear(projection) and type(projection).__module__.startswith("transformers.models."):
            return f"its {letter} projection is a {type(projection).__name__}"
    known = {id(p) for projection in one.projections.values() for p in projection.parameters()}
    for name, p in one.module.named_parameters():
        if id(p) not in known and not any(fnmatchcase(name, pattern) for pattern in one.adapter.parameters):
            return f"it has a parameter that {one.adapter.name} attention has not: {name}"
    return None


def _not_gathered(module: nn.Module, owners: dict[int, list[str]]) -> str | None:
    """Why the weights of a module cannot be gathered for each call, or None."""
    if "forward" in vars(module):
        return "its forward was replaced"
    if type(module).__name__ in _NOT_GATHERED:
        return _NOT_GATHERED[type(module).__name__]
    if problem := _not_its_own([module], owners):
        return problem
    return next((f"{name} is quantised" for name, p in module.named_parameters() if not p.is_floating_point()), None)


def _not_its_own(modules: list[nn.Module], owners: dict[int, list[str]]) -> str | None:
    """Why the parameters of modules cannot be stored in another way, or None."""
    for p in (p for module in modules for p in module.parameters()):
        if len(owners[id(p)]) > 1:
            return f"it shares a parameter between {', '.join(owners[id(p)])}: untie it first"
        if isinstance(p, DTensor):
            return "its parameters are DTensors already"
    return None


def _features(one: Found) -> tuple[object, ...]:
    """What makes two modules of one class behave differently."""
    known = one.projections.items()
    shapes = tuple((letter, tuple(p.get_parameter("weight").shape), p.bias is None) for letter, p in known)
    own = tuple((name, tuple(p.shape)) for name, p in one.module.named_parameters())
    config, layer = getattr(one.module, "config", None), layer_of(one.module)
    implementation = getattr(config, "_attn_implementation", None)
    kind = type(one.module), one.adapter.name, implementation
    return kind, shapes, own, settings(one.module), layer_settings(config, layer)
