"""The agreement of ranks: what must be alike on every rank of a grid, compared, and one error on all where it is not.

    what is compared                            when                                            by
    arguments, results of a search              parallelize, load_pretrained                    same_on_all_ranks
    source parameters, random generator         from_torch, parallelize                         check_same_weights
    inputs, settings, replicated parameters     the first call of a module, all with debug      check_call
    what decides the sizes of messages          a call in which it changes                      Calls.begin
    layer, number of the call, inputs, mask,    every call, in an exchange that it makes        Calls.number and
    options, writes to own blocks               anyway; on a GPU looked at two calls later      csrc/comm/seal.h,
                                                (compiled: no number; neither of the two with   deferred.py
                                                debug=False)
    inputs of the whole model                   every call of it, with those of its layers      ModelInputs

Digests are compared, not the tensors: over a group of its own (control.py), but for what rides in an exchange. What a
layer exchanges goes through the operators; the other collectives that Python issues are one number of a GradScaler
(training.py), and full_tensor of DTensors (blocks.py).
"""

import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from two_level_mha.control import Control, Inputs, same_in
from two_level_mha.deferred import COMPILED
from two_level_mha.errors import GridError
from two_level_mha.mesh import control_on
from two_level_mha.names import Args
from two_level_mha.operators import ops

if TYPE_CHECKING:
    from two_level_mha.layer import GridAttention

ALIKE = "every rank of a grid must be given the same inputs and arguments"


def same_on_all_ranks(fields: dict[str, object], mesh: DeviceMesh | None, advice: str) -> None:
    """Compares `fields` over the grid; raises the same GridError on every rank, naming the ranks and the field.

    A collective. A value may be an exception: then it is what every rank raises.
    """
    if mesh is None or mesh.size() == 1:
        for value in fields.values():
            if isinstance(value, Exception):
                raise value
        return
    same_in(control_on(mesh), fields, advice)


def digest(tensors: Iterable[Tensor]) -> str:
    """A digest of the bytes, shapes and dtypes of tensors."""
    state = hashlib.blake2b(digest_size=8)
    for x in tensors:
        state.update(f"{tuple(x.shape)}{x.dtype}".encode())
        state.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


class Calls:
    """Of one layer on a grid: what its calls carry along, so that the ranks compare them."""

    def __init__(self, control: Control, kind: str) -> None:
        control.layers += 1
        self.control, self.name = control, f"{kind} {control.layers}"
        self.count, self._number = 0, control.number
        self._sizes: dict[str, object] | None = None
        self._written: int | None = None

    def begin(self, sizes: dict[str, object], compared: bool) -> None:
        """Compares what decides how much is sent, if it is not that of the last call; compared: it was just now.

        Exchanges of other sizes end the process on some backends, so what they carry would come too late. Raises
        GridError on every rank that compares, RankFailure where the others went on. `end` comes after the call.
        """
        self.control.enter_call()
        self.control.doing = ""
        if self._number != self.control.number:  # the mesh was reopened: ranks may have counted apart
            self.count, self._sizes, self._number = 0, {}, self.control.number
        self.count += 1
        self.control.deferred.call = f"call {self.count}"
        try:
            self._begin(sizes, compared)
        except BaseException:
            self.end()
            raise

    def _begin(self, sizes: dict[str, object], compared: bool) -> None:
        turn, call = self.control.turn, self.control.call
        # one layer of a model has compared for the others, which must follow it
        if turn is not None and call > 0 and turn[:2] == (call, self._sizes):
            if sizes == turn[2]:
                self._sizes = sizes
            else:
                self._compare(sizes, compared)
        elif sizes != self._sizes:
            self._compare(sizes, compared)

    def end(self) -> None:
        self.control.deferred.call = COMPILED
        self.control.leave_call()

    def _compare(self, sizes: dict[str, object], compared: bool) -> None:
        if not compared and self._sizes is not None:
            fields = {"layer": self.name, "number of the call": self.count, **sizes}
            changed = [f"{k} {v} (was {self._sizes.get(k)})" for k, v in sizes.items() if v != self._sizes.get(k)]
            what = f"comparing its call {self.count} of {self.name}, of other sizes: {', '.join(changed)}"
            same_in(self.control, fields, "every rank of a grid must make the same calls", what)
            self.control.turn = (self.control.call, self._sizes, sizes)
        self._sizes = sizes

    def number(self, blocks: Iterable[Tensor | None]) -> int:
        """A hash of the call's number, the model's inputs, and how often code has written to this rank's blocks."""
        return hash((self.count, self.control.inputs.hash, self.written(blocks))) & (2**62 - 1) or 1

    def written(self, blocks: Iterable[Tensor | None]) -> int:
        """Writes since the first call: ranks may have come to their weights in different ways."""
        versions = 0
        for p in blocks:
            x = p._local_tensor if isinstance(p, DTensor) else p
            versions += 0 if x is None or x.is_inference() else x._version
        if self._written is None:
            self._written = versions
        return versions - self._written

    def explain(
        self, blocks: Iterable[Tensor | None], options: dict[str, object], tensors: Mapping[str, Tensor | None]
    ) -> NoReturn:
        """Raises GridError, on every rank, that names what differs. A collective."""
        fields: dict[str, object] = {"layer": self.name, "number of the call": self.count}
        fields |= {"grad mode": torch.is_grad_enabled(), **self.control.inputs.described}
        fields |= options | _described(tensors)
        fields["number of writes to the weights since the first call"] = self.written(blocks)
        same_in(self.control, fields, "every rank of a grid must make the same calls with the same inputs")
        raise GridError(f"the ranks of the grid differ in a call of {self.name}: every rank must be given the same")


