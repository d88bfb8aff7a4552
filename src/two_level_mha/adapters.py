"""The kinds of attention that parallelize knows: those of families.py, and what other packages add.

A package adds one by the entry-point group "two_level_mha.adapters", whose values are Adapters:

    [project.entry-points."two_level_mha.adapters"]
    mine = "my_package.split:ADAPTER"

or, in a program that is running, by the decorator of the function or class that makes the replacement:

    @tlm.register_adapter(
        "mine",
        matches=lambda module, parent: type(module) is MyAttention,
        paths={"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out"},
        inputs=lambda module, dtype: [((torch.randn(2, 5, module.to_q.in_features, dtype=dtype),), {})],
    )
    class SplitMine(GridAttention):
        def __init__(self, original, projections, paths, mesh, **options): ...

Each is tried against its original by parallelize, as our own are. Where several match, the program's come first, then
those of packages, then ours.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from two_level_mha.errors import GridError
from two_level_mha.integrations.forms import heads_of
from two_level_mha.mesh import Grid
from two_level_mha.names import Args, Kwargs

GROUP = "two_level_mha.adapters"

Replace = TypeVar("Replace", bound=Callable[..., nn.Module])

_registered: "dict[str, Adapter]" = {}  # filled by register_adapter alone


@dataclass(frozen=True)
class Adapter:
    """One kind of attention: how to recognise it, where its projections are, how to replace and to call it."""

    name: str
    matches: Callable[[nn.Module, nn.Module | None], bool]  # (module, parent)
    # projections that are linears of their own, q, k, v or qkv, o -> path as in StockTensor.key; or what gives them
    # for (module, parent)
    paths: Mapping[str, str] | Callable[[nn.Module, nn.Module | None], Mapping[str, str] | None]
    replace: Callable[..., nn.Module]  # (module, projections, paths, mesh, **options), gives a module with stock_names
    inputs: Callable[[Any, torch.dtype], list[tuple[Args, Kwargs]]]  # Any: a module that matches, here and below
    parameters: tuple[str, ...] = ()  # that it may have besides those of the projections; patterns, as of fnmatch
    cached: bool = False  # replace takes cache=, the layout of its KV cache
    crosses: bool | None = False  # whether it attends to other states than its own; None: it may
    # (module, paths) -> options of replace, of which the probe takes the first that fits
    variants: Callable[[Any, Mapping[str, str]], Sequence[dict[str, object]]] = lambda module, paths: ({},)
    # (module, projections) -> h, k, d
    sizes: Callable[[Any, dict[str, nn.Module]], tuple[int, int, int]] = heads_of
    problem: Callable[[Any], str | None] = lambda module: None  # a feature that is not supported
    grid: Callable[[Grid, int], Grid] = Grid.for_kv_heads  # (the model's, k) -> as which it takes the ranks

    def paths_in(self, module: nn.Module, parent: nn.Module | None) -> dict[str, str]:
        paths = self.paths(module, parent) if callable(self.paths) else self.paths
        assert paths is not None  # it matches
        return dict(paths)

    def new(
        self,
        module: nn.Module,
        projections: dict[str, nn.Module],
        paths: dict[str, str],
        mesh: DeviceMesh | None,
        options: Mapping[str, object],
    ) -> nn.Module:
        """The replacement; it takes of the options of parallelize what it has."""
        options = {name: value for name, value in options.items() if name != "cache" or self.cached}
        return self.replace(module, projections, paths, mesh, **options)


def register_adapter(
    name: str,
    *,
    matches: Callable[[nn.Module, nn.Module | None], bool],
    paths: Mapping[str, str] | Callable[[nn.Module, nn.Module | None], Mapping[str, str] | None],
    inputs: Callable[[Any, torch.dtype], list[tuple[Args, Kwargs]]],
    **others: Any,
) -> Callable[[Replace], Replace]:
    """A decorator: what it decorates makes the replacement, as Adapter.replace; it is returned as it is.

    matches, paths, inputs and the others are the fields of an Adapter. From then on parallelize knows that kind, in
    this process: every rank registers it. Raises GridError for a name that was registered before.
    """

    def register(replace: Replace) -> Replace:
        if name in _registered:
            raise GridError(f"an adapter {name!r} is registered already: give this one another name")
        _registered[name] = Adapter(name, matches, paths, replace, inputs, **others)
        return replace

    return register


def adapters_with(own: tuple[Adapter, ...]) -> list[Adapter]:
    """Every adapter, in the order in which they are asked: registered ones, those of entry points, `own`.

    Raises GridError, naming the package, for an entry point that cannot be loaded or is no Adapter, and for two
    adapters of one name.
    """
    found = {name: ("register_adapter", adapter) for name, adapter in _registered.items()}
    sources = [(f"the package {_package(point)}", _load(point)) for point in entry_points(group=GROUP)]
    for source, adapter in [*sources, *(("two_level_mha", adapter) for adapter in own)]:
        if adapter.name in found:
            raise GridError(
                f"two adapters are called {adapter.name!r}: one of {found[adapter.name][0]}, one of {source}; rename "
                "or remove one of them"
            )
        found[adapter.name] = (source, adapter)
    return [adapter for _, adapter in found.values()]


def _load(point: EntryPoint) -> Adapter:
    where = f"the entry point {point.name!r} ({point.value}) of the package {_package(point)} in group {GROUP}"
    try:
        adapter = point.load()
    except Exception as error:  # of any kind: it is another package's code
        raise GridError(f"{where} cannot be loaded: {error!r}; repair or uninstall it") from error
    if not isinstance(adapter, Adapter):
        raise GridError(f"{where} must be a two_level_mha.adapters.Adapter, got {type(adapter).__name__}")
    return adapter


def _package(point: EntryPoint) -> str:
    return "of unknown name" if point.dist is None else point.dist.name
