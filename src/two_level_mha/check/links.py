"""The check of links: collectives along each axis against the profile, and every pair of neighbours against the rest.

Pairs are timed by ping-pong, disjoint ones at once, in a few rounds; a pair's time is the best of its rounds' medians,
so that what happens once on a busy host names nobody. Pairs inside a host and pairs between hosts are compared apart.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from two_level_mha.check.context import FAIL, OK, WARN, Context, Finding, ranks_text
from two_level_mha.check.groups import axis_groups
from two_level_mha.profile import Profile

SLOW = 4.0  # times the median of the others, or what the profile says
SMALL, LARGE = 1, 1 << 20  # float32 elements: 4 bytes, 4 MiB
REPEATS = {SMALL: 9, LARGE: 3}
ROUNDS = 3

Pair = tuple[int, int]
Times = list[float]  # seconds for a SMALL and for a LARGE message


def links(context: Context) -> dict[str, Any]:
    """This rank's times: "axes", of a collective on each axis; "pairs", [peer, times] where it is the lower rank."""
    axes = {
        axis: [_collective(context, axis, group, size) for size in (SMALL, LARGE)]
        for axis, group in axis_groups(context).items()
        if dist.get_world_size(group) > 1
    }
    best: dict[int, Times] = {}
    phases = disjoint(neighbours(context.grid.head_groups, context.grid.slices))
    for _ in range(ROUNDS):
        for phase in phases:
            for pair in phase:
                if context.rank in pair:
                    peer = pair[1] if context.rank == pair[0] else pair[0]
                    times = [_ping_pong(context, peer, size) for size in (SMALL, LARGE)]
                    best[peer] = list(map(min, times, best.get(peer, times)))
    pairs = [[peer, times] for peer, times in best.items() if context.rank < peer]
    return {"host": context.inputs.host(), "axes": axes, "pairs": pairs}


def neighbours(n: int, m: int) -> list[Pair]:
    """The pairs next to each other on a ring along the slice, the head and the grid axis."""
    rings = [[i * m + j for j in range(m)] for i in range(n)]
    rings += [[i * m + j for i in range(n)] for j in range(m)] + [list(range(n * m))]
    pairs = {(min(a, b), max(a, b)) for ring in rings for a, b in zip(ring, ring[1:] + ring[:1], strict=True) if a != b}
    return sorted(pairs)


def disjoint(pairs: list[Pair]) -> list[list[Pair]]:
    """The pairs in phases of which none has a rank twice."""
    phases: list[list[Pair]] = []
    busy: list[set[int]] = []
    for pair in pairs:
        phase = next((k for k, ranks in enumerate(busy) if ranks.isdisjoint(pair)), len(phases))
        if phase == len(phases):
            phases.append([])
            busy.append(set())
        phases[phase].append(pair)
        busy[phase].update(pair)
    return phases


def judge_links(context: Context, answers: list[dict[str, Any]]) -> list[Finding]:
    hosts = [answer["host"] for answer in answers]
    pairs = {(rank, peer): times for rank, answer in enumerate(answers) for peer, times in answer["pairs"]}
    findings = slow_pairs(pairs, hosts, context.profile)
    for axis in answers[0]["axes"]:
        times = [max(answer["axes"][axis][k] for answer in answers) for k in (0, 1)]
        findings.append(_against_profile(context, axis, times, hosts))
    return findings or [Finding(OK, "no other rank")]


def slow_pairs(pairs: dict[Pair, Times], hosts: list[str], profile: Profile) -> list[Finding]:
    """A finding for each rank all of whose links are slow, and for each other slow link.

    Slow: over SLOW times the median of the others, and beyond it by more than SLOW latencies of the profile.
    """
    slow: dict[Pair, str] = {}
    for inside in (True, False):
        alike = {pair: times for pair, times in pairs.items() if (hosts[pair[0]] == hosts[pair[1]]) == inside}
        for pair, times in alike.items() if len(alike) > 1 else ():
            for k, what in ((1, "4 MiB"), (0, "4 bytes")):
                middle = statistics.median_low(other[k] for key, other in alike.items() if key != pair)
                if times[k] > SLOW * middle and times[k] - middle > SLOW * profile.latency_ns * 1e-9:
                    slow[pair] = f"{what} take {times[k] * 1e3:.2f} ms, between others {middle * 1e3:.2f} ms"
    own = {rank: [pair for pair in pairs if rank in pair] for rank in range(len(hosts))}
    ranks = [rank for rank, found in own.items() if len(found) > 1 and slow.keys() >= set(found)]
    findings = [
        Finding(FAIL, f"rank {rank} on host {hosts[rank]} is slow to all its neighbours: {slow[own[rank][0]]}", (rank,))
        for rank in ranks
    ]
    findings += [
        Finding(FAIL, f"the link of {ranks_text(pair)} is slow: {text}", pair)
        for pair, text in slow.items()
        if not set(pair) & set(ranks)
    ]
    return findings


def _against_profile(context: Context, axis: str, times: Times, hosts: list[str]) -> Finding:
    """The slowest rank's collective against the profile: its latency, and bytes/s inside a host or between hosts."""
    profile, n, m = context.profile, context.grid.head_groups, context.grid.slices
    size = {"slice": m, "head": n, "grid": n * m}[axis]
    group = {"slice": range(m), "head": range(0, n * m, m), "grid": range(n * m)}[axis]
    rate = profile.link if len({hosts[rank] for rank in group}) == 1 else profile.network
    sent = 4 * LARGE * (size - 1) / size * (1 if axis == "slice" else 2)
    measured = sent / max(times[1] - times[0], 1e-9)
    text = (
        f"{axis}: {times[0] * 1e3:.2f} ms and {measured / 1e9:.2f} GB/s, by profile {profile.name} "
        f"{profile.latency_ns * 1e-6:.2f} ms and {rate / 1e9:.2f} GB/s"
    )
    if times[0] > SLOW * profile.latency_ns * 1e-9 or measured * SLOW < rate:
        return Finding(WARN, f"{text}: plans predict too little; measure a profile of your own")
    return Finding(OK, text)


def _collective(context: Context, axis: str, group: dist.ProcessGroup, elements: int) -> float:
    size = dist.get_world_size(group)
    x = torch.zeros(-(-elements // size) * size, device=context.device)
    y = torch.empty_like(x)

    def work() -> None:
        if axis == "slice":
            dist.all_to_all_single(y, x, group=group)
        else:
            dist.all_reduce(x, group=group)

    def together() -> None:
        dist.all_reduce(torch.zeros(1, device=context.device), group=group)

    return _median_seconds(context, work, REPEATS[elements], together)


def _ping_pong(context: Context, peer: int, elements: int) -> float:
    """Seconds of one way."""
    message = torch.zeros(elements, device=context.device)
    first = context.rank < peer
    return _median_seconds(context, lambda: context.inputs.ping(peer, message, first), REPEATS[elements]) / 2


def _median_seconds(
    context: Context, work: Callable[[], None], repeats: int, before: Callable[[], None] = lambda: None
) -> float:
    def synchronize() -> None:
        if context.device.type == "cuda":
            torch.cuda.synchronize(context.device)

    times = []
    for _ in range(repeats + 1):  # the first makes connections
        before()
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
