"""Peak activation memory of a training step of a whole model, by the number of ranks.

    python benchmarks/activations.py [--layers N]

A Llama with random weights is split over 1, 2, 4 and 8 Gloo ranks by parallelize(activations=..), and trained for three
steps. Counted are the bytes of all tensors that operators give and that live at once, in the third step, without
weights and gradients: they were there before. Temporary memory inside an operator is not seen.

Of P ranks each may hold 1 / P of what one rank alone holds, and what must be whole: the input of one module, which it
gathers, and what is sent and received of the sum of its gradient, while the weights' gradients are computed. `over` is
what is held beyond that, over that 1 / P. When Gloo's threads let go of what was sent is chance: peaks vary by one such
tensor, and the largest of all ranks counts.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from common import machine, write_results
from live import LiveBytes

import two_level_mha as tlm

GRIDS = {1: (1, 1), 2: (1, 2), 4: (2, 2), 8: (2, 4)}
BATCH, LENGTH, WIDTH = 8, 256, 128
WHOLE = 3  # tensors (B, L, D)
LIMIT = 1.15
SIZES = {
    "vocab_size": 512, "hidden_size": WIDTH, "intermediate_size": 344, "num_attention_heads": 8,
    "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip


def peak_bytes(activations: str, layers: int) -> int:
    """Of a step on this rank."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_hidden_layers=layers))
    mesh = tlm.init_mesh("cpu", GRIDS[dist.get_world_size()])
    model = tlm.parallelize(model, mesh, activations=activations).train()
    ids_BL = torch.randint(SIZES["vocab_size"], (BATCH, LENGTH))

    def step() -> None:
        model.zero_grad(set_to_none=False)
        model(ids_BL, labels=ids_BL, use_cache=False).loss.backward()

    for _ in range(2):
        step()
    tensors = [x for p in model.parameters() for x in (p, p.grad)]
    with LiveBytes(tensors) as live:
        step()
    return live.peak


def rank_main(path: str, layers: int) -> None:
    """Writes the largest peak of all ranks, by layout."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {}
    for activations in ("replicated", "sequence", "batch"):
        peaks = [None] * dist.get_world_size()
        dist.all_gather_object(peaks, peak_bytes(activations, layers))
        found[activations] = max(peaks)
    if dist.get_rank() == 0:
        Path(path).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        rank_main(args.rank, args.layers)
        return
    whole, rows = WHOLE * BATCH * LENGTH * WIDTH * 4, []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in GRIDS:
            path = Path(folder, f"{ranks}.json")
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            subprocess.run([*launch, __file__, f"--rank={path}", f"--layers={args.layers}"], check=True)
            for activations, peak in json.loads(path.read_text()).items():
                alone = rows[0]["bytes"] if rows else peak
                row = {"activations": activations, "ranks": ranks, "bytes": peak, "of one rank": peak / alone}
                if ranks > 1 and activations != "replicated":
                    row |= {"over": (peak - whole) / (alone / ranks), "limit": LIMIT}
                rows.append(row)
                over = f", over 1 / P {row['over']:.2f} (limit {LIMIT})" if "over" in row else ""
                print(f"{ranks} ranks, {activations:10} {peak / 1e6:7.1f} MB, {peak / alone:.3f} of one rank{over}")
    print(write_results("activations", rows, of=machine() | {"layers": args.layers}))
    missed = [row for row in rows if "over" in row and not row["over"] <= row["limit"]]
    if missed:
        raise SystemExit(f"{len(missed)} of {len(rows)} rows are above their limit")


if __name__ == "__main__":
    main()
