"""Which tensor of the unsplit model's state dict each parameter of a split attention is.

A replacement module has one table, `stock_names`: name of its parameter -> StockTensor. Loading, full_state_dict and
from_torch / to_torch all go by it, so an adapter says once where its weights come from.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, distribute_tensor

from two_level_mha.errors import GridError
from two_level_mha.mesh import Place

Key = TypeVar("Key")


@dataclass(frozen=True)
class StockTensor:
    """Where one parameter is in the unsplit model.

    key: relative to the module; a leading "../" starts at its parent. shape: of the stock tensor. own: of ours,
    with heads and head_dim apart. A fused tensor holds several parameters: dim `dim` is so many equal groups, and of
    each this one has some, from `start` on. transposed: stock keeps (in, out), as GPT-2's Conv1D does. Shapes are those
    of the whole layer, not of a block.

        q_proj.weight (h*d, D)      StockTensor("q_proj.weight", (h * d, D), (h, d, D))
        o_proj.weight (D, h*d)      StockTensor("o_proj.weight", (D, h * d), (D, h, d))
        V of c_attn.weight (D, 3*D) StockTensor("c_attn.weight", (D, 3 * D), (h, d, D), 1, 2 * D, transposed=True)
        V of (h, 3, d) x D          StockTensor("qkv.weight", (3 * h * d, D), (h, d, D), 0, 2 * d, groups=h)
    """

    key: str
    shape: tuple[int, ...]
    own: tuple[int, ...]
    dim: int = 0
    start: int = 0
    transposed: bool = False
    groups: int = 1

    @property
    def size(self) -> int:
        """How much of dim `dim` is this parameter's."""
        return math.prod(self.own) * self.shape[self.dim] // math.prod(self.shape)

    def part(self, stock: Tensor) -> Tensor:
        """The parameter's entries of the stock tensor, in their order: a view, with a dim of groups."""
        x, dim = (stock.t(), 1 - self.dim) if self.transposed else (stock, self.dim)
        return self._of_groups(x, dim)

    def read(self, stock: Tensor) -> Tensor:
        """The parameter, of shape `own`: a view of the stock tensor, unless other parameters are between its groups."""
        return self.part(stock).reshape(self.own)

    def features(self, x: Tensor) -> Tensor:
        """What (out, ..), of the outputs of a projection of inputs, has of this parameter's: (heads, d, ..)."""
        return self._of_groups(x, 0).reshape(*self.own[:2], *x.shape[1:])

    def _of_groups(self, x: Tensor, dim: int) -> Tensor:
        grouped: Tensor = x.unflatten(dim, (self.groups, -1))
        return grouped.narrow(dim + 1, self.start, self.size // self.groups)


class HoldsStock(nn.Module):
    """A module on a mesh whose own parameters are what `stock_names` says of the unsplit model's tensors; `block` gives
    this rank's of a whole one.
    """

    stock_names: dict[str, StockTensor]
    mesh: DeviceMesh | None
    place: Place

    def block(self, full: Tensor, name: str) -> Tensor:
        """`full`, the same on every rank, as this module stores parameter `name`."""
        raise NotImplementedError


def resolve(name: str, key: str) -> str:
    """A StockTensor's key, for the module called `name`, in the terms of who calls it that."""
    while key.startswith("../"):
        name, key = name.rpartition(".")[0], key.removeprefix("../")
    return f"{name}.{key}" if name else key


def stored_key(module: nn.Module, key: str) -> str:
    """A StockTensor's key in the state dict of the unsplit model with the same LoRA layers: in one, what it is around
    is called base_layer.
    """
    path, _, part = key.rpartition(".")
    at: nn.Module | None = module
    for name in path.split("."):
        at = None if at is None else at._modules.get(name)
    return f"{path}.base_layer.{part}" if hasattr(at, "base_layer") else key


def linear_names(name: str, path: str, linear: nn.Module, head_dim: int) -> dict[str, StockTensor]:
    """The entries of `name`_weight and `name`_bias, name one of q, k, v, out, for a projection at `path`, an nn.Linear
    or a Conv1D.
    """
    entries = {}
    for part, p in linear.named_parameters():
        shape = tuple(p.shape)
        transposed = part == "weight" and not isinstance(linear, nn.Linear)
        own = shape[::-1] if transposed else shape
        if name != "out":
            own = (own[0] // head_dim, head_dim, *own[1:])
        elif part == "weight":
            own = (own[0], own[1] // head_dim, head_dim)
        entries[f"{name}_{part}"] = StockTensor(f"{path}.{part}", shape, own, transposed=transposed)
    return entries


# How q, k and v lie in one projection: in so many groups (None: one for each key/value head), of each group in this
# order. "quarters" is CodeGen's, of the four devices that it was trained on.
PACKINGS = {"blocks": (1, "qkv"), "groups": (None, "qkv"), "quarters": (4, "qvk")}


def fused_names(
    path: str, linear: nn.Module, heads: dict[str, int], head_dim: int, packing: str
) -> dict[str, StockTensor]:
    """The entries of q, k and v of one projection at `path`, an nn.Linear or a Conv1D; heads: of each of them.

    packing: one of PACKINGS. Raises GridError where its groups do not divide the heads.
    """
    groups, letters = PACKINGS[packing]
    groups = groups or heads["k"]
    if any(count % groups for count in heads.values()):
        raise GridError(f"{path} does not hold {groups} groups of heads: it is of {heads}")
    entries = {}
    for part, p in linear.named_parameters():
        shape, start = tuple(p.shape), 0
        transposed = part == "weight" and not isinstance(linear, nn.Linear)
        for letter in letters:
            count = heads[letter]
            own = (count, head_dim, *(shape[:1] if transposed else shape[1:]))
            entries[f"{letter}_{part}"] = StockTensor(
                f"{path}.{part}", shape, own, int(transposed), start, transposed, groups
            )
            start += count * head_dim // groups
    return entries


def from_stock(state: dict[str, Tensor], names: dict[str, StockTensor]) -> dict[str, Tensor]:
    """The parameters that `state`, of stock keys, holds."""
    return {name: stock.read(state[stock.key]) for name, stock in names.items() if stock.key in state}


def put(state: dict[Key, Tensor], key: Key, stock: StockTensor, x: Tensor) -> None:
    """Writes a parameter into the stock tensor at `key`, which is made when it is not there yet."""
    if key not in state:
        state[key] = x.new_empty(stock.shape)
    part = stock.part(state[key])
    part.copy_(x.reshape(part.shape))


def take_stock_keys(owner: nn.Module, child: str = "") -> None:
    """Lets load_state_dict of `owner` take stock's keys and, under our names, full tensors for `owner.child`.

    owner: the module itself with child "", or its parent, where a stock key starts there: load_state_dict shows a
    module only what is below it.
    """
    owner.register_load_state_dict_pre_hook(functools.partial(_take, child=child))


def _take(
    owner: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any], strict: bool, missing: list[str],
    unexpected: list[str], errors: list[str], *, child: str,
) -> None:  # fmt: skip
    """A pre-hook of load_state_dict. What is missing or has another shape is named as the caller knows it."""
    module = owner.get_submodule(child)
    assert isinstance(module, HoldsStock)
    taken: set[str] = set()
    found: dict[str, Any] = {}
    names = {name: stock for name, stock in module.stock_names.items() if module._parameters[name] is not None}
    by_ours = any(prefix + resolve(child, name) in state for name, stock in names.items() if name != stock.key)
    for name, stock in names.items():
        own = module._parameters[name]
        assert own is not None
        key, mine = prefix + resolve(child, stored_key(module, stock.key)), prefix + resolve(child, name)
        if not (key in state or mine in state):
            if not by_ours:
                found[mine] = own  # as it is: torch would report it by our name
                missing += [key] if key not in missing else []
            continue
        x = state[key if key in state else mine]
        if key in state:
            taken.add(key)
            if x.shape == stock.shape:
                x = stock.read(x)
            elif key != mine or x.shape != own.shape:
                errors.append(
                    f"size mismatch for {key}: copying a param with shape {x.shape} from checkpoint, the shape in "
                    f"current model is {torch.Size(stock.shape)}."
                )
                found[mine] = own
                continue
        if isinstance(own, DTensor) and not isinstance(x, DTensor) and x.shape == own.shape:
            x = module.block(x, name)
        found[mine] = x
    errors[:] = dict.fromkeys(errors)  # a fused tensor is of several parameters
    for key in taken:
        del state[key]
    state.update(found)


def split_parameters(module: nn.Module, grid: DeviceMesh, placements: dict[str, Placement]) -> None:
    """Makes DTensors of the module's own parameters, which are the same on every rank."""
    for name, p in list(module.named_parameters(recurse=False)):
        kept = distribute_tensor(p.detach(), grid, [placements[name]], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(kept, p.requires_grad))


def take_full_tensors(module: nn.Module) -> None:
    """Lets load_state_dict take full tensors for the module's own DTensors."""
    module.register_load_state_dict_pre_hook(_distribute)


def _distribute(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    for name, p in module.named_parameters(recurse=False):
        x = state.get(prefix + name)
        if isinstance(p, DTensor) and x is not None and not isinstance(x, DTensor) and x.shape == p.shape:
            state[prefix + name] = distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None)
