"""What save and load refuse, and what damage, a kill, a full disk or a second writer leaves. All at level E.

A failure is in the order of writes or the comparison of hashes (manifest.py), or in the vote of the ranks (saving.py);
never in what is stored, which test_saving.py looks at.
"""

import json
import os
import pickle
import random
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness.calls import mesh
from torch import nn
from torch.distributed.tensor import DTensor

import two_level_mha as tlm
from two_level_mha import manifest as files

pytestmark = pytest.mark.cpu_only("its programs run on Gloo")

KILLER = Path(__file__).parents[1] / "faults" / "saves.py"


def trained(seed: int = 0, mesh=None) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.ModuleList([tlm.TwoLevelAttention(16, 4, 4, 4, mesh=mesh), nn.Linear(3, 4)])
    optimizer = torch.optim.AdamW(tlm.param_groups(model), lr=0.1 + seed)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return model, optimizer


def bits(model: nn.Module, optimizer: torch.optim.Optimizer) -> list:
    """All that load could change, this rank's part."""
    states = optimizer.state_dict()
    moments = [x for state in states["state"].values() for x in state.values()]
    local = [x._local_tensor if isinstance(x, DTensor) else x for x in (*model.state_dict().values(), *moments)]
    return [[x.tolist() for x in (*local, torch.get_rng_state())], states["param_groups"]]


def refused(run, step=None, model=None, optimizer=None) -> str:
    """The text of load's refusal; model, optimizer and random generator must be as they were."""
    own = trained(1)
    model, optimizer = model or own[0], optimizer or own[1]
    before = bits(model, optimizer)
    with pytest.raises(tlm.GridError) as caught:
        tlm.load(run, model, optimizer, step=step)
    assert bits(model, optimizer) == before
    return str(caught.value)


@pytest.fixture
def run(tmp_path) -> Path:
    """A directory with the steps 4 and 12 of one run."""
    model, optimizer = trained()
    for step in (4, 12):
        tlm.save(tmp_path / "run", model, optimizer, step=step, extra={"step": step})
    return tmp_path / "run"


