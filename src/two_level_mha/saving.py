"""save and load: training that can be killed at any moment and go on, on this grid or on another.

torch.distributed.checkpoint writes the shards, as safetensors, and re-shards at a load; no pickle is read.
manifest.py says how the files become a checkpoint, training_state.py what is in it.
"""

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.optim import Optimizer

from two_level_mha.control import Control, control_of, controls
from two_level_mha.errors import GridError
from two_level_mha.failures import is_of_an_exchange
from two_level_mha.manifest import check_file, describe_file, new_folder, publish, read_manifest, some, step_name, sync
from two_level_mha.training_state import Restored, State, as_list, bytes_of, merged, state_to_save

_HEADERS = 1 << 20  # bytes, for the headers and the manifest
Optimizers = Optimizer | Iterable[Optimizer] | None


@dataclass(frozen=True)
class Loaded:
    """What load gives back besides the tensors: the step, what save was given as extra, the checkpoint's folder."""

    step: int
    extra: dict[str, Any]
    path: Path


def save(
    directory: str | Path,
    model: nn.Module,
    optimizer: Optimizers = None,
    *,
    step: int,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Writes a checkpoint of training; returns its folder, `directory`/step-00000120, which `directory`/latest names.

    It holds parameters and persistent buffers, the state and hyper-parameters of the optimizer, and the state of
    torch's random generators on every rank, of the CPU and of the model's device. A kill of any rank at any moment
    leaves the checkpoints that were there, and `latest` naming a whole one.

    directory: of the run, on a file system that all ranks share. optimizer: one, or several that share the model.
    step: a count, 0 or more. extra: what else training needs, a dict of what JSON has, alike on every rank: the state
    of a scheduler or a GradScaler, the position in the data.

    A collective of all ranks of the default process group; without one, of this process. Raises GridError on every
    rank, before anything is written, for arguments that do not fit or differ, a step that exists, another process that
    writes there, or too little space; an error of one rank while writing is raised on all, names it, and leaves nothing
    behind.
    """
    rank, _ = _place()
    state = State()

    def gather() -> dict[str, object]:
        nonlocal state
        for control in controls().values():
            control.deferred.look()
        alike = {
            "directory": str(_checked_path(directory)),
            "step": _checked_step(step),
            "extra": _json_of(extra),
        }
        state = state_to_save(model, as_list(optimizer), rank)
        return alike | state.description()

    everyone = _together(gather, alike=("directory", "step", "extra"))
    group = _group()  # not before a vote: every rank is there
    run, step, extra = Path(directory), everyone[0]["step"], json.loads(everyone[0]["extra"])
    whole = merged(everyone)

    with contextlib.ExitStack() as opened:

        def open_folder() -> Path | None:
            _check_space(run, bytes_of(whole["tensors"]) + _HEADERS)
            return opened.enter_context(new_folder(run, step)) if rank == 0 else None

        folder = _together(open_folder)[0]
        _together(lambda: _check_shared(folder))

        def write() -> dict[str, dict[str, Any]]:
            writer = HuggingFaceStorageWriter(path=str(folder), save_distributed=True)
            with _quiet():
                dcp.save(state.tensors, storage_writer=writer, process_group=group, no_dist=group is None)
            mine = sorted(folder.glob(f"shard-{rank + 1:05d}-*"))  # numbered by the writer, from 1
            for file in mine:
                sync(file)  # torch 2.11 syncs before the last buffer is written
            return {file.name: describe_file(file) for file in mine}

        files = {name: entry for found in _together(write) for name, entry in sorted(found.items())}

        def finish() -> None:
            if rank == 0:
                _check_whole(whole["tensors"], files)
                publish(folder, run, step, _head(state.grid, step) | {"extra": extra} | whole | {"files": files})

        _together(finish)
    return run / step_name(step)


def load(directory: str | Path, model: nn.Module, optimizer: Optimizers = None, *, step: int | None = None) -> Loaded:
    """Fills model and optimizer, in place, from a checkpoint that save wrote on any grid and number of ranks.

    step: None for the newest one. optimizer: None leaves its state aside. The random generators are restored where the
    number of ranks is that of the save, and left alone elsewhere.

    Every file is compared with the hash that save took, each by one rank, before a weight changes. A collective, as
    save. Raises GridError on every rank, with nothing changed, for a checkpoint that is missing, damaged, or of another
    model or optimizer, by name; and for an error while reading after that, which names the rank, with the model
    partly changed.
    """
    rank, ranks = _place()
    restored: Restored | None = None
    path = Path()
    manifest: dict[str, Any] = {}

    def find() -> dict[str, object]:
        nonlocal restored, path, manifest
        run, wanted = _checked_path(directory), None if step is None else _checked_step(step)
        optimizers = as_list(optimizer)
        path, manifest, digest = read_manifest(run, wanted)
        restored = Restored(model, optimizers, manifest, rank, ranks)
        restored.check()
        alike: dict[str, object] = {"directory": str(run), "step": wanted, "the manifest": digest}
        return alike | {"optimizers": len(optimizers)} | restored.expected()

    everyone = _together(find, alike=("directory", "step", "the manifest"))
    _check_names(path, manifest, everyone)
    group = _group()

    def verify() -> None:
        for name in sorted(manifest["files"])[rank::ranks]:
            check_file(path / name, manifest["files"][name])

    def fill() -> None:
        assert restored is not None
        try:
            reader = HuggingFaceStorageReader(path=str(path))
            with _quiet():
                dcp.load(restored.tensors, storage_reader=reader, process_group=group, no_dist=group is None)
            restored.finish()
        except (Exception, CheckpointException) as error:
            raise GridError(
                f"{path} has its hashes, but reading it failed, {_text(error)}; the model is partly changed: load again"
            ) from error

    _together(verify)
    _together(fill)
    return Loaded(manifest["step"], manifest["extra"], path)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warning that there is one process, which is no news."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _place() -> tuple[int, int]:
    """Rank and number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if _distributed() else (0, 1)


def _control() -> Control:
    return control_of(tuple(range(dist.get_world_size())))


def _group() -> dist.ProcessGroup | None:
    return _control().job_group() if _distributed() else None


def _together(work: Callable[[], Any], alike: tuple[str, ...] = ()) -> list[Any]:
    """What `work` returns on each rank; where it raises on one, or its entries called `alike` differ, every rank raises
    the same GridError.
    """
    result: Any = None
    failure: BaseException | None = None
    try:
        result = work()
    except (Exception, CheckpointException) as error:  # whatever it is, the others would wait for this rank
        if _distributed() and is_of_an_exchange(error):
            raise _control().failure(str(error)) from error
        failure = error
    mine = (None if failure is None else _text(failure), result)
    everyone = _control().gather(mine, "in save or load") if _distributed() else [mine]
    texts = [text for text, _ in everyone]
    if failed := [rank for rank, text in enumerate(texts) if text is not None]:
        text = texts[failed[0]]
        raise GridError(text if texts == [text] * len(texts) else f"rank {failed[0]}: {text}") from failure
    results = [result for _, result in everyone]
    for rank, other in enumerate(results):
        for name in alike:
            if other[name] != results[0][name]:
                first, value = (str(one[name])[:200] for one in (results[0], other))
                raise GridError(
                    f"{name} differs between ranks: {first} on rank 0, {value} on rank {rank}; give every rank the same"
                )
    return results


def _text(error: BaseException) -> str:
    """An error in a sentence; of torch's, which holds every rank's traceback, the first rank's."""
    if isinstance(error, CheckpointException):
        rank, (cause, _) = min(error.failures.items())
        return f"rank {rank}: {_text(cause)}"
    return str(error) if isinstance(error, GridError) else f"{type(error).__name__}: {error}"


def _checked_path(directory: str | Path) -> Path:
    if not isinstance(directory, (str, os.PathLike)):
        raise GridError(f"directory must be a path, got {directory!r}")
    return Path(directory)


def _checked_step(step: int) -> int:
    if isinstance(step, bool) or not isinstance(step, Integral) or step < 0:
        raise GridError(f"step must be an integer, 0 or more, got {step!r}")
    return int(step)


def _json_of(extra: dict[str, Any] | None) -> str:
    extra = {} if extra is None else extra
    if not isinstance(extra, dict):
        raise GridError(f"extra must be a dict or None, got {type(extra).__name__}")
    for key, value in extra.items():
        try:
            kept = isinstance(key, str) and repr(json.loads(json.dumps(value))) == repr(value)
        except (TypeError, ValueError):
            kept = False
        if not kept:
            raise GridError(
                f"extra[{key!r}] would not be the same out of JSON: extra must be made of dicts with texts as keys, "
                "lists, texts, numbers, bools and None"
            )
    return json.dumps(extra)


def _check_space(run: Path, need: int) -> None:
    """Raises GridError if the file system has too little space for `need` bytes."""
    run = run.absolute()
    there = next(path for path in (run, *run.parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    if free < need:
        raise GridError(f"a checkpoint needs {need} bytes, and {there} has {free} free: make space, or save elsewhere")


def _check_shared(folder: Path) -> None:
    if not folder.is_dir():
        raise GridError(f"there is no {folder}, which rank 0 has made: directory must be one that all ranks share")


def _check_whole(tensors: dict[str, dict[str, Any]], files: dict[str, dict[str, Any]]) -> None:
    held = dict.fromkeys(tensors, 0)
    for file in files.values():
        for name, shard in file["shards"].items():
            held[name] += torch.Size(shard["shape"]).numel()
    short = {name: n for name, n in held.items() if n != torch.Size(tensors[name]["shape"]).numel()}
    assert not short, f"shards are missing or overlap: {short}"


def _head(grid: tuple[int, int] | None, step: int) -> dict[str, object]:
    """What a manifest says of the run."""
    from two_level_mha import __version__

    versions = {"torch": torch.__version__, "two_level_mha": __version__}
    return {"step": step, "grid": grid, "world_size": _place()[1], "versions": versions}


def _check_names(path: Path, manifest: dict[str, Any], everyone: list[dict[str, Any]]) -> None:
    """Compares the names that all ranks hold with those that are stored. Every rank has both, so all raise alike."""
    stored = {
        "model": {name for name in manifest["tensors"] if name.startswith("model/")},
        "optimizer": {name for group in manifest["groups"] for name in group["parameters"]},
    }
    for what in ("model", "optimizer") if any(one["optimizers"] for one in everyone) else ("model",):
        held = set().union(*(names[what] for names in everyone))
        for text, names in (("has no", held - stored[what]), ("has also", stored[what] - held)):
            if names:
                found = some(name.removeprefix("model/") for name in names)
                raise GridError(f"{path} is the checkpoint of another {what}: it {text} {found}; nothing was loaded")
