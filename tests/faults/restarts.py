"""Training that torchrun starts again.

    torchrun --nproc-per-node 4 --max-restarts 2 tests/faults/restarts.py FOLDER [--kill]

A tiny Llama with dropout on a (2, 2) grid saves after every second step. With --kill rank 2 of the first attempt kills
itself in step 5, and the next attempt goes on from the last checkpoint. Rank 0 appends a line of JSON a step to
FOLDER/losses: attempt, step and loss.
"""

import argparse
import json
import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
import transformers

import two_level_mha as tlm

STEPS, WHEN, ODD = 8, 5, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kill", action="store_true", help="kill a rank of the first attempt")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), dist.get_rank()
    mesh = tlm.init_mesh("cpu", (2, 2), timeout=30)
    with tlm.guard(mesh, end_with_parent=True):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
            vocab_size=64, max_position_embeddings=64, attention_dropout=0.1, attn_implementation="sdpa",
        )  # fmt: skip
        model = tlm.parallelize(transformers.LlamaForCausalLM(config), mesh).train()
        optimizer, start = torch.optim.AdamW(tlm.param_groups(model), lr=1e-3), 0
        if (args.folder / "run" / "latest").exists():
            start = tlm.load(args.folder / "run", model, optimizer).step
        for step in range(start, STEPS):
            if args.kill and attempt == 0 and step == WHEN and rank == ODD:
                os.kill(os.getpid(), signal.SIGKILL)
            ids_BL = torch.arange(24).reshape(2, 12) + step
            loss = model(ids_BL, labels=ids_BL, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if rank == 0:
                with open(args.folder / "losses", "a") as file:
                    file.write(json.dumps({"attempt": attempt, "step": step, "loss": loss.item()}) + "\n")
            if step % 2 == 1:
                tlm.save(args.folder / "run", model, optimizer, step=step + 1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
