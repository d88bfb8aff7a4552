"""load_pretrained: a split model is filled from safetensors, and every rank reads only its rows.

transformers' own reader does it: it takes a state dict of anything that can be indexed, and indexes it by the
placements of the model's DTensors. Ours are given to it under our names, in our shapes, by StockSlice.
"""

import contextlib
import copy
import ctypes
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from two_level_mha.agreement import same_on_all_ranks
from two_level_mha.errors import GridError
from two_level_mha.integrations.private import pretrained_models, private, private_method
from two_level_mha.manifest import some
from two_level_mha.names import Model
from two_level_mha.pretrained_files import Stored, check_hashes, open_tensors, weight_files
from two_level_mha.replaced import note_replaced
from two_level_mha.stock import HoldsStock, StockTensor, resolve

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

_FLOATS = ("F64", "F32", "BF16", "F16")  # which torch converts to each other; not integers, bools or float8
_TRIMMED = 32 << 20  # bytes read between two times that freed memory is given back


class Heap:
    """Gives what converters have freed back to the system: malloc keeps it, up to a third of a share, between tensors.

    Only where libc can (glibc); elsewhere nothing is done.
    """

    def __init__(self) -> None:
        self.trim, self.read = getattr(ctypes.CDLL(None), "malloc_trim", None), 0

    def add(self, x: Tensor) -> Tensor:
        self.read += x.nbytes
        if self.trim is not None and self.read >= _TRIMMED:
            self.trim(0)
            self.read = 0
        return x


class Slice:
    """A tensor of a file, read when indexed: with own into memory of its own, else perhaps a view of the file."""

    def __init__(self, source: Stored, own: bool, heap: Heap) -> None:
        self.source, self.own, self.heap = source, own, heap

    def get_shape(self) -> list[int]:
        return self.source.get_shape()

    def get_dtype(self) -> str:
        return self.source.get_dtype()

    def __getitem__(self, index: Any) -> Tensor:
        x = self.heap.add(self.source[index])
        return x.clone() if self.own else x