class ModelInputs:
    """A forward pre-hook of a whole model: what it is given is compared with the calls of its layers.

    A vocabulary-split embedding sums rows of different tokens into one x that is equal everywhere.
    """

    def __init__(self, control: Control) -> None:
        self.control = control

    def __call__(self, model: nn.Module, args: Args, kwargs: dict[str, object]) -> None:
        if torch.compiler.is_compiling():
            return
        named = {str(i): x for i, x in enumerate(args)} | kwargs
        tensors = {name: x for name, x in named.items() if isinstance(x, Tensor) and not isinstance(x, DTensor)}
        described = {
            f"input {name} of the model": f"{tuple(x.shape)} {digest([x]) if x.is_cpu else ''}"
            for name, x in tensors.items()
        }
        elsewhere = [x for x in tensors.values() if x.is_cuda]
        seal = ops.seal(elsewhere, [], "") if elsewhere else None
        self.control.call, self.control.inputs = self.control.call + 1, Inputs(described, seal)


class NoteOfFailure:
    """A forward hook of a whole model, always called: what leaves the model as an exception is told to the others.

    Exchanges of torch's own parallel layers fail with a backend's text; the exception gets a note that says more.
    """

    def __init__(self, control: Control) -> None:
        self.control = control

    def __call__(self, model: nn.Module, args: Args, output: object) -> None:
        error = sys.exc_info()[1]
        if error is not None and not torch.compiler.is_compiling():
            self.control.tell_of(error)


def check_same_weights(model: nn.Module, mesh: DeviceMesh | None, random: bool) -> None:
    """Raises GridError on every rank if parameters (meta ones aside) or the random generator differ over the grid."""
    if mesh is None:
        return
    fields: dict[str, object] = {"the source parameters": digest([p for p in model.parameters() if not p.is_meta])}
    if random:
        fields["the state of torch's random generator"] = digest(
            [torch.get_rng_state(), _random_state(torch.device(mesh.device_type))]
        )
    same_on_all_ranks(fields, mesh, "seed every rank alike before building the model, or broadcast it first")


def compares(grid_size: int, debug: bool | None, compared: bool) -> bool:
    """Whether a call of a module compares its inputs over the grid: its first one, and all with debug.

    debug=None reads TLM_DEBUG. Under torch.compile nothing is compared.
    """
    if torch.compiler.is_compiling() or grid_size == 1:
        return False
    debug = os.environ.get("TLM_DEBUG") == "1" if debug is None else debug
    return debug or not compared


def seals(debug: bool | None) -> bool:
    """Whether calls carry what the ranks compare: not with debug=False, nor, if debug is None, with TLM_DEBUG=0."""
    return os.environ.get("TLM_DEBUG") != "0" if debug is None else debug


def check_call(
    module: "GridAttention",
    mesh: DeviceMesh,
    options: dict[str, object],
    check: Callable[[], dict[str, object]],
    tensors: Mapping[str, Tensor | None],
) -> dict[str, object]:
    """Returns check(), which raises for this rank's arguments, or returns what else must be alike on every rank.

    An error of one rank is raised on all, and so is a difference: of `options` and what check() returned, of `tensors`,
    the inputs, of the modes that torch is in, of the parameters that every rank holds, and with a "dropout_p" of the
    random generator. A collective.
    """
    try:
        settings = check()
    except Exception as error:  # whatever it is, the others would wait for this rank
        same_on_all_ranks({"error": error}, mesh, "")
        raise  # not reached
    device = next(module.parameters()).device
    fields = {
        "activations": module.activations,
        "training": module.training,
        "grad mode": torch.is_grad_enabled(),
        "autocast": _autocast_dtype(device.type),
        "parameters": [name for name, _ in module.named_parameters()],
        "trained parameters": [name for name, p in module.named_parameters() if p.requires_grad],
    }
    if settings.get("dropout_p"):
        fields["the state of the random generator"] = digest([_random_state(device)])
    fields |= options | settings | _described({**tensors, **_held_alike(module)})
    same_on_all_ranks(fields, mesh, ALIKE)
    return settings


def _described(tensors: Mapping[str, Tensor | None]) -> dict[str, object]:
    """What two ranks compare of their tensors."""
    fields: dict[str, object] = {}
    for name, x in tensors.items():
        fields[f"shape of {name}"] = None if x is None else tuple(x.shape)
        fields[f"dtype of {name}"] = None if x is None else str(x.dtype)
        fields[f"requires_grad of {name}"] = None if x is None else x.requires_grad
        fields[f"content of {name}"] = None if x is None or x.is_meta else digest([x])
    given = [(name, x) for name, x in tensors.items() if x is not None]
    firsts = [(name, next(first for first, y in given if y is x)) for name, x in given]
    fields["which inputs are one tensor"] = [f"{name} is {first}" for name, first in firsts if name != first]
    return fields


def _held_alike(module: nn.Module) -> dict[str, Tensor]:
    """Parameters that every rank holds in full, those of norms too, as it holds them."""
    held = {}
    for name, p in module.named_parameters():
        if not isinstance(p, DTensor):
            held[name] = p.detach()
        elif all(isinstance(placement, Replicate) for placement in p.placements):
            held[name] = p._local_tensor
    return {name: x.clone() for name, x in held.items()}  # numpy() would pin a storage that FSDP frees


def _random_state(device: torch.device) -> Tensor:
    """State of the generator that dropout on this device is drawn from."""
    if device.type in ("cpu", "meta"):
        return torch.get_rng_state()
    state: Tensor = torch.get_device_module(device).get_rng_state(device)
    return state


def _autocast_dtype(device_type: str) -> str | None:
    on = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return str(torch.get_autocast_dtype(device_type)) if on else None
