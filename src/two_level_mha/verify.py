"""Integrity of a job's memory: bits that flip, ranks that part, the first NaN. `verify` and what it returns.

after step k (k a multiple of every; 0 is the call of verify)
    checksums of parameters, buffers and moments are kept
forward calls up to the next step
    checksums of the inputs, sums of the outputs of layers
before step k + 1, for each optimizer
    checksums again, is everything finite, gradients too; one all-gather of a row of each rank:
        rank | something is wrong | inputs | random generator | a checksum for each way of being placed
    if a row says so or rows differ: the findings of all ranks to all ranks, and IntegrityError on each
"""

import weakref
import zlib
from collections.abc import Iterable
from numbers import Integral
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from two_level_mha.agreement import same_on_all_ranks
from two_level_mha.errors import GridError, IntegrityError
from two_level_mha.held import (
    Checksums,
    Held,
    Placed,
    Places,
    forward_hooks,
    held_by,
    joined,
    local_of,
    not_finite,
    numbers,
    random_state,
    sum_of,
    tensors_in,
)
from two_level_mha.names import Args, Kwargs
from two_level_mha.verdict import Copy, Findings, Same, mending, verdict


def verify(
    model: nn.Module, optimizer: Optimizer | Iterable[Optimizer] | None = None, every: int = 100
) -> "Verification":
    """Watches a model, and the optimizers that train it, for memory that changes by itself and ranks that part.

    After each `every`-th step checksums of this rank's weight blocks, replicated weights, buffers and moments are kept,
    the first time at once; before the next step, after its backward pass, it is looked whether
    - memory changed without a write that torch knows of: a bit flip, a stray write;
    - the ranks that should hold the same do: replicated weights, buffers and moments, by their placements (a plain
      tensor: all ranks of the grid), tensors given to the model's forward, torch's random generators;
    - a parameter, moment or gradient has NaN or Inf; if a gradient has, which layer's output had it first.
    If not, IntegrityError is raised from optimizer.step() on every rank, with the same text, and the step is not made:
    it names the rank, the layer or tensor, what differs and the way out. Without an optimizer forward calls are
    counted; every `every`-th, the first one too, is looked at when it is done, with all the time since the last one,
    and its output is withheld. Without a mesh there is no one to compare with.

    optimizer: one, several, or None. every: a positive integer; 1 leaves only the steps themselves unwatched.
    A collective over the grid. One look sends one all-gather of 8 * (4 + C) bytes a rank, where C, 1 to 4 as a rule, is
    the number of ways in which parameters are placed (for each optimizer that steps; for each mesh axis outside the
    grid again); findings are sent only when something is wrong.
    Call it when the model has been split, sharded and moved. Intended writes are known by torch's version of a tensor;
    after others, by x.data, numpy or a kernel that does not tell torch, call accept().
    Raises GridError, on every rank and with nothing installed, for arguments that are none or differ between ranks.
    """
    if not isinstance(model, nn.Module):
        raise GridError(f"model must be an nn.Module, got {type(model).__name__}")
    places = Places(model)
    if isinstance(optimizer, Iterable) and not isinstance(optimizer, Optimizer):
        optimizers = list(optimizer)
    else:
        optimizers = [] if optimizer is None else [optimizer]
    fields: dict[str, object] = {"refusal": _refusal(optimizers, every), "every": every}
    fields["number of optimizers"] = len(optimizers)
    tensors = (*model.named_parameters(), *model.named_buffers())
    placed = repr([(name, tuple(x.shape), places.of(name, x)) for name, x in tensors])
    fields["what the model holds (a checksum of names, shapes and placements)"] = zlib.crc32(placed.encode())
    same_on_all_ranks(fields, places.grid, "call verify alike on every rank")
    return Verification(model, optimizers, int(every), places)


def _refusal(optimizers: list[Any], every: object) -> GridError | None:
    if not isinstance(every, Integral) or isinstance(every, bool) or every < 1:
        return GridError(f"every must be a positive integer, the number of steps from look to look, got {every!r}")
    for one in optimizers:
        if not isinstance(one, Optimizer):
            return GridError(f"optimizer must be a torch.optim.Optimizer, several, or None, got {type(one).__name__}")
    return None


class _Kept(NamedTuple):
    """A checksum, and of what it is."""

    tensor: weakref.ref[Tensor]
    written: tuple[object, ...]
    checksum: int


