"""What parallelize tells: how much a rank keeps, split and whole, and what stayed whole."""

import re

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from two_level_mha.rest import Rest

_LARGEST = 6  # names of what stayed whole


def report(model: nn.Module, attentions: int, rest: Rest) -> str:
    """One line for rank 0, with sizes per rank and, by names without layer numbers, what is whole and why."""
    held = total = parameters = 0  # parameters of this rank, of the model; bytes of the model
    split = whole = 0  # bytes of this rank
    stayed: dict[str, int] = {}
    for name, p in model.named_parameters():
        local: Tensor = p._local_tensor if isinstance(p, DTensor) else p
        count = local.numel() * local.element_size()
        held, parameters, total = held + local.numel(), parameters + p.numel(), total + p.numel() * p.element_size()
        if local.numel() < p.numel():
            split += count
        else:
            whole += count
            kind = _any_layer(name.rpartition(".")[0])
            stayed[kind] = stayed.get(kind, 0) + count
    largest = [f"{name} {size(count)}" for name, count in sorted(stayed.items(), key=lambda item: -item[1])]
    largest = largest[:_LARGEST] + ["..."] * (len(largest) > _LARGEST)
    plans = [type(part).__name__ for part, plan in rest.plans.values() if plan]
    kinds = [f"{attentions} attention modules", *(f"what the tensor-parallel plan of {name} names" for name in plans)]
    if rest.mlps or not plans:
        kinds.append(f"{len(rest.mlps)} MLPs")
    reasons: dict[tuple[str, str], list[str]] = {}
    left = rest.whole | {f"the MLP {name}": why for name, why in rest.whole_mlps.items()}
    for name, why in left.items():
        reasons.setdefault((_any_layer(name), why), []).append(name)
    return (
        f"two_level_mha: {' and '.join(kinds)} split; parameters per rank {held:,} of {parameters:,}, "
        f"{size(split + whole)} of {size(total)}: {size(split)} split, {size(whole)} whole"
        + (f" ({', '.join(largest)})" if largest else "")
        + "".join(
            f"; {names[0] if len(names) == 1 else kind} stays whole: {why}" for (kind, why), names in reasons.items()
        )
    )


def size(count: int) -> str:
    """Bytes as text: 12.8 GB, 3.1 MB, 640 B."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count} B"


def _any_layer(name: str) -> str:
    return re.sub(r"\b\d+\b", "*", name)
