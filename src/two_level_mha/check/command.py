"""The command line of the checks: who this rank is, which grid and layer are tried, what is printed."""

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict
from datetime import timedelta

import torch
import torch.distributed as dist

from two_level_mha.check.context import WARN, Context, Finding, Sizes
from two_level_mha.check.run import Outcome, run_checks
from two_level_mha.errors import GridError
from two_level_mha.mesh import Grid
from two_level_mha.profile import DEVICE_TYPES, Profile, resolve_profile

TIMEOUT = 60.0  # seconds
HOW = "torchrun --nproc-per-node 4 -m two_level_mha check"


def add_check(parser: argparse.ArgumentParser) -> None:
    parser.description = f"Under torchrun, on the ranks of a job to come: {HOW}. Exit code 1 if a check fails."
    parser.add_argument("--grid", metavar="NxM", help="head groups x slices, such as 2x4")
    parser.add_argument("--num-heads", "--heads", dest="heads", type=int, help="query heads of the layer that is tried")
    parser.add_argument(
        "--num-kv-heads",
        "--kv-heads",
        dest="kv_heads",
        type=int,
        help="key/value heads (default: as many as query heads)",
    )
    parser.add_argument("--head-dim", type=int)
    parser.add_argument("--device-type", choices=DEVICE_TYPES, help="default: cuda where torch finds a GPU")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, metavar="SECONDS", help="of each check")
    parser.add_argument("--profile", metavar="NAME|FILE", help="the hardware to compare links with")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=check)


def check(args: argparse.Namespace) -> None:
    """Runs all checks; ends the process with 0, with 1 if one failed, with 2 for arguments that do not fit."""
    start = time.monotonic()
    try:
        context = context_of(args)
    except GridError as error:
        if not _said_by_rank_0():
            print(error, file=sys.stderr)
        _end(2)
    speaks = context.rank == 0
    if speaks and not args.json:
        print(_title(context), flush=True)

    def report(name: str, findings: list[Finding]) -> None:
        if speaks and not args.json:
            print_findings(name, findings)
        elif not speaks and any(finding.ranks == (0,) for finding in findings) and name == "ranks":
            print(findings[0].text, file=sys.stderr)  # rank 0 cannot say that it is missing

    outcome = run_checks(context, report)
    if speaks:
        seconds = time.monotonic() - start
        print(_as_json(context, outcome, seconds) if args.json else _last_sentence(context, outcome, seconds))
    _end(1 if outcome.failed else 0, blocked=outcome.broken)


def _end(code: int, blocked: bool = False) -> None:
    """blocked: a thread may still wait for a rank. Under torchrun all ranks fail at once, before it ends the later."""
    sys.stdout.flush()
    sys.stderr.flush()
    if blocked or (code and _under_torchrun()):
        os._exit(code)
    sys.exit(code)


def _under_torchrun() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def context_of(args: argparse.Namespace) -> Context:
    """This rank as torchrun, or whoever sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, started it."""
    alone = "RANK" not in os.environ
    rank, ranks = (0, 1) if alone else (_number("RANK"), _number("WORLD_SIZE"))
    local_rank = _number("LOCAL_RANK") if "LOCAL_RANK" in os.environ else rank
    if not args.timeout > 0:
        raise GridError(f"--timeout must be a number of seconds greater than 0, got {args.timeout:g}")
    device_type = args.device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    profile = resolve_profile(args.profile, device_type)
    grid, sizes = grid_and_sizes(args, ranks, alone, profile)
    return Context(
        rank=rank,
        world_size=ranks,
        local_rank=local_rank,
        grid=grid,
        sizes=sizes,
        device=torch.device("cpu") if device_type == "cpu" else torch.device("cuda", local_rank),
        profile=profile,
        timeout=args.timeout,
        connect=dist.HashStore if alone else Store(rank, args.timeout).connect,
    )


class Store:
    """The job's store at MASTER_ADDR:MASTER_PORT, which torchrun's agent is host to, or else rank 0."""

    def __init__(self, rank: int, timeout: float) -> None:
        self.address = (os.environ.get("MASTER_ADDR", "localhost"), _number("MASTER_PORT"))
        self.host = rank == 0 and not _under_torchrun()
        self.timeout = timedelta(seconds=timeout)

    def connect(self) -> dist.Store:
        """A client of its own; waits for no other rank, unlike a rendezvous, which does not say who is missing."""
        host, self.host = self.host, False
        store = dist.TCPStore(*self.address, is_master=host, wait_for_workers=False, timeout=self.timeout)
        return dist.PrefixStore("two_level_mha.check", store)


