"""A user's program as a type checker sees it: `make types` runs mypy --strict on it; it is not run."""

from pathlib import Path

import torch
from torch import nn

import two_level_mha as tlm


class Mine(nn.Module):
    def twice(self) -> int:
        return 2


mesh = tlm.init_mesh("cpu", (2, 2))
model: Mine = tlm.parallelize(Mine(), mesh, scheme="batch", cache="position")
print(model.twice())
state: dict[str, torch.Tensor] = tlm.full_state_dict(model)
layer = tlm.TwoLevelAttention(64, 8, 2, rope=tlm.Rotary(), mesh=mesh, scheme="auto")
plan = tlm.plan(embed_dim=64, num_heads=8, ranks=4, batch=1, seq=8)
out, logsumexp = tlm.partial_attention(*torch.randn(3, 1, 2, 4, 8).unbind())
cache = tlm.KVCache({"num_layers": 1, "num_kv_heads": 2, "head_dim": 8}, mesh, layout="batch")
optimizer = torch.optim.AdamW(tlm.param_groups(model))
norm: torch.Tensor = tlm.clip_grad_norm_(model.parameters(), 1.0)
with tlm.guard(mesh), tlm.verify(model, optimizer, every=10):
    folder: Path = tlm.save("run", model, optimizer, step=1, extra={"epoch": 2})
loaded: int = tlm.load("run", model, optimizer).step
pretrained = tlm.from_pretrained("folder", mesh, cache="batch", overlap=2)
generates: bool = pretrained.can_generate()


@tlm.register_adapter("mine", matches=lambda module, parent: type(module) is Mine, paths={}, inputs=lambda *_: [])
class SplitMine(Mine):
    def thrice(self) -> int:
        return 3


print(SplitMine().thrice())  # a decorator that keeps the class
tlm.from_pretrained("folder", mesh, cache="rows")  # type: ignore[arg-type]
tlm.TwoLevelAttention(64, 8, mesh=mesh, scheme="rows")  # type: ignore[arg-type]  # an unused ignore is an error too
