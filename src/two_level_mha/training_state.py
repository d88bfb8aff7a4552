"""What a checkpoint of training holds, under names that do not depend on the grid.

    model/<name>               parameters, persistent buffers; a tensor with two names under the first
    optimizer/<name>/<key>     the state of that parameter; hyper-parameters go to the manifest, by parameter too
    rng/<rank>/<device>        the random generators of a rank

Parameters differ in kind between grids, so tlm.param_groups makes other groups, and other numbers of parameters: names
alone are the same.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from two_level_mha.errors import GridError
from two_level_mha.stock import HoldsStock

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")  # of torch.compile and checkpoint_wrapper
_FIXED = ("params", "param_names")  # entries of an optimizer's group that are no hyper-parameters


@dataclass
class State:
    """This rank's part of a checkpoint; the fields besides `tensors` are JSON."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)  # parameters, options
    values: dict[str, object] = field(default_factory=dict)  # what a state has besides tensors: <name>/<key>
    optimizers: list[str] = field(default_factory=list)  # their classes
    grid: tuple[int, int] | None = None

    def description(self) -> dict[str, object]:
        """Its part of the manifest: shape of the whole, and dtype, in place of a tensor."""
        tensors = {name: describe(x) for name, x in self.tensors.items()}
        return {"tensors": tensors, "groups": self.groups, "values": self.values, "optimizers": self.optimizers}


def describe(x: Tensor) -> dict[str, object]:
    return {"shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch.")}


def bytes_of(tensors: dict[str, dict[str, Any]]) -> int:
    """Bytes of described tensors."""
    return sum(
        torch.Size(one["shape"]).numel()
        * torch.empty(0, dtype=getattr(torch, one["dtype"]), device="meta").element_size()
        for one in tensors.values()
    )


