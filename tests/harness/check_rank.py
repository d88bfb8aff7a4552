"""One rank, as a program, that runs `python -m two_level_mha check` several times with planted faults.

    python check_rank.py RESULT CASE..     under RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT

Writes what each case found to RESULT, as JSON. A case plants its fault by what the check looks through (Inputs).
"""

import argparse
import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from two_level_mha.blocks import local_blocks
from two_level_mha.check import CHECKS, Context, Inputs, add_check, run_checks
from two_level_mha.check.command import Store, context_of

SEEN = Inputs()


def slow_rank(context: Context) -> Inputs:
    def ping(peer: int, message: torch.Tensor, first: bool) -> None:
        if context.rank == 2:
            time.sleep(0.02)
        SEEN.ping(peer, message, first)

    return dataclasses.replace(SEEN, ping=ping)


def slow_link(context: Context) -> Inputs:
    def ping(peer: int, message: torch.Tensor, first: bool) -> None:
        if (context.rank, peer) == (1, 3):
            time.sleep(0.02)
        SEEN.ping(peer, message, first)

    return dataclasses.replace(SEEN, ping=ping)


def other_builds(context: Context) -> Inputs:
    changes = {
        1: {"torch": "2.99.0"},
        2: {"operator library": "0123456789abcdef"},
        3: {"rates of cpu": "1 2 3", "threads": "7"},
    }
    return dataclasses.replace(SEEN, facts=lambda kind: SEEN.facts(kind) | changes.get(context.rank, {}))


def hosts_in_turn(context: Context) -> Inputs:
    return dataclasses.replace(SEEN, host=lambda: "even" if context.rank % 2 == 0 else "odd")


def wrong_weight(context: Context) -> Inputs:
    def layer(mesh, sizes, **options):
        made = SEEN.layer(mesh, sizes, **options)
        if mesh is not None and context.rank == 2:
            with torch.no_grad():
                local_blocks([made.out_weight])[0][0, 0, 0] += 1e-3
        return made

    return dataclasses.replace(SEEN, layer=layer)


def wrong_arithmetic(context: Context) -> Inputs:
    """A rank that multiplies wrongly does so for the unsplit layer as well."""

    def layer(mesh, sizes, **options):
        made = SEEN.layer(mesh, sizes, **options)
        if context.rank == 1:
            made.register_forward_hook(lambda module, args, y: y * (1 + 1e-6))
        return made

    return dataclasses.replace(SEEN, layer=layer)


def clock_and_memory(context: Context) -> Inputs:
    ahead, free = (5.0 if context.rank == 0 else 0.0), (1 if context.rank == 3 else 8) * 10**9
    return dataclasses.replace(SEEN, clock=lambda: SEEN.clock() + ahead, memory=lambda device: free)


def stops(context: Context) -> Inputs:
    def ping(peer: int, message: torch.Tensor, first: bool) -> None:
        if context.rank == 3:
            os.kill(os.getpid(), signal.SIGSTOP)
        SEEN.ping(peer, message, first)

    return dataclasses.replace(SEEN, ping=ping)


# case -> inputs, which checks run, seconds for each
CASES = {
    "slow rank": (slow_rank, "ranks groups links", 60.0),
    "slow link": (slow_link, "ranks groups links", 60.0),
    "other builds": (other_builds, "ranks builds", 60.0),
    "hosts in turn": (hosts_in_turn, "ranks order", 60.0),
    "wrong weight": (wrong_weight, "ranks groups layers", 60.0),
    "wrong arithmetic": (wrong_arithmetic, "ranks groups layers", 60.0),
    "clock and memory": (clock_and_memory, "ranks groups clocks memory", 60.0),
    "never comes": (lambda context: SEEN, "ranks builds", 3.0),
    "stops": (stops, "ranks groups links layers", 5.0),
}


def main() -> None:
    result, *cases = sys.argv[1:]
    parser = argparse.ArgumentParser()
    add_check(parser)
    context = context_of(parser.parse_args(["--grid", "2x2", "--device-type", "cpu"]))
    store = Store(context.rank, 60.0)
    host = store.connect()  # rank 0 is host to the store as long as this client lives
    found = {}
    for case in cases:
        inputs, names, timeout = CASES[case]
        if case == "never comes" and context.rank == 3:
            continue
        own = dataclasses.replace(
            context,
            inputs=inputs(context),
            timeout=timeout,
            connect=lambda case=case: dist.PrefixStore(case, store.connect()),
        )
        outcome = run_checks(own, lambda *_: None, tuple(check for check in CHECKS if check.name in names.split()))
        findings = [
            [name, finding.status, finding.text, list(finding.ranks)]
            for name, many in outcome.findings.items()
            for finding in many
        ]
        found[case] = {"failed": outcome.failed, "left_out": list(outcome.left_out), "findings": findings}
        Path(result).write_text(json.dumps(found))
    host.set(f"done/{context.rank}", "")
    if context.rank == 0:
        host.wait([f"done/{rank}" for rank in range(3)])
    os._exit(0)  # a thread may still wait for rank 3


if __name__ == "__main__":
    main()
