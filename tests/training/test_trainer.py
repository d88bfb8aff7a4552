"""transformers' Trainer and accelerate on a split model, as users call them, against the unsplit one. On CPUs alone.

What breaks here is what they read of a split model, in integrations/on_grid.py, or a new version that asks for more.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from harness.programs import environment

pytestmark = pytest.mark.cpu_only("its programs run on Gloo")
load_file = pytest.importorskip("safetensors.torch").load_file
pytest.importorskip("accelerate")
pytest.importorskip("peft")

PROGRAM = Path(__file__).with_name("trainers.py")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "4")
# of losses and norms; bfloat16: of a model of which each rounds other sums
TOLERANCE = {"trainer": 2e-6, "lora": 2e-6, "accelerate": 2e-6, "bfloat16": 1e-2}


def run(folder: Path, *started: str) -> dict[str, list[float]]:
    command = [sys.executable, *started, str(PROGRAM), str(folder)]
    env = environment(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_as_unsplit(tmp_path):
    """Losses, norms of gradients, evaluations, and what both have saved at the end. Trainer stores moments of one rank
    alone, so it must refuse to.
    """
    whole, split = run(tmp_path / "whole"), run(tmp_path / "split", *TORCHRUN)
    assert whole.pop("resumable") == "" and "save_only_model=True" in split.pop("resumable")
    assert whole.keys() == split.keys() == TOLERANCE.keys()
    for case, expected in whole.items():
        assert split[case] == pytest.approx(expected, rel=TOLERANCE[case]), case
    folders = {"trainer": "trainer/checkpoint-8/model", "lora": "lora/checkpoint-8/adapter_model"}
    for name in (folders["trainer"], folders["lora"], "accelerate/model"):
        want, got = (load_file(tmp_path / of / f"{name}.safetensors") for of in ("whole", "split"))
        assert got.keys() == want.keys(), name
        for key, tensor in want.items():
            assert (got[key] - tensor).abs().max() <= 1e-3, (name, key)