def as_list(optimizer: Optimizer | Iterable[Optimizer] | None) -> list[Optimizer]:
    """Optimizers as save and load take them: one, several, or None."""
    if optimizer is None:
        return []
    if isinstance(optimizer, Optimizer):
        return [optimizer]
    found = list(optimizer) if isinstance(optimizer, Iterable) else [optimizer]
    if not all(isinstance(one, Optimizer) for one in found):
        raise GridError(f"optimizer must be a torch.optim.Optimizer, several or None, got {optimizer!r}")
    return found


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model by name, detached; they share its memory."""
    if not isinstance(model, nn.Module):
        raise GridError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    state = model.state_dict(keep_vars=True)  # first of all: fully_shard then puts its parameters in place
    if extra := [name for name, x in state.items() if not isinstance(x, Tensor)]:
        raise GridError(f"model has state that is no tensor, {', '.join(extra[:8])}: give it to save as extra=")
    buffers = {name: x for name, x in model.named_buffers() if name in state}
    found = {_clean(name): x.detach() for name, x in (dict(model.named_parameters()) | buffers).items()}
    if meta := [name for name, x in found.items() if x.is_meta]:
        raise GridError(f"model is on meta, {', '.join(meta[:8])}: give it memory by model.to_empty first")
    return {f"model/{name}": x for name, x in found.items()}


def _clean(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _device(tensors: dict[str, Tensor]) -> torch.device:
    return next((x.device for x in tensors.values()), torch.device("cpu"))


def _random_states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state(device)
    return states


def state_to_save(model: nn.Module, optimizers: list[Optimizer], rank: int) -> State:
    """What this rank brings to a save. Raises GridError for what cannot be stored."""
    tensors = model_tensors(model)
    state = State(tensors, grid=_grid(model), optimizers=sorted({type(one).__name__ for one in optimizers}))
    for group in _groups(model, optimizers):
        options = {key: _plain(x, key) for key, x in group.options.items()}
        state.groups.append({"parameters": [name for name, _, _ in group.members], "options": options})
        for name, p, one in group.members:
            for key, x in one.items():
                if not isinstance(x, Tensor):
                    state.values[f"{name}/{key}"] = _plain(x, f"{key} of {name}")
                elif isinstance(x, DTensor) and not _like_parameter(key, x.shape, p):
                    raise GridError(
                        f"optimizer keeps a DTensor {key} of shape {tuple(x.shape)} for {name} of shape "
                        f"{tuple(p.shape)}: only states of the parameter's shape can be saved, as those of AdamW or SGD"
                    )
                else:
                    tensors[f"optimizer/{name}/{key}"] = x.detach()
    tensors |= {f"rng/{rank}/{device}": x for device, x in _random_states(_device(tensors)).items()}
    state.tensors = {name: x.contiguous() for name, x in tensors.items()}  # safetensors wants it
    return state


def _grid(model: nn.Module) -> tuple[int, int] | None:
    grids = [module.place.grid for module in model.modules() if isinstance(module, HoldsStock)]
    return (grids[0].head_groups, grids[0].slices) if grids else None


def _like_parameter(key: str, shape: Sequence[int], p: Tensor) -> bool:
    """Whether a state is stored as its parameter is; a count of steps never is, not of a parameter without dims."""
    return key != "step" and tuple(shape) == tuple(p.shape)


@dataclass
class _Group:
    """A group of an optimizer: its hyper-parameters, and name, parameter and state of its members."""

    options: dict[str, object]
    members: list[tuple[str, Tensor, dict[str, Any]]]


def _groups(model: nn.Module, optimizers: list[Optimizer]) -> list[_Group]:
    names = {id(p): _clean(name) for name, p in model.named_parameters()}
    found = []
    for optimizer in optimizers:
        whole = optimizer.state_dict()
        for own, group in zip(optimizer.param_groups, whole["param_groups"], strict=True):
            if any(id(p) not in names for p in own["params"]):
                raise GridError("optimizer has a parameter that model has not: give the model that it steps")
            members = [
                (names[id(p)], p, whole["state"].get(index, {}))
                for p, index in zip(own["params"], group["params"], strict=True)
            ]
            found.append(_Group({key: x for key, x in group.items() if key not in _FIXED}, members))
    return found


def _plain(x: object, what: str) -> object:
    """A value of an optimizer as JSON has it; a tensor of one number is that number."""
    if isinstance(x, Tensor) and x.numel() == 1:
        return x.item()
    if isinstance(x, (tuple, list)):
        return [_plain(one, what) for one in x]
    if x is None or isinstance(x, (bool, int, float, str)):
        return x
    raise GridError(
        f"optimizer has {what}, a {type(x).__name__}: save stores tensors, numbers, texts and tuples of them"
    )


def _like(x: Any, current: object) -> Any:
    """A value out of JSON as the optimizer keeps it."""
    if isinstance(current, Tensor):
        return torch.full_like(current, x)
    if isinstance(current, (tuple, list)) and isinstance(x, list):
        kinds = current if len(current) == len(x) else [None] * len(x)
        return type(current)(_like(one, kind) for one, kind in zip(x, kinds, strict=True))
    return x


def merged(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The descriptions of all ranks' states as one. Raises GridError for a contradiction."""
    whole: dict[str, dict[str, Any]] = {"tensors": {}, "values": {}}
    for rank, state in enumerate(states):
        for kind, found in whole.items():
            for name, one in state[kind].items():
                if found.setdefault(name, one) != one:
                    raise GridError(
                        f"{name} differs between ranks: {found[name]} before rank {rank}, {one} on it; tensors of one "
                        "name must be parts of one tensor"
                    )
    groups = {json.dumps(group): group for state in states for group in state["groups"]}
    optimizers = sorted({name for state in states for name in state["optimizers"]})
    return whole | {"groups": list(groups.values()), "optimizers": optimizers}


