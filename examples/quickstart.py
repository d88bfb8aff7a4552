"""One attention layer on all ranks of a job, and the largest difference from torch's own.

    torchrun --nproc-per-node 4 examples/quickstart.py

On the CPU, or on a GPU for each rank.
"""

import torch
import torch.distributed as dist

import two_level_mha as tlm

device = "cuda" if torch.cuda.device_count() >= 4 else "cpu"
dist.init_process_group("nccl" if device == "cuda" else "gloo")
torch.manual_seed(0)  # alike on every rank: weights and inputs are drawn from it
stock = torch.nn.MultiheadAttention(256, 2, batch_first=True)  # 2 heads, for 4 ranks
mesh = tlm.init_mesh(device, num_heads=2, head_dim=128)
layer = tlm.TwoLevelMultiheadAttention.from_torch(stock, mesh)
x = torch.randn(8, 64, 256)
y, _ = layer(x.to(device), x.to(device), x.to(device), need_weights=False)
if dist.get_rank() == 0:
    print(layer)
    print("largest difference:", (y.cpu() - stock(x, x, x, need_weights=False)[0]).abs().max().item())
dist.destroy_process_group()
