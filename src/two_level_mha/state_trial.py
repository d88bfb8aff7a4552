"""Which layers that keep a state are split: a table proposes, a trial of all ranks in one process decides."""

import copy
import inspect
from types import FunctionType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from two_level_mha.errors import GridError
from two_level_mha.families import later
from two_level_mha.integrations.forms import layer_of, parameters_of
from two_level_mha.integrations.state_forms import Cut, form_of, has_form
from two_level_mha.low_rank import features_of
from two_level_mha.mesh import Grid, Place
from two_level_mha.probe import first_output, has_hooks, random_copy, settings
from two_level_mha.trial import TRIALS

if TYPE_CHECKING:
    from two_level_mha.attentions import Attentions

CACHES = ("cache_params", "past_key_values")
POSITIONS, KEEPS = "position_ids", "use_cache"


class States(NamedTuple):
    """A layer that is split by its heads and channels."""

    name: str
    module: nn.Module
    gate_first: bool  # where a norm that is cut has its gate

    @property
    def width(self) -> int:
        """Of its hidden states."""
        return _width(self.module)

    @property
    def gives_pair(self) -> bool:
        """Whether its output is a tuple, as attention's is."""
        return form_of(self.module).gives_pair


def take_states(attentions: "Attentions", grid: Grid) -> None:
    """Moves from those whose weights are gathered the layers that can be split; others get the reason why not. Sends
    nothing.
    """
    tried: dict[tuple[object, ...], bool | str] = {}
    for name, (module, _) in list(attentions.gathered.items()):
        if not has_form(module):
            continue
        kind = _kind(module)
        if kind not in tried:
            tried[kind] = _agreeing(module, grid)
        found = tried[kind]
        if any(has_hooks(part) or "forward" in vars(part) for part in module.modules() if part is not module):
            found = "a part of it has hooks, or its forward was replaced"
        if isinstance(found, str):
            attentions.gathered[name] = module, found
        else:
            del attentions.gathered[name]
            attentions.states[name] = States(name, module, found)
    for name, one in _beside_dealt(attentions).items():
        del attentions.states[name]
        attentions.gathered[name] = one.module, "its cache also has keys of attention whose weights are gathered"


def _beside_dealt(attentions: "Attentions") -> dict[str, States]:
    """Those whose layer of a cache is dealt by sequences, which theirs is not."""
    layers = {layer_of(module) for module, _ in attentions.gathered.values()} - {None}
    return {name: one for name, one in attentions.states.items() if layer_of(one.module) in layers}


def _width(module: nn.Module) -> int:
    return features_of(module.get_submodule(next(iter(form_of(module).rows))))[0]


def _kind(module: nn.Module) -> tuple[object, ...]:
    shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
    return type(module), settings(module), shapes


def _agreeing(module: nn.Module, grid: Grid) -> bool | str:
    """Where the gate of a norm acts, if all ranks together give the module's numbers; else what is wrong."""
    try:
        gates = (False, True) if Cut(module, form_of(module), grid).norm_axis() is not None else (False,)
    except GridError as error:
        return str(error)
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("cpu"):
        for dtype in TRIALS:
            for gate_first in gates:
                try:
                    off = _off(module, grid, gate_first, dtype)
                except Exception as error:  # of any kind: it is another's code
                    why = f"it cannot be run in parts: {error!r}"
                    continue
                if off <= TRIALS[dtype][0][1]:
                    return gate_first
                why = f"in parts its numbers differ by {off:.1e} on a small input"
    return why


def _off(module: nn.Module, grid: Grid, gate_first: bool, dtype: torch.dtype) -> float:
    """The largest relative difference between a copy of a module and its parts on all ranks."""
    torch.default_generator.manual_seed(0)
    (original,) = random_copy([module], dtype=dtype)
    original.__class__ = _without_kernels(type(original))
    ranks, worst, compared = Rehearsal(original, grid, gate_first), 0.0, 0
    for calls, cached in _calls(original, dtype):
        try:
            expected = _called(original, calls, cached)
        except Exception:  # it may know no such cache, but one call must work
            continue
        compared += 1
        for parts in ranks.run(calls, cached):
            for got, whole in zip(parts, expected, strict=True):
                off = (got - whole).abs().max() / whole.abs().max()
                worst = max(worst, float("inf") if off.isnan() else off.item())
    if not compared:
        raise GridError("it cannot be called with hidden states and a mask")
    return worst


def _without_kernels(kind: type[nn.Module]) -> type[nn.Module]:
    """A class whose forward calls torch's code where transformers would call a package's kernels, which want a GPU."""
    forward = inspect.unwrap(kind.forward)
    own = [(name, f) for name, f in forward.__globals__.items() if getattr(f, "__module__", None) == kind.__module__]
    plain = {name: f.__wrapped__ for name, f in own if not isinstance(f, type) and hasattr(f, "__wrapped__")}
    made = FunctionType(
        forward.__code__, forward.__globals__ | plain, forward.__name__, forward.__defaults__, forward.__closure__
    )
    made.__kwdefaults__ = forward.__kwdefaults__
    return type(kind.__name__, (kind,), {"forward": made, "__module__": kind.__module__})