class Restored:
    """This rank's model and optimizers, ready to take a checkpoint: `tensors` are filled, then finish() is called.

    Tensors of the model are its own memory, all others are new.
    """

    def __init__(
        self, model: nn.Module, optimizers: list[Optimizer], manifest: dict[str, Any], rank: int, ranks: int
    ) -> None:
        self.optimizers, self.manifest = optimizers, manifest
        self.model_tensors = model_tensors(model)
        self._keys = _by_parameter(
            name.removeprefix("optimizer/") for name in manifest["tensors"] if name.startswith("optimizer/")
        )
        self._value_keys = _by_parameter(manifest["values"])
        self.tensors = dict(self.model_tensors)
        self.groups = _groups(model, optimizers)
        self.device, self.rng = _device(self.tensors), {}
        if ranks == manifest["world_size"]:
            names = {device: f"rng/{rank}/{device}" for device in _random_states(self.device)}
            self.rng = {device: name for device, name in names.items() if name in manifest["tensors"]}
        for name in self.rng.values():
            self.tensors[name] = self._empty(name)

    def expected(self) -> dict[str, set[str]]:
        """Names that must be in the checkpoint: tensors of the model, parameters of the optimizers."""
        return {
            "model": set(self.model_tensors),
            "optimizer": {name for group in self.groups for name, _, _ in group.members},
        }

    def check(self) -> None:
        """Raises GridError for a tensor of another shape or dtype, another optimizer, or groups that do not fit."""
        wrong = [
            f"{name.partition('/')[2]} is {_text(entry)} and should be {_text(describe(x))}"
            for name, x in self.model_tensors.items()
            if (entry := self.manifest["tensors"].get(name)) and entry != describe(x)
        ]
        if wrong:
            more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
            raise GridError(f"the checkpoint of another model: {', '.join(wrong[:8])}{more}")
        classes = sorted({type(one).__name__ for one in self.optimizers})
        if not set(classes) <= set(self.manifest["optimizers"]):
            saved = ", ".join(self.manifest["optimizers"]) or "no optimizer"
            raise GridError(
                f"the checkpoint holds the state of {saved}, and optimizer is {', '.join(classes)}: give the optimizer "
                "that was saved, or optimizer=None"
            )
        self.options = [self._options(group) for group in self.groups]
        self.states = [self._state(group) for group in self.groups]

    def _options(self, group: _Group) -> dict[str, object]:
        saved = {name: one["options"] for one in self.manifest["groups"] for name in one["parameters"]}
        mine = [(name, saved[name]) for name, _, _ in group.members if name in saved]
        for name, options in mine:
            if options != mine[0][1]:
                raise GridError(
                    f"optimizer has {mine[0][0]} and {name} in one group, but they were saved with other "
                    f"hyper-parameters: {mine[0][1]} and {options}; make the groups as they were"
                )
        return {key: _like(x, group.options.get(key)) for key, x in (mine[0][1] if mine else {}).items()}

    def _state(self, group: _Group) -> list[dict[str, object]]:
        """The state of every member: its tensors are made here and wait among `tensors`."""
        states = []
        for name, p, _ in group.members:
            prefix = f"optimizer/{name}/"
            state = {key: self._empty(prefix + key, p, key) for key in self._keys.get(name, ())}
            self.tensors |= {prefix + key: x for key, x in state.items()}
            states.append(
                state | {key: self.manifest["values"][f"{name}/{key}"] for key in self._value_keys.get(name, ())}
            )
        return states

    def _empty(self, name: str, p: Tensor | None = None, key: str = "") -> Tensor:
        entry = self.manifest["tensors"][name]
        dtype = getattr(torch, entry["dtype"])
        if p is not None and _like_parameter(key, entry["shape"], p):
            return torch.empty_like(p.detach(), dtype=dtype)
        return torch.empty(entry["shape"], dtype=dtype, device="cpu")

    def finish(self) -> None:
        """Gives the optimizers and the random generators what `tensors` hold now."""
        groups = iter(zip(self.options, self.states, strict=True))
        for optimizer in self.optimizers:
            whole = optimizer.state_dict()
            whole["state"] = {}
            for group in whole["param_groups"]:
                options, states = next(groups)
                group |= options
                whole["state"] |= {index: one for index, one in zip(group["params"], states, strict=True) if one}
            optimizer.load_state_dict(whole)
        for device, name in self.rng.items():
            if device == "cpu":
                torch.set_rng_state(self.tensors[name])
            else:
                torch.get_device_module(device).set_rng_state(self.tensors[name], self.device)


def _by_parameter(names: Iterable[str]) -> dict[str, list[str]]:
    """Parameter -> keys of its state, of names <parameter>/<key>."""
    found: dict[str, list[str]] = {}
    for name in names:
        parameter, _, key = name.rpartition("/")
        found.setdefault(parameter, []).append(key)
    return found


def _text(entry: dict[str, Any]) -> str:
    return f"{entry['dtype']} ({', '.join(map(str, entry['shape']))})"
