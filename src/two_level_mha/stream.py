"""The hidden states of a stack of layers, split over the grid from the first layer to behind the last.

A Stream knows how those of the call under way are split, and is shared by all modules that see parts of them. Outside
the layers everything is whole: positions, masks, what comes from the embedding and what goes to the head.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from two_level_mha import _C
from two_level_mha.activations import dropped, gather_part, keep_part, used_apart, whole_sizes
from two_level_mha.blocks import local_blocks
from two_level_mha.context import cast
from two_level_mha.errors import GridError, UsageRuntimeError
from two_level_mha.mesh import place_on
from two_level_mha.names import Args, Kwargs
from two_level_mha.operators import ops as _ops

Output: TypeAlias = Tensor | tuple[Any, ...]  # of a module: hidden states, or these first


class Stream:
    """Of one stack. `splits`: whether its layers are given parts now, which they are not in short calls without
    gradients, such as the steps of a generation.
    """

    def __init__(self, activations: str, mesh: DeviceMesh, batch_first: bool, reduce_dtype: torch.dtype | None) -> None:
        self.activations, self.batch_first, self.reduce_dtype = activations, batch_first, reduce_dtype
        self.place = place_on(mesh)
        self.rows = activations == "sequence"
        self.dim = int(batch_first == self.rows)
        self.full = self.place.grid.size * (2 if self.rows else 1)  # chunks
        self.splits = True
        self.to_loss = False  # in a call that computes a loss of parts
        self.passes = False  # then the head is given what leaves the layers as it is, so that this can stay split
        self._open = self._left = self._trains = self._was_split = False
        self._sizes: tuple[int, ...] = ()  # along dim, of the wholes of the call under way: hidden states, memory
        self._seen: set[tuple[int, ...]] = set()  # those of calls whose layers may be run again in backward
        self._memory: tuple[Tensor, Tensor] | None = None  # whole and part

    def make_whole(self, module: nn.Module, args: Args, output: object) -> object:
        """Hook of what may give hidden states that were recorded between the layers: they become whole."""
        if not self._was_split:
            return output
        if isinstance(output, dict):
            states: Any = output.get("hidden_states")
            if _recorded(states):
                output["hidden_states"] = self._wholes(states)
            return output
        if type(output) is tuple:
            return tuple(self._wholes(one) if _recorded(one) else one for one in output)
        return output

    def _wholes(self, states: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Of hidden states, and what else there is, those of the last call that are parts made whole; a collective."""
        if torch.compiler.is_compiling():
            raise UsageRuntimeError(
                f"output_hidden_states is not available in a graph with activations={self.activations!r}: between the "
                'layers each rank has its part of them; parallelize with activations="replicated"'
            )
        assert self.place.control is not None  # of several ranks
        size, grid = self._sizes[0], self.place.grid
        mine = [None if x is None else x.shape[self.dim] for x in states]
        everyone = self.place.control.gather(mine, "looking for parts among the hidden states that were recorded")
        of_parts = list(_C.split_sizes(size, grid.head_groups, grid.slices, self.rows))
        return tuple(
            gather_part(x, size, self.activations, self.place, self.batch_first)
            if x is not None and [of_rank[i] for of_rank in everyone] == of_parts
            else x
            for i, x in enumerate(states)
        )

    def begin(self, owner: nn.Module, args: Args) -> None:
        """Pre-hook of the module whose forward runs the layers."""
        self._open, self._left, self._sizes = True, False, ()
        self._trains = torch.is_grad_enabled()  # layers may be run without, and again in backward

    def end(self, owner: nn.Module, args: Args, output: object) -> None:
        """Hook of the same, which is called after an error too."""
        split, self.splits = self.splits, True
        self._open, self._memory, self._was_split = False, None, split and bool(self._sizes)
        if output is not None and self._sizes and split and not self._left:
            raise UsageRuntimeError(
                f"{type(owner).__name__} has not called the norm behind its layers, where split hidden states become "
                'whole again: parallelize with activations="replicated"'
            )
        if self._sizes and self._trains and not torch.compiler.is_compiling() and len(self._seen) < 2:
            self._seen.add(self._sizes)

    def begin_model(self, model: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Pre-hook of a model that computes its loss on vocabulary shards."""
        rows = kwargs.get("logits_to_keep", 0)
        asked = kwargs.get("labels") is not None and isinstance(rows, int) and rows == 0
        self.to_loss = asked and torch.is_grad_enabled() and not torch.compiler.is_compiling()

    def end_model(self, model: nn.Module, args: Args, output: object) -> None:
        """Hook of the same, which is called after an error too."""
        self.to_loss = False

    def enter(self, layer: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """Pre-hook of the first layer: whole hidden states, its first argument, become parts."""
        args, kwargs, x = _first(args, kwargs)
        size = x.shape[self.dim]
        if self._open:
            self.splits = self._trains or size >= self.full
            self._sizes = (size,)
        return (self.keep(x), *args), kwargs

    def enter_memory(self, layer: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """Pre-hook of every layer that is given another sequence as its second argument."""
        x, memory, *others = args
        if self._memory is None or self._memory[0] is not memory:
            self._memory = memory, self.keep(memory)
        if self._open:
            self._sizes = (self._sizes[0], memory.shape[self.dim])
        return (x, self._memory[1], *others), kwargs

    def leave(self, last: nn.Module, args: Args, output: Output) -> Output:
        """Hook of what is called last with parts: its output, or the first of it, becomes whole."""
        self._left = True
        if self.to_loss and self.passes:
            return output
        return _of_first(output, self.gather)

    def gather_input(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """Pre-hook of a module that takes all rows: its first argument becomes whole."""
        args, kwargs, x = _first(args, kwargs)
        return (self.gather(x), *args), kwargs

    def keep_output(self, module: nn.Module, args: Args, output: Output) -> Output:
        """Hook of the same: of its output, or the first of it, this rank's part."""
        return _of_first(output, self.keep)

    def whole_sizes(self, shapes: list[tuple[int, ...]]) -> list[int]:
        """Those of wholes along dim, of which this rank has parts of `shapes`. Outside a call, where checkpoints run
        layers again, a collective, unless all calls had the same ones.

        Raises GridError where the parts are none of them.
        """
        known = self._sizes if self._open or self.to_loss else next(iter(self._seen)) if len(self._seen) == 1 else None
        if known is None or len(known) < len(shapes):
            return whole_sizes(shapes, self.activations, self.place, self.dim)
        for size, shape in zip(known, shapes, strict=False):
            self._check(size, shape)
        return list(known[: len(shapes)])

    def keep(self, x: Tensor) -> Tensor:
        """This rank's part of what is the same on every rank."""
        return keep_part(x, self.activations, self.place, self.batch_first) if self.splits else x

    def gather(self, x: Tensor) -> Tensor:
        """The whole, which every rank uses alike."""
        if not self.splits:
            return x
        (size,) = self.whole_sizes([tuple(x.shape)])
        return gather_part(x, size, self.activations, self.place, self.batch_first)

    def project(self, x: Tensor, linears: Sequence[nn.Linear]) -> list[Tensor]:
        """All rows, whole, through this rank's columns of each linear; of x (B, L, D), this rank's part."""
        own = local_blocks([p for linear in linears for p in (linear.weight, linear.bias)])
        return self.project_by(x, own[::2], own[1::2])

    def project_by(self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
        """The same, by this rank's weights (width, D) and biases."""
        (size,) = self.whole_sizes([tuple(x.shape)])
        given: list[Tensor | None] = [x, *weights, *biases]
        found = cast(given)
        behind = 1 + len(weights)
        whole, *own = [one for one in found[:behind] if one is not None]
        products = _ops.project_activations(
            self._batch_first(whole), own, found[behind:], size, self.rows, *self._grid, self.reduce_dtype
        )
        return [self._batch_first(y) for y in products]

    def sum(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The sum over the ranks and the bias: this rank's part of it, or if nothing is split all of it."""
        if self.splits:
            return self._batch_first(
                _ops.sum_activations(self._batch_first(x), bias, self.rows, *self._grid, self.reduce_dtype)
            )
        y = _ops.all_reduce(x, self.place.grid.size, self.place.groups[2])
        return y if bias is None else y + bias

    def summed(self, parameters: list[Tensor]) -> list[Tensor]:
        """Parameters that act on parts, with the sum over the ranks as their gradient."""
        return used_apart(parameters, self.place, self.reduce_dtype)

    @property
    def _grid(self) -> tuple[list[int], str]:
        return self.place.args[0], self.place.groups[2]

    def _batch_first(self, x: Tensor) -> Tensor:
        return x if self.batch_first else x.transpose(0, 1)

    def _check(self, size: int, shape: tuple[int, ...]) -> None:
        if torch.compiler.is_compiling():
            return
        grid, place = self.place.grid, self.place
        own = _C.split_sizes(size, grid.head_groups, grid.slices, self.rows)
        expected = own[place.head_group * grid.slices + place.slice]
        if shape[self.dim] != expected:
            raise GridError(
                f"activations={self.activations!r}: of hidden states with {size} along dim {self.dim} this rank has "
                f"{expected}, but a layer was given {shape}: the model changes them between its layers; parallelize "
                'with activations="replicated"'
            )


def _recorded(entry: object) -> bool:
    """Whether an entry of an output is hidden states, one after the other, some of which may be left out."""
    if not isinstance(entry, (tuple, list)):
        return False
    tensors = [x for x in entry if x is not None]
    return bool(tensors) and all(isinstance(x, Tensor) and x.dim() == 3 for x in tensors)


def _first(args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs, Tensor]:
    """Arguments without the hidden states, and these."""
    if args:
        return args[1:], kwargs, args[0]
    name = next(name for name in ("hidden_states", "src", "tgt") if name in kwargs)
    return (), {key: value for key, value in kwargs.items() if key != name}, kwargs[name]


def _of_first(output: Output, change: Callable[[Tensor], Tensor]) -> Output:
    """An output with its tensor changed, or the first of them."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


class InStream(nn.Module):
    """A module of a layer in a stream; made of one that exists, by `become`."""

    stream: Stream


class SplitColumns(InStream, nn.Linear):
    """Columns of a linear. In an MLP that has projected its input through all of them at once, `given` has that input
    and this one's product.
    """

    alone = True
    given: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.stream.splits:
            weight, bias = local_blocks([self.weight, self.bias])
            return nn.functional.linear(x, weight, bias)
        if self.alone:
            return self.stream.project(x, [self])[0]
        if self.given is None or self.given[0] is not x:
            raise UsageRuntimeError(
                "a linear that is split by columns must be called by its MLP, with the input of that one, got another "
                "call: what was put around it after parallelize, such as an adapter, does not work with "
                f'activations={self.stream.activations!r}; parallelize with activations="replicated"'
            )
        return self.given[1]


class SplitRows(InStream, nn.Linear):
    """Rows of a linear: what this rank's columns come to, summed over the ranks."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = local_blocks([self.weight, self.bias])
        return self.stream.sum(nn.functional.linear(x, weight), bias)


class SplitMLP(InStream):
    """An MLP whose `columns` are all given its input."""

    columns: tuple[str, ...]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.stream.splits:
            return super().forward(x, *args, **kwargs)
        # SplitColumns, or what was put around one, which that refuses
        linears: list[Any] = [self.get_submodule(path) for path in self.columns]

        try:
            for linear, y in zip(linears, self.stream.project(x, linears), strict=True):
                linear.given = (x, y)
            return super().forward(x, *args, **kwargs)
        finally:
            for linear in linears:
                linear.given = None


class OnParts(InStream):
    """A module with parameters of its own that acts on parts."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        own = {name: p for name, p in self._parameters.items() if p is not None and p.requires_grad}
        if not own or not self.stream.splits or not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        try:
            summed = self.stream.summed(list(own.values()))
            self._parameters.update(zip(own, summed, strict=True))  # type: ignore[arg-type]  # plain, for the call
            return super().forward(*args, **kwargs)
        finally:
            self._parameters.update(own)


class DropoutOnParts(InStream, nn.Dropout):
    """Drops the elements that it would drop of the whole."""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.stream.splits and self.p > 0.0):
            return super().forward(x)
        (size,) = self.stream.whole_sizes([tuple(x.shape)])
        shape = (*x.shape[: self.stream.dim], size, *x.shape[self.stream.dim + 1 :])
        return dropped(x, self.p, shape, self.stream.keep)


class DropoutOnColumns(nn.Dropout):
    """Between the linears of a split MLP: of `width` columns, of which this rank has those from `first` on, drops the
    elements that it would drop of all.
    """

    width: int
    first: int

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.p > 0.0):
            return super().forward(x)
        own = slice(self.first, self.first + x.shape[-1])
        return dropped(x, self.p, (*x.shape[:-1], self.width), lambda kept: kept[..., own])
