"""The rank pool and the recorder themselves.
A failure here makes every distributed test's verdict doubtful.
"""

import os
import sys
import time
from multiprocessing.connection import wait

import harness.pool
import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from harness import Pool, RankFailure
from harness.launcher import PRELOAD

from two_level_mha.testing import record_collectives


def who_am_i(offset):
    return dist.get_rank() + offset, dist.get_world_size(), os.getpid()


def summed(tensor):
    total = tensor.clone().requires_grad_() * dist.get_rank()
    dist.all_reduce(total.data)
    return {"total": total, "ones": [torch.ones(2)]}


def raises_on_one(rank):
    if dist.get_rank() == rank:
        raise ValueError("planted")
    dist.barrier()


def raises_unpicklable():
    class Local(Exception):
        pass

    raise Local("planted")


def hangs_on_one(rank):
    if dist.get_rank() != rank:
        dist.barrier()
    else:
        time.sleep(1000)


def dies_on_one(rank):
    if dist.get_rank() == rank:
        print("last words", flush=True)
        os.abort()
    dist.barrier()


def records_every_kind():
    x = torch.ones(8, 2)
    with record_collectives() as record:
        y = x.requires_grad_() * 1
        y = funcol.all_gather_tensor_autograd(y, 0, dist.group.WORLD)  # backward: reduce_scatter
        funcol.reduce_scatter_tensor(x.detach(), "sum", 0, dist.group.WORLD)
        funcol.all_to_all_single(x.detach(), None, None, dist.group.WORLD)
        funcol.all_reduce(x.detach().double(), "sum", dist.group.WORLD)
        y.sum().backward()
    return (
        [(c.name, c.dtype, c.elements, c.group_size, c.sent, c.backward) for c in record.calls],
        record.sent(backward=False),
        record.counts(backward=True),
    )


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_results_come_in_rank_order(pool):
    """Localises: answers are matched to ranks; processes live on between calls."""
    first = pool.run(who_am_i, 4, 10)
    assert [result[:2] for result in first] == [(10 + rank, 4) for rank in range(4)]
    assert pool.run(who_am_i, 4, 10) == first


def test_tensors_come_back_detached(pool):
    """Localises: the way of tensors in and out of a rank."""
    results = pool.run(summed, 4, torch.arange(3.0))
    for result in results:
        assert torch.equal(result["total"], 6 * torch.arange(3.0)) and not result["total"].requires_grad
        assert torch.equal(result["ones"][0], torch.ones(2))


def test_a_raising_rank_is_named_and_its_siblings_are_killed(pool, monkeypatch):
    """Localises: error transport, and that ranks stuck in a collective end with the one that raised.

    The others never answer: the pool must not ask for the call's time-out any more once one has raised.
    """
    pids = [result[2] for result in pool.run(who_am_i, 4, 0)]
    waits = []
    with monkeypatch.context() as patch, pytest.raises(RankFailure, match="rank 2 of 4 raised") as failure:
        patch.setattr(harness.pool, "wait", lambda pending, seconds: waits.append(seconds) or wait(pending, seconds))
        pool.run(raises_on_one, 4, 2)
    assert waits[0] > harness.pool.GRACE >= waits[-1]
    assert isinstance(failure.value.__cause__, ValueError) and "raises_on_one" in str(failure.value)
    assert not any(alive(pid) for pid in pids)
    assert len(pool.run(who_am_i, 4, 0)) == 4


def test_an_error_that_cannot_be_pickled_is_reported(pool):
    """Localises: error transport when the exception itself cannot travel."""
    with pytest.raises(RankFailure, match="Local: planted"):
        pool.run(raises_unpicklable, 4)


def test_a_hang_is_a_failure_with_every_stack(pool):
    """Localises: the time-out, the signal that dumps stacks, and the restart afterwards."""
    with pytest.raises(RankFailure, match=r"time-out, ranks \[0, 1, 2, 3\]") as failure:
        pool.run(hangs_on_one, 4, 1, timeout=2)
    text = str(failure.value)
    assert [f"--- rank {rank}" in text for rank in range(4)] == [True] * 4
    assert text.count("in hangs_on_one") == 4 and text.count("in barrier") == 3
    assert len(pool.run(who_am_i, 4, 0)) == 4


def test_a_dying_rank_leaves_its_log(pool):
    """Localises: a crash (signal) is told from an exception and carries the rank's log."""
    with pytest.raises(RankFailure, match="rank 3 left with status -6") as failure:
        pool.run(dies_on_one, 4, 3)
    assert "last words" in str(failure.value)


def test_the_recorder_knows_every_collective(pool):
    """Localises: names, sizes and bytes of the recorder, by hand for a group of 4 and 16 elements a rank."""
    expected = [
        ("all_gather", torch.float32, 16, 4, 3 * 64, False),
        ("reduce_scatter", torch.float32, 16, 4, 48, False),
        ("all_to_all", torch.float32, 16, 4, 48, False),
        ("all_reduce", torch.float64, 16, 4, 192, False),
        ("reduce_scatter", torch.float32, 64, 4, 192, True),
    ]
    for calls, sent, counts in pool.run(records_every_kind, 4):
        assert calls == expected and sent == 480 and counts == {"reduce_scatter": 1}


def origin():
    """This process, its parent, and what of PRELOAD it had to import itself: after rank.py, not before the fork."""
    names = list(sys.modules)
    inherited = names[: names.index("rank")]
    return os.getpid(), os.getppid(), [name for name in PRELOAD if name not in inherited]


def test_sixteen_ranks_are_forks_and_leave_nothing():
    """Localises: start-up cost (one process imports, ranks are its forks) and shutdown."""
    own = Pool()
    results = own.run(origin, 16)
    launcher = own.launcher.pid
    own.close()
    assert [result[1:] for result in results] == [(launcher, [])] * 16
    assert not any(alive(pid) for pid in [launcher, *(result[0] for result in results)])


def test_a_launcher_that_is_late_is_replaced(monkeypatch):
    """Localises: what a machine too busy to import in time leaves behind."""
    own = Pool()
    with monkeypatch.context() as patch:
        patch.setattr(harness.pool, "START_TIMEOUT", 0.0)
        with pytest.raises(RankFailure, match="the launcher does not answer"):
            own.run(who_am_i, 1, 0)
    assert len(own.run(who_am_i, 1, 0)) == 1
    own.close()
