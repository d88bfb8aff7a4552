"""The check of numbers: a layer of every exact scheme, forward and backward, against the unsplit layer of one seed."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from two_level_mha.agreement import digest
from two_level_mha.check.context import EMBED_DIM, FAIL, OK, Context, Finding, odd_ranks, ranks_text
from two_level_mha.decoder import TwoLevelAttention
from two_level_mha.errors import GridError
from two_level_mha.layer import SCHEMES, stores_whole_heads

EXACT = tuple(scheme for scheme in SCHEMES if scheme not in ("auto", "independent"))
DTYPES = {"cpu": (torch.float64, 1e-10), "cuda": (torch.float32, 2e-5)}  # device type -> dtype, relative tolerance
SEED = 2026
BATCH, LENGTH = 2, 5


def layers(context: Context) -> dict[str, dict[str, Any]]:
    """Scheme -> what this rank found of it; {} for one that this grid cannot run.

    "weights": whether its blocks are those of the unsplit layer. "unsplit": a digest of that layer's results here.
    "output", "gradients": relative differences, of gradients in its own blocks and of the input. "bits": a digest of
    the output. "again": whether a second run gives the same bits.
    """
    whole, x, dy = _drawn(context, None, None)
    expected = _run(whole, x, dy)
    unsplit = digest(list(expected.values()))
    found: dict[str, dict[str, Any]] = {}
    for scheme in EXACT:
        try:
            stores_whole_heads(scheme, context.sizes.num_heads, context.sizes.num_kv_heads, context.grid)
        except GridError:
            found[scheme] = {}
            continue
        layer, x, dy = _drawn(context, context.mesh, scheme)
        weights = {name: _local(layer.block(p.detach(), name)) for name, p in whole.named_parameters()}
        same = all(torch.equal(_local(p.detach()), weights[name]) for name, p in layer.named_parameters())
        results, again = _run(layer, x, dy), _run(layer, x, dy)
        blocks = {name: _local(layer.block(expected[name], name)) for name in weights} | {"x": expected["x"]}
        found[scheme] = {
            "weights": same,
            "unsplit": unsplit,
            "output": _relative(results["y"], expected["y"]),
            "gradients": max(_relative(results[name], block) for name, block in blocks.items()),
            "bits": digest([results["y"]]),
            "again": digest(list(results.values())) == digest(list(again.values())),
        }
    return found


def judge_layers(context: Context, answers: list[dict[str, dict[str, Any]]]) -> list[Finding]:
    findings = [
        Finding(FAIL, f"scheme {scheme}: {text}", ranks)
        for scheme in EXACT
        if answers[0][scheme]
        for text, ranks in _problems([answer[scheme] for answer in answers], DTYPES[context.device.type][1])
    ]
    run = [scheme for scheme in EXACT if answers[0][scheme]]
    worst = max(max(answer[scheme][what] for what in ("output", "gradients")) for answer in answers for scheme in run)
    left_out = [scheme for scheme in EXACT if scheme not in run]
    text = f"{', '.join(run)}: the unsplit layer's numbers within {worst:.0e}, the same bits on all ranks and again"
    return findings or [Finding(OK, text + (f" (this grid has no {', '.join(left_out)})" if left_out else ""))]


def _problems(answers: list[dict[str, Any]], tolerance: float) -> list[tuple[str, tuple[int, ...]]]:
    """What is wrong with one scheme, and on which ranks: first what only the rank at fault sees."""
    everyone = tuple(range(len(answers)))
    problems = []
    # not <= : a NaN is wrong too
    wrong = {
        what: tuple(rank for rank in everyone if not answers[rank][what] <= tolerance)
        for what in ("output", "gradients")
    }
    other_weights = tuple(rank for rank in everyone if not answers[rank]["weights"])
    if other_weights:
        problems.append((f"{ranks_text(other_weights)} drew other weights than the unsplit layer's", other_weights))
    if wrong["output"] or wrong["gradients"]:
        other_unsplit = odd_ranks([answer["unsplit"] for answer in answers])
        worst = max(answer[what] for answer in answers for what in wrong)
        if other_unsplit and not other_weights:
            text = f"{ranks_text(other_unsplit)} computes the unsplit layer to other bits than the others"
            problems.append((text, other_unsplit))
        seen = tuple(sorted({*wrong["output"], *wrong["gradients"]}))
        where = "all ranks" if seen == everyone and len(everyone) > 1 else ranks_text(seen)
        named = other_weights or other_unsplit or seen
        problems.append((f"wrong by {worst:.0e} (at most {tolerance:.0e} is rounding) on {where}", named))
    if odd := odd_ranks([answer["bits"] for answer in answers]):
        problems.append((f"{ranks_text(odd)} has other bits in the output than the others", odd))
    if other := tuple(rank for rank in everyone if not answers[rank]["again"]):
        problems.append((f"a second run gave other bits on {ranks_text(other)}", other))
    return problems


def _drawn(context: Context, mesh: DeviceMesh | None, scheme: str | None) -> tuple[TwoLevelAttention, Tensor, Tensor]:
    """A layer, its input and the gradient of its output: the same on every rank, split or not."""
    dtype, _ = DTYPES[context.device.type]
    torch.manual_seed(SEED)
    x, dy = (torch.randn(BATCH, LENGTH, EMBED_DIM, dtype=dtype) for _ in range(2))
    options = {} if scheme is None else {"scheme": scheme}
    # debug=False: TLM_DEBUG may differ between ranks, which is reported, and must not hang this check
    layer = context.inputs.layer(mesh, context.sizes, dtype=dtype, debug=False, **options)
    return layer.to(context.device), x.to(context.device), dy.to(context.device)


def _run(layer: TwoLevelAttention, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """y, and the gradients of x and of this rank's parameters by name."""
    x = x.clone().requires_grad_()
    names, parameters = zip(*layer.named_parameters(), strict=True)
    y = layer(x)
    dx, *gradients = torch.autograd.grad(y, [x, *parameters], dy)
    return {"y": y.detach(), "x": dx} | dict(zip(names, map(_local, gradients), strict=True))


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def _relative(x: Tensor, expected: Tensor) -> float:
    return ((x - expected).abs().max() / expected.abs().max().clamp_min(1.0)).item()
