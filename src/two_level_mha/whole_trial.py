"""The trial of a whole model: what it gives for two tokens, forward and backward, before it is split and after.

Attention, layers with states and MLPs were tried by themselves. Here they are called as the model calls them, one after
the other, and what is around them meets what they are now. The model lends its weights to both runs, and nothing else:
its gradients, buffers, hooks, caches, counters and random numbers are afterwards what they were.
"""

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from two_level_mha.control import Control
from two_level_mha.errors import GridError, RankFailure
from two_level_mha.integrations.forms import parameters_of
from two_level_mha.layer import GridAttention
from two_level_mha.probe import HOOKS, first_output
from two_level_mha.rest import PLAN_TOLERANCE
from two_level_mha.stream import Stream

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IDS = "input_ids"
OUTPUT = "its output"
RESCALED = "layers_are_rescaled"  # of RWKV: whether it has divided its output projections in place


@dataclass
class WholeTrial:
    """A transformers model, called `name` in the one that is split; what it gave for `given`, by what that is of."""

    name: str
    model: "PreTrainedModel"
    given: dict[str, object]
    expected: dict[str, Tensor]
    hooks: set[int]  # those of users, which are not called
    tolerance: float | None  # None: its numbers are not compared

    def check(self, control: Control) -> None:
        """Raises GridError, on every rank, if the split model dies on one of them or gives other numbers; a collective.

        A rank that dies by itself leaves the others in an exchange: these raise RankFailure when it lasts too long.
        """
        kind, before, where = type(self.model).__name__, (control.call, control.inputs), "what is in its way"
        try:
            why = self._difference(_run(self.model, self.given, self.hooks, weights=True))
        except RankFailure:
            raise
        except Exception as error:  # of any kind: most of it is another's code
            why = f"it dies of {error!r}"
            if (module := _raised_in(error, self.model)) is not None:
                where = re.sub(r"\b\d+\b", "*", ".".join(filter(None, (self.name, module))))
                why += f" in {where}"
        finally:
            control.call, control.inputs = before
        if why is not None:
            why = (
                f"{kind} was split, but for two tokens {why}: make the model again, and leave {where} whole by "
                "skip=[..], or all but attention by rest=False"
            )
        everyone = control.gather(why, f"telling what became of the trial of a {kind}: {why or 'it is right'}")
        if (first := next(filter(None, everyone), None)) is not None:
            raise GridError(first)

    def _difference(self, got: dict[str, Tensor]) -> str | None:
        if self.tolerance is None:
            return None
        largest = {name: x.abs().max() for name, x in self.expected.items() if x.isfinite().all()}
        of_gradients = [x for name, x in largest.items() if name != OUTPUT]
        for name in (name for name in largest if name in got):
            most = largest[name] if name == OUTPUT else torch.stack(of_gradients).max()
            off = (got[name] - self.expected[name]).abs().max()
            if not off <= self.tolerance * most.clamp(min=1e-6):
                return (
                    f"it gives other numbers: {name} is off by {off.item():.1e}, where the largest is {most.item():.1e}"
                )
        return None


def whole_trials(
    parts: "Mapping[str, PreTrainedModel]", mesh: DeviceMesh, control: Control, exact: bool
) -> tuple[list[WholeTrial], dict[str, str]]:
    """The trials of transformers models that will be split, by name; and why others are not tried. A collective.

    exact: whether split they are to give the same numbers.
    """
    trials: list[WholeTrial] = []
    untried: dict[str, str] = {} if parts else {"": "how it is called is not known, since transformers has not made it"}
    for name, part in parts.items():
        if (problem := _problem(part, mesh)) is not None:
            untried[name] = problem
            continue
        given, hooks = _two_tokens(part, mesh.device_type), _hooks_of(part)
        try:
            expected = _run(part, given, hooks, weights=False)
        except Exception as error:  # of any kind: it is another's code
            untried[name] = f"unsplit it cannot be called with two tokens alone: {error!r}"
            continue
        trials.append(WholeTrial(name, part, given, expected, hooks, _tolerance(part) if exact else None))
    for others in control.gather(untried, "comparing which models can be called with two tokens"):
        untried |= others
    return [trial for trial in trials if trial.name not in untried], untried


def _problem(model: "PreTrainedModel", mesh: DeviceMesh) -> str | None:
    """Why nobody knows what two tokens are to a model, or what it gives for them; or None."""
    if model.main_input_name != IDS:
        return f"its input is {model.main_input_name}, not {IDS}"
    if any(hasattr(part, RESCALED) for part in model.modules()):
        return "it changes its weights in its first call"
    for name, p in model.named_parameters():
        if p.requires_grad and not _is_plain(p):
            return f"{name} is a trained {type(p).__name__}"
    for kind in {x.device.type for x in (*model.parameters(), *model.buffers())} - {mesh.device_type}:
        return f"it has weights on {kind}, and the mesh is of {mesh.device_type}"
    return None


