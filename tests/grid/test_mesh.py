"""Meshes: what init_mesh and Grid refuse, and meshes made elsewhere: on some of the ranks, or part of a bigger one."""

import os
import re
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from harness.calls import text_of
from harness.device import DEVICE
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import two_level_mha as tlm
from two_level_mha.mesh import AXES, Grid, Place, grid_group, place_on

GRIDS = {
    "three": ((2, 2, 1), r"grid must be two integers, \(head_groups, slices\), got \(2, 2, 1\)"),
    "number": (4, "grid must be two integers.*got 4"),
    "text": ("22", "grid must be two integers.*got '22'"),
    "floats": ((2.0, 2), "head_groups must be an integer, got 2.0"),
    "texts": (("2", "2"), "head_groups must be an integer, got '2'"),
}


def refused_grids() -> list[str]:
    return [text_of(tlm.init_mesh, DEVICE, grid) for grid, _ in GRIDS.values()]


def test_what_is_no_grid(pool):
    """Localises: the checks of init_mesh's grid; alike on every rank."""
    found = pool.run(refused_grids, 4)
    assert all(texts == found[0] for texts in found)
    for text, (_, pattern) in zip(found[0], GRIDS.values(), strict=True):
        assert re.search(pattern, text), text


def cuda_meshes() -> list[str]:
    texts = [text_of(tlm.init_mesh, "cuda", (1, 2))]
    with (
        mock.patch.dict(os.environ, {"LOCAL_RANK": str(dist.get_rank())}),
        mock.patch.object(dist, "get_backend_config", lambda: "cpu:gloo,cuda:nccl"),
        mock.patch.object(torch.cuda, "device_count", lambda: 2),
        mock.patch.object(torch.cuda, "current_device", lambda: 0),
    ):
        texts.append(text_of(tlm.init_mesh, "cuda", (1, 2)))
    return texts


@pytest.mark.cpu_only("it plants the backends and devices of a machine with GPUs")
def test_cuda_tensors_need_their_backend_and_device(pool):
    """Localises: CUDA tensors that reach Gloo, which dies of them; ranks that all compute on the first GPU."""
    for backend, device in pool.run(cuda_meshes, 2):
        assert 'init_mesh("cuda") needs NCCL for CUDA tensors, and the process group has Gloo' in backend
        assert "the current device is cuda:0, and LOCAL_RANK is 1: call torch.cuda.set_device" in device


def test_sizes_of_a_grid_are_integers():
    """Localises: the checks of Grid."""
    for sizes, name in (((2.0, 2), "head_groups"), ((2, 2.5), "slices"), ((2, None), "slices")):
        assert re.match(f"{name} must be an integer, got", text_of(Grid, *sizes))
    assert Grid(2, 2).size == 4


def on_a_part(ranks: list[list[int]]) -> tuple[Place | str, list[int], float]:
    """The place or the error, the ranks of the grid's group, and a layer's difference from one process."""
    mesh = DeviceMesh(DEVICE, torch.tensor(ranks), mesh_dim_names=AXES)
    if mesh.get_coordinate() is None:
        texts = [text_of(call, mesh) for call in (place_on, grid_group)]
        assert texts[0] == texts[1]
        found = texts[0], [], 0.0
    else:
        place, group = place_on(mesh), grid_group(mesh)
        assert mesh.size() == 1 or place.groups[2] == group.group_name
        torch.manual_seed(0)
        stock = torch.nn.MultiheadAttention(16, 4, batch_first=True, dtype=torch.float64)
        ours, x_BLD = tlm.TwoLevelMultiheadAttention.from_torch(stock, mesh), torch.randn(2, 5, 16, dtype=torch.float64)
        difference = ours(x_BLD, x_BLD, x_BLD)[0] - stock(x_BLD, x_BLD, x_BLD)[0]
        found = place, dist.get_process_group_ranks(group), difference.abs().max().item()
    dist.barrier(dist.new_group())  # hangs where some ranks made a group that others did not count
    return found


