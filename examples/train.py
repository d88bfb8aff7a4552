"""A tiny language model trained twice: on one process, and with every attention split over a grid of ranks.

    torchrun --nproc-per-node 8 examples/train.py --grid 2x4                # 8 ranks, 2 key/value heads
    torchrun --nproc-per-node 8 examples/train.py --grid 2x4 --text FILE --steps 500

The text (this project's README, or a file) is read as bytes. All ranks train the split model; then rank 0 trains the
unsplit one from the same seed on the same batches, and draws both loss curves. Only attention is split here, so the
MLPs are computed by every rank. Exit code 1: the curves differ by more than TOLERANCE; 2: the arguments do not fit.

Letters: B sequences, L tokens, D embedding, C the 256 bytes.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from tqdm import tqdm

import two_level_mha as tlm

README = Path(__file__).resolve().parent.parent / "README.md"
HEADS, KV_HEADS, HEAD_DIM = 8, 2, 16
EMBED, LAYERS, LENGTH, BATCH = 96, 2, 64, 8
TOLERANCE = {"float32": 1e-4, "float64": 1e-10}  # of the loss; rounding grows with every step


class Block(nn.Module):
    def __init__(self, mesh: DeviceMesh | None, **options: Any) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(EMBED), nn.RMSNorm(EMBED)
        given: dict[str, Any] = {"rope": tlm.Rotary(), "qk_norm": 1e-6, "mesh": mesh} | options
        self.attention = tlm.TwoLevelAttention(EMBED, HEADS, KV_HEADS, HEAD_DIM, **given)
        self.mlp = nn.Sequential(nn.Linear(EMBED, 4 * EMBED), nn.GELU(), nn.Linear(4 * EMBED, EMBED))

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD))
        x_BLD = x_BLD + self.mlp(self.mlp_norm(x_BLD))
        return x_BLD


class LanguageModel(nn.Module):
    """Bytes (B, L) -> logits (B, L, 256) of the next byte."""

    def __init__(self, mesh: DeviceMesh | None = None, layers: int = LAYERS, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, EMBED)
        self.blocks = nn.ModuleList([Block(mesh, **options) for _ in range(layers)])
        self.norm, self.head = nn.RMSNorm(EMBED), nn.Linear(EMBED, 256, bias=False)

    def forward(self, ids_BL: Tensor) -> Tensor:
        x_BLD = self.embedding(ids_BL)
        for block in self.blocks:
            x_BLD = block(x_BLD)
        logits_BLC: Tensor = self.head(self.norm(x_BLD))
        return logits_BLC


def batches(text: bytes, steps: int) -> Iterator[Tensor]:
    """Bytes (B, L + 1) at random places of the text: the same on every rank and in every run."""
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        first_B1 = torch.randint(len(ids) - LENGTH, (BATCH, 1), generator=generator)
        yield ids[first_B1 + torch.arange(LENGTH + 1)]


def train(
    mesh: DeviceMesh | None, text: bytes, steps: int, device: torch.device, dtype: torch.dtype, progress: str | None,
    **options: Any,
) -> list[float]:  # fmt: skip
    """The loss of every step. progress: what the bar is called; None: no bar. options: of the attention layers."""
    torch.manual_seed(0)  # alike on every rank: weights are drawn whole, and each rank keeps its blocks
    model = LanguageModel(mesh, **options).to(device, dtype)
    optimizer = torch.optim.AdamW(tlm.param_groups(model), lr=3e-3)
    losses = []
    with tqdm(total=steps, desc=progress, unit="step", disable=progress is None) as bar:
        for ids_BL in batches(text, steps):
            ids_BL = ids_BL.to(device)
            logits_BLC = model(ids_BL[:, :-1])
            loss = F.cross_entropy(logits_BLC.flatten(0, 1), ids_BL[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            tlm.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            bar.update()
    return losses


def draw(file: Path, split: list[float], whole: list[float], grid: str) -> None:
    """Both loss curves, and below them their distance."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (curves, distance) = pyplot.subplots(
        2, 1, sharex=True, figsize=(8, 6), height_ratios=(3, 1), layout="constrained"
    )
    curves.plot(whole, color="tab:orange", linewidth=4, alpha=0.5, label="one process, grid (1, 1)")
    curves.plot(split, color="tab:blue", linewidth=1, label=f"grid ({grid.replace('x', ', ')})")
    curves.set_ylabel("loss (nats per byte)")
    curves.set_title(f"{HEADS} query and {KV_HEADS} key/value heads, trained unsplit and split")
    curves.legend()
    distance.plot([abs(x - y) for x, y in zip(split, whole, strict=True)], color="tab:gray", linewidth=1)
    distance.set_ylabel("difference")
    distance.set_xlabel("step")
    figure.savefig(file, dpi=120)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", default="2x4", metavar="NxM", help="head groups x slices (2x4)")
    parser.add_argument("--text", type=Path, default=README, help="what to learn (this project's README)")
    parser.add_argument("--steps", type=int, default=300, help="how many (300)")
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32", help="of the weights (float32)")
    parser.add_argument("--picture", type=Path, default=Path("train.png"), help="where to draw (train.png)")
    return parser.parse_args()


def run(args: argparse.Namespace, device: torch.device) -> int:
    """The job of one rank; returns the exit code: 0 or 2 on every rank, or 1 on rank 0, which compares."""
    first = dist.get_rank() == 0
    text, dtype = args.text.read_bytes(), getattr(torch, args.dtype)
    try:
        if len(text) <= LENGTH:
            raise ValueError(f"the text must be longer than {LENGTH} bytes, got {len(text)} in {args.text}")
        if args.steps < 1:
            raise ValueError(f"--steps must be positive, got {args.steps}")
        grid = tlm.Grid.parse(args.grid)
        mesh = tlm.init_mesh(device.type, (grid.head_groups, grid.slices))
        grid.check(HEADS, KV_HEADS, HEAD_DIM)
    except ValueError as error:
        if first:
            print(f"error: {error}", file=sys.stderr)
        dist.barrier()  # a rank that is gone would have torchrun stop rank 0 before it prints
        return 2
    job = (text, args.steps, device, dtype)
    split = train(mesh, *job, f"grid {args.grid}" if first else None)
    code = 0
    if first:
        whole = train(None, *job, "one process")
        draw(args.picture, split, whole, args.grid)
        difference = max(abs(x - y) for x, y in zip(split, whole, strict=True))
        print(f"\n{'step':>6}{'unsplit':>14}{'grid ' + args.grid:>14}")
        for step in sorted({*range(0, args.steps, max(args.steps // 10, 1)), args.steps - 1}):
            print(f"{step:>6}{whole[step]:>14.6f}{split[step]:>14.6f}")
        allowed = TOLERANCE[args.dtype]
        print(f"\nlargest difference of the loss: {difference:.1e} (allowed: {allowed:.0e}); curves: {args.picture}")
        code = 0 if difference <= allowed else 1
    # not a broadcast of the code: a Gloo thread that drops a Python tensor while Python exits aborts (pytorch#179291)
    dist.barrier()
    return code


def main() -> int:
    args = parse_args()
    if "RANK" not in os.environ:
        print("error: start it under torchrun: torchrun --nproc-per-node 8 examples/train.py", file=sys.stderr)
        return 2
    cuda = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
    try:
        return run(args, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
