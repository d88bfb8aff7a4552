"""A long job: python tests/faults/soak.py --steps 10000 --meshes 500

Four ranks on a (2, 2) grid ask for a mesh again and again, then train a decoder layer, two steps of three with autocast
or another length, and compare every call. Exit status 1 if, between a tenth of the steps and the last, the number of
threads or of open files of any rank changes, its resident memory grows by more than 1 %, or outputs differ over ranks.
"""

import argparse
import json
import os
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

import two_level_mha as tlm

RANKS = 4


def resources() -> dict[str, int]:
    with open("/proc/self/statm") as statm:
        pages = int(statm.read().split()[1])
    page = os.sysconf("SC_PAGE_SIZE")
    return {
        "threads": len(os.listdir("/proc/self/task")),
        "files": len(os.listdir("/proc/self/fd")),
        "memory": pages * page,
    }


def rank_main(rank: int, steps: int, meshes: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=RANKS)
    mesh = tlm.init_mesh("cpu", (2, 2), timeout=60)
    before = resources()
    for _ in range(meshes):
        mesh = tlm.init_mesh("cpu", (2, 2), timeout=60)
    of_meshes = {name: count - before[name] for name, count in resources().items() if name != "memory"}
    torch.manual_seed(0)
    layer = tlm.TwoLevelAttention(32, 4, 4, 8, mesh=mesh, rope=tlm.Rotary(), qk_norm=1e-6)
    optimizer = torch.optim.AdamW(tlm.param_groups(layer))
    marks = []
    for step in range(steps):
        x = torch.randn(2, 8 if step % 3 else 12, 32, generator=torch.Generator().manual_seed(step % 100))
        with torch.autocast("cpu", torch.bfloat16, enabled=step % 3 == 1):
            loss = layer(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (steps // 10, steps - 1):
            marks.append(resources())
    losses = [torch.empty(()) for _ in range(RANKS)]
    dist.all_gather(losses, loss.detach())
    with open(f"{directory}/{rank}.json", "w") as file:
        json.dump({"meshes": of_meshes, "marks": marks, "equal": all(torch.equal(x, losses[0]) for x in losses)}, file)
    dist.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--meshes", type=int, default=500)
    args = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as directory:
        multiprocessing.spawn(rank_main, (args.steps, args.meshes, directory), nprocs=RANKS)
        found = [json.loads(open(f"{directory}/{rank}.json").read()) for rank in range(RANKS)]
    sound = True
    for rank, one in enumerate(found):
        early, late = one["marks"]
        flat = all(early[name] == late[name] for name in ("threads", "files"))
        flat = flat and late["memory"] <= 1.01 * early["memory"] and not any(one["meshes"].values())
        sound = sound and flat and one["equal"]
        growth = late["memory"] / early["memory"]
        print(
            f"rank {rank}: {args.meshes} meshes +{one['meshes']['threads']} threads, +{one['meshes']['files']} files; "
            f"{args.steps} steps: threads {early['threads']} -> {late['threads']}, files {early['files']} -> "
            f"{late['files']}, memory x {growth:.4f}; {'sound' if flat and one['equal'] else 'NOT SOUND'}"
        )
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
