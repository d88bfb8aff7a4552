"""Two nodes joined by a shaped link, benchmarks/nodes.py, and what benchmarks/links.py says of the bytes over it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import link_ranks
import links
import nodes
import pytest

ROOT = Path(__file__).resolve().parents[2]
KIB = 1024


@pytest.fixture
def shaped_links():
    """Skips where there can be none; afterwards this process has left no namespace."""
    if reason := nodes.missing():
        pytest.skip(reason)
    yield
    assert not namespaces(os.getpid())


def namespaces(pid: int) -> set[str]:
    """Those that a process has made."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {text.split()[0] for text in listed.splitlines() if text.startswith(f"tlm{pid}x")}


def over_link(kind: str, sent: float, groups: list[list[int]], node_of: list[int]) -> set[float]:
    """What nodes send to others where every rank of the groups sends so many bytes."""
    found = dict.fromkeys(node_of, 0.0)
    for group in groups:
        for rank in group:
            found[node_of[rank]] += link_ranks.crossing(kind, sent, group, rank, node_of)
    return set(found.values())


@pytest.mark.parametrize("n, m", [(2, 2), (2, 4), (3, 2), (4, 3)])
def test_formulas_of_gathers(n, m):
    """E. Localises: where a ring or a pairwise exchange leaves a node, against the formulas at the top of links.py."""
    P, N = n * m, 60
    grid = [list(range(P))]
    heads, slices = [list(range(j, P, m)) for j in range(m)], [list(range(i * m, (i + 1) * m)) for i in range(n)]
    in_order, in_turn = [rank // m for rank in range(P)], [rank % n for rank in range(P)]
    assert over_link("all_gather", (P - 1) * N, grid, in_order) == {(P - 1) * N}
    assert over_link("all_gather", (n - 1) * N, heads, in_order) == {(P - m) * N}
    assert over_link("all_gather", (n - 1) * m * N, heads, in_order) == {m * (P - m) * N}
    assert over_link("all_gather", (m - 1) * N, slices, in_order) <= {0.0}
    assert over_link("all_to_all", (P - 1) * N, grid, in_order) == {m * (P - m) * N}
    assert over_link("all_gather", (P - 1) * N, grid, in_turn) == {m * (P - 1) * N}


def test_disturbed_runs():
    """Localises: a rule that looks at more than computing alone; a run left out of the list, or in a median."""

    def run(before, after, at_once, chunks):
        size = {"1": 1000010, "4": 1000010}
        alone = {"alone_ms": [before, after], "around_link_bytes": [10, 10]}
        return alone | {"ms": {"1": at_once, "4": chunks}, "link_bytes": size}

    runs = [run(100, 100, 150, 110), run(100, 100, 150, 130), run(100, 130, 900, 1), run(100, 100, 160, 120)]
    predicted = {"bytes_of_a_rank": {}, "link_bytes": {"1": 1000000, "4": 990000}}
    row = links.judged({"part": "", "case": "", "predicted": predicted, "runs": runs}, rate=8_000_000)
    assert [one["disturbed"] for one in row["runs"]] == [False, False, True, False]
    assert row["measured"]["exposed_ms"] == {"1": 50, "4": 20} and row["measured"]["ms"] == {"1": 150, "4": 120}
    assert (row["halved"], row["compute_over_exchange"], row["ratio"]) == (2, 2.0, 1.0101)
    assert row["predicted"]["link_ms"] == {"1": 1000.0, "4": 990.0}
    assert links.missed(row) == " ABOVE EXPOSED" and links.line(row).endswith(" ABOVE EXPOSED")
    assert not links.missed(row | {"ratio": 1.01, "compute_over_exchange": 1.2})
    assert links.missed(row | {"ratio": 1.0, "compute_over_exchange": 1.2, "planned_ratio": 1.04}) == " SLOWER"


@pytest.mark.parametrize("rate", ["100", "fast", "0mbit", "-1mbit"])
def test_rates(rate):
    """Localises: a rate that tc would take for another."""
    assert nodes.bits_per_second("1.5mbit") == 1_500_000
    with pytest.raises(ValueError, match="a rate is"):
        nodes.bits_per_second(rate)


TALK = f"""
import os, socket, sys, time
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import nodes
if os.environ["RANK"] == "0":
    with socket.create_server((nodes.ADDRESSES[0], 29501)) as server:
        peer = server.accept()[0]
    got = 0
    while size := len(peer.recv(1 << 16)):
        got += size
    peer.sendall(b".")
    print(got)
else:
    for _ in range(100):
        try:
            peer = socket.create_connection((nodes.ADDRESSES[0], 29501), timeout=10)
            break
        except ConnectionRefusedError:
            time.sleep(0.1)
    before, start = nodes.sent(), time.perf_counter()
    peer.sendall(bytes({KIB} << 10))
    peer.shutdown(socket.SHUT_WR)
    peer.recv(1)
    print(time.perf_counter() - start, nodes.sent() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("delay_ms", [0, 20])
def test_rate_delay_and_counters(shaped_links, delay_ms):
    """Localises: a link faster than it should be, whichever kind makes it; headers that are counted as payload."""
    with nodes.Nodes("1gbit"), nodes.Nodes("50mbit", delay_ms) as two:  # another pair of the same addresses
        got, said = two.run([sys.executable, "-c", TALK], 1, timeout=60)
    seconds, size = map(float, said.split())
    assert int(got) == 1 << 20
    assert size == pytest.approx(1 << 20, rel=0.01)
    least = ((1 << 20) - (1 << 17)) * 8 / 50e6 + 2 * delay_ms / 1e3  # what the bucket holds goes through at once
    assert least < seconds < 5


@pytest.mark.slow
def test_ranks_that_fail(shaped_links):
    """Localises: ranks that outlive another's failure or the time limit, and what is told of them."""
    program = "import os, sys, time; time.sleep(60) if os.environ['RANK'] == '0' else sys.exit('no disk')"
    with nodes.Nodes("1gbit") as two:
        start = time.monotonic()
        with pytest.raises(RuntimeError, match="rank 1 of 2 ended with 1: no disk"):
            two.run([sys.executable, "-c", program], 1)
        with pytest.raises(RuntimeError, match="rank 0 of 2 is not done after 1 s"):
            two.run([sys.executable, "-c", "import time; time.sleep(60)"], 1, timeout=1)
        assert time.monotonic() - start < 20
        for name in two.names:
            assert not subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals(shaped_links, number):
    """Localises: namespaces and ranks that are left when a benchmark is stopped."""
    program = "import nodes, sys\nwith nodes.Nodes('1gbit') as two:\n"
    program += " print(*two.names, flush=True)\n two.run(['sleep', '60'], 1)"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")}
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    names = process.stdout.readline().split()
    assert set(names) == namespaces(process.pid)
    deadline = time.monotonic() + 10
    while not (
        pids := subprocess.run(["ip", "netns", "pids", names[1]], capture_output=True, text=True).stdout.split()
    ):
        assert time.monotonic() < deadline
    process.send_signal(number)
    assert process.wait(timeout=20) != 0
    assert not namespaces(process.pid)
    assert not any(Path("/proc", pid).exists() for pid in pids)


@pytest.mark.slow
def test_bytes_over_the_link(shaped_links, tmp_path):
    """Localises: what crosses between nodes, in either order of stages and of ranks, against the formulas."""
    command = [sys.executable, "benchmarks/links.py", "--quick", "--json", str(tmp_path / "links.json")]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said)
        try:
            process.wait(timeout=600)
        finally:
            process.terminate()
    assert not namespaces(process.pid)
    assert (tmp_path / "links.json").exists(), (tmp_path / "said").read_text()[-2000:]
    found = json.loads((tmp_path / "links.json").read_text())["rows"]
    rows = {(row["part"], row["case"]): row for row in found}
    N, m, P = 512 * KIB, 2, 4
    formulas = {"flat ring": (P - 1) * N, "head axis first": (P - m) * N, "slice axis first": m * (P - m) * N}
    for name, expected in formulas.items():
        row = rows["short", f"gather, {name}"]
        assert row["predicted"]["link_bytes"]["1"] == expected
        assert row["measured"]["link_bytes"]["1"] == pytest.approx(expected, rel=0.02)
    assert rows["wrong order", "gather, flat ring"]["predicted"]["link_bytes"]["1"] == m * (P - 1) * N
    schemes = [row for row in rows.values() if row["predicted"]["bytes_of_a_rank"]]
    assert len(schemes) == 2 * 6 * 3
    for row in schemes:
        assert row["ratio"] == pytest.approx(1, abs=0.02), row["case"]


def test_without_root():
    """Localises: a machine that cannot make nodes, which is told why in a sentence."""
    if os.geteuid() != 0:
        command = []
    elif Path("/usr/bin/setpriv").exists():
        command = ["setpriv", "--reuid", "65534", "--clear-groups"]
    else:
        pytest.skip("run by root, and setpriv is missing")
    command += [sys.executable, "benchmarks/links.py", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "Network namespaces need root: run as root.\n"
