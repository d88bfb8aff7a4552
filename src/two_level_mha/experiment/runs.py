"""What the ranks of a layout do in a call, recorded at full size: one rank of each pipeline stage; others do alike.

A batch that does not fit in memory is run in pieces, one after the other; the largest piece that fits is recorded.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import two_level_mha as tlm
from two_level_mha.cache_layer import CacheLayer
from two_level_mha.experiment.fake import FakeTensors, on_fake_rank
from two_level_mha.experiment.hardware import Hardware
from two_level_mha.experiment.model import Built, HeadsCache, Layout, Sizes, build, check, mesh_of
from two_level_mha.experiment.recorder import Event, Start, Wait, Work, record
from two_level_mha.names import CacheLayout

RESERVED = 0.06  # of a rank's memory: contexts, buffers of collectives, fragments
MODES = ("prefill", "training", "decode")


@dataclass(frozen=True)
class Call:
    """mode: "prefill", a forward pass; "training", forward, backward and the reduction of gradients; "decode", one
    token for each sequence, the last of the length, on a KV cache. cache: how ours keeps that.
    """

    mode: str
    causal: bool
    dtype: torch.dtype
    cache: CacheLayout = "position"


@dataclass
class Run:
    """A layout as it was recorded. batch: sequences of a piece; events: of one rank of each stage; peak: bytes, of the
    rank that holds the most, and weights, those of its parameters; refused: why there are no events.
    """

    layout: Layout
    batch: int = 0
    events: dict[int, list[Event]] = field(default_factory=dict)
    peak: int = 0
    weights: int = 0
    refused: str = ""


def stages_of(layout: Layout) -> list[int]:
    """One rank of each pipeline stage."""
    return [stage * layout.tp for stage in range(layout.pp)]


def padded(sizes: Sizes, layout: Layout) -> Sizes:
    """The length as ranks compute it that split its rows in equal parts."""
    parts = 2 * layout.ranks if layout.activations == "sequence" else layout.tp if layout.rows else 1
    return replace(sizes, length=-(-sizes.length // parts) * parts)


def pieces_of(sizes: Sizes, layout: Layout) -> list[int]:
    """Batches of equal pieces that the layout can run, the largest first."""
    found = []
    for batch in range(sizes.batch, 0, -1):
        if sizes.batch % batch == 0:
            try:
                check(replace(padded(sizes, layout), batch=batch), layout)
            except ValueError:
                continue
            found.append(batch)
    return found


def record_layout(sizes: Sizes, layout: Layout, machine: Hardware, call: Call) -> Run:
    """The run of a layout on the ranks of a machine, none of which holds more than its memory."""
    batches = pieces_of(sizes, layout)
    if call.mode == "decode":
        batches = [batch for batch in batches if batch == sizes.batch]
    if not batches:
        return Run(layout, refused=f"the batch of {sizes.batch} does not fit this layout")
    run = Run(layout, batches[0])
    stages = stages_of(layout)
    waiting = list(stages)
    while waiting:
        rank = waiting.pop(0)
        allowed = [batch for batch in batches if batch <= run.batch]
        found = on_fake_rank(rank, machine.ranks, partial(_record_rank, sizes, layout, allowed, machine, call))
        if found.refused:
            return found
        if found.batch < run.batch:
            waiting = [stage for stage in stages if stage != rank]  # a piece is the same for all stages
            run = Run(layout, found.batch)
        run.events[rank] = found.events[rank]
        run.peak, run.weights = max(run.peak, found.peak), max(run.weights, found.weights)
    return run


def _record_rank(sizes: Sizes, layout: Layout, batches: list[int], machine: Hardware, call: Call) -> Run:
    """This rank's run with the largest of `batches` that fits."""
    torch.set_default_dtype(call.dtype)
    mesh, rank = mesh_of(layout), dist.get_rank()
    limit = machine.memory * (1 - RESERVED)
    while True:
        piece = padded(replace(sizes, batch=batches[0]), layout)
        events, peak, weights = _record(piece, layout, mesh, machine, call)
        if peak <= limit:
            return Run(layout, batches[0], {rank: events}, peak, weights)
        # what is not weights grows with the batch at most
        fits = max(0.0, (limit - weights) / max(1, peak - weights)) * batches[0]
        smaller = batches[1:]
        batches = [batch for batch in smaller if batch <= fits] or smaller[-1:]
        if not batches:
            pieces = "" if call.mode == "decode" else ", the batch in its smallest pieces"
            return Run(layout, 0, {}, peak, weights, f"does not fit: {peak / 1e9:.1f} GB a rank{pieces}")