def _two_tokens(model: "PreTrainedModel", device: str) -> dict[str, object]:
    ids = torch.tensor([[1, 2]], device=device)
    known: dict[str, object] = {"attention_mask": torch.ones_like(ids), "use_cache": False}
    if getattr(model.config, "is_encoder_decoder", False):
        known["decoder_input_ids"] = ids
    named = parameters_of(model)
    return {IDS: ids} | {name: x for name, x in known.items() if name in named}


def _tolerance(model: nn.Module) -> float | None:
    """The relative difference that is allowed; None in a precision in which a choice among experts may turn."""
    dtypes = {x.dtype for x in model.parameters() if x.is_floating_point()}
    known = dtypes <= PLAN_TOLERANCE.keys() and torch.get_float32_matmul_precision() == "highest"
    return max(PLAN_TOLERANCE[dtype] for dtype in dtypes) if known else None


def _run(model: nn.Module, given: dict[str, object], hooks: set[int], *, weights: bool) -> dict[str, Tensor]:
    """What a model gives, and the gradients of its vectors that every rank has whole; those of weights are dropped one
    by one, and are not asked for without `weights`.
    """
    found: dict[str, Tensor] = {}
    device = next(model.parameters()).device
    devices = [] if device.type == "cpu" else [device.index]
    with (
        torch.random.fork_rng(devices=devices, device_type="cuda" if device.type == "cpu" else device.type),
        torch.autocast(device.type, enabled=False),
        torch.enable_grad(),
        _lent(model, hooks),
    ):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed those of GPUs too
        for name, p in ((name, p) for name, p in model.named_parameters() if _is_plain(p)):
            vector = p.dim() == 1 and p.is_floating_point() and not isinstance(p, DTensor)
            p.requires_grad_(vector or (weights and p.requires_grad))
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(_Taken(found, f"the gradient of {name}" if vector else None))
        y = first_output(model.eval()(**given))
        found[OUTPUT] = y.detach()
        if y.requires_grad:
            y.to(torch.promote_types(y.dtype, torch.float32)).square().mean().backward()
    return found


class _Taken:
    """A hook that takes a gradient away as soon as it is there, and keeps it under a name."""

    def __init__(self, found: dict[str, Tensor], name: str | None) -> None:
        self.found, self.name = found, name

    def __call__(self, p: Tensor) -> None:
        if self.name is not None and p.grad is not None:  # which is None where a backward pass found none
            self.found[self.name] = p.grad
        p.grad = None


@contextmanager
def _lent(model: nn.Module, hooks: set[int]) -> Iterator[None]:
    """The model with other parameters of the same memory, copies of buffers, and without `hooks`; whatever changes of
    its modules in the context is undone.
    """
    streams = {x for module in model.modules() for x in vars(module).values() if isinstance(x, Stream)}
    owners: list[Any] = [*model.modules(), *streams]
    before = [(owner, dict(vars(owner))) for owner in owners]
    lent: dict[int, Tensor] = {}

    def lend(x: Tensor | None) -> Tensor | None:
        if x is None or not _is_plain(x):
            return x
        if id(x) not in lent:
            lent[id(x)] = nn.Parameter(x.detach(), x.requires_grad) if isinstance(x, nn.Parameter) else x.clone()
        return lent[id(x)]

    try:
        for owner, attributes in before:
            for name, value in attributes.items():
                if isinstance(value, (dict, list, set)):
                    vars(owner)[name] = copy.copy(value)
            if isinstance(owner, nn.Module):
                for table in (vars(owner)[name] for name in ("_parameters", "_buffers")):
                    table.update({name: lend(x) for name, x in table.items()})
                for table in (vars(owner)[name] for name in HOOKS):
                    for number in hooks & table.keys():
                        del table[number]
            if isinstance(owner, GridAttention):
                owner.debug, owner._compared = False, True  # so that it counts nothing
        yield
    finally:
        for owner, attributes in before:
            vars(owner).clear()
            vars(owner).update(attributes)


def _is_plain(x: Tensor) -> bool:
    """Whether it is none of a class of another library's, such as what a quantisation has made."""
    return type(x) in (Tensor, nn.Parameter, DTensor)


def _hooks_of(model: nn.Module) -> set[int]:
    return {number for module in model.modules() for table in HOOKS for number in getattr(module, table)}


def _raised_in(error: BaseException, model: nn.Module) -> str | None:
    """The name of the innermost module in whose call an exception was raised; None: in none but the model's own."""
    names = {module: name for name, module in model.named_modules()}
    found, trace = None, error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        found = names.get(owner, found) if isinstance(owner, nn.Module) else found
        trace = trace.tb_next
    return found or None
