"""A run's checkpoints on disk: their files, their hashes, and an order of writes that leaves each whole or absent.

    run/latest                                the newest checkpoint, in a line of sha256sum: its manifest
    run/step-00000120/manifest.json           what is stored; size, SHA-256 and CRC-32 of every other file
    run/step-00000120/manifest.json.sha256    a line of sha256sum
    run/step-00000120/shard-*.safetensors     the tensors, in torch.distributed.checkpoint's names
    run/.step-00000120.tmp-*                  a save that is under way, or died
    run/.latest.tmp                           what `latest` is about to be
    run/.lock                                 held by flock, so a dead writer holds nothing

A checkpoint exists from the rename of its folder on; until then it is removed by the next save. All files are on disk
before the rename.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import uuid
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from two_level_mha.errors import GridError

FORMAT = 1
MANIFEST, LATEST, NEXT, LOCK = "manifest.json", "latest", ".latest.tmp", ".lock"
NAMED = 8  # tensors or files in one sentence of an error
_CHUNK = 1 << 22  # bytes read at once


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def some(names: Iterable[str]) -> str:
    """The first names of many, for an error."""
    names = sorted(names)
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def file_hashes(path: Path) -> dict[str, Any]:
    """The size in bytes, and SHA-256 and CRC-32 in hexadecimal digits."""
    sha256, crc, size = hashlib.sha256(), 0, 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            sha256.update(chunk)
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return {"size": size, "sha256": sha256.hexdigest(), "crc32": f"{crc:08x}"}


def describe_file(path: Path) -> dict[str, object]:
    """A safetensors file for the manifest: its hashes, and of every shard its place in the tensor and its CRC-32."""
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
        offsets = json.loads(header.pop("__metadata__")["DCP_SHARDING_INFO"])
        shards = {
            name: {
                "offset": offsets[name]["saved_offsets"],
                "shape": entry["shape"],
                "begin": start + entry["data_offsets"][0],
                "end": start + entry["data_offsets"][1],
            }
            for name, entry in header.items()
        }
        for shard in shards.values():
            shard["crc32"] = _crc32(file, shard["begin"], shard["end"])
    return file_hashes(path) | {"shards": shards}


def _crc32(file: BinaryIO, begin: int, end: int) -> str:
    file.seek(begin)
    crc = 0
    while begin < end and (chunk := file.read(min(_CHUNK, end - begin))):
        crc, begin = zlib.crc32(chunk, crc), begin + len(chunk)
    return f"{crc:08x}"


def check_file(path: Path, entry: dict[str, Any]) -> None:
    """Raises GridError unless the file is the one that the manifest describes; names the tensors that are damaged."""
    size = path.stat().st_size
    if size != entry["size"]:
        raise GridError(f"{path} has {size} bytes, and its manifest says {entry['size']}: load another step")
    if (found := file_hashes(path)["sha256"]) != entry["sha256"]:
        with path.open("rb") as file:
            shards = entry["shards"].items()
            bad = [name for name, shard in shards if _crc32(file, shard["begin"], shard["end"]) != shard["crc32"]]
        what = f"tensors {some(bad)}" if bad else "the header"
        raise GridError(
            f"{path} is damaged, {what}: its SHA-256 is {found}, and its manifest says {entry['sha256']}: load another "
            "step"
        )


def read_manifest(run: Path, step: int | None) -> tuple[Path, dict[str, Any], str]:
    """The folder, the manifest and its SHA-256, of a step or of the newest one. Raises GridError if a byte of it, or of
    what names it, is not as written.
    """
    if not run.is_dir():
        raise GridError(f"directory must be one that two_level_mha.save has written, but {run} is no directory")
    if step is None:
        name, expected = _newest(run)
        folder = run / name
    else:
        folder, expected = run / step_name(step), None
        if not folder.is_dir():
            raise GridError(
                f"{run} has no step {step}; its steps: {some(p.name for p in run.glob('step-*')) or 'none'}"
            )
    path = folder / MANIFEST
    if not path.is_file():
        raise GridError(f"{folder} has no {MANIFEST}: it is no checkpoint of two_level_mha.save, or not a whole one")
    text = path.read_bytes()
    digest = hashlib.sha256(text).hexdigest()
    if expected not in (None, digest):
        raise GridError(
            f"{path} is damaged or another save's: its SHA-256 is {digest}, and {run / LATEST} has {expected}"
        )
    beside = folder / f"{MANIFEST}.sha256"
    if not beside.is_file() or beside.read_bytes() != _line(digest, MANIFEST):
        raise GridError(
            f"{path} is damaged: its SHA-256 is {digest}, which is not what {beside} says; load another step"
        )
    manifest = json.loads(text)
    if manifest["format"] != FORMAT:
        raise GridError(
            f"{path} has format {manifest['format']}, and this two_level_mha reads {FORMAT}: take the newer one"
        )
    _check_names(folder, manifest["files"])
    return folder, manifest, digest


def _check_names(folder: Path, files: dict[str, Any]) -> None:
    """torch's reader takes every safetensors file of a folder, so there must be no other."""
    found = {path.name for path in folder.glob("*.safetensors")}
    if absent := files.keys() - found:
        raise GridError(f"{folder} has no {some(absent)}, which its manifest lists: load another step")
    if strange := found - files.keys():
        raise GridError(f"{folder} has {some(strange)}, which its manifest does not list: move it elsewhere")


