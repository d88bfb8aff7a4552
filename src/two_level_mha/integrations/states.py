"""Layers that keep a state for each head: transformers' own code on this rank's heads, or its part of what they give.

Linears are stored split. Vectors, of channels or of heads, every rank keeps whole and takes its own of in the call:
they are few numbers, and their gradients are summed over the ranks. During a call the module is a smaller one of its
class: parameters, buffers and the attributes that count heads are this rank's; so are the states that a cache keeps.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.nn.functional import linear
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, LinearAttentionLayer

from two_level_mha.blocks import laid_out, local_blocks, own_part
from two_level_mha.class_like import become
from two_level_mha.errors import GridError
from two_level_mha.integrations.forms import layer_of, parameters_of
from two_level_mha.integrations.lora import mark
from two_level_mha.integrations.lora_layers import STATES
from two_level_mha.integrations.state_forms import ALL, HEADS, SLICES, Cut, form_of, owner_of
from two_level_mha.low_rank import is_linear
from two_level_mha.mesh import Place, mesh_of, place_on
from two_level_mha.names import Args, Kwargs
from two_level_mha.operators import ops as _ops
from two_level_mha.stock import HoldsStock, take_stock_keys
from two_level_mha.stream import Stream


class Exchange(NamedTuple):
    """What a rank does together with others of its grid."""

    place: Place
    reduce_dtype: torch.dtype | None

    def apart(self, xs: list[Tensor], axis: int) -> list[Tensor]:
        """Tensors that are the same along an axis and used differently: their gradients are summed over it."""
        size = self._size(axis)
        if size == 1 or not xs or not torch.is_grad_enabled():
            return xs
        return _ops.replicated(xs, size, self.place.groups[axis], self.reduce_dtype)

    def sum(self, x: Tensor, axis: int, apart: bool) -> Tensor:
        """Over an axis; apart: ranks use it differently."""
        size = self._size(axis)
        if size == 1:
            return x
        y = _ops.all_reduce(x.to(self.reduce_dtype or x.dtype), size, self.place.groups[axis]).to(x.dtype)
        return self.apart([y], axis)[0] if apart else y

    def _size(self, axis: int) -> int:
        grid = self.place.grid
        return (grid.slices, grid.head_groups, grid.size)[axis]


class PartedRows(nn.Linear):
    """Rows of a linear, in parts that are stored apart; each has as many groups of what comes out."""

    parts: list[tuple[Tensor, Tensor | None]]  # during a call of the module that it is in
    groups: int

    def forward(self, x: Tensor) -> Tensor:
        given = [linear(x, weight, bias).unflatten(-1, (self.groups, -1)) for weight, bias in self.parts]
        return torch.cat(given, -1).flatten(-2)


class SummedColumns(nn.Linear):
    """Columns of a linear: what they come to is summed over the ranks. apart: ranks use the sum differently. stream: of
    hidden states that are split, into parts of which the sum goes.
    """

    exchange: Exchange
    apart: bool
    whose: tuple[nn.Module, str]  # in a tuple: the module that it is in is no child of it; the name of its parameter
    stream: Stream | None = None

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # an nn.Linear's is an attribute
        """In a call this rank's columns; else the parameter, for a model that changes it in place, as RWKV's does."""
        module, name = self.whose
        own = self._parameters["weight"]
        return _present(module._parameters, name) if own is None else own

    def forward(self, x: Tensor) -> Tensor:
        if self.stream is not None and self.stream.splits:
            return self.stream.sum(linear(x, self.weight), self.bias)
        y = self.exchange.sum(linear(x, self.weight), ALL, self.apart)
        return y if self.bias is None else y + self.bias.to(y.dtype)  # y's is of autocast, if there is one


class SummedProduct(Tensor):
    """This rank's columns of a matrix: the slices' products with it are summed, and each uses the sum differently."""

    exchange: Exchange

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            y = function(*args, **(kwargs or {}))
        exchange = next(x.exchange for x in args if isinstance(x, SummedProduct))
        if function in (Tensor.matmul, Tensor.__matmul__, torch.matmul):
            return exchange.sum(y, SLICES, apart=True)
        return summed_product(y, exchange) if isinstance(y, Tensor) else y


def summed_product(x: Tensor, exchange: Exchange) -> SummedProduct:
    y: SummedProduct = x.as_subclass(SummedProduct)
    y.exchange = exchange
    return y


class SlicedNorm(nn.Module):
    """A gated RMS norm that takes squares together of columns which several ranks have."""

    exchange: Exchange
    axis: int
    widths: tuple[int, int]  # what is normalised together: of this rank, of all
    gate_first: bool
    weight: Tensor
    variance_epsilon: float

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        dtype = x.dtype
        x = x.to(torch.promote_types(dtype, torch.float32))
        factor = None if gate is None else ACT2FN[getattr(self, "activation", "silu")](gate.to(x.dtype))
        if factor is not None and self.gate_first:
            x = x * factor
        own, whole = self.widths
        x = x.unflatten(-1, (-1, own))
        squares = self.exchange.sum(x.pow(2).sum(-1, keepdim=True), self.axis, apart=True)
        x = (x * torch.rsqrt(squares / whole + self.variance_epsilon)).flatten(-2) * self.weight.to(x.dtype)
        return (x if factor is None or self.gate_first else x * factor).to(dtype)


class Within(NamedTuple):
    """Of a linear the layer with states that it is in, and what of its weight's dim `dim` a rank has; "": all."""

    layer: "SplitStates"
    text: str
    dim: int


