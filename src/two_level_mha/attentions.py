"""Every attention of a model, and what will become of it: structure proposes, a probe decides."""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from two_level_mha.adapters import Adapter, adapters_with
from two_level_mha.errors import GridError
from two_level_mha.families import FAMILIES
from two_level_mha.integrations.private import pretrained_models
from two_level_mha.integrations.projected import IMPLEMENTATIONS
from two_level_mha.layer import GridAttention
from two_level_mha.probe import (
    changed_linear,
    has_hooks,
    is_inside,
    layer_settings,
    named_layers,
    random_copy,
    settings,
)
from two_level_mha.stock import resolve

# Names of projections: q, kv_b_proj, query_key_value, linear_v, c_attn and so on.
_PROJECTION = re.compile(r"(^|_)(q|k|v|kv|qkv|Wqkv|Wq|query|key|value)(_|$)|^(c_attn|in_proj)$")

# Classes of what stands in the place of attention: MambaMixer, Qwen3NextGatedDeltaNet, Lfm2ShortConv and so on.
_MIXER = re.compile(
    r"Mixer$|DeltaNet$|DeltaAttention$|ShortConv$|LightningAttention$|RecurrentBlock$|mLSTMLayer$|^Rwkv\w*Attention$"
)

# Of what is gathered beside attention: the least share of its layer, one in so many; classes inside a module that is
# split in part.
_LEAST = 20
_OF_LAYERS = re.compile(r"MLP|Mlp|Moe|MoE|Expert|FeedForward")

# Classes that die or do something else with transformers' plan for them, and why: they are gathered as well.
_UNPLANNED = {
    "Inkling2SparseMoeBlock": "its plan gives other numbers",
    "Llama4TextMoe": "it writes to what its plan makes a view",
    "InklingMoE": "it multiplies tensors with what its plan makes DTensors",
}

# Classes that give their parts away while the model runs, and the way out.
_CHANGING = {
    "BigBirdBlockSparseAttention": 'it becomes another in short calls: set attention_type="original_full" first'
}

# Gain of the random weights, and the difference allowed. Some models take the softmax in float32; what clips shows at
# the big numbers, where such a softmax is nearly one of its inputs.
TRIALS = ((1.0, 1e-6), (30.0, 1e-2))


class Unlike(GridError):
    """An attention that no adapter reproduces."""


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


def _looks_like_attention(module: nn.Module) -> bool:
    names = (*module._modules, *module._parameters)
    called = type(module).__name__
    return ("Attention" in called or called.endswith("MLA")) and any(_PROJECTION.search(name) for name in names)


def _mixes_tokens(module: nn.Module) -> bool:
    """Whether a module's class is called like one of linear attention, a state space or a recurrence."""
    return bool(_MIXER.search(type(module).__name__)) and any(p is not None for p in module.parameters())


