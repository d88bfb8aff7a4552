"""The command line itself: its version, what a bug report needs, a reader that goes away."""

import subprocess
import sys

from harness.programs import environment

import two_level_mha as tlm

COMMAND = [sys.executable, "-m", "two_level_mha"]


def test_version_and_facts():
    """Localises: a fact that a bug report would have to ask for."""
    env = environment(OMP_NUM_THREADS="1")
    shown = subprocess.run([*COMMAND, "--version"], capture_output=True, text=True, timeout=200, env=env)
    assert shown.stdout == f"two_level_mha {tlm.__version__}\n"
    rows = subprocess.run([*COMMAND, "info"], capture_output=True, text=True, timeout=200, env=env).stdout.splitlines()
    found = {row.split("  ")[1]: row for row in rows if row.startswith("  ") and len(row.split("  ")) > 2}
    for name in (
        "two_level_mha",
        "python",
        "system",
        "torch running",
        "CPU kernels",
        "backends",
        "transformers",
        "ninja",
    ):
        assert name in found, name
    assert "Gloo" in found["backends"] and "1 threads" in found["CPU kernels"]


def test_closed_pipe():
    """Localises: a traceback where `head` has seen enough."""
    for words in (
        ["info"],
        ["plan", "--embed-dim", "64", "--num-heads", "4", "--ranks", "4", "--batch", "1", "--seq", "8"],
    ):
        with subprocess.Popen(
            [*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
        ) as process:
            process.stdout.close()
            assert process.stderr.read() == ""
            assert process.wait(timeout=200) == 1