def _line(digest: str, name: str) -> bytes:
    return f"{digest}  {name}\n".encode()


def _named(path: Path) -> tuple[str, str] | None:
    """The checkpoint's name and its manifest's hash, of a file like `latest`; None if it is not such a file."""
    if not path.is_file():
        return None
    digest, _, name = path.read_bytes().decode(errors="replace").partition("  ")
    name = name.removesuffix(f"/{MANIFEST}\n")
    whole = path.read_bytes() == _line(digest, f"{name}/{MANIFEST}") and Path(name).name == name
    return (name, digest) if whole else None


def _renamed(run: Path) -> tuple[str, str] | None:
    """What a save that died had made whole, and `latest` does not name yet."""
    if (named := _named(run / NEXT)) is None:
        return None
    path = run / named[0] / MANIFEST
    return named if path.is_file() and file_hashes(path)["sha256"] == named[1] else None


def _newest(run: Path) -> tuple[str, str]:
    if (named := _renamed(run) or _named(run / LATEST)) is not None:
        return named
    if (run / LATEST).is_file():
        raise GridError(f"{run / LATEST} is damaged: give step=")
    steps = some(path.name for path in run.glob("step-*"))
    raise GridError(
        f"{run} has no file {LATEST}: " + (f"give step=, of {steps}" if steps else "nothing was saved there")
    )


@contextlib.contextmanager
def new_folder(run: Path, step: int) -> Iterator[Path]:
    """A hidden folder to write a checkpoint into, under the lock of the run; it is removed where the block raises.

    Raises GridError if the step exists, or if another process is writing.
    """
    run.mkdir(parents=True, exist_ok=True)
    sync(run.parent)
    with _lock(run):
        if _renamed(run):
            os.replace(run / NEXT, run / LATEST)
        for left in run.glob(".step-*.tmp-*"):
            shutil.rmtree(left, ignore_errors=True)  # ranks of a dead job may still be writing
        if (run / step_name(step)).exists():
            raise GridError(
                f"{run} has step {step} already: save another step, or remove {run / step_name(step)} first"
            )
        folder = run / f".{step_name(step)}.tmp-{uuid.uuid4().hex[:8]}"
        folder.mkdir()
        try:
            yield folder
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


@contextlib.contextmanager
def _lock(run: Path) -> Iterator[None]:
    with (run / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise GridError(
                f"{run} is being written by {file.read().strip()}: save elsewhere, or end that job"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def publish(folder: Path, run: Path, step: int, manifest: dict[str, Any]) -> Path:
    """Gives what new_folder made, and whose files are on disk, its manifest and its name, and lets `latest` name it."""
    text = json.dumps({"format": FORMAT} | manifest).encode()
    digest = hashlib.sha256(text).hexdigest()
    target = run / step_name(step)
    _write(folder / MANIFEST, text)
    _write(folder / f"{MANIFEST}.sha256", _line(digest, MANIFEST))
    _write(run / NEXT, _line(digest, f"{target.name}/{MANIFEST}"))  # before the rename: after it nothing needs space
    sync(folder)
    folder.rename(target)
    sync(run)
    os.replace(run / NEXT, run / LATEST)
    sync(run)
    return target


def _write(path: Path, text: bytes) -> None:
    with path.open("wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Puts a file, or the names in a folder, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
