"""`python -m two_level_mha check`: nothing is found on four sound ranks, and each planted fault is, with its rank.

Judges, which only look at answers, are tried without ranks. Everything else runs as processes of their own, since a
check makes process groups, stops, and ends processes; harness/check_rank.py plants several faults in one start.
"""

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness.programs import environment

import two_level_mha as tlm
from two_level_mha.check import Context
from two_level_mha.check.context import FAIL, OK, Sizes, difference, odd_ranks, ranks_text
from two_level_mha.check.layers import EXACT, judge_layers
from two_level_mha.check.links import disjoint, neighbours, slow_pairs
from two_level_mha.check.ranks import judge_order
from two_level_mha.facts import facts_of_rank, may_differ
from two_level_mha_cli import main

pytestmark = pytest.mark.cpu_only("its programs run on Gloo")

PROGRAM = Path(__file__).resolve().parents[1] / "harness" / "check_rank.py"
PLANTED = (
    *("slow rank", "slow link", "other builds", "hosts in turn", "wrong weight", "wrong arithmetic"),
    *("clock and memory", "never comes", "stops"),
)
CPU = tlm.Profile.named("cpu")
LAYER = Sizes(num_heads=8, num_kv_heads=8, head_dim=16)


def on_loopback(**more: str) -> dict[str, str]:
    fixed = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    return environment(**fixed | more)


