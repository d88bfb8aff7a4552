"""The safetensors files of a directory, as load_pretrained reads them: which they are, whether they are whole."""

import json
from pathlib import Path, PurePath
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from two_level_mha.errors import GridError
from two_level_mha.manifest import file_hashes, some
from two_level_mha.mesh import grid_group

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"


def weight_files(path: Path) -> list[Path]:
    """The files that the index names, or the only one. Raises GridError if one is absent, or outside the directory."""
    index, names = path / INDEX, [WEIGHTS]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise GridError(f"{index} is no index of safetensors files: {type(error).__name__}: {error}") from error
    if outside := [name for name in names if not _inside(name)]:
        raise GridError(f"{index} names {some(outside)}: the files of a model must be in its directory, {path}")
    if absent := [name for name in names if not (path / name).is_file()]:
        raise GridError(f"{path} has no {some(absent)}: load_pretrained reads a directory of safetensors files")
    return [path / name for name in names]


def _inside(name: str) -> bool:
    """By the name alone: a file of a directory may well be a link to elsewhere."""
    return not PurePath(name).is_absolute() and ".." not in PurePath(name).parts


class Stored(Protocol):
    """A tensor of a file, read when indexed."""

    def get_shape(self) -> list[int]: ...
    def get_dtype(self) -> str: ...
    def __getitem__(self, index: Any) -> Tensor: ...


def open_tensors(files: list[Path]) -> dict[str, Stored]:
    """Every tensor by name, as something that is read when indexed.

    Raises GridError for a file that is damaged, and for a tensor that two files have.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, Stored] = {}
    owners: dict[str, Path] = {}
    for file in files:
        try:
            opened = safe_open(file, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise GridError(f"{file} is no whole safetensors file: {error}; fetch it again") from error
        names = set(opened.keys())
        if twice := names & owners.keys():
            others = some({owners[name].name for name in twice})
            raise GridError(f"{file} has tensors that {others} has too, {some(twice)}: remove one of the files")
        owners |= dict.fromkeys(names, file)
        found |= {name: opened.get_slice(name) for name in names}
    return found


def check_hashes(path: Path, files: list[Path], sha256: dict[str, str] | None, mesh: DeviceMesh | None) -> None:
    """Compares this rank's share of the files with their hashes. Raises GridError for a file that differs, is absent,
    or has no hash.
    """
    if sha256 is None:
        return
    if not isinstance(sha256, dict) or not all(isinstance(x, str) for pair in sha256.items() for x in pair):
        raise GridError(f"sha256 must be a dict of file names and hexadecimal digests, or None, got {sha256!r}")
    if without := {str(file.relative_to(path)) for file in files} - sha256.keys():
        raise GridError(f"sha256 has no hash of {some(without)}, which would be read from {path}: give all or none")
    if absent := [name for name in sha256 if not _inside(name) or not (path / name).is_file()]:
        raise GridError(f"sha256 has hashes of {some(absent)}, which {path} has not")
    rank, ranks = 0, 1
    if mesh is not None and mesh.size() > 1:
        rank, ranks = dist.get_rank(grid_group(mesh)), mesh.size()
    for name in sorted(sha256)[rank::ranks]:
        if (found := file_hashes(path / name)["sha256"]) != sha256[name].lower():
            raise GridError(f"{path / name} has the SHA-256 {found}, and sha256 says {sha256[name]}: fetch it again")