class SplitStates(HoldsStock):
    """Of a module of another class too, whose forward it runs on what this rank has of its heads and channels."""

    cut: Cut
    exchange: Exchange
    layer: int | None  # of a cache
    hidden_name: str
    stored: dict[nn.Module, dict[str, list[str]]]  # of each linear by parameter: names of its parts
    layouts: dict[str, list[Placement]]  # of the parts, placements on the axes of the mesh
    kept: list[tuple[nn.Module, str, str]]  # parameters that are whole on every rank: module, name, path
    tables: list[tuple[nn.Module, str, str]]  # buffers of which a rank takes its own
    counts: list[tuple[nn.Module, str, int]]  # this rank's
    stream: Stream | None = None  # of a model whose hidden states are split

    def block(self, full: Tensor, name: str) -> Tensor:
        if self.mesh is not None:
            return laid_out(full, self.mesh, self.layouts[name])
        place = self.place
        ranks = [(place.grid.head_groups, place.head_group), (place.grid.slices, place.slice)]
        return own_part(full, self.layouts[name], ranks)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for cache in (x for x in (*args, *kwargs.values()) if isinstance(x, Cache)):
            self._check_cache(cache)
        hidden, args = (args[0], args[1:]) if args else (kwargs.pop(self.hidden_name), ())
        hidden = hidden if self.stream is None else self.stream.gather(hidden)
        form = self.cut.form
        states: list[Tensor] | None = None if form.states is None else kwargs.get(form.states[0])
        if states is not None:
            self._take_states(states, kwargs)
        with self._own():
            output = super().forward(*self.exchange.apart([hidden], ALL), *args, **kwargs)
        if states is not None:
            self._give_states(states)
        return (output[0], states) if form.gives_weights or form.states is not None else output

    def _take_states(self, states: list[Tensor], kwargs: Kwargs) -> None:
        """Gives a call, instead of the list of all states, one of this rank's: views, to which it writes."""
        assert self.cut.form.states is not None
        name, which, text, dim = self.cut.form.states
        kwargs[name] = [self.cut.take(x, text, dim) if i in which else x for i, x in enumerate(states)]

    def _give_states(self, states: list[Tensor]) -> None:
        """Makes the list whole again, of this layer: every rank has written its own."""
        assert self.cut.form.states is not None
        _, which, text, dim = self.cut.form.states
        layers = [states[i][..., self.layer] for i in which]
        own = torch.stack([torch.zeros_like(x) for x in layers])
        for mine, x in zip(own, layers, strict=True):
            self.cut.take(mine, text, dim).copy_(self.cut.take(x, text, dim))
        for x, whole in zip(layers, self.exchange.sum(own, ALL, apart=False), strict=True):
            x.copy_(whole)

    def _check_cache(self, cache: Cache) -> None:
        """Raises GridError for one that holds the states of more channels than this rank's."""
        layer = cache.layers[self.layer] if self.layer is not None and self.layer < len(cache.layers) else None
        state = (getattr(layer, "conv_states", None) or {}).get(0)
        channels = [self.cut.size(text) for path, (text, _) in self.cut.form.vectors.items() if path.startswith("conv")]
        if state is not None and state.shape[1] != channels[0]:
            raise GridError("past_key_values was filled by a model that is not split so: fill it again by this one")

    @contextmanager
    def _own(self) -> Iterator[None]:
        """The module as what this rank has of it."""
        before: list[tuple[dict[str, Any], str, object]] = []

        def put(table: dict[str, Any], name: str, value: object) -> None:
            before.append((table, name, table[name]))
            table[name] = value

        own = self._own_weights()
        wholes = self.exchange.apart([_present(module._parameters, name) for module, name, _ in self.kept], ALL)
        try:
            put(vars(self), "training", False)  # fused kernels of training take all of a layer, and know no slices
            for module, name, count in self.counts:
                put(vars(module), name, count)
            for (module, name, path), whole in zip(self.kept, wholes, strict=True):
                put(module._parameters, name, self._taken(whole, path))
            for module, name, path in self.tables:
                put(module._buffers, name, self._taken(_present(module._buffers, name), path))
            for child, parameters in self.stored.items():
                if isinstance(child, PartedRows):
                    weights, biases = parameters["weight"], parameters.get("bias")
                    own_biases = [None] * len(weights) if biases is None else [own[name] for name in biases]
                    child.parts = list(zip([own[name] for name in weights], own_biases, strict=True))
                    continue
                for name, (part,) in parameters.items():
                    put(child._parameters, name, own[part])
            yield
        finally:
            for table, name, value in reversed(before):
                table[name] = value
            for child in self.stored:
                vars(child).pop("parts", None)

    def _own_weights(self) -> dict[str, Tensor]:
        """By name, in the dims of the stock tensor."""
        blocks = local_blocks([_present(self._parameters, name) for name in self.layouts])
        own = dict(zip(self.layouts, blocks, strict=True))
        for axis in (SLICES, HEADS, ALL):
            alike = [name for name, layout in self.layouts.items() if _same_along(layout) == axis]
            own |= zip(alike, self.exchange.apart([own[name] for name in alike], axis), strict=True)
        found = {}
        for name, x in own.items():
            stock = self.stock_names[name]
            found[name] = x.flatten(stock.dim, stock.dim + x.dim() - len(stock.shape))
        return found

    def _taken(self, x: Tensor, path: str) -> Tensor:
        form = self.cut.form
        for known in (form.vectors.get(path), form.inner_dims.get(path)):
            x = x if known is None else self.cut.take(x, *known)
        return summed_product(x, self.exchange) if path in form.products else x


