"""Runs checks on every rank and gathers the answers over the store.

every rank    probe, in a thread that is waited for `timeout` seconds at most -> answer
rank 0        takes the answers that come, and gives all of them to everyone
every rank    judge(all answers) -> the same findings
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
import torch.distributed as dist

from two_level_mha.check import groups, layers, links, ranks
from two_level_mha.check.context import FAIL, Context, Finding, ranks_text

GRACE = 1.0  # seconds that ranks may differ in


class Check(NamedTuple):
    """probe(context) -> what JSON can hold; judge(context, answers by rank) -> findings, without sending anything."""

    name: str
    probe: Callable[[Context], Any]
    judge: Callable[[Context, list[Any]], list[Finding]]


CHECKS = (
    Check("ranks", ranks.arrive, ranks.judge_arrival),
    Check("builds", ranks.facts, ranks.judge_facts),
    Check("groups", groups.make_groups, groups.judge_groups),
    Check("clocks", ranks.clock, ranks.judge_clock),
    Check("memory", ranks.memory, ranks.judge_memory),
    Check("order", ranks.place, ranks.judge_order),
    Check("links", links.links, links.judge_links),
    Check("layers", layers.layers, layers.judge_layers),
)

Report: TypeAlias = Callable[[str, list[Finding]], None]


Done = TypeVar("Done")


class NoAnswer(Exception):
    """Rank 0 does not answer, so that nobody can say who else does."""


@dataclass
class Outcome:
    """Findings by check, in order. broken: a rank did not answer or raised, so that later checks were left out."""

    findings: dict[str, list[Finding]]
    broken: bool = False
    left_out: tuple[str, ...] = ()

    @property
    def failed(self) -> list[str]:
        """The checks that failed."""
        return [name for name, found in self.findings.items() if any(finding.status == FAIL for finding in found)]


def run_checks(context: Context, report: Report, checks: tuple[Check, ...] = CHECKS) -> Outcome:
    """Runs `checks` in order, as every other rank does, and tells each one's findings as they are known.

    Leaves no process group behind, unless the outcome is broken: then end the process with os._exit, because a thread
    of it may wait for another rank.
    """
    outcome = Outcome({})
    answering = list(range(context.world_size))
    try:
        store = within(context.timeout + GRACE, context.connect)
        for check in checks:
            answers = _ask(context, store, check)
            answering = [rank for rank, answer in enumerate(answers) if answer is not None]
            found = _unanswered(context, answers)
            outcome.broken = bool(found)
            if not found:
                found = check.judge(context, [answer["value"] for answer in answers if answer is not None])
            outcome.findings[check.name] = found
            report(check.name, found)
            if outcome.broken:
                break
        _leave_together(context, store, answering)
    except (NoAnswer, TimeoutError, dist.DistError) as error:
        text = (
            f"rank {context.rank} has no answer from rank 0 within {context.timeout:g} s: it is stopped, or has not "
            f"started, or MASTER_ADDR={os.environ.get('MASTER_ADDR')} and MASTER_PORT={os.environ.get('MASTER_PORT')} "
            f"do not lead to it ({first_line(error)})"
        )
        outcome.broken = True
        outcome.findings["ranks"] = [Finding(FAIL, text, (0,))]
        report("ranks", outcome.findings["ranks"])
    outcome.left_out = tuple(check.name for check in checks if check.name not in outcome.findings)
    if not outcome.broken and dist.is_initialized():
        dist.destroy_process_group()
    return outcome


def within(seconds: float, work: Callable[[], Done]) -> Done:
    """work(), or TimeoutError if it takes longer: its thread then goes on, since nothing can end a blocked call."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append((work(), None))
        except Exception as error:
            result.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not result:
        raise TimeoutError(f"not done after {seconds:g} s")
    done: Done
    done, error = result[0]
    if error is not None:
        raise error
    return done


def _ask(context: Context, store: dist.Store, check: Check) -> list[dict[str, Any] | None]:
    """Every rank's answer to a check, None from one that gave none: {"value"}, or {"error", "after": seconds}."""
    start = time.monotonic()

    def probe() -> Any:
        if context.device.type == "cuda" and check.probe is not ranks.arrive:
            torch.cuda.set_device(context.device)  # a thread has its own
        return check.probe(context)

    try:
        answer = {"value": within(context.timeout, probe)}
    except Exception as error:
        answer = {"error": first_line(error), "after": time.monotonic() - start}
    left = start + context.timeout - time.monotonic()
    return gather(context, store, check.name, answer, left + GRACE, range(context.world_size))


def gather(context: Context, store: dist.Store, name: str, answer: Any, seconds: float, of: Iterable[int]) -> list[Any]:
    """The answers of ranks `of` that reach rank 0 within so many seconds, by rank, None for the others."""

    def exchange() -> list[Any]:
        store.set(f"{name}/{context.rank}", json.dumps(answer))
        if context.rank > 0:
            store.wait([name], timedelta(seconds=seconds + GRACE))
            told: list[Any] = json.loads(store.get(name))
            return told
        keys = [f"{name}/{rank}" for rank in range(context.world_size)]
        try:
            store.wait([keys[rank] for rank in of], timedelta(seconds=seconds))
        except dist.DistError:
            pass  # those that are there count
        found = [json.loads(store.get(key)) if store.check([key]) else None for key in keys]
        store.set(name, json.dumps(found))
        return found

    try:
        return within(seconds + 2 * GRACE, exchange)
    except (TimeoutError, dist.DistError) as error:
        raise NoAnswer(first_line(error)) from error


def _unanswered(context: Context, answers: list[dict[str, Any] | None]) -> list[Finding]:
    """Who did not answer; or else who raised, the first one first: the others' errors may come of it."""
    missing = tuple(rank for rank, answer in enumerate(answers) if answer is None)
    if missing:
        text = f"{ranks_text(missing)} did not answer within {context.timeout:g} s: stopped, or ended, or never started"
        return [Finding(FAIL, text, missing)]
    errors: dict[str, list[int]] = {}
    given = [(answer.get("after", 0.0), rank, answer) for rank, answer in enumerate(answers) if answer is not None]
    for _, rank, answer in sorted(given, key=lambda one: one[0]):
        if "error" in answer:
            errors.setdefault(answer["error"], []).append(rank)
    return [Finding(FAIL, f"{ranks_text(found)}: {text}", tuple(found)) for text, found in errors.items()]


def _leave_together(context: Context, store: dist.Store, answering: list[int]) -> None:
    """Nobody goes before rank 0 has reported: torchrun ends all ranks after the first that fails. Rank 0, which may be
    host to the store, goes last.
    """
    gather(context, store, "end", True, GRACE, answering)
    store.set(f"left/{context.rank}", "")
    if context.rank == 0:
        try:
            store.wait([f"left/{rank}" for rank in answering], timedelta(seconds=GRACE))
        except dist.DistError:
            pass  # it has the report, and ends by itself


def first_line(error: BaseException) -> str:
    return f"{error}".split("\n")[0][:300] or type(error).__name__