def listing(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


SAVES = {
    "negative": ({"step": -1}, "step must be an integer, 0 or more, got -1"),
    "bool": ({"step": True}, "step must be an integer, 0 or more, got True"),
    "text": ({"step": "3"}, "step must be an integer, 0 or more, got '3'"),
    "exists": ({"step": 12}, "has step 12 already: save another step, or remove"),
    "directory": ({"step": 1, "directory": 3}, "directory must be a path, got 3"),
    "a file": ({"step": 1, "directory": __file__}, "NotADirectoryError|FileExistsError"),
    "model": ({"step": 1, "model": [1]}, "model must be a torch.nn.Module, got list"),
    "optimizer": ({"step": 1, "optimizer": "adam"}, "optimizer must be a torch.optim.Optimizer, several or None"),
    "extra": ({"step": 1, "extra": [1]}, "extra must be a dict or None, got list"),
    "extra's keys": ({"step": 1, "extra": {"a": {1: 2}}}, r"extra\['a'\] would not be the same out of JSON"),
    "extra's tensor": ({"step": 1, "extra": {"b": torch.ones(1)}}, r"extra\['b'\] would not be the same"),
    "extra's tuple": ({"step": 1, "extra": {"c": (1, 2)}}, r"extra\['c'\] would not be the same"),
}


@pytest.mark.parametrize("case", SAVES)
def test_arguments_of_save(run, case):
    """Localises: an argument found out after something was written."""
    arguments, message = SAVES[case]
    model, optimizer = trained()
    before = listing(run)
    given = {"directory": run, "model": model, "optimizer": optimizer} | arguments
    with pytest.raises(tlm.GridError, match=message):
        tlm.save(**given)
    assert listing(run) == before


def test_what_cannot_be_saved(tmp_path):
    """Localises: state that a checkpoint would leave out without a word."""

    class Counts(nn.Module):
        def get_extra_state(self):
            return {"steps": 3}

    with pytest.raises(tlm.GridError, match="state that is no tensor, 0._extra_state: give it to save as extra="):
        tlm.save(tmp_path, nn.Sequential(Counts()), step=0)
    with pytest.raises(tlm.GridError, match="model is on meta, weight"):
        tlm.save(tmp_path, nn.Linear(2, 2, device="meta"), step=0)
    with pytest.raises(tlm.GridError, match="a parameter that model has not"):
        tlm.save(tmp_path, nn.Linear(2, 2), trained()[1], step=0)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.LBFGS(model.parameters())
    optimizer.state[model.weight]["old_dirs"] = [torch.ones(2)]
    with pytest.raises(tlm.GridError, match="optimizer has old_dirs of weight, a Tensor: save stores"):
        tlm.save(tmp_path, model, optimizer, step=0)
    assert listing(tmp_path) == []


def test_what_load_does_not_find(run, tmp_path):
    """Localises: a missing part of a run, named; another step is never taken instead."""
    assert "must be one that two_level_mha.save has written" in refused(tmp_path / "none")
    assert "step must be an integer, 0 or more, got -3" in refused(run, step=-3)
    assert "has no step 5; its steps: step-00000004, step-00000012" in refused(run, step=5)
    (run / "step-00000004" / "manifest.json").unlink()
    assert "step-00000004 has no manifest.json" in refused(run, step=4)
    (run / "latest").unlink()
    assert "has no file latest: give step=, of step-00000004, step-00000012" in refused(run)
    assert "has no file latest: nothing was saved there" in refused(tmp_path)
    shard = next((run / "step-00000012").glob("*.safetensors"))
    shutil.copy(shard, shard.with_name("more.safetensors"))
    assert "has more.safetensors, which its manifest does not list" in refused(run, step=12)
    shard.with_name("more.safetensors").unlink()
    shard.unlink()
    assert f"has no {shard.name}, which its manifest lists" in refused(run, step=12)


def test_another_model(run):
    """Localises: names, shapes, dtypes or an optimizer that do not fit, before anything changes."""
    attention = tlm.TwoLevelAttention(16, 4, 4, 4)
    for linear, message in (
        (
            nn.Linear(4, 4),
            r"the checkpoint of another model: 1.weight is float32 \(4, 3\) and should be float32 \(4, 4\)",
        ),
        (nn.Linear(3, 4, dtype=torch.float64), r"1.weight is float32 \(4, 3\) and should be float64 \(4, 3\)"),
        (nn.Linear(3, 4, bias=False), "of another model: it has also 1.bias"),
        (nn.Sequential(nn.Linear(3, 4)), "of another model: it has no 1.0.bias, 1.0.weight"),
    ):
        model = nn.ModuleList([attention, linear])
        assert re.search(message, refused(run, model=model, optimizer=torch.optim.AdamW(model.parameters())))
    model, _ = trained(1)
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    assert "holds the state of AdamW, and optimizer is SGD" in refused(run, model=model, optimizer=sgd)
    part = torch.optim.AdamW(list(model.parameters())[:-1])
    assert "of another optimizer: it has also 1.bias" in refused(run, model=model, optimizer=part)
    tlm.load(run, model)


def groups_apart(run) -> None:
    model, _ = trained()
    first, *others = model.parameters()
    optimizer = torch.optim.AdamW([{"params": [first], "lr": 0.5}, {"params": others}])
    tlm.save(run, model, optimizer, step=1)


def test_groups(tmp_path):
    """Localises: hyper-parameters of one group given to parameters of another."""
    groups_apart(tmp_path)
    assert "in one group, but they were saved with other hyper-parameters" in refused(tmp_path)


def flipped(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_flipped_bits(run):
    """1,000 flips of one bit, in every file of a checkpoint and in `latest`: 53 through load too, all by what it
    runs before it reads a tensor. Localises: a byte that no hash covers.
    """
    draw = random.Random(0)
    folder = run / "step-00000012"
    paths = [*folder.iterdir(), run / "latest"]
    _, manifest, _ = files.read_manifest(run, None)

    def verify() -> None:
        for name, entry in files.read_manifest(run, None)[1]["files"].items():
            files.check_file(folder / name, entry)

    verify()
    silent = []
    for number in range(1000):
        path = paths[number % len(paths)]
        whole = path.read_bytes()
        bit = draw.randrange(8 * len(whole))
        flipped(path, bit)
        try:
            verify()
            silent.append((path.name, bit))
        except (tlm.GridError, UnicodeDecodeError):
            pass
        if number % 19 == 0:  # of every file, as 19 and the number of files share no divisor
            refused(run)
        path.write_bytes(whole)
    assert silent == []
    assert tlm.load(run, *trained(1)).step == 12


def test_the_damage_is_named(run):
    """Localises: which tensor is damaged, in words."""
    (shard,) = (run / "step-00000012").glob("*.safetensors")
    entry = json.loads((run / "step-00000012" / "manifest.json").read_text())["files"][shard.name]
    whole = shard.read_bytes()
    flipped(shard, 8 * entry["shards"]["model/1.bias"]["begin"] + 3)
    assert re.search(f"{shard.name} is damaged, tensors model/1.bias: its SHA-256 is", refused(run))
    shard.write_bytes(whole[:-1])
    assert f"has {len(whole) - 1} bytes, and its manifest says {len(whole)}" in refused(run)
    shard.write_bytes(whole)
    subprocess.run(["sha256sum", "--check", "--strict", "latest"], cwd=run, check=True, capture_output=True)


class Hostile:
    def __reduce__(self):
        return os.mkdir, (os.environ["HOSTILE"],)


def test_no_pickle_is_read(run, tmp_path, monkeypatch):
    """Pickles under our files' names, with hashes that fit too: refused, never run."""
    target = tmp_path / "ran"
    monkeypatch.setenv("HOSTILE", str(target))
    hostile = pickle.dumps(Hostile())
    pickle.loads(hostile)
    target.rmdir()
    folder = run / "step-00000012"
    for path in [*folder.iterdir(), run / "latest"]:
        whole = path.read_bytes()
        path.write_bytes(hostile)
        refused(run)
        path.write_bytes(whole)
    (folder / ".metadata").write_bytes(hostile)
    tlm.load(run, *trained(1))
    (shard,) = folder.glob("*.safetensors")
    shard.write_bytes(hostile)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][shard.name] |= files.file_hashes(shard)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    digest = files.file_hashes(folder / "manifest.json")["sha256"]
    (folder / "manifest.json.sha256").write_text(f"{digest}  manifest.json\n")
    assert re.search("reading it failed, rank 0: .*header too large", refused(run, step=12))
    assert not target.exists()


def test_two_writers_and_no_space(run, monkeypatch):
    """Localises: the lock, whose holder is named; space that is looked at first. Nothing is left of either save."""
    model, optimizer = trained()
    before = listing(run)
    with files.new_folder(run, 20), pytest.raises(tlm.GridError, match=f"is being written by process {os.getpid()} on"):
        tlm.save(run, model, optimizer, step=21)
    next(run.glob(".step-00000020.tmp-*")).rmdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(tlm.GridError, match=r"a checkpoint needs \d+ bytes, and .* has 1 free"):
        tlm.save(run, model, optimizer, step=22)
    assert listing(run) == before


def test_a_save_that_died(run):
    """Localises: each moment at which a dead save's files wait for the next one."""
    model, optimizer = trained()
    left = run / ".step-00000020.tmp-dead"
    shutil.copytree(run / "step-00000012", left)
    assert tlm.load(run, *trained(1)).step == 12
    # died after the rename, before `latest` was replaced
    later = (run / "latest").read_text()
    first = files.file_hashes(run / "step-00000004" / "manifest.json")["sha256"]
    (run / "latest").write_text(f"{first}  step-00000004/manifest.json\n")
    (run / ".latest.tmp").write_text(later)
    assert tlm.load(run, *trained(1)).step == 12
    # died before the rename
    (run / ".latest.tmp").write_text(later.replace("12/", "13/"))
    assert tlm.load(run, *trained(1)).step == 4
    (run / ".latest.tmp").write_text(later)
    with pytest.raises(tlm.GridError, match="has step 12 already"):
        tlm.save(run, model, optimizer, step=12)
    assert not left.exists() and (run / "latest").read_text() == later
    tlm.save(run, model, optimizer, step=13)
    assert tlm.load(run, *trained(1)).step == 13 and not (run / ".latest.tmp").exists()


def test_what_is_on_disk_when(run, monkeypatch):
    """Localises: a file or a folder that a crash of the machine could take after the name that leads to it is there."""
    events = []
    fsync, rename, replace = os.fsync, Path.rename, os.replace

    def synced(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", lambda path, to: (events.append("RENAME"), rename(path, to)))
    monkeypatch.setattr(os, "replace", lambda path, to: (events.append("REPLACE"), replace(path, to)))
    folder = tlm.save(run, *trained(), step=20)
    renamed, replaced = events.index("RENAME"), events.index("REPLACE")
    before = set(events[:renamed])
    assert {path.name for path in folder.iterdir()} <= before and ".latest.tmp" in before
    assert events[renamed - 1].startswith(".step-00000020.tmp-")
    assert events[renamed + 1 : replaced] == events[replaced + 1 :] == [run.name]


def texts_of(directory: Path) -> list[str]:
    """What this rank is told where ranks differ, or one fails; whether anything changed."""
    rank = torch.distributed.get_rank()
    model, optimizer = trained(0, mesh((1, 2)))
    tlm.save(directory, model, optimizer, step=1)
    before, there = bits(model, optimizer), listing(directory)
    found = []

    def call(function, *args, **options) -> None:
        try:
            function(*args, **options)
            found.append("no error")
        except tlm.GridError as error:
            found.append(str(error))

    call(tlm.save, directory, model, optimizer, step=2 + rank)
    call(tlm.save, directory, model, optimizer, step=2, extra={"rank": rank})
    call(tlm.save, directory, model, optimizer, step=2 if rank == 0 else "two")
    call(tlm.load, directory, model, optimizer, step=None if rank == 0 else 1)
    call(tlm.load, directory if rank == 0 else directory / "none", model, optimizer)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    call(tlm.save, directory, model, optimizer, step=2)
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    torch.distributed.barrier()
    found.append(f"left behind: {set(listing(directory)) - set(there)}")
    torch.distributed.barrier()
    if rank == 0:
        flipped(next((directory / "step-00000001").glob("shard-00002*")), 40000)
    torch.distributed.barrier()
    call(tlm.load, directory, model, optimizer)
    found.append(f"changed: {bits(model, optimizer) != before}")
    torch.distributed.barrier()
    call(tlm.save, directory, model, optimizer, step=2)
    return found


def test_ranks_raise_alike(pool, tmp_path):
    """Localises: a rank that goes on, waits, or says something else than the others."""
    first, second = pool.run(texts_of, 2, tmp_path)
    assert first == second
    expected = [
        "step differs between ranks: 2 on rank 0, 3 on rank 1",
        'extra differs between ranks: {"rank": 0} on rank 0, {"rank": 1} on rank 1',
        "rank 1: step must be an integer, 0 or more, got 'two'",
        "step differs between ranks: None on rank 0, 1 on rank 1",
        "rank 1: directory must be one that two_level_mha.save has written",
        "rank 1: OSError: .*File too large",
        r"left behind: set\(\)",
        "rank 1: .*shard-00002-.* is damaged",
        "changed: False",
        "no error",
    ]
    for text, pattern in zip(first, expected, strict=True):
        assert re.match(pattern, text), text


def kills(number: int, grid: str) -> dict[str, int]:
    command = [sys.executable, str(KILLER), "--kills", str(number), "--grid", grid]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20 * number + 60)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_kills():
    """Ranks killed at random moments of a save: what loads then is a whole step, bit for bit. Localises: the order of
    writes.
    """
    assert kills(5, "1x2")["kills"] == 5


@pytest.mark.slow
def test_many_kills():
    """The same on 4 ranks, often enough that kills come before and after the folder has its name."""
    counts = kills(40, "2x2")
    assert counts["leftovers"] > 0 and counts["renamed"] + counts["returned"] > 0, counts