@pytest.mark.parametrize(
    ("world", "ranks"),
    [(4, [[1, 3]]), (4, [[1], [2]]), (4, [[3]]), (5, [[0, 1], [3, 4]]), (4, [[0, 2], [1, 3]])],
)
def test_a_mesh_of_some_ranks(pool, world, ranks):
    """Localises: the error on ranks outside, the groups that they must join in making, and those of the others."""
    found = pool.run(on_a_part, world, ranks, timeout=40)
    held = {rank: (i, j) for i, row in enumerate(ranks) for j, rank in enumerate(row)}
    grid = Grid(len(ranks), len(ranks[0]))
    for rank, (place, members, difference) in enumerate(found):
        if rank not in held:
            assert place.startswith(f"rank {rank} is not in the mesh:"), place
            continue
        assert (place.grid, place.head_group, place.slice) == (grid, *held[rank])
        assert members == sorted(held) and difference <= 1e-10


def permuted() -> list[str]:
    meshes = [DeviceMesh(DEVICE, torch.tensor(ranks), mesh_dim_names=AXES) for ranks in PERMUTED]
    return [text_of(place_on, mesh) for mesh in meshes]


PERMUTED = ([[3, 1], [0, 2]], [[2, 3], [0, 1]], [[1, 0], [3, 2]], [[3, 2, 1, 0]], [[1], [0], [2], [3]])


def test_ranks_of_a_mesh_ascend(pool):
    """Localises: groups whose order is not that of the mesh, which exchange blocks of other places without a word."""
    for texts in pool.run(permuted, 4):
        for text, ranks in zip(texts, PERMUTED, strict=True):
            assert text.startswith(f"the ranks of mesh must ascend along head and along slice, got {ranks}:"), text


def groups_of_lines() -> list[float]:
    """Differences from one process of a model split by the first two ranks alone, on a row and on a column."""
    differences = []
    for shape in ((1, 2), (2, 1)):
        mesh = DeviceMesh(DEVICE, torch.tensor([0, 1]).view(shape), mesh_dim_names=AXES)
        if dist.get_rank() < 2:
            place_on(mesh)
            torch.manual_seed(0)
            stock = torch.nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
            x_BLD = torch.randn(2, 5, 16, dtype=torch.float64)
            whole = stock(x_BLD)
            split = tlm.parallelize(stock, mesh, rest=True)
            assert split.linear1.weight.to_local().shape == (16, 16)
            differences.append((split(x_BLD) - whole).abs().max().item())
        assert not mesh._flatten_mapping
    dist.barrier(dist.new_group())
    return differences


def test_only_a_grid_of_both_axes_makes_a_group(pool):
    """Localises: a group that ranks outside would have to join, where an axis has the same ranks."""
    found = pool.run(groups_of_lines, 4, timeout=40)
    assert [len(differences) for differences in found] == [2, 2, 0, 0]
    assert max(max(differences, default=0.0) for differences in found) <= 1e-10


def with_another_grid_axis() -> list[str]:
    texts = []
    for names in (("grid", "head", "slice"), ("data", "head", "slice")):
        mesh = init_device_mesh(DEVICE, (1, 2, 2), mesh_dim_names=names)
        texts.append(text_of(place_on, mesh["head", "slice"]))
    mesh = init_device_mesh(DEVICE, (1, 2, 2), mesh_dim_names=("data", "head", "slice"))
    mesh["data", "head"]._flatten("grid")
    return [*texts, text_of(place_on, mesh["head", "slice"])]


def test_a_bigger_mesh_with_an_axis_grid(pool):
    """Localises: torch's own error where the flattened axis finds its name taken."""
    for taken, free, flattened in pool.run(with_another_grid_axis, 4):
        assert re.match(r'the mesh that .* has another axis "grid".*another name', taken), taken
        assert free == "no error" and flattened == taken