@dataclass
class Attentions:
    """Of a model: those that are replaced, those whose weights are gathered for each call, by name, and why, and those
    that the user leaves whole.
    """

    found: list[Found] = field(default_factory=list)
    gathered: dict[str, tuple[nn.Module, str]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    def names(self) -> set[str]:
        return {*self.gathered, *(name for one in self.found for name in one.names())}


def find_attentions(model: nn.Module, skips: Callable[[str], bool], options: dict) -> Attentions:
    """Every attention of the model whose name `skips` does not say; each kind is tried against its replacement.

    Inside a transformers model, those that no adapter reproduces are gathered, and with them all of the same class,
    which may share keys. Raises GridError, naming it, for one that is not supported.
    """
    parts, gathers = pretrained_models(model).values(), set()
    if options["scheme"] != "independent":  # another model
        gathers = {module for part in parts for module in part.modules() if module is not part}
    generates = {module for part in parts if part.can_generate() for module in part.modules()}
    attentions = _find(model, gathers, generates, skips)
    variants: dict[tuple, dict[str, object] | Unlike] = {}
    for one in list(attentions.found):
        kind = _features(one)
        if kind not in variants:
            variants[kind] = _agreeing(one, options)
        variant = variants[kind]
        if not isinstance(variant, Unlike):
            one.variant = variant
        elif one.module in gathers:
            attentions.gathered[one.name] = one.module, str(variant)
        else:
            raise variant
    classes = {type(module): why for module, why in attentions.gathered.values()}
    for one in list(attentions.found):
        if (why := classes.get(type(one.module))) is not None:
            attentions.found.remove(one)
            attentions.gathered.setdefault(one.name, (one.module, why))
    return attentions


def add_whole(
    model: nn.Module, attentions: Attentions, split: Callable[[str], bool], skips: Callable[[str], bool]
) -> None:
    """Adds to those whose weights are gathered what else stays whole in layers of transformers' models: MLPs without a
    plan. split: whether the parameter of a name is split otherwise.
    """
    owners = _owners(model)
    inside = attentions.names()
    for prefix, part in pretrained_models(model).items():
        for name, layer in named_layers(part, prefix):
            if any(is_inside(other, (name,)) for other in inside):
                size = sum(p.numel() for p in layer.parameters())
                for child, module in layer.named_children():
                    _add_whole_module(f"{name}.{child}", module, size, attentions, split, skips, owners)


def _add_whole_module(name: str, module: nn.Module, size: int, attentions, split, skips, owners) -> None:
    held = dict(module.named_parameters(prefix=name))
    if skips(name) or any(is_inside(other, (name,)) for other in attentions.names()):
        return
    if sum(p.numel() for p in held.values()) * _LEAST < size or all(p.dim() < 2 for p in held.values()):
        return
    if any(map(split, held)):
        for child, part in module.named_children():
            if _OF_LAYERS.search(type(part).__name__):
                _add_whole_module(f"{name}.{child}", part, size, attentions, split, skips, owners)
    elif not _not_gathered(module, owners) and not has_hooks(module):
        attentions.gathered[name] = module, "no plan splits it"


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Parameter -> modules that own it; a module used in several places is one."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for p in module._parameters.values():
            owners.setdefault(id(p), []).append(name)
    return owners


def _find(
    model: nn.Module, gathers: set[nn.Module], generates: set[nn.Module], skips: Callable[[str], bool]
) -> Attentions:
    """Every attention by its structure alone. generates: modules of models that generate."""
    owners = _owners(model)
    uses: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    adapters = adapters_with(FAMILIES)
    supported = "supported: " + ", ".join(adapter.name for adapter in adapters)
    for module in model.modules():
        for child_name, child in module._modules.items():
            uses.setdefault(child, []).append((module, child_name))
    attentions = Attentions()
    for name, module in model.named_modules():
        parent = uses[module][0][0] if name else None
        if isinstance(module, GridAttention):  # split already
            continue
        adapter = next((one for one in adapters if one.matches(module, parent)), None)
        mixer = module in gathers and _mixes_tokens(module)
        unplanned = _UNPLANNED.get(type(module).__name__) if module in gathers else None
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
            why = unplanned or f"no adapter knows its structure ({type(module).__name__})"
            attentions.gathered[name] = module, why
            continue
        if adapter is None:
            raise GridError(
                f"{where} looks like attention of a structure that is not supported; {supported}; a part of the model "
                "without it can be split by itself: parallelize(model.part, mesh)"
            )
        one = Found(module, adapter, adapter.projections(module, parent), uses[module], name)
        if problem := _problem(one, owners):
            raise GridError(f"{where} is not supported: {problem}")
        if (problem := _unlike(one, module in generates)) and module in gathers and not _not_gathered(module, owners):
            attentions.gathered[name] = module, problem
        elif problem:
            raise GridError(f"{where} is not supported: {problem}")
        else:
            attentions.found.append(one)
    if not (attentions.found or attentions.gathered):
        done = any(isinstance(module, GridAttention) for module in model.modules())
        known = (
            "it is split already" if done else "all are left out by skip= or only=" if attentions.skipped else supported
        )
        raise GridError(f"no attention was found in {type(model).__name__} that could be split; {known}")
    return attentions


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
    if problem := _not_its_own([module, *one.projections.values()], owners):
        return problem
    if one.adapter.out_in_parent and len({id(parent) for parent, _ in one.uses}) > 1:
        return "it is used in several places, with an output projection at each"
    return None


def _unlike(one: Found, generates: bool) -> str | None:
    """What a module has that the adapter of its structure has not, or None. generates: whether its model does."""
    takes_cache = "past_key_values" in inspect.signature(one.module.forward).parameters
    if generates and takes_cache and not one.adapter.cached:
        return "it is called with a KV cache"
    if "CrossAttention" in type(one.module).__name__:
        return "it is cross-attention"
    if problem := one.adapter.problem(one.module):
        return problem
    known = {id(p) for projection in one.projections.values() for p in projection.parameters()}
    for name, p in one.module.named_parameters():
        if id(p) not in known and name not in one.adapter.parameters:
            return f"it has a parameter that {one.adapter.name} attention has not: {name}"
    return None


def _not_gathered(module: nn.Module, owners: dict[int, list[str]]) -> str | None:
    """Why the weights of a module cannot be gathered for each call, or None."""
    if "forward" in vars(module):
        return "its forward was replaced"
    if type(module).__name__ in _CHANGING:
        return _CHANGING[type(module).__name__]
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


def _features(one: Found) -> tuple:
    """What makes two modules of one class behave differently."""
    shapes = tuple((letter, tuple(p.weight.shape), p.bias is None) for letter, p in one.projections.items())
    own = tuple((name, tuple(p.shape)) for name, p in one.module.named_parameters())
    config, layer = getattr(one.module, "config", None), getattr(one.module, "layer_idx", None)
    implementation = getattr(config, "_attn_implementation", None)
    return type(one.module), implementation, shapes, own, settings(one.module), layer_settings(config, layer)


def _agreeing(one: Found, options: dict) -> dict[str, object] | Unlike:
    """The first of the adapter's variants that gives the original's numbers, or what is wrong with the first."""
    refusals = []
    for variant in one.adapter.variants:
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("cpu"):
                torch.default_generator.manual_seed(0)  # torch.manual_seed would seed those of GPUs too
                for gain, tolerance in TRIALS:
                    _probe(one, options | variant, gain, tolerance)
            return variant
        except Unlike as error:
            refusals.append(error)
    return refusals[0]


def _probe(one: Found, options: dict, gain: float, tolerance: float) -> None:
    """Runs a copy of the original and its replacement on small random inputs; raises Unlike if they differ."""
    where, known = f"{one.name} ({type(one.module).__name__})", one.adapter.name
    try:
        original, *copies = random_copy([one.module, *one.projections.values()], gain)
    except Exception as error:
        raise GridError(f"{where} is not supported: it cannot be copied for a trial: {error!r}") from error
    projections = dict(zip(one.projections, copies, strict=True))
    try:
        ours = one.adapter.new(original, projections, None, options).eval()
    except GridError as error:
        raise Unlike(f"{where} is not supported: {error}") from None
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
            raise Unlike(
                f"{where} has the structure of {known} attention, but cannot be called like it: {error!r}"
            ) from error
        try:
            got = ours(*our_args, **our_kwargs)[0]
        except Exception as error:
            raise Unlike(
                f"{where} has the structure of {known} attention, but its parts do not work like it: {error!r}"
            ) from error
        difference = (expected - got).abs().max().item() if expected.shape == got.shape else float("inf")
        if not difference <= tolerance * expected.abs().max().item():
            raise Unlike(
                f"{where} has the structure of {known} attention, but its numbers differ from it by {difference:.1e} "
                "on a small input: it does something else, and is not supported"
            )
