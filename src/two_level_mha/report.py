"""What parallelize did: how much a rank keeps, what is split and what is not, and why."""

import re
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from two_level_mha.attentions import Attentions
from two_level_mha.errors import GridError
from two_level_mha.rest import Rest

_LARGEST = 6  # names of what is unsplit
_ATTRIBUTE = "two_level_mha_report"


@dataclass(frozen=True)
class Report:
    """What parallelize split in a model, and what this rank holds of it; str() gives it as one line.

    attentions, states, mlps: how many modules; states: those that keep one instead of keys. gathered: modules that
    keep their own code, whose weights are gathered for each call -> why. tp_plans: classes of the transformers models
    whose tensor-parallel plan was applied. parameters, total_bytes: of the model; held_parameters, split_bytes,
    unsplit_bytes: of this rank. unsplit: module, a * for its layer's number -> bytes, the largest first. left_out: what
    looks as if it could be split, or has a rule in a plan -> why it is not. other_ways: modules whose own code goes
    another way since they are split -> which, and why. untried: models that were not run on two tokens since they are
    split -> why.
    """

    attentions: int
    tp_plans: tuple[str, ...]
    mlps: int
    parameters: int
    held_parameters: int
    total_bytes: int
    split_bytes: int
    unsplit_bytes: int
    unsplit: dict[str, int]
    left_out: dict[str, str]
    gathered: dict[str, str] = field(default_factory=dict)
    states: int = 0
    other_ways: dict[str, str] = field(default_factory=dict)
    untried: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        kinds = [f"{self.attentions} attention modules"] + [f"{self.states} layers with states"] * (self.states > 0)
        kinds += [f"what the tensor-parallel plan of {name} names" for name in self.tp_plans]
        if self.mlps or not self.tp_plans:
            kinds.append(f"{self.mlps} MLPs")
        if self.gathered:
            kinds[-1] += f" and {len(self.gathered)} with gathered weights"
        largest = [f"{name} {size(count)}" for name, count in self.unsplit.items()]
        largest = largest[:_LARGEST] + ["..."] * (len(largest) > _LARGEST)
        reasons: dict[tuple[str, str], list[str]] = {}
        for name, why in self.left_out.items():
            reasons.setdefault((_any_layer(name), f"stays unsplit: {why}"), []).append(name)
        for name, why in self.gathered.items():
            kind = _any_layer(name)
            reasons.setdefault((kind, f"has its weights gathered: {why.replace(name, kind)}"), []).append(name)
        for name, how in self.other_ways.items():
            reasons.setdefault((_any_layer(name), how), []).append(name)
        for name, why in self.untried.items():
            reasons.setdefault((name, f"was not tried on two tokens: {why}"), []).append(name or "the whole")
        return (
            f"{' and '.join(kinds)} split; parameters per rank {self.held_parameters:,} of {self.parameters:,}, "
            f"{size(self.split_bytes + self.unsplit_bytes)} of {size(self.total_bytes)}: {size(self.split_bytes)} "
            f"split, {size(self.unsplit_bytes)} unsplit"
            + (f" ({', '.join(largest)})" if largest else "")
            + "".join(f"; {names[0] if len(names) == 1 else kind} {why}" for (kind, why), names in reasons.items())
        )


def report(model: nn.Module) -> Report:
    """What the last parallelize(model, ...) did. Raises GridError for a model that it was not called with."""
    found = vars(model).get(_ATTRIBUTE)
    if not isinstance(found, Report):
        raise GridError(
            f"{type(model).__name__} has no report: it is kept on the very module that parallelize was called with"
        )
    return found


def keep_report(model: nn.Module, attentions: Attentions, rest: Rest) -> Report:
    """Makes the report of a model that was just split, and keeps it on the model."""
    held = parameters = total = split = unsplit = 0
    by_module: dict[str, int] = {}
    for name, p in model.named_parameters():
        local: Tensor = p._local_tensor if isinstance(p, DTensor) else p
        count = local.numel() * local.element_size()
        held, parameters, total = held + local.numel(), parameters + p.numel(), total + p.numel() * p.element_size()
        if local.numel() < p.numel():
            split += count
        else:
            unsplit += count
            module = _any_layer(name.rpartition(".")[0])
            by_module[module] = by_module.get(module, 0) + count
    made = Report(
        attentions=len(attentions.found),
        tp_plans=tuple(type(part).__name__ for part, tp_plan in rest.tp_plans.values() if tp_plan),
        mlps=len(rest.mlps),
        parameters=parameters,
        held_parameters=held,
        total_bytes=total,
        split_bytes=split,
        unsplit_bytes=unsplit,
        unsplit=dict(sorted(by_module.items(), key=lambda item: -item[1])),
        left_out=rest.left_out | {f"the MLP {name}": why for name, why in rest.left_out_mlps.items()},
        gathered={name: why for name, (_, why) in attentions.gathered.items()},
        states=len(attentions.states),
        other_ways=rest.other_ways,
        untried=rest.untried,
    )
    setattr(model, _ATTRIBUTE, made)
    return made


def size(count: int) -> str:
    """Bytes as text: 12.8 GB, 3.1 MB, 640 B."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count} B"


def _any_layer(name: str) -> str:
    return re.sub(r"\b\d+\b", "*", name)