def _calls(module: nn.Module, dtype: torch.dtype) -> list[tuple[list[dict[str, object]], str | None]]:
    """Arguments of calls one after the other, and what they call a cache: with padding and without, and two steps."""
    width, named = _width(module), parameters_of(module)
    hidden, *_ = named
    needed = {name: None for name, p in named.items() if p.default is p.empty and name != hidden}

    def given(first: int, shape: tuple[int, ...]) -> dict[str, object]:
        found: dict[str, object] = {hidden: torch.randn(2, *shape, width, dtype=dtype), **needed}
        return found | ({POSITIONS: torch.arange(first, first + shape[0]).expand(2, -1)} if POSITIONS in named else {})

    whole, step = given(0, form_of(module).shape), given(6, (1,))
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, :2] = False
    padded = whole | {"attention_mask": mask}
    caches: list[str | None] = [name for name in CACHES if name in named]
    if KEEPS in named and not caches:  # what it would put into a cache it keeps itself
        caches = [None]
    return [([whole], None), ([padded], None), *(([padded, step], name) for name in caches)]


def _called(module: nn.Module, calls: list[dict[str, object]], cached: str | None) -> list[Tensor]:
    """What a module gives in each call."""
    options = {} if cached is None else {cached: later("states", "blank_cache")(layer_of(module))}
    return [first_output(module(**given, **options)) for given in calls]


def held_by_first(modules: list[nn.Module], grid: Grid, batch: int) -> tuple[int, int]:
    """Bytes that rank 0 has, as the others or more: of the weights, and of the states of `batch` sequences.

    modules: with parameters on the meta device; of each kind a call of one token is read. Raises GridError as Cut does,
    and for one that keeps its states in no cache of transformers.
    """
    held: dict[tuple[object, ...], tuple[int, int]] = {}
    kinds = [_kind(module) for module in modules]
    for kind, module in zip(kinds, modules, strict=True):
        if kind not in held:
            held[kind] = _held_of(module, grid, batch)
    return sum(held[kind][0] for kind in kinds), sum(held[kind][1] for kind in kinds)


def _held_of(module: nn.Module, grid: Grid, batch: int) -> tuple[int, int]:
    """The same of one."""
    part = copy.deepcopy(module)
    part.__class__ = _without_kernels(type(part))
    cut = Cut(part, form_of(part), grid)
    later("states", "become_split")(part, cut, Alone(Place(cut.grid, 0, 0)), None, False)
    hidden, *_ = named = parameters_of(module)
    weights = sum(p.nbytes for p in part.parameters())
    if form_of(module).gives_weights:  # of images, without states
        return weights, 0
    cache, name = later("states", "blank_cache")(layer_of(module)), next((x for x in CACHES if x in named), None)
    dtype = next(module.parameters()).dtype
    given: dict[str, object] = {other: None for other, p in named.items() if p.default is p.empty}
    given |= {hidden: torch.empty(batch, 1, _width(module), dtype=dtype, device="meta")}
    given |= {} if name is None else {name: cache}
    try:
        with torch.no_grad(), torch.device("meta"):
            part(**given)
        layer = cache.layers[layer_of(module)]
    except Exception as error:  # of any kind: it is another's code
        raise GridError(f"{type(module).__name__} keeps states in no cache of transformers: {error!r}") from error
    states = [*layer.conv_states.values(), *layer.recurrent_states.values()]
    return weights, sum(state.nbytes for state in states if state is not None)


class Alone(NamedTuple):
    """A rank's integrations.states.Exchange where there is no other, and no number is asked for."""

    place: Place

    def apart(self, xs: list[Tensor], axis: int) -> list[Tensor]:
        return xs

    def sum(self, x: Tensor, axis: int, apart: bool) -> Tensor:
        return x


class Rehearsal:
    """All ranks of a grid, one after the other, again and again until every sum that they exchange is known."""

    def __init__(self, original: nn.Module, grid: Grid, gate_first: bool) -> None:
        self.known: dict[tuple[int, int, int], Tensor] = {}  # by number of the sum, axis, and ranks along it
        self.found: dict[tuple[int, int, int], list[Tensor]] = {}
        own = Cut(original, form_of(original), grid).grid
        places = [Place(own, i, j) for i in range(own.head_groups) for j in range(own.slices)]
        shared = {id(p): p for p in original.parameters()}  # nobody writes to them
        self.ranks = []
        for place in places:
            part = copy.deepcopy(original, dict(shared))
            cut = Cut(part, form_of(part), own, place.head_group, place.slice)
            seat = Seat(self, place)
            later("states", "become_split")(part, cut, seat, None, gate_first)
            self.ranks.append((part, seat))

    def run(self, calls: list[dict[str, object]], cached: str | None) -> list[list[Tensor]]:
        """What the ranks give, each in every call."""
        self.known.clear()
        while True:
            self.found.clear()
            outputs = []
            for part, seat in self.ranks:
                seat.calls = 0
                outputs.append(_called(part, calls, cached))
            if not self.found:
                return outputs
            first = min(number for number, *_ in self.found)
            self.known |= {key: sum(parts[1:], start=parts[0]) for key, parts in self.found.items() if key[0] == first}


class Seat:
    """A rank's integrations.states.Exchange in a rehearsal."""

    def __init__(self, rehearsal: Rehearsal, place: Place) -> None:
        self.rehearsal, self.place, self.calls = rehearsal, place, 0

    def apart(self, xs: list[Tensor], axis: int) -> list[Tensor]:
        return xs

    def sum(self, x: Tensor, axis: int, apart: bool) -> Tensor:
        group = (self.place.head_group, self.place.slice, 0)[axis]  # that ranks along the axis have in common
        key = (self.calls, axis, group)
        self.calls += 1
        if key not in self.rehearsal.known:
            self.rehearsal.found.setdefault(key, []).append(x)
            return x
        return self.rehearsal.known[key]
