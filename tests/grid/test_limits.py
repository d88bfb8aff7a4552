"""How long a mesh waits, whose groups it has, and that `close` frees them. A failure is in mesh.py or control.py."""

import datetime
import os
import threading

import pytest
import torch
import torch.distributed as dist
from harness.pool import Pool

import two_level_mha as tlm
from two_level_mha import mesh as mesh_module
from two_level_mha.mesh import AXES, grid_group, place_on

pytestmark = pytest.mark.cpu_only("time-outs of Gloo, and calls that only the CPU compares")

ODD = 2


def limits(mesh) -> list[float]:
    """Of the groups of the slice axis, the head axis, the grid, and the agreements."""
    groups = [mesh.get_group("slice"), mesh.get_group("head"), grid_group(mesh)]
    backends = [group._get_backend(torch.device("cpu")) for group in groups]
    return [x.options._timeout.total_seconds() for x in [*backends, place_on(mesh).control.group]]


def all_limits() -> list:
    world = dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    found = []
    for timeout in (None, 7, datetime.timedelta(minutes=2), 3.5):
        found.append(limits(tlm.init_mesh("cpu", (2, 2), timeout=timeout)))
    return [world, *found]


def test_the_limit_reaches_every_group(pool):
    """E. Localises: a group that waits for torch's 30 minutes: that of an axis, of the grid, or of the agreements."""
    for world, inherited, *given in pool.run(all_limits, 4):
        assert inherited == [world] * 4
        assert given == [[7.0] * 4, [120.0] * 4, [3.5] * 4]


def text(call, *args, **kwargs) -> str:
    try:
        call(*args, **kwargs)
    except tlm.GridError as error:
        return str(error)
    return "no error"


def refusals() -> list[str]:
    odd = dist.get_rank() == ODD
    texts = [text(tlm.init_mesh, "cpu", (2, 2), timeout=wrong) for wrong in (0, -1.0, "soon", True, float("nan"))]
    texts.append(text(tlm.init_mesh, "cpu", (2, 2), timeout=-1 if odd else 60))
    texts.append(text(tlm.init_mesh, "cpu", (4, 1) if odd else (2, 2)))
    os.environ["TLM_DEBUG" if odd else "UNUSED"] = "0"
    texts.append(text(tlm.init_mesh, "cpu", (2, 2)))
    os.environ.pop("TLM_DEBUG", None)
    facts = mesh_module.facts_alike
    mesh_module.facts_alike = lambda: facts() | ({"operator library": "another"} if odd else {})
    texts.append(text(tlm.init_mesh, "cpu", (2, 2)))
    mesh_module.facts_alike = facts
    return [*texts, text(tlm.init_mesh, "cpu", (2, 2))]


def test_what_init_mesh_refuses(pool):
    """Localises: an argument, a build or a setting of one rank that others wait for, or that they do not hear of."""
    for texts in pool.run(refusals, 4):
        for found in texts[:5]:
            assert "timeout must be a positive number of seconds, a timedelta or None, got" in found
        assert "timeout must be" in texts[5]
        for found, field in zip(texts[6:9], ("grid", "TLM_DEBUG", "operator library"), strict=True):
            assert found.startswith(f"{field} differs between ranks") and f"on rank {ODD}" in found, found
        assert texts[9] == "no error"


def resources() -> tuple[int, int]:
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def shared_and_closed() -> dict:
    shapes = [(2, 2), (4, 1), (1, 4)]
    first = [tlm.init_mesh("cpu", shape) for shape in shapes]
    before = resources()
    again = [tlm.init_mesh("cpu", shape) for _ in range(20) for shape in shapes]
    after = resources()
    layer = tlm.TwoLevelMultiheadAttention(16, 4, mesh=first[0])
    x = torch.ones(2, 3, 16)
    layer(x, x, x)
    tlm.close(first[1])  # of all meshes of these ranks
    closed = text(layer, x, x, x)
    counts = []
    for _ in range(6):
        mesh = tlm.init_mesh("cpu", (2, 2))
        other = tlm.TwoLevelMultiheadAttention(16, 4, mesh=mesh)
        other(x, x, x)
        tlm.close(mesh)
        del mesh, other
        dist.barrier()
        counts.append(resources())
    return {
        "same": all(mesh is first[i % 3] for i, mesh in enumerate(again)),
        "grew": (before, after),
        "closed": closed,
        "again": text(layer, x, x, x),
        "counts": counts,
        "none": text(tlm.close, "mesh"),
    }


def test_meshes_share_groups_and_close_frees_them():
    """E. Localises: a group, a thread or a file that a mesh leaves behind; a layer that goes on without its groups."""
    ranks = Pool()
    try:
        for found in ranks.run(shared_and_closed, 4, timeout=120):
            assert found["same"] and found["grew"][0] == found["grew"][1], found
            for text_ in (found["closed"], found["again"]):
                assert text_.startswith("the mesh of this layer was closed"), text_
            assert found["counts"][1] == found["counts"][-1], found["counts"]
            assert found["none"].startswith("mesh must be a DeviceMesh")
    finally:
        ranks.close()


def many_meshes(count: int) -> list:
    found = [resources()]
    for _ in range(count):
        tlm.init_mesh("cpu", (2, 2))
    return [*found, resources()]


@pytest.mark.slow
def test_500_meshes_cost_what_one_does(pool):
    """E. Localises: groups, threads and files of a mesh that is made again and again."""
    for first, last in pool.run(many_meshes, 4, 500, timeout=240):
        assert last[0] - first[0] < 60 and last[1] - first[1] < 30, (first, last)


def a_mesh_of_others() -> tuple[list[list[int]], float]:
    """A mesh that torch made, over some ranks: its control needs those ranks alone."""
    mesh = dist.init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("data", *AXES))["head", "slice"]
    layer = tlm.TwoLevelMultiheadAttention(16, 4, mesh=mesh)
    x = torch.ones(2, 3, 16)
    layer(x, x, x)
    for _ in range(2):
        layer(x, x, x)
    threads = [t.name for t in threading.enumerate() if t.name == "two_level_mha states"]
    return list(layer.place.control.ranks), len(threads)


def test_a_control_has_the_ranks_of_its_mesh(pool):
    """Localises: an agreement of ranks that do not share a layer."""
    assert [ranks for ranks, _ in pool.run(a_mesh_of_others, 4)] == [[0, 1], [0, 1], [2, 3], [2, 3]]
