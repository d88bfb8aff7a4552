"""Checks of what each rank is: that it came, its build and settings, clock, memory, and place among the hosts."""

import math
import statistics
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from two_level_mha import _C
from two_level_mha.check.context import FAIL, OK, WARN, Context, Finding, difference, odd_ranks, ranks_text
from two_level_mha.errors import GridError
from two_level_mha.facts import may_differ

CLOCKS_APART = 1.0  # seconds
ROUNDS = 5


def arrive(context: Context) -> None:
    device = context.device
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise GridError(
            f"LOCAL_RANK is {device.index}, but {torch.cuda.device_count()} GPUs are visible: start at most one "
            "process for each GPU of a host, or check with --device-type cpu"
        )


def judge_arrival(context: Context, answers: list[None]) -> list[Finding]:
    return [Finding(OK, f"all {len(answers)} answer" if len(answers) > 1 else "one process")]


def facts(context: Context) -> dict[str, str]:
    grid, sizes = context.grid, context.sizes
    arguments = {
        "grid": f"{grid.head_groups}x{grid.slices}",
        "heads, key/value heads, head_dim": f"{sizes.num_heads}, {sizes.num_kv_heads}, {sizes.head_dim}",
        "device type": context.device.type,
        "profile": f"{context.profile.name} {context.profile.numbers}",
    }
    return context.inputs.facts(context.device.type) | arguments


def judge_facts(context: Context, answers: list[dict[str, str]]) -> list[Finding]:
    """A finding for each fact that differs; the odd ranks are those that do not have what most have."""
    findings = []
    for name in dict.fromkeys(name for answer in answers for name in answer):
        values = [answer.get(name, "not set") for answer in answers]
        if len(set(values)) > 1:
            status = WARN if may_differ(name) else FAIL
            findings.append(Finding(status, f"{name}: {difference(values)}; make it alike", odd_ranks(values)))
    mine = answers[0]
    alike = f"torch {mine['torch']}, two_level_mha {mine['two_level_mha']}, {mine['CPU']}, threads: {mine['threads']}"
    return findings or [Finding(OK, alike)]


def clock(context: Context) -> float:
    """Seconds by which this rank's clock is ahead of rank 0's: of the quickest of a few questions to it."""
    if context.world_size == 1:
        return 0.0
    if context.rank == 0:
        for peer in range(1, context.world_size):
            for _ in range(ROUNDS):
                question = torch.empty(1, dtype=torch.float64)
                dist.recv(question, peer)
                dist.send(question.fill_(context.inputs.clock()), peer)
        return 0.0
    found = []
    for _ in range(ROUNDS):
        answer = torch.empty(1, dtype=torch.float64)
        before = context.inputs.clock()
        dist.send(answer, 0)
        dist.recv(answer, 0)
        after = context.inputs.clock()
        found.append((after - before, (before + after) / 2 - answer.item()))
    return min(found)[1]


def judge_clock(context: Context, answers: list[float]) -> list[Finding]:
    middle = statistics.median_low(answers)
    findings = [
        Finding(WARN, f"rank {rank} is {ahead - middle:+.1f} s off the others: set its host's clock (NTP)", (rank,))
        for rank, ahead in enumerate(answers)
        if abs(ahead - middle) > CLOCKS_APART
    ]
    return findings or [Finding(OK, f"within {max(answers) - min(answers):.3f} s")]


def memory(context: Context) -> int | None:
    return context.inputs.memory(context.device)


def judge_memory(context: Context, answers: list[int | None]) -> list[Finding]:
    known = [free for free in answers if free is not None]
    if not known:
        return [Finding(OK, "hosts do not tell how much is free")]
    middle = statistics.median(known)
    findings = [
        Finding(
            WARN,
            f"rank {rank} has {free / 1e9:.1f} GB free, the median is {middle / 1e9:.1f} GB: another job on its "
            f"{'GPU' if context.device.type == 'cuda' else 'host'}?",
            (rank,),
        )
        for rank, free in enumerate(answers)
        if free is not None and 2 * free < middle
    ]
    return findings or [Finding(OK, f"{min(known) / 1e9:.1f} GB free or more")]


def place(context: Context) -> dict[str, Any]:
    return {"host": context.inputs.host(), "local_rank": context.local_rank}


def judge_order(context: Context, answers: list[dict[str, Any]]) -> list[Finding]:
    """Ranks are numbered host by host; slice groups, which are consecutive ranks, stay inside a host if they can."""
    hosts: dict[str, list[int]] = {}
    for rank, answer in enumerate(answers):
        hosts.setdefault(answer["host"], []).append(rank)
    findings = []
    for host, ranks in hosts.items():
        if any(b != a + 1 for a, b in pairwise(ranks)):
            text = (
                f"host {host} has {ranks_text(ranks)}, which do not follow each other: number the ranks host by host, "
                "RANK = first rank of the host + LOCAL_RANK, as torchrun does"
            )
            findings.append(Finding(FAIL, text, tuple(ranks)))
            continue
        local = [answers[rank]["local_rank"] for rank in ranks]
        if any(b <= a for a, b in pairwise(local)):
            text = (
                f"LOCAL_RANK of {ranks_text(ranks)}, on host {host}, is {', '.join(map(str, local))}: it must ascend "
                "with RANK, and each process of a host needs its own"
            )
            findings.append(Finding(FAIL, text, tuple(ranks)))
    return findings or _judge_slices(context, answers, hosts)


def _judge_slices(context: Context, answers: list[dict[str, Any]], hosts: dict[str, list[int]]) -> list[Finding]:
    n, m = context.grid.head_groups, context.grid.slices
    groups = [range(i * m, (i + 1) * m) for i in range(n)]
    across = [group for group in groups if len({answers[rank]["host"] for rank in group}) > 1]
    if not across:
        return [Finding(OK, f"{len(hosts)} host{'s' if len(hosts) > 1 else ''}, slice groups inside a host")]
    crossing = f"the slice group of {ranks_text(across[0])} crosses hosts, and it exchanges before every attention"
    together, s = math.gcd(*map(len, hosts.values())), context.sizes
    inside = [(n * m // slices, slices) for slices in range(together, 0, -1) if together % slices == 0]
    layer = (s.num_heads, s.num_kv_heads, s.head_dim)
    fitting = [grid for grid in inside if not _C.grid_problem(*grid, *layer)]
    ranks = tuple(rank for group in across for rank in group)
    if fitting:
        grid = "x".join(map(str, fitting[0]))
        return [Finding(FAIL, f"{crossing}: take the grid {grid}, whose slice groups stay inside a host", ranks)]
    way_out = f"no grid for this layer keeps slice groups inside hosts of {together} ranks; use more ranks per host"
    return [Finding(WARN, f"{crossing}: {way_out}", ranks)]
