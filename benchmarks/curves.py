"""The loss of every step of examples/train.py, split over 4 ranks by each scheme, beside that of one process.

    python benchmarks/curves.py [--case TEXT] [--repeats STEPS]

Weights are drawn from one seed, batches are the same, parameters are float64: a split step differs from the unsplit one
by the order of its sums alone, and the losses of an exact scheme may differ by the example's tolerance. `independent`,
with a softmax for each slice, is another model; it takes no rotary angles and no norms of heads, so none has them here.
"""

import functools
import os
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from common import ROOT, run_cases, verdict
from torch.distributed.device_mesh import DeviceMesh

import two_level_mha as tlm
from two_level_mha.layer import SCHEMES

sys.path.insert(0, str(ROOT.parent / "examples"))
from train import TOLERANCE, train  # noqa: E402

GRID = (2, 2)
TEXT = "docs/decisions.md"
STEPS = 200
LITERAL = "independent"
CASES = {scheme: scheme for scheme in SCHEMES if scheme != "auto"}


def losses(mesh: DeviceMesh | None, steps: int, **options) -> list[float]:
    text, kind = (ROOT.parent / TEXT).read_bytes(), (torch.device("cpu"), torch.float64)
    return train(mesh, text, steps, *kind, None, rope=None, qk_norm=None, **options)


def rank_main(rank: int, scheme: str, steps: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=GRID[0] * GRID[1])
    found = losses(tlm.init_mesh("cpu", GRID), steps, scheme=scheme)
    if rank == 0:
        torch.save(found, f"{directory}/losses.pt")
    dist.barrier()
    dist.destroy_process_group()


@functools.cache
def unsplit(steps: int) -> list[float]:
    return losses(None, steps)


def run(scheme: str, steps: int) -> dict:
    with tempfile.TemporaryDirectory() as directory:
        multiprocessing.spawn(rank_main, (scheme, steps, directory), nprocs=GRID[0] * GRID[1])
        split = torch.load(f"{directory}/losses.pt")
    difference = max(abs(a - b) for a, b in zip(split, unsplit(steps), strict=True))
    held = {} if scheme == LITERAL else {"ratio": difference / TOLERANCE["float64"], "limit": 1.0}
    row = {"case": scheme, "grid": list(GRID), "text": TEXT, "difference": difference, **held}
    return row | {
        name: [round(loss, 15) for loss in of] for name, of in (("unsplit", unsplit(steps)), ("split", split))
    }


def line(row: dict) -> str:
    last = f"{row['split'][-1]:.6f} (unsplit {row['unsplit'][-1]:.6f})"
    return f"{row['case']:<12} last loss {last}  largest difference {row['difference']:.1e}{verdict(row)}"


def main() -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    run_cases("curves", __doc__.splitlines()[0], CASES, run, line, repeats=STEPS)


if __name__ == "__main__":
    main()
