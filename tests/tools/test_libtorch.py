"""The package as a C++ program uses it: installed headers, the CMake config, the ops without Python."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import CUDA_HOME

import two_level_mha as tlm

pytestmark = pytest.mark.cpu_only("its programs run on the CPU")

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
@pytest.mark.skipif(
    torch.version.cuda is not None and CUDA_HOME is None,
    reason="this torch has CUDA and its CMake config needs the CUDA toolkit, which is not installed",
)
@pytest.mark.slow
def test_programs(tmp_path):
    """Both of examples/libtorch: one agrees with the unsplit layer, one decodes as Python. Localises headers, CMake,
    autograd; the KV cache without Python.
    """
    prefix = f"{torch.utils.cmake_prefix_path};{tlm.cmake_prefix_path}"
    source = str(ROOT / "examples" / "libtorch")
    run("cmake", "-S", source, "-B", str(tmp_path), f"-DCMAKE_PREFIX_PATH={prefix}", "-DCMAKE_BUILD_TYPE=Release")
    run("cmake", "--build", str(tmp_path))
    assert "equal to the unsplit layer" in run(str(tmp_path / "attention_by_blocks"))
    assert [int(token) for token in run(str(tmp_path / "decode")).split()] == decoded()


def decoded() -> list[int]:
    """The tokens of examples/libtorch/decode.cpp: a prompt, then one after the other, with a cache."""
    h, k, d, D, V = 4, 2, 8, 24, 50
    torch.manual_seed(0)
    embedding_VD = torch.randn(V, D, dtype=torch.float64)
    layers = []
    for _ in range(2):
        layer = tlm.TwoLevelAttention(D, h, k, d, rope=tlm.Rotary(), dtype=torch.float64, device="meta")
        shapes = {"q_weight": (h, d, D), "k_weight": (k, d, D), "v_weight": (k, d, D), "out_weight": (D, h, d)}
        drawn = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
        layer.load_state_dict(drawn, assign=True)
        layers.append(layer)
    cache = tlm.KVCache({"num_layers": 2, "num_kv_heads": k, "head_dim": d}, None)
    tokens, found = torch.tensor([[3, 14, 15, 9, 26]]), []
    with torch.no_grad():
        for _ in range(24):
            x_BLD = embedding_VD[tokens]
            for layer, kept in zip(layers, cache.layers, strict=True):
                x_BLD = x_BLD + layer(x_BLD / x_BLD.square().mean(-1, keepdim=True).sqrt(), cache=kept)
            tokens = (x_BLD[:, -1] @ embedding_VD.T).argmax(-1, keepdim=True)
            found.append(tokens.item())
    assert len(set(found)) > 4, found  # not one token again and again
    return found