class Verification:
    """What `verify` returns: a handle that removes its hooks, also as a context manager, and mends what it can."""

    def __init__(self, model: nn.Module, optimizers: list[Optimizer], every: int, places: Places) -> None:
        self.model, self.optimizers, self.every = model, optimizers, every
        self.step = 0  # steps made, forward calls without an optimizer
        self._stepped: set[Optimizer] = set()  # of the present step
        self._places, self._checksums = places, Checksums()
        same_on = places.gather([places.same_on(placed) for placed in places.known])
        self._same: Same = {
            placed: joined({rank: table[i] for rank, table in same_on.items()}) for i, placed in enumerate(places.known)
        }
        self._kept: dict[str, _Kept] = {}
        self._calls = 0  # forward calls since the last look
        self._inputs: list[tuple[str, str, Tensor]] = []  # name, shape and dtype, checksum
        self._outputs: list[tuple[str, Tensor]] = []  # layer, sum
        self._changed: dict[str, str] = {}  # buffers that were wrong before forward calls wrote to them
        self._output_hooks: list[Any] = []
        self.accept()
        # functions, not methods: a deep copy of the model takes them as they are, and its calls are not ours
        self._hooks = [
            model.register_forward_pre_hook(lambda *call: self._before_forward(*call), with_kwargs=True),
            model.register_forward_hook(lambda *call: self._after_forward(*call)),
            model.register_forward_hook(lambda *call: self._unhook_outputs(), always_call=True),
        ]
        for one in optimizers:
            self._hooks.append(one.register_step_pre_hook(lambda optimizer, *_: self._before_step(optimizer)))
            self._hooks.append(one.register_step_post_hook(lambda optimizer, *_: self._after_step(optimizer)))

    def remove(self) -> None:
        """Ends the watch; nothing of it stays on the model or the optimizers."""
        self._unhook_outputs()
        for hook in self._hooks:
            hook.remove()
        self._kept.clear()

    def __enter__(self) -> "Verification":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def accept(self) -> None:
        """Takes what is in memory now as intended, for writes that torch does not know of. Sends nothing."""
        self._kept.clear()
        self._keep(None)

    @torch.no_grad()
    def repair(self) -> list[str]:
        """Copies each weight, buffer and moment that differs or changed from the majority of the ranks that hold it.

        Ranks whose own memory changed, or has NaN or Inf, have no vote. The gradients of the step that was refused
        come from the wrong memory: zero_grad(), and run the batch again. A collective; returns a sentence for each
        tensor that was copied, the same on every rank.
        Raises IntegrityError, on every rank and with nothing copied, where a tensor exists once, is wrong on every rank
        or has no majority: the last checkpoint has it.
        """
        held = self._held()
        plan = mending(self._places.gather(self._memory(held)), self._same)
        if plan.lost:
            raise IntegrityError(f"repair is not possible: {'; '.join(plan.lost)}; load the last checkpoint")
        by_name = {one.name: one for one in held}
        for copy in plan.copies:
            self._copy(copy, by_name)
        self._keep(None)
        return [f"{copy.name} of rank {copy.source} on rank {rank}" for copy in plan.copies for rank in copy.targets]

    def _copy(self, copy: Copy, held: dict[str, Held]) -> None:
        if self._places.rank == copy.source:
            data = _bytes(held[copy.name].local).to(self._places.device)
            for rank in copy.targets:
                dist.send(data, rank)
        elif self._places.rank in copy.targets:
            local = held[copy.name].local
            data = torch.empty_like(_bytes(local), device=self._places.device)
            dist.recv(data, copy.source)
            local.copy_(data.to(local.device).view(local.dtype).view(local.shape))

    # -- Hooks

    def _watches(self) -> bool:
        return self.step % self.every == 0 and not torch.compiler.is_compiling()

    def _before_forward(self, model: nn.Module, args: Args, kwargs: Kwargs) -> None:
        if model is not self.model or not self._watches():
            return
        buffers = [one for one in self._held() if one.buffer]
        self._changed |= self._memory(buffers).changed
        self._calls += 1
        again = f" of call {self._calls} since the last step" if self._calls > 1 else ""
        for key, value in ({f"input {i}": x for i, x in enumerate(args)} | kwargs).items():
            for name, x in tensors_in(key, value):
                if not isinstance(x, DTensor) or all(placement.is_replicate() for placement in x.placements):
                    kind = f"{tuple(x.shape)} {x.dtype}"
                    self._inputs.append((name + again, kind, self._checksums.of(local_of(x))))
        watched = torch.is_grad_enabled() or not self.optimizers  # evaluation between steps would only pile them up
        if watched and not self._output_hooks:
            self._output_hooks = forward_hooks(self.model, self._after_layer)

    def _after_layer(self, name: str, output: object) -> None:
        sums = [sum_of(local_of(x)) for _, x in tensors_in("", output) if x.is_floating_point() or x.is_complex()]
        if sums:
            self._outputs.append((name, sum(sums[1:], sums[0])))

    def _unhook_outputs(self) -> None:
        for hook in self._output_hooks:
            hook.remove()
        self._output_hooks = []

    def _after_forward(self, model: nn.Module, _args: Args, output: object) -> None:
        if model is not self.model or torch.compiler.is_compiling():
            return
        if self._output_hooks:
            self._after_layer("the model", output)
        if self.optimizers:
            return
        if self.step % self.every == 0:
            self._look(None, f"forward call {self.step + 1}")
            self._keep(None)
        self.step += 1

    def _before_step(self, optimizer: Optimizer) -> None:
        new = not self._stepped or optimizer in self._stepped  # several optimizers make one step in turn
        step = self.step + new
        if (step - 1) % self.every == 0:
            self._look(optimizer, f"before step {step}")
        if new:
            self._stepped.clear()
        self._stepped.add(optimizer)
        self.step = step

    def _after_step(self, optimizer: Optimizer) -> None:
        if self.step % self.every == 0:
            self._keep(optimizer)

    # -- Looking

    def _held(self) -> list[Held]:
        return held_by(self.model, self.optimizers, self._places)

    @torch.no_grad()
    def _keep(self, writer: Optimizer | None) -> None:
        """Keeps checksums of all that is new, that was written to, or that `writer` writes, as torch may not know."""
        held = self._held()
        new = [one for one in held if one.optimizer is writer is not None or not self._is_kept(one)]
        sums = self._checksums.all(one.local for one in new)
        for one, checksum in zip(new, sums, strict=True):
            self._kept[one.name] = _Kept(weakref.ref(one.tensor), one.written(), checksum)

    def _is_kept(self, one: Held) -> bool:
        """Whether the checksum that was kept is of this tensor as it was last written."""
        kept = self._kept.get(one.name)
        return kept is not None and kept.tensor() is one.tensor and kept.written == one.written()

    def _memory(self, held: list[Held]) -> Findings:
        found = Findings()
        for one, checksum in zip(held, self._checksums.all(one.local for one in held), strict=True):
            found.checksums[one.name] = (one.placed, checksum)
            if self._is_kept(one) and checksum != (expected := self._kept[one.name].checksum):
                found.changed[one.name] = (
                    f"changed without being written to (its checksum is {_hex(checksum)}, {_hex(expected)} was kept)"
                )
        found.not_finite = not_finite([(one.name, one.local) for one in held if not one.buffer])
        return found

    @torch.no_grad()
    def _look(self, optimizer: Optimizer | None, when: str) -> None:
        """Raises IntegrityError on every rank if anything is wrong on any; `optimizer` is about to step."""
        inputs, outputs, self._inputs, self._outputs = self._inputs, self._outputs, [], []
        self._calls = 0
        found = self._memory(self._held())
        found.changed = self._changed | found.changed
        self._changed = {}
        if optimizer is not None and getattr(optimizer, "found_inf", None) is None:  # set: a GradScaler sees to it
            written = {p for group in optimizer.param_groups for p in group["params"]}
            grads = [(name, p.grad) for name, p in self.model.named_parameters() if p in written]
            found.gradients = not_finite(
                [(name, local_of(g)) for name, g in grads if g is not None and g.layout == torch.strided]
            )
        if found.gradients or optimizer is None:
            found.layers = _first_outputs(outputs, optimizer is None)
        for (name, kind, _), checksum in zip(inputs, numbers([x for *_, x in inputs]), strict=True):
            found.inputs[name] = (kind, checksum)
        found.random = _mixed(self._checksums.all(random_state(self._places.device)))
        if not self._well(self._places.gather_row(self._row(found))):
            everyone = dict(sorted(self._places.gather(found).items()))
            raise IntegrityError(f"{when}: {verdict(everyone, self._same)}")

    def _row(self, found: Findings) -> list[int]:
        by_place: dict[Placed, list[int]] = {placed: [] for placed in self._places.known}
        for placed, checksum in found.checksums.values():
            by_place[placed].append(checksum)
        given = zlib.crc32(repr([(name, kind) for name, (kind, _) in found.inputs.items()]).encode())
        inputs = _mixed([given, *(checksum for _, checksum in found.inputs.values())])
        return [int(found.faults), inputs, found.random, *map(_mixed, by_place.values())]

    def _well(self, rows: dict[int, list[int]]) -> bool:
        columns = [(), (), *self._places.known]  # by whom the numbers after the first are held alike
        return not any(row[0] for row in rows.values()) and all(
            row[1 + i] == rows[other][1 + i]
            for rank, row in rows.items()
            for i, placed in enumerate(columns)
            for other in self._same[placed][rank]
        )


def _first_outputs(outputs: list[tuple[str, Tensor]], only_if_last: bool) -> list[str]:
    """A sentence for each output that is not finite, "" for the others; only_if_last: if the model's own is not."""
    sums = numbers([x for _, x in outputs])
    texts = [
        "" if abs(total) < float("inf") else f"{name} is the first layer whose output is not finite"
        for (name, _), total in zip(outputs, sums, strict=True)
    ]
    return [] if only_if_last and not (texts and texts[-1]) else texts


def _mixed(checksums: list[int]) -> int:
    """One 64-bit number for several, by their places."""
    total = sum((2 * i + 1) * checksum for i, checksum in enumerate(checksums)) % (1 << 64)
    return total - (total >> 63 << 64)


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8)


def _hex(checksum: int) -> str:
    return f"{checksum % (1 << 64):#018x}"
