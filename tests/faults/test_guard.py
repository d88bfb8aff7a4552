"""`guard` in one process and in two: what it lets through, and that ranks end with their parent."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from harness.calls import text_of
from harness.pool import Pool

import two_level_mha as tlm
from two_level_mha.held import Places

pytestmark = pytest.mark.cpu_only("its programs run on Gloo")

PARENT = """
import os, sys, subprocess, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print(child.pid, flush=True)
time.sleep(60)
"""
CHILD = """
import os, time
import torch, torch.distributed as dist
import two_level_mha as tlm
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
with tlm.guard(tlm.init_mesh("cpu", (1, 1)), end_with_parent=True):
    open(os.environ["READY"], "w").close()
    time.sleep(60)
"""


def test_a_rank_ends_with_its_parent(tmp_path: Path):
    """Localises: prctl: a rank whose launcher was killed trains on as an orphan."""
    ready = tmp_path / "ready"
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "READY": str(ready)},
    )
    child = int(parent.stdout.readline())
    try:
        deadline = time.monotonic() + 60
        while not ready.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert ready.exists()
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + 10
        while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
            state = Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[0]
            if state == "Z":  # dead, if nobody has waited for it
                return
            time.sleep(0.05)
        assert not Path(f"/proc/{child}").exists()
    finally:
        parent.kill()
        if Path(f"/proc/{child}").exists():
            os.kill(child, signal.SIGKILL)


def guarded(error: Exception) -> list[str]:
    """What leaves the block of one rank, and what a call of the other ranks raises then."""
    mesh = tlm.init_mesh("cpu", (2, 2), timeout=30)
    layer = tlm.TwoLevelMultiheadAttention(16, 4, mesh=mesh)
    x = torch.ones(2, 3, 16)
    layer(x, x, x)
    texts = []
    for _ in range(2):
        try:
            with tlm.guard(mesh):
                if torch.distributed.get_rank() == 2 and not texts:
                    raise error
                layer(x, x, x)
            texts.append("")
        except Exception as raised:
            texts.append(f"{type(raised).__name__}: {raised}")
    torch.distributed.barrier()
    return texts


@pytest.mark.parametrize("error", [KeyError("labels"), MemoryError("no more"), RuntimeError("of the user's")])
def test_what_leaves_a_guarded_block(error):
    """Localises: an exception of one rank that the others wait for, or that is replaced where it was raised."""
    ranks = Pool()
    try:
        start = time.monotonic()
        found = ranks.run(guarded, 4, error, timeout=100)
        assert time.monotonic() - start < 100
        name = type(error).__name__
        for rank, (first, second) in enumerate(found):
            if rank == 2:
                assert first == f"{name}: {error}"
            else:
                assert first.startswith(f"RankFailure: rank 2 raised {name}: {error}"), first
            assert "closed after a failure" in second and f"rank 2 raised {name}" in second, second
    finally:
        ranks.close()


def fail(mesh, layer, x) -> str:
    """Rank 2 leaves, the others hear of it."""
    try:
        with tlm.guard(mesh):
            if torch.distributed.get_rank() == 2:
                torch.rand(5)
                raise MemoryError("no more")
            layer(x, x, x)
    except Exception as error:
        return type(error).__name__
    return ""


def reopened() -> list[tuple]:
    mesh = tlm.init_mesh("cpu", (2, 2), timeout=60)
    layer = tlm.TwoLevelMultiheadAttention(16, 4, mesh=mesh)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.ones(2, 3, 16)
    places = Places(layer)  # as verify has it
    found = []
    for _ in range(2):
        before = [layer(x, x, x)[0], compiled(x, x, x, need_weights=False)[0], layer.q_weight.full_tensor()]
        start = time.monotonic()
        failed = fail(mesh, layer, x)
        assert time.monotonic() - start < 40, "waited for a rank that had left, as long as an exchange may take"
        tlm.reopen(mesh)
        after = [layer(x, x, x)[0], compiled(x, x, x, need_weights=False)[0], layer.q_weight.full_tensor()]
        after[0].sum().backward()
        assert places.gather("here") == dict.fromkeys(range(4), "here")
        equal = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        found.append((failed, equal, torch.rand(3).tolist(), tlm.init_mesh("cpu", (2, 2)) is mesh))
    return found


def not_reopened() -> list[str]:
    texts = []
    mesh = tlm.init_mesh("cpu", (2, 2), timeout=3)
    layer, x = tlm.TwoLevelMultiheadAttention(16, 4, mesh=mesh), torch.ones(2, 3, 16)
    fail(mesh, layer, x)
    other = tlm.init_mesh("cpu", (2, 2), timeout=3)
    texts.append(text_of(tlm.reopen, mesh))
    tlm.close(other)
    texts.append(text_of(tlm.reopen, other))
    last = tlm.init_mesh("cpu", (2, 2), timeout=3)
    fail(last, tlm.TwoLevelMultiheadAttention(16, 4, mesh=last), x)
    if torch.distributed.get_rank() != 2:
        try:
            tlm.reopen(last)
        except tlm.RankFailure as error:
            texts.append(str(error))
    return texts


def test_a_mesh_is_reopened():
    """Localises: groups, their names or their order after a failure, counts and generators that ranks have apart; a
    group that somebody else holds, so that the others do not hear of its end: guards of a compiled layer do.
    """
    ranks = Pool()
    try:
        found = ranks.run(reopened, 4, timeout=200)
        for rank, tries in enumerate(found):
            for failed, equal, _, same in tries:
                assert failed == ("MemoryError" if rank == 2 else "RankFailure") and equal and same
            assert [drawn for _, _, drawn, _ in tries] == [drawn for _, _, drawn, _ in found[0]]
    finally:
        ranks.close()


def test_what_cannot_be_reopened():
    """Localises: ranks that wait for one that does not come, and a mesh that has groups of its own no more."""
    ranks = Pool()
    try:
        found = ranks.run(not_reopened, 4, timeout=100)
        for rank, texts in enumerate(found):
            anew, closed, *missed = texts
            assert "was made anew" in anew and "was closed" in closed, texts
            assert len(missed) == (rank != 2), texts
            for text in missed:
                assert re.search(r"rank \d waited 3 s to make the mesh: rank 2 is not there", text), text
    finally:
        ranks.close()
