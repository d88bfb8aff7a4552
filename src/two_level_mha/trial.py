"""The trial of an attention against its replacement: what names and shapes propose, numbers decide."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from two_level_mha.errors import GridError
from two_level_mha.integrations.forms import INDEXER, MASKS, SHARED_STATES, WEIGHTS_DROPOUT, weights_dropout
from two_level_mha.probe import first_output, random_copy

if TYPE_CHECKING:
    from two_level_mha.attentions import Found


# Gain of the random weights, and the difference allowed. Some models take the softmax in float32; what clips shows at
# the big numbers, where such a softmax is nearly one of its inputs. In float32 are those that cannot run in float64.
TRIALS = {torch.float64: ((1.0, 1e-6), (30.0, 1e-2)), torch.float32: ((1.0, 1e-5), (30.0, 1e-2))}


class Unlike(GridError):
    """An attention that no adapter reproduces."""


class NotCalled(Unlike):
    """One that cannot be called as its structure says."""


def drop_all_weights(original: nn.Module) -> None:
    """Puts it into training with a probability of 1 where it drops attention weights, and of 0 elsewhere."""
    original.train()
    for part in original.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    for name, value in list(vars(original).items()):
        if isinstance(value, float) and "drop" in name:
            setattr(original, name, float(name in WEIGHTS_DROPOUT))
    for name in WEIGHTS_DROPOUT:
        if isinstance(getattr(original, name, None), nn.Dropout):
            getattr(original, name).p = 1.0


def count_of(output: Any) -> int:
    """How many entries a module gave; 0: a tensor alone."""
    return 0 if isinstance(output, torch.Tensor) else len(output)


def agreeing(one: "Found", options: dict[str, Any]) -> dict[str, object] | Unlike:
    """The first of the adapter's variants that gives the original's numbers, or what is wrong with the first."""
    refusals = []
    for variant in one.adapter.variants(one.module, one.paths):
        for dtype in TRIALS:
            try:
                _try(one, options | variant, dtype)
                return variant
            except Unlike as error:
                refusals.append(error)
                if not isinstance(error, NotCalled):
                    break
    return refusals[0]


def _try(one: "Found", options: dict[str, Any], dtype: torch.dtype) -> None:
    """Raises Unlike where the replacement with these options gives other numbers than the original."""
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("cpu"):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed those of GPUs too
        for gain, tolerance in TRIALS[dtype]:
            _probe(one, options, dtype, gain, tolerance)
        if weights_dropout(one.module)[1].p > 0.0:
            _probe(one, options, dtype, *TRIALS[dtype][0], dropping=True)


def _probe(
    one: "Found", options: dict[str, Any], dtype: torch.dtype, gain: float, tolerance: float, dropping: bool = False
) -> None:
    """Runs a copy of the original and its replacement on small random inputs; raises Unlike if they differ.

    dropping: in training, where all attention weights are dropped and nothing else is.
    """
    where, known = f"{one.name} ({type(one.module).__name__})", one.adapter.name
    try:
        original, *copies = random_copy([one.module, *one.projections.values()], gain, dtype)
    except Exception as error:
        raise GridError(f"{where} is not supported: it cannot be copied for a trial: {error!r}") from error
    projections = dict(zip(one.projections, copies, strict=True))
    when = " in training, with all attention weights dropped" if dropping else ""
    if dropping:
        drop_all_weights(original)
    try:
        ours = one.adapter.new(original, projections, one.paths, None, options).train(dropping)
    except GridError as error:
        raise Unlike(f"{where} is not supported: {error}") from None
    if (indexer := getattr(original, INDEXER, None)) is not None:
        indexer.index_topk = 3  # of six keys: a choice that shows
    compared = 0
    calls = []  # twice the same: a cache in them is written to
    for _ in range(2):
        torch.default_generator.manual_seed(1)
        calls.append(one.adapter.inputs(original, dtype))
    for (args, kwargs), (our_args, our_kwargs) in zip(*calls, strict=True):
        try:
            expected = original(*args, **kwargs)
            given, expected = count_of(expected), first_output(expected)
            if one.out_in_parent:
                expected = projections["o"](expected)
        except Exception as error:
            if compared and any(kwargs.get(name, args) is None for name in MASKS):  # its model always makes one
                continue
            raise NotCalled(
                f"{where} has the structure of {known} attention, but cannot be called like it: {error!r}"
            ) from error
        try:
            got = ours(*our_args, **our_kwargs)
            got, gives = first_output(got), count_of(got)
            if gives < given or (gives > 0) != (given > 0):
                raise TypeError(f"it gives {given or 'a tensor alone'}, and they {gives or 'a tensor alone'}")
        except Exception as error:
            raise Unlike(
                f"{where} has the structure of {known} attention, but its parts do not work like it: {error!r}"
            ) from error
        compared += 1
        pairs = [(expected, got)]
        for kind, states in (kwargs.get(SHARED_STATES) or {}).items():  # what it has left for other layers
            left = our_kwargs[SHARED_STATES].get(kind, [x[:0] for x in states])
            pairs += zip(states, left, strict=False)
        for a, b in pairs:
            difference = (a - b).abs().max().item() if a.shape == b.shape else float("inf")
            if not difference <= tolerance * a.abs().max().item():
                raise Unlike(
                    f"{where} has the structure of {known} attention, but its numbers differ from it by "
                    f"{difference:.1e} on a small input{when}: it does something else, and is not supported"
                )