def _present(table: Mapping[str, Tensor | None], name: str) -> Tensor:
    """Of a table of parameters or buffers, which may have names without any."""
    x = table[name]
    assert x is not None
    return x


def _same_along(layout: Sequence[Placement]) -> int | None:
    """The axis along which ranks have the same; None: there is none."""
    head, slice_ = (isinstance(placement, Replicate) for placement in layout)
    return ALL if head and slice_ else HEADS if head else SLICES if slice_ else None


def split_states(module: nn.Module, mesh: DeviceMesh, gate_first: bool, reduce_dtype: torch.dtype | None) -> None:
    """Makes a module, in place, one of SplitStates on the ranks of the mesh."""
    form = form_of(module)
    own_mesh = mesh_of(mesh, lambda grid: Cut(module, form, grid).grid)
    place = place_on(own_mesh)
    cut = Cut(module, form, place.grid, place.head_group, place.slice)
    become_split(module, cut, Exchange(place, reduce_dtype), own_mesh, gate_first)
    take_stock_keys(module)
    assert isinstance(module, SplitStates)
    cuts = {path: (text, 0) for path, text in form.rows.items()} | {path: (text, 1) for path, text in form.columns}
    linears = {path: part for path, part in module.named_modules() if is_linear(part)}
    for path, part in linears.items():
        vars(part)["within"] = Within(module, *cuts.get(path, ("", 0)))
    mark(module, dict.fromkeys(linears, STATES), mesh)


