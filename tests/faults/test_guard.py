"""`guard` in one process and in two: what it lets through, and that ranks end with their parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import two_level_mha as tlm

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
    from harness.pool import Pool

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
