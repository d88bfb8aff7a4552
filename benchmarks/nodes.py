"""Two nodes on one machine: network namespaces joined by a link of a given rate and delay, and ranks in them.

    with Nodes("100mbit", delay_ms=2) as nodes:
        outputs = nodes.run([sys.executable, "program.py"], ranks_per_node=2)

The program finds RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and GLOO_SOCKET_IFNAME in its environment, so
that init_process_group("gloo") needs nothing else, and `places()` and `sent()` of this module tell it which rank is
where and what its node has sent. Ranks of one node bind the link's address too, but reach each other over loopback.

The rate is held by tbf on a veth pair. A delay is netem's, or, in a kernel without it, that of a relay in this process
between two TUN devices, which keeps the rate as well.
"""

import contextlib
import fcntl
import itertools
import os
import re
import select
import shutil
import signal
import struct
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

NODES = 2
ADDRESSES = ("10.77.0.1", "10.77.0.2")  # the same in every run: nothing outside of the namespaces sees them
UNITS = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
# What a packet of TCP counts beside its payload: 20 IPv4, 20 TCP, 12 time stamps, and on veth 14 Ethernet.
HEADERS = {"veth": 66, "tun": 52}
QUEUE_SECONDS = 0.4  # as much as this waits for the link
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h
LOOK_SECONDS = 0.05  # between looks at the ranks

_pairs = itertools.count()


def missing() -> str | None:
    """Why this machine cannot make nodes, as one sentence; None if it can."""
    if os.geteuid() != 0:
        return "Network namespaces need root: run as root."
    absent = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if absent:
        return f"The command {' and '.join(absent)} is missing: install iproute2."
    try:
        with Nodes("1gbit"):
            return None
    except RuntimeError as error:
        return f"This system makes no namespaces joined by a shaped link: {error}."


def bits_per_second(rate: str) -> int:
    """Of a rate as tc writes it, "100mbit". Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg]?bit)", rate)
    if match is None or float(match[1]) == 0:
        raise ValueError(f"a rate is a positive number with bit, kbit, mbit or gbit, as 100mbit; got {rate!r}")
    return int(float(match[1]) * UNITS[match[2]])


def places(ranks: int, round_robin: bool) -> list[int]:
    """The node of every rank: one node after the other, or the nodes in turn."""
    return [rank % NODES if round_robin else rank * NODES // ranks for rank in range(ranks)]


def sent() -> int:
    """Bytes of payload that this rank's node has sent over the link so far; for programs that Nodes runs."""
    folder = Path("/sys/class/net", os.environ["GLOO_SOCKET_IFNAME"], "statistics")
    size, packets = (int((folder / name).read_text()) for name in ("tx_bytes", "tx_packets"))
    return size - packets * int(os.environ["LINK_HEADER"])