def become_split(module: nn.Module, cut: Cut, exchange: Exchange, mesh: DeviceMesh | None, gate_first: bool) -> None:
    """The same without what concerns a whole model; mesh: None, or the one of exchange.place."""
    form = cut.form
    hidden_name = next(iter(parameters_of(module)))
    become(
        module, SplitStates, cut=cut, exchange=exchange, place=exchange.place, mesh=mesh, layer=layer_of(module),
        hidden_name=hidden_name, stored={}, layouts={}, stock_names={},
    )  # fmt: skip
    assert isinstance(module, SplitStates)
    for path, text in form.rows.items():
        several = len(cut.stock("", (cut.size(text, cut.whole),), text, 0)) > 1
        _store(module, path, text, 0)
        if several:
            become(module.get_submodule(path), PartedRows, groups=cut.groups(text))
    for path, text in form.columns:
        _store(module, path, text, 1)
        whose, apart = (module, f"{path}.weight".replace(".", "_")), path != form.out[0]
        become(module.get_submodule(path), SummedColumns, exchange=exchange, apart=apart, whose=whose)
    axis = cut.norm_axis()
    if axis is not None and form.norm is not None:
        path, text = form.norm
        if hasattr(module.get_submodule(path), "variance_epsilon"):
            widths = (cut.size(text), cut.size(text, cut.whole))
            options = {"exchange": exchange, "axis": axis, "widths": widths, "gate_first": gate_first}
            become(module.get_submodule(path), SlicedNorm, **options)
    module.kept = [
        (*owner_of(module, path), path)
        for path, _ in module.named_parameters()
        if path not in module.layouts and path != f"{form.out[0]}.bias"
    ]
    module.tables = [(*owner_of(module, path), path) for path, _ in module.named_buffers() if path in form.vectors]
    counted = [(*owner_of(module, path), cut.size(text)) for path, text in form.sizes.items()]
    module.counts = [one for one in counted if getattr(*one[:2], None) is not None]


def split_hidden(module: nn.Module, stream: Stream) -> None:
    """Lets a split module take and give from now on this rank's part of hidden states."""
    assert isinstance(module, SplitStates)
    out = module.get_submodule(module.cut.form.out[0])
    assert isinstance(out, SummedColumns)
    module.stream = out.stream = stream


def blank_cache(layer: int | None) -> Cache:
    """An empty cache in which this layer keeps states."""
    return Cache(layers=[LinearAttentionLayer() for _ in range((layer or 0) + 1)])


def _store(module: SplitStates, path: str, text: str, dim: int) -> None:
    """Makes parameters of the module of those of a linear; of columns the bias stays where it is."""
    child = module.get_submodule(path)
    held: dict[str, list[str]] = {}
    module.stored[child] = held
    for name, p in list(child.named_parameters(recurse=False)):
        if p.dim() <= dim:
            continue
        parts = module.cut.stock(f"{path}.{name}", tuple(p.shape), text, dim)
        held[name] = []
        for i, (stock, dims) in enumerate(parts):
            own = f"{path}.{name}".replace(".", "_") + (f"_{i}" if len(parts) > 1 else "")
            module.stock_names[own] = stock
            module.layouts[own] = [Replicate() if at is None else Shard(at) for at in dims]
            kept = module.block(stock.read(p.detach()), own)
            module.register_parameter(own, nn.Parameter(kept, p.requires_grad))
            held[name].append(own)
        child.register_parameter(name, None)