def _said_by_rank_0() -> bool:
    """Whether rank 0 refuses the arguments too; for torchrun, which would end ranks by a signal once one has exited."""
    if not _under_torchrun():
        return False
    rank, ranks, timeout = _number("RANK"), _number("WORLD_SIZE"), timedelta(seconds=TIMEOUT)
    store = Store(rank, TIMEOUT).connect()
    store.set(f"refused/{rank}", "")
    try:
        store.wait([f"refused/{one}" for one in range(ranks)], timeout)
    except dist.DistError:
        pass  # the others were given other arguments
    return rank > 0 and store.check(["refused/0"])


def grid_and_sizes(args: argparse.Namespace, ranks: int, alone: bool, profile: Profile) -> tuple[Grid, Sizes]:
    """The grid of --grid, or the best one for the layer; the layer given, or a small one that fits the grid."""
    if (args.heads is None) != (args.head_dim is None) or (args.kv_heads is not None and args.heads is None):
        raise GridError("--heads, --head-dim and, if they differ, --kv-heads go together: give them, or none of them")
    given = None
    if args.heads is not None:
        given = Sizes(args.heads, args.heads if args.kv_heads is None else args.kv_heads, args.head_dim)
    if args.grid is not None:
        grid = Grid.parse(args.grid)
        if grid.size != ranks:
            pairs = ", ".join(f"{d}x{ranks // d}" for d in range(ranks, 0, -1) if ranks % d == 0)
            start = f"; start that many: {HOW.replace('4', str(grid.size), 1)}" if alone else ""
            raise GridError(f"--grid {args.grid} needs {grid.size} ranks, but there are {ranks}: take {pairs}{start}")
    elif given is not None:
        sizes = (given.num_heads, given.num_kv_heads, given.head_dim)
        candidates = Grid.candidates(ranks, *sizes, profile=profile)
        grid = candidates[0] if candidates else Grid(ranks, 1)  # the second one says below what does fit
    else:
        grid = _square(ranks, int(os.environ.get("LOCAL_WORLD_SIZE", ranks)))
    if given is None:
        n, m = grid.head_groups, grid.slices
        # as many key/value heads as ranks: any other grid of them would fit this layer too
        given = Sizes(num_heads=2 * n * m, num_kv_heads=n * m, head_dim=m * max(1, 16 // m))
    grid.check(given.num_heads, given.num_kv_heads, given.head_dim)
    return grid, given


def _square(ranks: int, ranks_of_host: int) -> Grid:
    """The grid closest to a square whose slice groups are inside a host, so that every axis has more than one rank."""
    together = math.gcd(ranks, ranks_of_host)
    slices = [m for m in range(1, together + 1) if together % m == 0]
    m = min(slices, key=lambda m: abs(math.log(m * m / ranks)) - 1e-9 * m)
    return Grid(ranks // m, m)


def _number(variable: str) -> int:
    text = os.environ.get(variable, "")
    if not text.isdigit():
        raise GridError(f"{variable} must be a number in an environment with RANK, got {text!r}: start by torchrun")
    return int(text)


def print_findings(name: str, findings: list[Finding]) -> None:
    for finding in findings:
        print(f"  {finding.status:4}  {name:6}  {finding.text}", flush=True)


def _title(context: Context) -> str:
    grid, sizes = context.grid, context.sizes
    layer = f"{sizes.num_heads} query and {sizes.num_kv_heads} key/value heads of {sizes.head_dim}"
    ranks = "1 rank" if context.world_size == 1 else f"{context.world_size} ranks"
    return f"{ranks} on {context.device.type}, grid {grid.head_groups}x{grid.slices}, {layer}"


def _last_sentence(context: Context, outcome: Outcome, seconds: float) -> str:
    warned = sum(finding.status == WARN for found in outcome.findings.values() for finding in found)
    warnings = f", {warned} warning{'s' if warned > 1 else ''}" if warned else ""
    if outcome.failed:
        rest = f"; not run: {', '.join(outcome.left_out)}" if outcome.left_out else ""
        return f"failed: {', '.join(outcome.failed)}{warnings}, in {seconds:.1f} s{rest}"
    how = f"; one process alone: for more, {HOW}" if context.world_size == 1 else ""
    return f"nothing failed{warnings}, in {seconds:.1f} s{how}"


def _as_json(context: Context, outcome: Outcome, seconds: float) -> str:
    found = [{"check": name, **asdict(finding)} for name, many in outcome.findings.items() for finding in many]
    grid = [context.grid.head_groups, context.grid.slices]
    head = {"ok": not outcome.failed, "ranks": context.world_size, "grid": grid, "device_type": context.device.type}
    head |= {"profile": context.profile.name, "seconds": round(seconds, 1)}
    return json.dumps(head | {"findings": found}, indent=1)