class Nodes:
    """A context: two namespaces and their link, which are gone when it ends, by an error or a signal too.

    Their names begin with tlm and the number of this process; what kill -9 leaves, `ip netns del` removes.
    """

    def __init__(self, rate: str, delay_ms: float = 0) -> None:
        self.rate, self.delay_ms = bits_per_second(rate), delay_ms
        pair = f"tlm{os.getpid()}x{next(_pairs) % 1000}"
        # of namespace and interface both, of which no name may be longer than 15 characters
        self.names = [f"{pair}{end}" for end in "ab"]
        self.kind = "veth"
        self._relay: _Relay | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Nodes":
        with self._stack:  # undoes all if a step fails
            self._stack.enter_context(_ended_by_signals())
            for name in self.names:
                self._stack.callback(subprocess.run, ["ip", "netns", "del", name], capture_output=True)
                _call("ip", "netns", "add", name)
            if self.delay_ms > 0 and not _has_netem(self.names[0]):
                self.kind = "tun"
                self._relay = self._stack.enter_context(_Relay(self.names, self.rate, self.delay_ms))
                for name in self.names:
                    _call("ip", "link", "set", name, "netns", name)
            else:
                a, b = self.names
                _call("ip", "link", "add", a, "netns", a, "type", "veth", "peer", "name", b, "netns", b)
            for name, address in zip(self.names, ADDRESSES, strict=True):
                if Path("/proc/sys/net/ipv6").exists():  # whose chatter would be counted
                    _call("ip", "-n", name, "link", "set", name, "addrgenmode", "none")
                _call("ip", "-n", name, "addr", "add", f"{address}/24", "dev", name)
                _call("ip", "-n", name, "link", "set", name, "up")
                _call("ip", "-n", name, "link", "set", "lo", "up")
                # every kernel has reno; bbr's guesses of a rate that is shaped, after a pause, scatter by factors
                _call("ip", "netns", "exec", name, "sh", "-c", "echo reno > /proc/sys/net/ipv4/tcp_congestion_control")
            self.shape(self.rate)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def shape(self, rate: int) -> None:
        """Sets the rate of both ways, bits a second."""
        self.rate = rate
        if self._relay is not None:
            self._relay.rate = rate
            return
        # 2 ms: with less it would not keep up at high rates, and as much is let through at once. More than 64 KiB, what
        # TCP hands over at once: tbf cuts that into packets, which costs a quarter of a core at 200 Mbit/s
        burst = max(1 << 17, rate // 8 // 500)
        tbf = ["tbf", "rate", f"{rate}bit", "burst", str(burst), "latency", f"{QUEUE_SECONDS * 1e3:.0f}ms"]
        for name in self.names:
            at = ["tc", "-n", name, "qdisc", "replace", "dev", name]
            if self.delay_ms > 0:  # as tc-netem(8) stacks the two; not run, for want of a kernel with netem
                _call(*at, "root", "handle", "1:", "netem", "delay", f"{self.delay_ms}ms", "limit", "100000")
                _call(*at, "parent", "1:1", "handle", "10:", *tbf)
            else:
                _call(*at, "root", *tbf)

    def run(
        self, command: list[str], ranks_per_node: int, *, round_robin: bool = False, timeout: float = 600
    ) -> list[str]:
        """What each rank wrote to stdout. Raises RuntimeError, with the end of a rank's output, if one fails or if they
        take longer than `timeout` seconds; no rank is left then.
        """
        ranks = NODES * ranks_per_node
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            started, files = [], [Path(folder, str(rank)) for rank in range(ranks)]
            for rank, node in enumerate(places(ranks, round_robin)):
                variables = {
                    "RANK": rank, "LOCAL_RANK": rank // NODES if round_robin else rank % ranks_per_node,
                    "WORLD_SIZE": ranks, "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": 29500,
                    "GLOO_SOCKET_IFNAME": self.names[node], "LINK_HEADER": HEADERS[self.kind],
                }  # fmt: skip
                out, err = (stack.enter_context(files[rank].with_suffix(kind).open("wb")) for kind in (".out", ".err"))
                process = subprocess.Popen(
                    ["ip", "netns", "exec", self.names[node], *command], stdout=out, stderr=err,
                    stdin=subprocess.DEVNULL, env=os.environ | {name: str(x) for name, x in variables.items()},
                    start_new_session=True,  # so that a rank ends with all that it has started
                )  # fmt: skip
                stack.callback(_kill, process)
                started.append(process)
            end = time.monotonic() + timeout
            while True:
                codes = [process.poll() for process in started]
                failed = next((rank for rank, code in enumerate(codes) if code), None)
                if failed is not None or None not in codes or time.monotonic() > end:
                    break
                time.sleep(LOOK_SECONDS)
            if failed is not None or None in codes:
                rank = codes.index(None) if failed is None else failed
                how = f"is not done after {timeout} s" if failed is None else f"ended with {codes[rank]}"
                said = files[rank].with_suffix(".err").read_text(errors="replace")[-3000:]
                raise RuntimeError(f"rank {rank} of {ranks} {how}: {said}")
            return [file.with_suffix(".out").read_text(errors="replace") for file in files]


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` said {done.stderr.strip()!r}")


def _has_netem(namespace: str) -> bool:
    command = ["tc", "-n", namespace, "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]
    if subprocess.run(command, capture_output=True).returncode:
        return False
    _call("tc", "-n", namespace, "qdisc", "del", "dev", "lo", "root")
    return True


def _kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise SystemExit, as SIGINT raises KeyboardInterrupt: contexts are left."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield  # where Python takes no handler
        return
    heeded = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, leave) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Relay:
    """A context: two TUN devices of given names, and a thread that carries packets from each to the other, paced and
    delayed. The devices may move to other namespaces; they are gone with the context.
    """

    def __init__(self, names: list[str], rate: int, delay_ms: float) -> None:
        self.names, self.rate, self.delay = names, rate, delay_ms / 1e3
        self.files: list[int] = []
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._carry, daemon=True)

    def __enter__(self) -> "_Relay":
        for name in self.names:
            self.files.append(os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK))
            fcntl.ioctl(self.files[-1], TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
            _call("ip", "link", "set", name, "mtu", "9000")  # six times fewer packets to carry in Python
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        self.thread.join()
        for file in self.files:
            os.close(file)

    def _carry(self) -> None:
        free = [0.0, 0.0]  # when either way will have sent all that it has taken
        flying: list[deque[tuple[float, bytes]]] = [deque(), deque()]  # what arrives when
        while not self.ended.is_set():
            now = time.monotonic()
            for way, file in enumerate(reversed(self.files)):
                while flying[way] and flying[way][0][0] <= now:
                    with contextlib.suppress(OSError):  # a device that is down: lost, as on any link
                        os.write(file, flying[way].popleft()[1])
            next_one = min((packets[0][0] for packets in flying if packets), default=now + LOOK_SECONDS)
            room = [file for way, file in enumerate(self.files) if free[way] - now < QUEUE_SECONDS]
            ready, _, _ = select.select(room, [], [], max(0.0, min(next_one - now, LOOK_SECONDS)))
            now = time.monotonic()
            for way, file in enumerate(self.files):
                while file in ready and free[way] - now < QUEUE_SECONDS:
                    try:
                        packet = os.read(file, 1 << 16)
                    except OSError:  # nothing more, or the device is not up
                        break
                    free[way] = max(free[way], now) + len(packet) * 8 / self.rate
                    flying[way].append((free[way] + self.delay, packet))
