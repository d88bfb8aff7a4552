"""Weights of embeddings and heads (vocabulary, D), split by the vocabulary over the flattened grid.

Those that both share, and of a transformers model those that its tensor-parallel plan has no rule for, if it has one.

A rank looks up the tokens whose rows it has, and the sum over the ranks is every token's row, as it is stored. As a
head's, the rows are columns of the logits, which are gathered. Tensor-parallel plans have rules for one owner of a
parameter, torch's styles make of each owner's a parameter of its own.
"""

import contextlib
import copy
import dis
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from two_level_mha.activations import used_apart
from two_level_mha.blocks import dealt, laid_out
from two_level_mha.class_like import become, class_like
from two_level_mha.integrations.lora import mark
from two_level_mha.integrations.private import is_pretrained
from two_level_mha.mesh import Place, grid_mesh, place_on
from two_level_mha.operators import ops as _ops
from two_level_mha.stock import take_full_tensors

_NO_CALLS = ("__init__", "_init_weights", "resize_", "_resize_", "set_", "tie_")  # methods that no forward calls
_OF_ALL = ("dtype", "device", "shape")  # what of a DTensor is as of a tensor


class SplitEmbedding(nn.Embedding):
    """Looks up whole rows of a table that is split by rows."""

    mesh: DeviceMesh  # of the grid as one axis
    place: Place

    def forward(self, input: Tensor) -> Tensor:
        assert isinstance(self.weight, DTensor)
        first, count = dealt(self.num_embeddings, self.mesh.size(), self.mesh.get_local_rank())
        own = input - first
        known = (input >= 0) & (input < self.num_embeddings)  # others raise below, on every rank
        elsewhere = known & ((own < 0) | (own >= count))
        padding = self.padding_idx if self.padding_idx in range(first, first + count) else None
        rows = nn.functional.embedding(
            own.masked_fill(elsewhere, 0), self.weight.to_local(), None if padding is None else padding - first
        )
        rows = rows.masked_fill(elsewhere.unsqueeze(-1), 0.0)
        return _ops.all_reduce(rows, self.mesh.size(), self.place.groups[2])


class ColumnHead(nn.Linear):
    """A head (D -> vocabulary) whose weight is split by columns; a bias is split so, or whole."""

    mesh: DeviceMesh  # of the grid as one axis
    place: Place

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.weight, DTensor)
        if torch.is_grad_enabled():
            (x,) = self.summed([x])
        bias = None if self.bias is None else self.own(self.bias)
        logits = self.sharded(nn.functional.linear(x, self.weight.to_local(), bias))
        return logits.redistribute(placements=[Replicate()]).to_local()

    def summed(self, xs: list[Tensor]) -> list[Tensor]:
        """What every rank has alike and uses for its columns, with the sum over the ranks as its gradient."""
        return used_apart(xs, self.place)

    def own(self, p: Tensor) -> Tensor:
        """This rank's columns."""
        if isinstance(p, DTensor):
            return p.to_local()
        first, count = dealt(self.out_features, self.mesh.size(), self.mesh.get_local_rank())
        return self.summed([p])[0][first : first + count]

    def sharded(self, logits: Tensor) -> DTensor:
        """This rank's columns as a part of all."""
        shape = torch.Size((*logits.shape[:-1], self.out_features))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(logits, self.mesh, [Shard(-1)], run_check=False, shape=shape, stride=stride)


@dataclass
class Vocabulary:
    """The owners of one weight in a model, by name."""

    model: nn.Module
    embeddings: dict[str, nn.Embedding]
    heads: dict[str, nn.Linear]

    def names(self) -> set[str]:
        return {*self.embeddings, *self.heads}


def find_vocabularies(
    model: nn.Module, ranks: int, owners: dict[int, list[str]], is_taken: Callable[[str], bool]
) -> tuple[list[Vocabulary], dict[str, str]]:
    """The weights of embeddings and heads that can be split over `ranks`; of others why not, by name.

    owners: of all its parameters. is_taken: whether a module of a name stays whole, or is split in another way.
    """
    found: list[Vocabulary] = []
    left_out: dict[str, str] = {}
    large = _large(model)
    for key, names in owners.items():
        modules = {name: model.get_submodule(name) for name in names}
        embeddings = {name: module for name, module in modules.items() if isinstance(module, nn.Embedding)}
        heads = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
        if any(id(module._parameters.get("weight")) != key for module in modules.values()):
            continue
        if len(embeddings) + len(heads) < len(modules):
            continue
        if not (embeddings and heads) and key not in large:
            continue
        if any(map(is_taken, modules)):
            continue
        problem = next((text for module in modules.values() if (text := _problem(module, ranks))), None)
        problem = problem or _read_otherwise(model, {name.rpartition(".")[2] for name in names})
        if problem is None:
            found.append(Vocabulary(model, embeddings, heads))
        else:
            left_out |= dict.fromkeys(modules, problem)
    return found, left_out


