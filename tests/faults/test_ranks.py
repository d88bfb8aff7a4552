"""One rank of a job breaks: every other one ends within the limit, and says who, where and why. Level T.

A failure is in who hears of a fault (control.py, guard.py), in a group that the limit does not reach or that is not
closed (mesh.py), or in an exchange whose error nobody turns into a RankFailure (csrc/comm/progress.cpp). ranks.py is
the program that breaks a rank; its cases run in one process, one after the other.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from harness.pool import ENVIRONMENT

pytestmark = pytest.mark.cpu_only("its programs run on Gloo")

PROGRAM = Path(__file__).with_name("ranks.py")
ODD, LIMIT = 2, 5.0  # as in ranks.py
GONE = rf"rank {ODD} is gone"
MUTE = rf"rank {ODD} is without an answer for {LIMIT:g} s"
EXCHANGE = r"(all_reduce|all_gather|reduce_scatter|all_to_all) over the (grid|slice axis|head axis)"
LAYER = r"model\.layers\.\d+\.self_attn"
PLACE = rf"{EXCHANGE} of {LAYER}"

# case -> what the ranks that go on raise: class, and patterns in its text
EXPECTED = {
    "kill_forward": ("RankFailure", GONE, PLACE),
    "kill_backward": ("RankFailure", GONE, rf"backward {PLACE}"),
    "kill_between": ("RankFailure", GONE, PLACE),
    "kill_generate": ("RankFailure", GONE, PLACE),
    "kill_save": ("RankFailure", GONE, PLACE),
    "kill_in_save": ("RankFailure", GONE, PLACE),
    "kill_state_dict": ("RankFailure", GONE, PLACE),
    "kill_load": ("RankFailure", GONE, "comparing"),
    "stop_forward": ("RankFailure", MUTE, PLACE),
    "stop_backward": ("RankFailure", MUTE, rf"backward {PLACE}"),
    "skip_layer": ("RankFailure", rf"rank {ODD} is past .*of model\.layers\.0\.self_attn", PLACE),
    "swap_layers": ("GridError", rf"layer differs .*{LAYER} on rank {ODD}"),
    "raise_in_forward": ("RankFailure", rf"rank {ODD} raised KeyError: .the odd rank's batch", PLACE),
    "raise_and_live": ("RankFailure", rf"rank {ODD} raised KeyError: .the odd rank's batch", PLACE),
    "raise_and_go_on": ("GridError", rf"input 0 of the model differs .* on rank {ODD}"),
    "no_memory": ("RankFailure", rf"rank {ODD} raised RuntimeError: .*memory", PLACE),
    "no_memory_once": ("RankFailure", rf"rank {ODD} raised RuntimeError: .*memory", PLACE),
    "fail_in_backward": ("RankFailure", rf"rank {ODD} raised KeyError: .the odd rank's batch", rf"backward {PLACE}"),
    "other_tokens": ("GridError", rf"input 0 of the model differs .* on rank {ODD}"),
    "no_grad": ("RankFailure", rf"rank {ODD} is comparing its call 3 of {LAYER}.*grad mode False", PLACE),
    "autocast": ("RankFailure", rf"rank {ODD} is comparing its call 3 of {LAYER}.*bytes of an element", PLACE),
    "fewer_tokens": ("RankFailure", rf"rank {ODD} is past .*call 8 of the model", r"call 9 of the model"),
    "other_grid": ("GridError", rf"grid differs .* on rank {ODD}"),
}
REOPENED = ("no_memory_once", "fail_in_backward")  # by every rank, which leaves that step out
FAST = ("kill_forward", "kill_backward", "stop_forward", "swap_layers", "no_memory_once", "kill_save", "other_grid")


def run(ranks: int, cases: list[str], odd: int = ODD) -> dict[str, dict]:
    command = [sys.executable, str(PROGRAM), "--ranks", str(ranks), "--odd", str(odd), *cases]
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]
    return {found["case"]: found for found in map(json.loads, done.stdout.splitlines())}


def check(found: dict) -> None:
    name, odd = found["case"], found["odd"]
    assert found["fault"], found
    stopped = {odd} if name in ("stop_forward", "stop_backward", "raise_and_live", "fewer_tokens") else set()
    assert set(found["alive"]) <= stopped, found
    raised, *patterns = EXPECTED[name]
    for rank, result in enumerate(found["results"]):
        if rank != odd:
            assert result["status"] == 0 and result["raised"] == raised, (name, rank, result)
            assert result["seconds"] <= LIMIT + 5, (name, rank, result)
            for pattern in patterns:
                assert re.search(pattern, result["text"]), (name, rank, pattern, result["text"])
    if name in REOPENED:
        check_equal_losses(found, 4)


def check_equal_losses(found: dict, count: int) -> None:
    losses = [result["losses"] for result in found["results"]]
    assert not found["alive"] and len(losses[0]) == count and all(one == losses[0] for one in losses), found


def test_every_rank_ends():
    """Localises: the fault of the case that is named."""
    found = run(4, list(FAST))
    assert list(found) == list(FAST)
    for one in found.values():
        check(one)


ON_EIGHT = ("kill_forward", "kill_save", "kill_in_save", "stop_backward", "raise_and_live", "no_memory_once", "no_grad")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [4, 8])
def test_every_rank_ends_after_every_fault(ranks):
    """Localises: the same for the other faults, and one of each kind on 8 ranks; `make soak` has all of them there.

    A short stop is survived.
    """
    cases = list(ON_EIGHT) if ranks == 8 else [name for name in EXPECTED if name not in FAST]
    found = run(ranks, [*cases, "pause"])
    check_equal_losses(found.pop("pause"), 5)
    assert list(found) == cases
    for one in found.values():
        check(one)


@pytest.mark.slow
def test_every_rank_ends_without_the_store():
    """Localises: rank 0, which keeps the store here, is gone or stands still: questions to it that never end."""
    for name, found in run(4, ["kill_forward", "stop_forward", "kill_save"], odd=0).items():
        assert set(found["alive"]) <= ({0} if name == "stop_forward" else set()), found
        for result in found["results"][1:]:
            assert result["raised"] == "RankFailure" and result["seconds"] <= LIMIT + 5, (name, result)
            assert "store does not answer, so rank 0, or the launcher that keeps it, is gone" in result["text"], result
            assert re.search(rf"rank \d was (in|past) .*{LAYER}|in save or load", result["text"]), result


if __name__ == "__main__":  # of make soak
    for one in run(8, list(EXPECTED)).values():
        check(one)
        print(f"{one['case']}: every rank ended and said why")
