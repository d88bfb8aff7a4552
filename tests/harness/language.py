"""A tiny language model around TwoLevelAttention, for tests of training, and how two of them differ."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import two_level_mha as tlm
from two_level_mha.blocks import full_tensor

from .device import DEVICE

EMBED, BYTES = 12, 11
ATTENTION = {"num_heads": 8, "num_kv_heads": 4, "head_dim": 8, "bias": True, "qk_norm": 1e-3, "rope": tlm.Rotary(100.0)}


class Model(nn.Module):
    """Ids (B, L) -> logits (B, L, 11). The same seed gives the same weights on every grid."""

    def __init__(self, mesh=None, *, layers: int = 2, checkpointed: bool = False, dtype=torch.float64, **options):
        super().__init__()
        torch.manual_seed(5)
        self.checkpointed = checkpointed
        self.embedding = nn.Embedding(BYTES, EMBED, dtype=dtype)
        self.norms = nn.ModuleList([nn.LayerNorm(EMBED, dtype=dtype) for _ in range(layers)])
        self.attentions = nn.ModuleList(
            [tlm.TwoLevelAttention(EMBED, mesh=mesh, dtype=dtype, **(ATTENTION | options)) for _ in range(layers)]
        )
        self.head = nn.Linear(EMBED, BYTES, dtype=dtype)

    def forward(self, ids_BL: Tensor) -> Tensor:
        x_BLD = self.embedding(ids_BL)
        for norm, attention in zip(self.norms, self.attentions, strict=True):
            y_BLD = norm(x_BLD)
            if self.checkpointed:
                x_BLD = x_BLD + checkpoint(attention, y_BLD, use_reentrant=False)
            else:
                x_BLD = x_BLD + attention(y_BLD)
        return self.head(x_BLD)


def tokens(batch: int = 4, length: int = 7, seed: int = 0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(BYTES, (batch, length + 1), device="cpu", generator=generator).to(DEVICE)


def backward(model: nn.Module, ids_BL: Tensor, scale: Tensor | float = 1.0, seed: int = 0) -> float:
    """The mean loss of the next token, after its backward pass; dropout is drawn from the seed."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss = F.cross_entropy(model(ids_BL[:, :-1]).flatten(0, 1), ids_BL[:, 1:].flatten())
    (loss * scale).backward()
    return loss.item()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: full_tensor(p.grad).clone() for name, p in model.named_parameters()}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: full_tensor(p.detach()).clone() for name, p in model.named_parameters()}


def local_bytes(model: nn.Module) -> list[Tensor]:
    return [(p._local_tensor if isinstance(p, DTensor) else p).detach().clone() for p in model.parameters()]


def difference(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert ours.keys() == expected.keys()
    return max((ours[name] - expected[name]).abs().max().item() for name in ours)