def _large(model: nn.Module) -> set[int]:
    """Ids of the weights of transformers models' input embeddings and heads, and of embeddings as large as these."""
    large = set()
    for part in model.modules():
        if not is_pretrained(part):
            continue
        if getattr(part.config.get_text_config(), "vocab_size", None) is None:  # of images or sound
            continue
        with contextlib.suppress(NotImplementedError, AttributeError):  # of models that have none
            taken = part.get_input_embeddings()
            if isinstance(taken, nn.Embedding):
                tables = [module for module in part.modules() if isinstance(module, nn.Embedding)]
                large |= {id(one.weight) for one in tables if one.weight.numel() >= taken.weight.numel()}
            given = part.get_output_embeddings()
            if isinstance(given, nn.Linear):
                large.add(id(given.weight))
    return large


def split_vocabulary(one: Vocabulary, mesh: DeviceMesh) -> None:
    """Gives every owner the same DTensor, and what it computes with its rows."""
    grid, place = grid_mesh(mesh), place_on(mesh)
    modules: list[nn.Module] = [*one.embeddings.values(), *one.heads.values()]
    before = modules[0].get_parameter("weight")
    weight = nn.Parameter(laid_out(before.detach(), grid, [Shard(0)]), before.requires_grad)
    for module in modules:
        module.register_parameter("weight", weight)
        take_full_tensors(module)
    for embedding in one.embeddings.values():
        plain = type(embedding) is nn.Embedding  # another class, such as one that scales, calls what it is made of
        made = class_like(SplitEmbedding, nn.Embedding) if plain else class_like(type(embedding), SplitEmbedding)
        embedding.__class__ = made
        vars(embedding).update(mesh=grid, place=place)
    for head in one.heads.values():
        become(head, ColumnHead, mesh=grid, place=place)
    mark(one.model, dict.fromkeys(one.embeddings, "embedding_rowwise") | dict.fromkeys(one.heads, "whole"), mesh)


def _read_otherwise(model: nn.Module, names: set[str]) -> str | None:
    """Where the code of a model, or of an embedding by the name of self, reads the weight of what it calls by one of
    these names, or None: as Gemma 4, which puts a row of it where images will be.
    """
    classes = {cls for module in model.modules() for cls in type(module).__mro__ if not _is_base(cls)}
    for cls in sorted(classes, key=lambda cls: cls.__qualname__):
        for name, method in vars(cls).items():
            if not inspect.isfunction(method) or name.startswith(_NO_CALLS):
                continue
            known = [step.argval for step in dis.get_instructions(inspect.unwrap(method))]
            for owner, read, then in zip(known, known[1:], known[2:], strict=False):
                if owner in names and read == "weight" and then not in _OF_ALL:
                    return f"{cls.__name__}.{name} reads {owner}.weight"
    return None


def _is_base(cls: type) -> bool:
    """Whether it is torch's, or of what all models of transformers are."""
    return cls.__module__.startswith(("torch.", "transformers.")) and ".models." not in cls.__module__


class _Apart(nn.Embedding):
    """Looks up rows of a table that is not its weight."""

    table: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.embedding(input, self.table)


def _embedding_problem(module: nn.Embedding) -> str | None:
    """Why an embedding's table cannot be another's, or None: of another class than torch's a copy of few rows is tried,
    which may change what it looked up, and may not use its weight besides.
    """
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        return "max_norm, scale_grad_by_freq and sparse are not supported of an embedding that is split"
    if type(module) is nn.Embedding:
        return None
    one = copy.copy(module)
    one.padding_idx = None
    found = []
    with torch.device("cpu"), torch.no_grad():
        held = {name: x for name, x in module._buffers.items() if x is not None}
        vars(one)["_buffers"] = {
            name: torch.ones_like(x, device="cpu") if x.is_meta else x.cpu() for name, x in held.items()
        }
        table = torch.arange(4.0, dtype=torch.float64).unsqueeze(1) + torch.arange(module.embedding_dim) / 7
        ids = torch.tensor([[2, 0, 3]])
        for cls, weight in ((type(module), table), (class_like(type(module), _Apart), table * torch.nan)):
            one.__class__ = cls
            vars(one).update(_parameters={"weight": nn.Parameter(weight, requires_grad=False)}, table=table)
            try:
                found.append(one.forward(ids))
            except Exception as error:
                return f"its {type(module).__name__} cannot be called with tokens alone: {error!r}"
        if not torch.equal(*found):
            return f"its {type(module).__name__} uses its weight besides"
    return _read_otherwise(module, {"self"})  # where it is given something else than tokens, as Ovis 2's


def _problem(module: nn.Module, ranks: int) -> str | None:
    """Why an owner of a weight cannot be split, or None."""
    weight = module._parameters.get("weight")
    if "forward" in vars(module):
        return "its forward was replaced"
    if isinstance(module, nn.Linear):
        if type(module) is not nn.Linear:
            return f"its weight is that of a {type(module).__name__}, not a plain nn.Linear"
    elif isinstance(module, nn.Embedding) and (problem := _embedding_problem(module)):
        return problem
    if weight is None or isinstance(weight, DTensor):
        return "its weight is no plain parameter"
    if dealt(weight.shape[0], ranks, ranks - 1)[1] == 0:
        return f"of its {weight.shape[0]} rows the last of {ranks} ranks would have none"
    return None
