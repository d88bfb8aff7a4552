"""examples/slurm/two_nodes.sh, on two nodes that are two torchruns of this machine: the check, then a program."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from harness.programs import environment

pytestmark = pytest.mark.cpu_only("its programs run on Gloo")

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "slurm" / "two_nodes.sh"
PROGRAM = """
import torch, torch.distributed as dist, two_level_mha as tlm
dist.init_process_group("gloo")
mesh = tlm.init_mesh("cpu", (2, 2))
layer = tlm.TwoLevelAttention(32, 4, 2, mesh=mesh)
y = layer(torch.ones(2, 3, 32))
print("rank", dist.get_rank(), "of", dist.get_world_size(), "at", mesh.get_coordinate(), tuple(y.shape))
tlm.close(mesh)
dist.barrier()
dist.destroy_process_group()
"""


def free_ports() -> int:
    """A port that is free with its successor."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            try:
                second.bind(("127.0.0.1", first.getsockname()[1] + 1))
            except OSError:
                continue
            return first.getsockname()[1]


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="two host names on one machine need root")
def test_two_nodes(tmp_path):
    """Localises: the order of ranks over nodes, the check before the program, an exit code that is lost."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    port, nodes = free_ports(), []
    for node in range(2):
        variables = {
            "SLURM_NNODES": "2", "SLURM_NODEID": str(node), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "RANKS_PER_NODE": "2", "CHECK_ARGUMENTS": "--device-type cpu --timeout 60", "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": "",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }  # fmt: skip
        command = ["unshare", "--uts", "sh", "-c", f'hostname node{node} && exec "$0" "$@"', str(SCRIPT), str(program)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        nodes.append(subprocess.Popen(command, env=environment(**variables), **pipes))
    try:
        said = [node.communicate(timeout=300)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(said)
    assert "nothing failed" in said[0]
    for rank in range(4):
        assert f"rank {rank} of 4 at ({rank // 2}, {rank % 2}) (2, 3, 32)" in said[rank // 2]


def test_without_a_program():
    """Localises: the sentence for who gives it nothing to run; the script's syntax."""
    done = subprocess.run([str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 2 and "usage: two_nodes.sh PROGRAM ARGUMENTS" in done.stdout
