"""What checks are made of: the context of a rank, what it looks at, and findings."""

import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from two_level_mha.decoder import TwoLevelAttention
from two_level_mha.facts import facts_of_rank
from two_level_mha.mesh import Grid
from two_level_mha.profile import Profile

OK, WARN, FAIL = "ok", "WARN", "FAIL"
EMBED_DIM = 64


@dataclass(frozen=True)
class Finding:
    """One line of the report. ranks: those that it names."""

    status: str
    text: str
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sizes:
    """The layer that is tried."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


def host_of_rank() -> str:
    """The machine that this process is on: its name, and its boot, since images of a cluster may share a name."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return socket.gethostname() + (f" ({boot.read_text()[:8]})" if boot.exists() else "")


def free_memory(device: torch.device) -> int | None:
    """Free bytes of a GPU, or of the host; None: the host does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return 1024 * int(lines["MemAvailable"].split()[0])


def ping(peer: int, message: torch.Tensor, first: bool) -> None:
    """Sends `message` to rank `peer` and takes one of that size from it, in this order if `first`."""
    for step in (dist.send, dist.recv) if first else (dist.recv, dist.send):
        step(message, peer)


def make_layer(mesh: DeviceMesh | None, sizes: Sizes, **options: Any) -> TwoLevelAttention:
    """The layer that is tried, drawn from torch's generator."""
    layer = (EMBED_DIM, sizes.num_heads, sizes.num_kv_heads, sizes.head_dim)
    return TwoLevelAttention(*layer, bias=True, mesh=mesh, **options)


@dataclass(frozen=True)
class Inputs:
    """What a rank is looked at through."""

    facts: Callable[[str], dict[str, str]] = facts_of_rank
    host: Callable[[], str] = host_of_rank
    clock: Callable[[], float] = time.time  # seconds
    memory: Callable[[torch.device], int | None] = free_memory
    ping: Callable[[int, torch.Tensor, bool], None] = ping
    layer: Callable[..., TwoLevelAttention] = make_layer


@dataclass
class Context:
    """One rank of a run. connect: makes a client of the job's store, which checks and process groups do not share."""

    rank: int
    world_size: int
    local_rank: int
    grid: Grid
    sizes: Sizes
    device: torch.device
    profile: Profile
    timeout: float  # seconds, of each check
    connect: Callable[[], dist.Store]
    inputs: Inputs = field(default_factory=Inputs)
    mesh: DeviceMesh | None = None  # made by the check of groups


def ranks_text(ranks: Sequence[int]) -> str:
    """rank 3; ranks 0, 2; ranks 4 to 7, 9."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts = [f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(parts)}"


def odd_ranks(values: Sequence[Any]) -> tuple[int, ...]:
    """The ranks whose value is not that of more than half of them; all ranks where there is no such value."""
    value, count = Counter(values).most_common(1)[0]
    found = range(len(values))
    return tuple(rank for rank in found if values[rank] != value or 2 * count <= len(values))


def difference(values: Sequence[str]) -> str:
    """Who has which value, the odd ranks first."""
    holders: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        holders.setdefault(value, []).append(rank)
    groups = sorted(holders.items(), key=lambda item: len(item[1]))
    texts = [f"{value} on {ranks_text(ranks)}" for value, ranks in groups]
    if 2 * len(groups[-1][1]) > len(values):
        texts[-1] = f"{groups[-1][0]} on the others"
    return ", ".join(texts)
