"""The check of process groups: that they can be made on the whole grid, and that none waits for ever."""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from two_level_mha.check.context import FAIL, OK, Context, Finding, ranks_text
from two_level_mha.control import set_timeout
from two_level_mha.mesh import AXES, grid_group

# A group gives up after the check has: NCCL ends the process then, and the report must come first.
SLACK = 10.0  # seconds
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


def make_groups(context: Context) -> dict[str, float]:
    """Makes the mesh, sums a one over each of its axes, and returns the seconds after which each group gives up."""
    timeout = timedelta(seconds=context.timeout + SLACK)
    dist.init_process_group(
        BACKENDS[context.device.type],
        store=dist.PrefixStore("groups", context.connect()),
        rank=context.rank,
        world_size=context.world_size,
        timeout=timeout,
    )
    n, m = context.grid.head_groups, context.grid.slices
    # torch's own call: two_level_mha.init_mesh refuses what this program is to report
    context.mesh = init_device_mesh(context.device.type, (n, m), mesh_dim_names=AXES)
    found = {}
    for axis, group in axis_groups(context).items():
        set_timeout(group, timeout)
        ones, size = torch.ones(1, device=context.device), dist.get_world_size(group)
        dist.all_reduce(ones, group=group)
        if ones.item() != size:
            raise RuntimeError(f"a sum of ones over the {axis} axis of {size} ranks is {ones.item():g}")
        backend = group._get_backend(context.device)
        found[axis] = backend.options._timeout.total_seconds()
    return found


def axis_groups(context: Context) -> dict[str, dist.ProcessGroup]:
    """Axis -> this rank's group."""
    mesh = context.mesh
    assert mesh is not None  # make_groups has made it
    return {"slice": mesh.get_group("slice"), "head": mesh.get_group("head"), "grid": grid_group(mesh)}


def judge_groups(context: Context, answers: list[dict[str, float]]) -> list[Finding]:
    limit = context.timeout + SLACK
    for axis in answers[0]:
        ranks = tuple(rank for rank, answer in enumerate(answers) if answer[axis] > limit)
        if ranks:
            seconds = answers[ranks[0]][axis]
            text = f"the {axis} group of {ranks_text(ranks)} gives up after {seconds:g} s, not {limit:g} s"
            return [Finding(FAIL, text, ranks)]
    backend = "NCCL" if context.device.type == "cuda" else "Gloo"
    return [Finding(OK, f"{backend}: slice, head and grid, none waits for more than {limit:g} s")]
