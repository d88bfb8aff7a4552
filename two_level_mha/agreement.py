"""The agreement of ranks: what must be alike on every rank of a grid, compared, and one error on all where it is not.

    what is compared                            when                                            by
    arguments, results of a search              parallelize, load_pretrained                    same_on_all_ranks
    source parameters, random generator         from_torch, parallelize                         check_same_weights
    inputs, settings, replicated parameters     the first call of a module, all with debug      check_call

Digests are compared, not the tensors, each time in one all_gather_object over the grid. What a layer exchanges goes
through the operators; the other collectives that Python issues are one number of a GradScaler (training.py), and
full_tensor of DTensors (blocks.py).
"""

import hashlib
import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from two_level_mha.errors import GridError
from two_level_mha.mesh import grid_group


def same_on_all_ranks(fields: dict[str, object], mesh: DeviceMesh | None, advice: str) -> None:
    """Compares `fields` over the grid; raises the same GridError on every rank, naming the ranks and the field.

    A collective. A value may be an exception: then it is what every rank raises.
    """
    if mesh is None or mesh.size() == 1:
        for value in fields.values():
            if isinstance(value, Exception):
                raise value
        return
    group = grid_group(mesh)
    everyone: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, fields, group=group)
    for value in fields.values():  # this rank's own error keeps its class
        if isinstance(value, Exception):
            raise value
    for rank, other in enumerate(everyone):
        for name, value in other.items():
            if isinstance(value, Exception):
                raise GridError(f"rank {rank} of the grid: {value}")
            mine = everyone[0].get(name)
            if value != mine:
                raise GridError(
                    f"{name} differs between ranks of the grid: {mine} on rank 0, {value} on rank {rank}; {advice}"
                )


def digest(tensors: list[Tensor]) -> str:
    """A digest of the bytes, shapes and dtypes of tensors."""
    state = hashlib.blake2b(digest_size=8)
    for x in tensors:
        state.update(f"{tuple(x.shape)}{x.dtype}".encode())
        state.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return state.hexdigest()


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


def check_call(
    module: nn.Module,
    mesh: DeviceMesh,
    options: dict[str, object],
    check: Callable[[], dict[str, object]],
    tensors: dict[str, Tensor | None],
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
    device = next(iter(tensors.values())).device
    fields = {
        "training": module.training,
        "grad mode": torch.is_grad_enabled(),
        "autocast": _autocast_dtype(device.type),
        "parameters": [name for name, _ in module.named_parameters()],
        "trained parameters": [name for name, p in module.named_parameters() if p.requires_grad],
    }
    if settings.get("dropout_p"):
        fields["the state of the random generator"] = digest([_random_state(device)])
    fields |= options | settings | _described(tensors | _held_alike(module))
    same_on_all_ranks(fields, mesh, "every rank of a grid must be given the same inputs and arguments")
    return settings


def _described(tensors: dict[str, Tensor | None]) -> dict[str, object]:
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
    return torch.get_device_module(device).get_rng_state(device)


def _autocast_dtype(device_type: str) -> str | None:
    on = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return str(torch.get_autocast_dtype(device_type)) if on else None