def start(rank: int, port: int, command: list[str], **more: str) -> subprocess.Popen:
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "4"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *command], env=on_loopback(**place, **more), **pipes)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def end(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()


def context(grid: tuple[int, int], sizes: Sizes = LAYER) -> Context:
    ranks = grid[0] * grid[1]
    place = {"rank": 0, "world_size": ranks, "local_rank": 0, "device": torch.device("cpu")}
    return Context(grid=tlm.Grid(*grid), sizes=sizes, profile=CPU, timeout=1.0, connect=lambda: None, **place)


def test_sound_ranks():
    """Localises: any check that finds what is not there, or fails to run under torchrun."""
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "4", "-m", "two_level_mha", "check", "--json"]
    done = subprocess.run(
        [sys.executable, *command, "--device-type", "cpu"],
        env=on_loopback(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = json.loads(done.stdout)
    failed = {finding["check"] for finding in found["findings"] if finding["status"] == FAIL}
    assert failed <= {"links"}, done.stdout + done.stderr  # which are slow where other programs hold the CPU
    assert found["ok"] == (done.returncode == 0) == (not failed), done.stdout + done.stderr
    assert found["ranks"] == 4 and found["grid"] == [2, 2] and found["device_type"] == "cpu"
    checks = list(dict.fromkeys(finding["check"] for finding in found["findings"]))
    assert checks == ["ranks", "builds", "groups", "clocks", "memory", "order", "links", "layers"]
    assert {f["check"] for f in found["findings"] if f["status"] != OK} <= {"links"}  # slower than the profile


def test_environment_of_a_rank():
    """Settings of real processes. Localises: facts of the CPU and of variables, exit codes, who prints."""
    port, command = free_port(), ["-m", "two_level_mha", "check", "--device-type", "cpu"]
    own = [{}, {"TLM_DEBUG": "1"}, {"ATEN_CPU_CAPABILITY": "default"}, {"OMP_NUM_THREADS": "2"}]
    processes = [start(rank, port, command, **more) for rank, more in enumerate(own)]
    try:
        texts = [process.communicate(timeout=120) for process in processes]
    finally:
        end(processes)
    assert [process.returncode for process in processes] == [1, 1, 1, 1], texts
    assert [out for out, _ in texts[1:]] == ["", "", ""]
    report = texts[0][0]
    assert "FAIL  builds  TLM_DEBUG: 1 on rank 1, not set on the others" in report
    assert "FAIL  builds  CPU capability: DEFAULT on rank 2, " in report
    assert "WARN  builds  OMP_NUM_THREADS: 2 on rank 3, 1 on the others" in report
    assert "\nfailed: builds" in report


@pytest.mark.parametrize(
    ("ranks", "arguments", "message"),
    (
        (
            None,
            "--grid 2x3",
            "--grid 2x3 needs 6 ranks, but there are 1: take 1x1; start that many: torchrun --nproc-per-node 6 -m "
            "two_level_mha check",
        ),
        (4, "--grid 2x3", "--grid 2x3 needs 6 ranks, but there are 4: take 4x1, 2x2, 1x4"),
        (4, "--grid 4", "a grid is written as head groups x slices, such as 2x4, got '4'"),
        (4, "--heads 4", "--heads, --head-dim and, if they differ, --kv-heads go together: give them, or none of them"),
        (
            4,
            "--heads 6 --head-dim 9 --grid 4x1",
            "grid (4, 1) does not fit num_heads=6, num_kv_heads=6, head_dim=9: head_groups=4 must divide "
            "num_kv_heads=6; valid grids for 4 ranks: (2, 2), (1, 4); for 3: (3, 1), (1, 3); for 6: (6, 1), (3, 2), "
            "(2, 3), (1, 6)",
        ),
        (4, "--timeout 0", "--timeout must be a number of seconds greater than 0, got 0"),
        (4, "--profile tpu", "profile must be one of h100, cpu, or a JSON file, got 'tpu'"),
    ),
)
def test_arguments_that_do_not_fit(monkeypatch, capsys, ranks, arguments, message):
    """Localises: context_of. One sentence and code 2, before anything is sent, so alike on every rank."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "3", "WORLD_SIZE": str(ranks), "MASTER_PORT": "1"}.items() if ranks else ():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["two_level_mha", "check", "--device-type", "cpu", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == message + "\n"


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> dict[str, list[dict]]:
    """Case -> what ranks 0, 1 and 2 found; rank 3 is stopped in the last one, and found what came before."""
    directory = tmp_path_factory.mktemp("planted")
    port, results = free_port(), [directory / f"rank{rank}.json" for rank in range(4)]
    processes = [start(rank, port, [str(PROGRAM), str(results[rank]), *PLANTED]) for rank in range(4)]
    try:
        texts = [process.communicate(timeout=150) for process in processes[:3]]
        assert [process.returncode for process in processes[:3]] == [0, 0, 0], texts
        assert processes[3].poll() is None  # stopped
    finally:
        end(processes)
    found = [json.loads(result.read_text()) for result in results]
    return {case: [one[case] for one in found if case in one] for case in PLANTED}


# case -> checks that fail, and by check, status and a part of the text: the ranks named
FOUND = {
    "slow rank": (["links"], {("links", "FAIL", "rank 2 on host"): [2]}),
    "slow link": (["links"], {("links", "FAIL", "the link of ranks 1, 3 is slow"): [1, 3]}),
    "other builds": (
        ["builds"],
        {
            ("builds", "FAIL", "torch: 2.99.0 on rank 1, "): [1],
            ("builds", "FAIL", "operator library: 0123456789abcdef on rank 2, "): [2],
            ("builds", "FAIL", "rates of cpu: 1 2 3 on rank 3, "): [3],
            ("builds", "WARN", "threads: 7 on rank 3, 1 on the others"): [3],
        },
    ),
    "hosts in turn": (
        ["order"],
        {
            ("order", "FAIL", "host even has ranks 0, 2, which do not follow each other"): [0, 2],
            ("order", "FAIL", "host odd has ranks 1, 3, which do not follow each other"): [1, 3],
        },
    ),
    "wrong weight": (
        ["layers"],
        {("layers", "FAIL", f"scheme {name}: rank 2 drew other weights"): [2] for name in EXACT},
    ),
    "wrong arithmetic": (
        ["layers"],
        {("layers", "FAIL", f"scheme {name}: rank 1 computes the unsplit layer to other bits"): [1] for name in EXACT},
    ),
    "clock and memory": (
        [],
        {
            ("clocks", "WARN", "rank 0 is +5.0 s off the others"): [0],
            ("memory", "WARN", "rank 3 has 1.0 GB free, the median is 8.0 GB"): [3],
        },
    ),
    "never comes": (["ranks"], {("ranks", "FAIL", "rank 3 did not answer within 3 s"): [3]}),
    "stops": (["links"], {("links", "FAIL", "rank 3 did not answer within 5 s"): [3]}),
}


@pytest.mark.parametrize("case", FOUND)
def test_planted_faults(planted, case):
    """Localises: the check that is to find this fault; all ranks find the same, so that they end with one code."""
    failed, expected = FOUND[case]
    answers = planted[case]
    assert len(answers) == (3 if case in ("never comes", "stops") else 4)
    assert all(answer == answers[0] for answer in answers)
    assert answers[0]["failed"] == failed, answers[0]
    found = [finding for finding in answers[0]["findings"] if finding[1] != OK]
    for (check, status, text), ranks in expected.items():
        assert [f[3] for f in found if f[:2] == [check, status] and f[2].startswith(text)] == [ranks], found
    named = {check for check, *_ in expected}
    assert {f[0] for f in found} <= named | {"links"}  # which may be slower than the profile
    assert answers[0]["left_out"] == {"never comes": ["builds"], "stops": ["layers"]}.get(case, [])


def test_the_odd_rank_is_named_by_majority():
    """Localises: odd_ranks, difference and ranks_text, which every comparison of ranks uses."""
    assert odd_ranks(["a", "a", "b"]) == (2,) and difference(["a", "a", "b"]) == "b on rank 2, a on the others"
    assert odd_ranks(["a", "b"]) == (0, 1) and difference(["a", "b"]) == "a on rank 0, b on rank 1"
    assert odd_ranks(["a", "b", "b", "a"]) == (0, 1, 2, 3) and odd_ranks(["a"] * 3) == ()
    assert ranks_text([3]) == "rank 3" and ranks_text([7, 4, 5, 6, 9, 10]) == "ranks 4 to 7, 9, 10"


def test_facts():
    """Localises: facts.py. What a job may differ in is a pattern of names; all else must be alike."""
    facts = facts_of_rank()
    assert facts == facts_of_rank() and all(isinstance(text, str) for text in facts.values())
    assert {"torch", "operator library", "library _C", "rates of cpu", "CPU capability", "threads"} <= facts.keys()
    assert len(facts["operator library"]) == 16 and facts["operator library"] != facts["library _C"]
    assert may_differ("NCCL_SOCKET_IFNAME") and may_differ("OMP_NUM_THREADS") and may_differ("TORCH_LOGS_OUT")
    assert not may_differ("TLM_DEBUG") and not may_differ("NCCL_ALGO") and not may_differ("TORCH_DISTRIBUTED_DEBUG")


def order(grid: tuple[int, int], hosts: str, local_ranks: str, **sizes: int):
    answers = [{"host": host, "local_rank": int(local)} for host, local in zip(hosts, local_ranks, strict=True)]
    return judge_order(context(grid, Sizes(**sizes) if sizes else LAYER), answers)


def test_order_of_ranks():
    """Localises: judge_order, for hosts that one machine cannot have."""
    (found,) = order((2, 4), "aaaabbbb", "01230123")
    assert found.status == OK and "2 hosts, slice groups inside a host" in found.text
    (found,) = order((2, 2), "aabb", "0001")
    assert found.status == "FAIL" and found.text.startswith("LOCAL_RANK of ranks 0, 1, on host a, is 0, 0: it must")
    (found,) = order((1, 8), "aaaabbbb", "01230123")
    assert found.status == "FAIL" and found.ranks == tuple(range(8))
    assert "slice group of ranks 0 to 7 crosses hosts" in found.text and "take the grid 2x4" in found.text
    (found,) = order((1, 8), "aaaabbbb", "01230123", num_heads=1, num_kv_heads=1, head_dim=8)  # it has to cross
    assert found.status == "WARN" and "no grid for this layer" in found.text
    (found,) = order((2, 2), "aaab", "0120")
    assert found.status == "FAIL" and found.ranks == (2, 3) and "take the grid 4x1" in found.text


def test_neighbours_are_timed_in_disjoint_phases():
    """Localises: neighbours and disjoint; a pair twice or a rank in two pairs at once would time itself waiting."""
    assert neighbours(1, 1) == [] and neighbours(1, 2) == [(0, 1)] and len(neighbours(2, 2)) == 6
    pairs = neighbours(3, 4)
    assert (0, 3) in pairs and (3, 4) in pairs and (0, 8) in pairs and (0, 5) not in pairs
    phases = disjoint(pairs)
    assert sorted(pair for phase in phases for pair in phase) == pairs
    assert all(len({rank for pair in phase for rank in pair}) == 2 * len(phase) for phase in phases)


def test_slow_links():
    """Localises: slow_pairs. Links between hosts are compared with their like, and noise is not slow."""
    fast, far = [1e-4, 4e-3], [3e-3, 1e-1]
    pairs = {(0, 1): fast, (1, 2): far, (2, 3): fast, (0, 3): far}
    assert slow_pairs(pairs, list("aabb"), CPU) == []
    assert {f.ranks for f in slow_pairs(pairs, list("aaaa"), CPU)} == {(1, 2), (0, 3)}
    assert slow_pairs({(0, 1): [1e-4, 4e-3], (2, 3): [9e-4, 4e-3]}, list("aabb"), CPU) == []  # under a few latencies
    (found,) = slow_pairs({(0, 1): fast, (0, 2): far, (1, 2): far}, list("aaa"), CPU)
    assert found.ranks == (2,) and "slow to all its neighbours: 4 bytes take 3.00 ms" in found.text


def layer_answers(**odd) -> list[dict]:
    """Four ranks that agree, but for rank 2."""
    sound = {"weights": True, "unsplit": "u", "output": 0.0, "gradients": 0.0, "bits": "b", "again": True}
    return [{name: (sound | odd if rank == 2 else sound) for name in EXACT} for rank in range(4)]


def test_wrong_numbers():
    """Localises: judge_layers. Each way in which one rank can be wrong is found in every scheme, NaN among them."""
    where = context((2, 2))
    assert [f.status for f in judge_layers(where, layer_answers(unsplit="v"))] == [OK]  # other bits, right numbers
    for odd, text in (
        ({"output": float("nan")}, "wrong by"),
        ({"gradients": 1e-9}, "wrong by 1e-09"),
        ({"bits": "c"}, "rank 2 has other bits in the output"),
        ({"again": False}, "a second run gave other bits on rank 2"),
        ({"weights": False}, "rank 2 drew other weights"),
    ):
        found = judge_layers(where, layer_answers(**odd))
        assert len(found) == len(EXACT) and all(f.ranks == (2,) and text in f.text for f in found), (odd, found)