class StockSlice(Slice):
    """A parameter of a split attention inside a tensor of a file: heads and head_dim apart, read when indexed."""

    def __init__(self, source: Stored, own: bool, heap: Heap, stock: StockTensor) -> None:
        super().__init__(source, own, heap)
        self.stock = stock

    def get_shape(self) -> list[int]:
        return list(self.stock.own)

    def __getitem__(self, index: Any) -> Tensor:
        index = (index,) if not isinstance(index, tuple) else index
        index = (slice(None),) * len(self.stock.own) if index == (Ellipsis,) else index
        asked = [range(*part.indices(n)) for part, n in zip(index, self.stock.own, strict=True)]
        dims = self._stock_dims()
        if not all(asked):  # a slice that has nothing
            return torch.empty([len(part) for part in asked], dtype=self.source[:0].dtype)
        pieces: list[list[slice]] = [[]]
        joined = 0
        for dim, own_dims in enumerate(dims):
            ranges = _flat_ranges([asked[i] for i in own_dims], [self.stock.own[i] for i in own_dims])
            slices = [slice(*each) for each in (self._in_groups(ranges) if dim == self.stock.dim else ranges)]
            joined = dim if len(slices) > 1 else joined
            pieces = [[*piece, part] for piece in pieces for part in slices]
        read = [self.heap.add(self.source[tuple(piece)]) for piece in pieces]
        x = torch.cat(read, joined) if len(read) > 1 else read[0]
        x = (x.t() if self.stock.transposed else x).reshape([len(part) for part in asked])
        return x.clone(memory_format=torch.contiguous_format) if self.own else x

    def _in_groups(self, ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Ranges of the entries that are the parameter's, as ranges of the stock dim."""
        groups = self.stock.groups
        own, whole = self.stock.size // groups, self.stock.shape[self.stock.dim] // groups
        found = []
        for first, last in ranges:
            for group in range(first // own, -(-last // own)):
                offset = group * (whole - own) + self.stock.start
                found.append((max(first, group * own) + offset, min(last, (group + 1) * own) + offset))
        return found

    def _stock_dims(self) -> list[list[int]]:
        """For each dim of the stock tensor the dims of ours that it holds, outer first."""
        shape = list(self.stock.shape)
        shape[self.stock.dim] = self.stock.size
        dims, own = [], 0
        for size in reversed(shape) if self.stock.transposed else shape:
            held: list[int] = []
            while math.prod(self.stock.own[i] for i in held) != size:
                held.append(own)
                own += 1
            dims.append(held)
        dims[-1] += range(own, len(self.stock.own))  # of size 1
        return dims[::-1] if self.stock.transposed else dims


def _flat_ranges(asked: list[range], sizes: list[int]) -> list[tuple[int, int]]:
    """The ranges of a flattened index that hold a block of its parts."""
    ranges = [(0, 1)]
    for part, size in zip(asked, sizes, strict=True):
        if len(part) == size:
            ranges = [(first * size, last * size) for first, last in ranges]
        else:
            ranges = [
                (i * size + part.start, i * size + part.stop) for first, last in ranges for i in range(first, last)
            ]
    return ranges


def load_pretrained(model: Model, path: str | os.PathLike[str], *, sha256: dict[str, str] | None = None) -> Model:
    """Fills a parallelized transformers model, in place, from the safetensors files in directory `path`; returns it.

    The model may be on meta (then it comes to the mesh's device) or hold weights. Every rank reads only what it keeps.
    Names, conversions (fused experts, renamed keys), tied weights, buffers outside the files and the dtype, which is
    the model's, are transformers' work, as in from_pretrained; so are eval() and generation_config at the end.

    sha256: the hexadecimal SHA-256 of every file by its name in `path`; others of the directory may be among them. Each
    is compared on one rank, and all before any weight changes. None: flipped bits inside a tensor are not noticed.

    Raises GridError, on every rank and before any weight changes, that names tensors which are missing, of another
    shape or kind of dtype (float64, float32, bfloat16 and float16 are one kind), in two files or not the model's,
    conversions that would touch a split projection, and files that are damaged or outside `path`. An error while
    reading after that is raised on every rank too, with the model partly changed. A collective of the grid.
    """
    problem: Exception | None = None
    shapes: dict[str, tuple[int, ...]] | None
    parts = pretrained_models(model)
    if list(parts) != [""]:
        problem = GridError(f"load_pretrained takes a transformers model, got {type(model).__name__}")
    grid = next((module.mesh for module in model.modules() if isinstance(module, HoldsStock)), None)
    try:
        if problem:
            raise problem
        checkpoint = _Checkpoint(parts[""], Path(path), _device(model))
        checkpoint.check()
        shapes, generation_config = checkpoint.shapes, _generation_config(parts[""], Path(path))
        check_hashes(Path(path), checkpoint.files, sha256, grid)
    except Exception as error:  # whatever it is, the others would wait for this rank
        problem, shapes, sha256 = error, None, None
    fields: dict[str, object] = {"refusal": problem, "the names and shapes in the checkpoint": shapes}
    fields["sha256"] = sha256
    same_on_all_ranks(fields, grid, "give every rank the same files")
    before = dict(model.named_parameters())
    try:
        checkpoint.load()
    except Exception as error:
        problem = GridError(f"reading {path} failed, {type(error).__name__}: {error}; the model is partly changed")
        problem.__cause__ = error
    same_on_all_ranks({"an error while reading": problem}, grid, "")
    for name, p in model.named_parameters():
        p.requires_grad_(before[name].requires_grad)
    note_replaced(before, model, "load_pretrained")
    model.eval()
    if generation_config is not None:
        parts[""].generation_config = generation_config
    return model


def _generation_config(model: "PreTrainedModel", directory: Path) -> "GenerationConfig | None":
    """What from_pretrained would give the model; None for one that does not generate, and without any file."""
    names = ("generation_config.json", "config.json")
    name = next((name for name in names if (directory / name).is_file()), None)
    if name is None or not model.can_generate():
        return None
    other: dict[str, Any] = {"config_file_name": name, "_from_model_config": True} if name == names[1] else {}
    return type(model.generation_config).from_pretrained(str(directory), **other)


def _device(model: nn.Module) -> torch.device:
    """Where the model is; on meta: where its mesh is."""
    for p in model.parameters():
        local = p._local_tensor if isinstance(p, DTensor) else p
        if not local.is_meta:
            return local.device
    kinds = {p.device_mesh.device_type for p in model.parameters() if isinstance(p, DTensor)} or {"cpu"}
    (kind,) = kinds
    return torch.device(kind, torch.get_device_module(kind).current_device()) if kind != "cpu" else torch.device(kind)


class _Checkpoint:
    """The tensors of a directory, and what they are in a model."""

    def __init__(self, model: "PreTrainedModel", path: Path, device: torch.device) -> None:
        self.model, self.path, self.device = model, path, device
        self.files = weight_files(path)
        self.sources = open_tensors(self.files)
        self.shapes = {key: tuple(source.get_shape()) for key, source in self.sources.items()}
        self.mapping = private("get_model_conversion_mapping")(model)
        self.expected = {name: tuple(x.shape) for name, x in model.state_dict(keep_vars=True).items()}
        self.floating = {name for name, x in model.state_dict(keep_vars=True).items() if x.is_floating_point()}
        self.ours: dict[str, list[tuple[str, StockTensor]]] = {}  # stock key -> our parameters that it holds
        places: dict[nn.Module, str] = {}  # the first of each module
        for name, module in model.named_modules(remove_duplicate=False):
            first = places.setdefault(module, name)
            for own, stock in module.stock_names.items() if isinstance(module, HoldsStock) else ():
                if module._parameters[own] is not None:
                    del self.expected[f"{name}.{own}"]
                    key = resolve(name, stock.key)
                    if name == first or key in self.sources:  # of one in several places files may have the first alone
                        self.ours.setdefault(key, []).append((f"{first}.{own}", stock))
                        self.floating.add(key)
        self.targets = {key: self._target(key) for key in self.sources}

    def _target(self, key: str) -> tuple[str, str | None]:
        """The name that transformers' reader gives to a key of the files, and the pattern of its converter."""
        rename, names = private("rename_source_key"), dict.fromkeys([*self.expected, *self.ours], True)
        renamings = [one for one in self.mapping if isinstance(one, private("WeightRenaming"))]
        name, pattern = rename(key, renamings, self._converters(), self.model.base_model_prefix, names)
        if name not in names and key in names:
            name, pattern = rename(key, [], [], self.model.base_model_prefix, names)
        return name, pattern

    def _converters(self) -> list[Any]:
        return [one for one in self.mapping if isinstance(one, private("WeightConverter"))]

    def check(self) -> None:
        """Raises GridError if a tensor is missing, extra, of another shape or dtype, or a converter meets a projection.

        What a converter makes is known by running it on meta tensors of the files' shapes.
        """
        converters = {pattern: one for one in self._converters() for pattern in one.source_patterns}
        running: dict[str, Any] = {}  # target -> a converter of its own, as the reader makes them
        found: dict[str, tuple[int, ...]] = {}
        unexpected: list[str] = []
        for key in sorted(self.targets, key=private("dot_natural_key")):
            name, pattern = self.targets[key]
            if pattern is not None:
                first, *others = converters[pattern].target_patterns
                made = [name, *(name.replace(first, other) for other in others)]
                if touched := [one for one in made if one in self.ours]:
                    raise GridError(
                        f"{self.path}: transformers converts {key} to {', '.join(touched)}, which is split here and "
                        "read as it is stored: load the checkpoint into the unsplit model, write that by "
                        "save_pretrained, and load the result"
                    )
                if name in self.expected:
                    running.setdefault(name, copy.deepcopy(converters[pattern]))
                    meta = torch.empty(self.shapes[key], device="meta")
                    running[name].add_tensor(name, key, pattern, lambda meta=meta: meta)
                    continue
            elif name in self.expected or name in self.ours:
                found[name] = self.shapes[key]
                continue
            unexpected.append(name)
        info = self._info(unexpected)
        for name, converter in running.items():
            try:
                made = converter.convert(name, model=self.model, config=self.model.config, loading_info=info)
            except private("SkipParameters"):
                continue
            for one, x in made.items():
                found[one] = tuple((x[0] if isinstance(x, list) else x).shape)
        self._complain(found, info)

    def _info(self, unexpected: list[str]) -> Any:
        return private("LoadStateDictInfo")(
            missing_keys=set(), unexpected_keys=set(unexpected), mismatched_keys=set(), error_msgs=[],
            conversion_errors={}, skipped_pp_keys=set(),
        )  # fmt: skip

    def _complain(self, found: dict[str, tuple[int, ...]], info: Any) -> None:
        shapes = self.expected | {key: entries[0][1].shape for key, entries in self.ours.items()}
        tied = self.model.all_tied_weights_keys
        groups = {name: {source, *(one for one, of in tied.items() if of == source)} for name, source in tied.items()}
        groups |= {source: groups[name] for name, source in tied.items()}
        for key, entries in self.ours.items():  # of a module in several places one name is enough
            groups[key] = {other for other, others in self.ours.items() if others == entries}
        missing = {name for name in shapes if not found.keys() & groups.get(name, {name})}
        info.missing_keys |= missing
        private_method(self.model, "_adjust_missing_and_unexpected_keys")(info)  # what the model says to ignore
        parameters = {name for name, _ in self.model.named_parameters()} | self.ours.keys()
        missing = (missing & parameters) | info.missing_keys  # an ignored parameter would be random on every rank
        wrong = [
            f"{name} is {_shape(shape)} and should be {_shape(shapes[name])}"
            for name, shape in found.items()
            if name in shapes and shape != shapes[name]
        ]
        extra = info.unexpected_keys | found.keys() - shapes.keys()
        dtypes = {key: source.get_dtype() for key, source in self.sources.items()}
        unlike = [
            f"{key} is {dtypes[key]} and should be {'one of ' + ', '.join(_FLOATS) if floating else 'no float'}"
            for key, (name, _) in self.targets.items()
            if name in shapes and (floating := name in self.floating) != (dtypes[key] in _FLOATS)
        ]
        for what, names in (
            ("has no", missing),
            ("has tensors that the model has not:", extra),
            ("has another shape:", wrong),
            ("has another dtype:", unlike),
            ("cannot be converted:", info.conversion_errors.keys()),
        ):
            if names:
                raise GridError(f"{self.path} {what} {some(names)}; nothing was loaded")

    def load(self) -> None:
        """Lets transformers fill the model."""
        state: dict[str, Slice] = {}
        heap = Heap()
        own = self.device.type == "cpu"  # else the reader copies it to the device
        for key, source in self.sources.items():
            name, pattern = self.targets[key]
            if name in self.ours:
                state |= {mine: StockSlice(source, own, heap, stock) for mine, stock in self.ours[name]}
            else:
                state[key] = Slice(source, own and pattern is None, heap)  # a converter copies what it fuses
        for module in self.model.modules():
            # ours are complete; buffers that the files have not are made again
            vars(module).pop("_is_hf_initialized", None)
            if isinstance(module, HoldsStock) and not any(True for _ in module.buffers(recurse=False)):
                vars(module)["_is_hf_initialized"] = True
        dtype = self.model.dtype
        config = private("LoadStateDictConfig")(
            pretrained_model_name_or_path=str(self.path),
            device_map={"": self.device},
            dtype=dtype,
            dtype_plan=private_method(self.model, "_get_dtype_plan")(dtype),
            weight_mapping=private("get_model_conversion_mapping")(self.model),
        )
        with _one_after_the_other():
            info, _ = private_method(self.model, "_load_pretrained_model")(self.model, state, None, config)
        for name, p in self.model.named_parameters():  # a converter may have returned a view
            local = p._local_tensor if isinstance(p, DTensor) else p
            if name in self.expected and local.untyped_storage().nbytes() != local.nbytes:
                local.data = local.detach().clone()
        private_method(self.model, "_finalize_model_loading")(self.model, config, info)
        left = (info.missing_keys, info.mismatched_keys, info.conversion_errors, info.error_msgs)
        assert not any(left), f"what was checked is not what was read: {left}"


@contextlib.contextmanager
def _one_after_the_other() -> Iterator[None]:
    """Keeps transformers' reader from reading ahead: what it reads early waits in memory, up to a second share."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        os.environ |= {} if before is None else {name: before}


def _shape(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))})"
