"""The command line itself: its version, what a bug report needs, a reader that goes away."""

import subprocess
import sys

from harness.programs import environment

import two_level_mha as tlm
import two_level_mha_cli
from two_level_mha.blocks import COMBINES
from two_level_mha.context import ACTIVATIONS
from two_level_mha.profile import DEVICE_TYPES

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


def test_help_without_torch():
    """Localises: an import of the package on the way to a command's options; a value that the package has, too."""
    program = (
        "import sys, two_level_mha_cli\n"
        "try: two_level_mha_cli.main()\n"
        "finally: assert 'torch' not in sys.modules and 'two_level_mha' not in sys.modules"
    )
    for words in (["--help"], ["plan", "--help"]):
        shown = subprocess.run(
            [sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=60, env=environment()
        )
        assert (shown.returncode, shown.stderr) == (0, "") and shown.stdout.startswith("usage: "), shown
    refused = subprocess.run([*COMMAND, "plan"], capture_output=True, text=True, timeout=200, env=environment())
    assert refused.returncode == 2 and "required: --batch, --seq" in refused.stderr
    assert two_level_mha_cli.ACTIVATIONS == ACTIVATIONS and two_level_mha_cli.COMBINES == COMBINES
    assert sorted(two_level_mha_cli.DEVICE_TYPES) == sorted(set(DEVICE_TYPES))


def test_plan_as_a_picture(tmp_path):
    """Localises: options that the picture leaves out; a file that cannot be written, which is told in a sentence."""
    layer = ["--embed-dim", "64", "--num-heads", "4", "--ranks", "4", "--batch", "1", "--seq", "8"]

    def drawn(path):
        command = [*COMMAND, "plan", *layer, "--plot", str(path)]
        return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment())

    assert drawn(tmp_path / "plan.svg").returncode == 0
    options = tlm.plan(embed_dim=64, num_heads=4, ranks=4, batch=1, seq=8).options
    picture = (tmp_path / "plan.svg").read_text()
    assert all(f"<!-- {option.grid} {option.scheme}" in picture for option in options)
    assert drawn(tmp_path / "plan.png").returncode == 0
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    for path in (tmp_path / "plan.words", tmp_path / "none" / "plan.png"):
        done = drawn(path)
        assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith(f"--plot {path}: "), done


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