def _record(
    sizes: Sizes, layout: Layout, mesh: DeviceMesh | None, machine: Hardware, call: Call
) -> tuple[list[Event], int, int]:
    """Events, the most bytes held, and those of the weights."""
    copies = layout.dp > 1 and not layout.sharded  # whose gradients DDP sums, in C++ that needs real memory
    training = call.mode == "training"
    with FakeTensors():
        built = build(
            sizes, layout, mesh, causal=call.causal, training=training and not copies, dtype=call.dtype,
            profile=machine.profile,
        )  # fmt: skip
        prepare = _decode if call.mode == "decode" else _whole_call
        run, held = prepare(sizes, layout, mesh, built, call)
        run()  # DTensor asks for shapes in the first call
        parameters = list(built.model.parameters())
        with record([*parameters, *held()]) as found:
            run()
    events = _of_nccl(found.events) if machine.device == "cuda" else found.events
    weights = sum((p.to_local() if hasattr(p, "to_local") else p).nbytes for p in parameters)
    if copies and training:
        assert mesh is not None
        events.append(_sum_of_gradients(mesh, weights))
    if call.mode == "decode" and layout.pp > 1:
        events = _as_stage(sizes, layout, events, call)
    return events, found.peak, weights


Prepared: TypeAlias = tuple[
    Callable[[], object], Callable[[], list[Tensor]]
]  # the call, and what is in memory before it


def _whole_call(sizes: Sizes, layout: Layout, mesh: DeviceMesh | None, built: Built, call: Call) -> Prepared:
    given = torch.empty(sizes.batch, sizes.length, sizes.embed_dim, dtype=call.dtype)
    part = built.part(given)
    # ours with split activations takes its part of x itself: the whole is not what a rank holds
    held = [] if layout.activations != "replicated" else [part]
    if call.mode != "training":
        return lambda: built.forward(part), lambda: held
    target = built.part(torch.empty_like(given), target=True)
    return lambda: built.step(part, target), lambda: [*held, target]


def _decode(sizes: Sizes, layout: Layout, mesh: DeviceMesh | None, built: Built, call: Call) -> Prepared:
    """A step with all tokens but the last in the cache, and one that DTensor asks in before."""
    layers, batch = len(built.model.layers), sizes.batch // layout.dp // layout.micro_batches
    caches: list[HeadsCache] | list[CacheLayer]
    if layout.grid is None:
        shape = (batch, sizes.kv_heads // layout.tp, sizes.length + 1, sizes.head_dim)
        caches = [HeadsCache(torch.empty(shape), torch.empty(shape), sizes.length - 1) for _ in range(layers)]
    else:
        of = {"num_layers": layers, "num_kv_heads": sizes.kv_heads, "head_dim": sizes.head_dim}
        caches = tlm.KVCache(of, mesh, layout=call.cache, max_length=sizes.length + 1).layers
    token = torch.empty(batch, 1, sizes.embed_dim)

    def step() -> Tensor:
        with torch.no_grad():
            y: Tensor = built.model(token, caches=caches)
        return y

    if layout.grid is not None:
        with torch.no_grad():
            built.model(torch.empty(batch, sizes.length - 1, sizes.embed_dim), caches=caches)

    def held() -> list[Tensor]:
        memory = [x for cache in caches for x in cache.memory]
        return memory + [torch.empty_like(x) for x in memory for _ in range(layout.micro_batches - 1)]

    return step, held


def _as_stage(sizes: Sizes, layout: Layout, events: list[Event], call: Call) -> list[Event]:
    """A stage's step on its micro-batches, each with what it takes from the stage before and gives to the next."""
    rank, batch = dist.get_rank(), sizes.batch // layout.micro_batches
    size = batch * sizes.embed_dim * call.dtype.itemsize
    stages = stages_of(layout)
    at = stages.index(rank)
    found: list[Event] = []
    for _ in range(layout.micro_batches):
        if at > 0:
            found.append(Start("recv", (stages[at - 1], rank), stages[at - 1], size, 0, False, False))
        first = len(found)
        found += [Wait(event.start + first) if isinstance(event, Wait) else event for event in events]
        if at + 1 < len(stages):
            found.append(Start("send", (rank, stages[at + 1]), stages[at + 1], size, size, False, False))
    return found


def _of_nccl(events: list[Event]) -> list[Event]:
    """As the operators run on CUDA: on the CPU they make a reduce-scatter of an all-to-all and a sum of what came."""
    summed: dict[int, int] = {}
    for i, (event, after) in enumerate(pairwise(events)):
        begun = events[event.start] if isinstance(event, Wait) else None
        exchanged = isinstance(begun, Start) and begun.name == "all_to_all"
        if isinstance(event, Wait) and exchanged and isinstance(after, Work) and after.name == "aten.sum":
            summed[event.start] = i + 1
    nothing = Work("reduce_scatter", "memory", 0, 0, 1, (), False)  # in the sum's place, so that events keep theirs
    found: list[Event] = [
        replace(event, name="reduce_scatter") if isinstance(event, Start) and i in summed else event
        for i, event in enumerate(events)
    ]
    for i in summed.values():
        found[i] = nothing
    return found


def _sum_of_gradients(mesh: DeviceMesh, size: int) -> Start:
    """What DDP sends: one all-reduce of all gradients, without what it hides behind the backward pass."""
    ranks = tuple(dist.get_process_group_ranks(mesh.get_group("dp")))
    sent = 2 * (len(ranks) - 1) * size // len(ranks)
    return Start("all_reduce", ranks, None, size, sent, backward=True, waited=False)
