"""Attention as a torch parallel style, past its number of heads, beside torch's own styles for the MLPs.

    torchrun --nproc-per-node 4 examples/parallel_style.py

An encoder of 2 heads on 4 ranks: one step of training, compared with the unsplit encoder's. On the CPU, or on a GPU for
each rank.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import two_level_mha as tlm


def step(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The loss after one step of AdamW."""
    optimizer = torch.optim.AdamW(tlm.param_groups(model), lr=1e-3)
    model(x).square().mean().backward()
    optimizer.step()
    loss: torch.Tensor = model(x).square().mean().detach()
    return loss


device = "cuda" if torch.cuda.device_count() >= 4 else "cpu"
dist.init_process_group("nccl" if device == "cuda" else "gloo")
if device == "cuda":
    torch.cuda.set_device(dist.get_node_local_rank())
torch.manual_seed(0)


def encoder() -> torch.nn.Module:
    layer = torch.nn.TransformerEncoderLayer(64, 2, 128, dropout=0.0, batch_first=True)
    return torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


stock = encoder().to(device)
model = encoder().to(device)
model.load_state_dict(stock.state_dict())
tp = init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("tp",))
plan = {
    "layers.*.self_attn": tlm.TwoLevelParallel(),
    "layers.*.linear1": ColwiseParallel(),
    "layers.*.linear2": RowwiseParallel(),
}
parallelize_module(model, tp, plan)
x = torch.randn(4, 16, 64, device=device)
losses = [step(one, x).item() for one in (stock, model)]
if dist.get_rank() == 0:
    kept = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters())
    print(model.get_submodule("layers.0.self_attn"))
    print(f"parameters of this rank: {kept} of {sum(p.numel() for p in stock.parameters())}")
    print(f"difference of the loss after one step: {abs(losses[0] - losses[1]):.1e}")
dist.destroy_process_group()
