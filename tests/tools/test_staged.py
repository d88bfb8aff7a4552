"""The group through which ranks share a GPU (harness/staged.py), here with tensors of the CPU, and the ranks on it.

A failure here makes every distributed test's verdict on a GPU doubtful.
"""

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from harness.layer import Case, errors, place
from harness.staged import StagedGroup

import two_level_mha as tlm

TESTS = Path(__file__).parents[1]


def exact() -> dict[str, bool]:
    """Every collective that the operators, torch's parallel layers and checkpoints use: is it what it should be?"""
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    x = torch.arange(8.0) + 10 * rank
    every = [torch.arange(8.0) + 10 * r for r in range(size)]
    total, pieces = sum(every), [list(y.chunk(size)) for y in every]
    found = {"is staged": isinstance(group, StagedGroup) and isinstance(dist.new_group(), StagedGroup)}
    summed, in_place = funcol.all_reduce(x, "sum", group), x.clone()
    found["all_reduce"] = torch.equal(summed, total)
    torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce_(in_place, "max", group.group_name))
    found["all_reduce_, max"] = torch.equal(in_place, every[-1])
    found["all_gather"] = torch.equal(funcol.all_gather_tensor(x, 0, group), torch.cat(every))
    found["reduce_scatter"] = torch.equal(
        funcol.reduce_scatter_tensor(x, "sum", 0, group), list(total.chunk(size))[rank]
    )
    sent = [2] * size
    found["all_to_all"] = torch.equal(
        funcol.all_to_all_single(x, sent, sent, group), torch.cat([piece[rank] for piece in pieces])
    )
    sent = [2 * int(other == 0) for other in range(size)]  # all to the first, which may send nothing itself
    taken = [2 * int(rank == 0) for _ in range(size)]
    found["all_to_all, uneven"] = torch.equal(
        funcol.all_to_all_single(x[:2].clone(), taken, sent, group),
        torch.cat([y[:2] for y in every]) if rank == 0 else x[:0],
    )
    found["broadcast"] = torch.equal(funcol.broadcast(x, 2, group), every[2])
    rows = [torch.empty(8) for _ in range(size)]
    dist.all_gather(rows, x)
    found["list of all_gather"] = torch.equal(torch.stack(rows), torch.stack(every))
    flat = torch.empty(8 * size)
    dist.all_gather_into_tensor(flat, x)
    found["all_gather_into_tensor"] = torch.equal(flat, torch.cat(every))
    part = torch.empty(2)
    dist.reduce_scatter_tensor(part, x)
    found["reduce_scatter_tensor"] = torch.equal(part, list(total.chunk(size))[rank])
    told = [rank]
    dist.broadcast_object_list(told, src=1)
    objects = [None] * size
    dist.all_gather_object(objects, {"rank": rank})
    found["objects"] = told == [1] and objects == [{"rank": r} for r in range(size)]
    dist.barrier()
    return found


def test_collectives(staged_pool):
    """E. Localises: a method of the staged group: its name, which argument it writes to, options it drops."""
    for found in staged_pool.run(exact, 4):
        assert all(found.values()), found


def layers(n: int, m: int) -> dict[str, float]:
    """By scheme, the largest difference of outputs and gradients from the unsplit layer."""
    found = {}
    for scheme in ("slices", "sequence", "batch", "heads", "weights"):
        heads = {"heads": 8, "kv_heads": 4} if scheme != "heads" else {"heads": 8 * n, "kv_heads": n * m}
        for combine in ("reduce", "concat"):
            case = Case(scheme=scheme, combine=combine, causal=0, length=7, **heads)
            found[f"{scheme}, {combine}"] = max(errors(case, place(n, m)).values())
    return found


@pytest.mark.parametrize("grid", [(2, 2), (1, 4)])
def test_every_scheme(staged_pool, grid):
    """T. Localises: a layer that cannot work on the staged group, forward or backward."""
    for found in staged_pool.run(layers, 4, *grid):
        assert all(error <= 1e-10 for error in found.values()), found


def cuda_mesh() -> tuple:
    """The grid of a mesh of type "cuda" on ranks that share a GPU; one is planted."""
    with (
        mock.patch.object(torch.cuda, "device_count", lambda: 1),
        mock.patch.object(torch.cuda, "is_initialized", lambda: True),
    ):
        return tuple(tlm.init_mesh("cuda", (2, 2)).shape)


@pytest.mark.cpu_only("it plants a GPU")
def test_a_mesh_of_cuda(staged_pool):
    """Localises: what init_mesh refuses of CUDA: Gloo, which dies of its tensors, not what goes through the host."""
    assert staged_pool.run(cuda_mesh, 4) == [(2, 2)] * 4


@pytest.mark.cpu_only("it plants a machine without GPUs")
@pytest.mark.parametrize(
    "variables, sentence",
    [
        ({"TLM_TEST_DEVICE": "cuda"}, "TLM_TEST_DEVICE=cuda, and torch sees no GPU on this machine"),
        ({"TLM_TEST_DEVICE": "tpu"}, "TLM_TEST_DEVICE must be one of cpu, cuda, got 'tpu'"),
        ({"TLM_TEST_BACKEND": "nccl"}, "TLM_TEST_BACKEND must be one of gloo, staged with cpu, got 'nccl'"),
    ],
)
def test_a_device_that_is_not_there(variables, sentence):
    """Localises: a suite that would pass on the CPU where its tester meant a GPU."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only", str(TESTS / "tools" / "test_staged.py")],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""} | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode != 0 and sentence in result.stderr, result.stderr
