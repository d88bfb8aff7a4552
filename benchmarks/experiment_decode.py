"""Decoding in every layout: one token a step for each sequence, with a KV cache that holds T tokens before the first.

Ours keeps the cache by position or by batch (two_level_mha.cache_layer) on every grid. Tensor parallelism keeps whole
KV heads, and copies of them past their number. Data parallelism has its own sequences, with a batch that need not
divide. In a pipeline micro-batches go round: the first stage begins a step of one when the last has finished its step
before, which it tells by the tokens; both micro-batches=1 and as many as there are stages.

A run is `steps` steps, after which the cache goes back to T tokens; time per output token (TPOT) is a run's over steps.
What is fed in is fixed and the same for all. Each rank compares what it has of the outputs, after all steps.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from experiment_ranks import Case, Setting, attempt, check, mesh_for, record, row_of, worst
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import two_level_mha as tlm
from two_level_mha.experiment.model import ONE_RANK, HeadsCache, Layout, Sizes, baselines, build

Rows = list[tuple[Tensor, Tensor]]  # keys and values (B, k, T, d) of each layer


def decode_cases(setting: Setting, meshes: dict) -> Iterator[Case]:
    """One for each batch and layout; collectives."""
    for batch in setting.batches:
        sizes = replace(setting.sizes, batch=batch, length=1)
        found = Found(setting, sizes)
        for layout, cache in decode_layouts(sizes, dist.get_world_size()):
            if setting.asked(f"{layout.name}, cache by {cache}"):
                yield prepared(replace(setting, sizes=sizes), found, layout, cache, meshes)


def decode_layouts(sizes: Sizes, ranks: int) -> Iterator[tuple[Layout, str]]:
    """Layouts, and how ours keep the cache."""
    for grid in tlm.Grid.candidates(ranks, sizes.heads, sizes.kv_heads, sizes.head_dim, device_type="cpu"):
        for cache in ("position", "batch")[: 1 if grid.slices == 1 else 2]:
            yield Layout((grid.head_groups, grid.slices)), cache
    roomy = replace(sizes, batch=ranks)  # a batch that divides; it need not
    seen = set()
    for layout in baselines(roomy, ranks, 1, training=False):
        plain = replace(layout, rows=False, sharded=False)  # one token has no rows; weights are gathered by no one
        if plain in seen or layout.dp > sizes.batch:
            continue
        seen.add(plain)
        yield plain, "heads"
        if plain.pp > 1 and sizes.batch % plain.pp == 0:
            yield replace(plain, micro_batches=plain.pp), "heads"


class Found:
    """What every layout begins with, and what the unsplit model gives."""

    def __init__(self, setting: Setting, sizes: Sizes) -> None:
        torch.manual_seed(0)
        self.sizes, self.context, self.steps = sizes, setting.context, setting.steps
        model = build(sizes, ONE_RANK, None, stock=True, **setting.factory).model
        self.state = model.state_dict()
        shape = (sizes.batch, sizes.kv_heads, self.context, sizes.head_dim)
        self.rows = [tuple(torch.randn(shape, **setting.factory) for _ in range(2)) for _ in range(sizes.layers)]
        self.x = torch.randn(self.steps, sizes.batch, 1, sizes.embed_dim, **setting.factory)
        caches = caches_of(self.rows, self.steps)
        self.output = decode(model, self.x, lambda: caches)

    @property
    def length(self) -> int:
        """That the caches must hold."""
        return self.context + self.steps


def prepared(setting: Setting, found: Found, layout: Layout, cache: str, meshes: dict) -> Case:
    """A layout that was checked and recorded, or whose row says why it is not to be timed; a collective."""
    sizes = found.sizes
    row = row_of(setting, layout, "decode", True)
    row |= {"B": sizes.batch, "T": found.context, "steps": found.steps, "tokens": sizes.batch * found.steps}
    row["cache"] = cache
    if layout.grid is not None:
        row["layout"] = f"ours {layout.grid[0]}x{layout.grid[1]}, cache by {cache}"
    elif layout.pp > 1:
        row["layout"] = layout.name.replace("GPipe ", "micro-batches ")
    case = Case(row)

    def prepare() -> None:
        mesh = mesh_for(layout, setting, meshes)
        # no stages of torch's, whose shapes are fixed; a rank's own sequences are cut here
        model = build(
            sizes, replace(layout, dp=1, micro_batches=1), mesh, state=found.state, stock=setting.stock,
            **setting.factory,
        ).model  # fmt: skip
        make = _ours if layout.grid is not None else _others
        case.run, case.before, held, own = make(found, layout, cache, mesh, model)
        case.holds, row["cache_bytes"] = tuple(held), sum(x.numel() * x.element_size() for x in held)
        case.before()
        y = case.run()
        expected = {"output": found.output[:, own]}
        check(row, worst({} if y is None else {"output": y}, expected), setting)
        record(case, model, setting)

    attempt(row, prepare)
    return case


Made = tuple[Callable[[], Tensor | None], Callable[[], None], list[Tensor], slice]  # the last: sequences of this rank


def _ours(found: Found, layout: Layout, kind: str, mesh: DeviceMesh, model: nn.Module) -> Made:
    sizes = found.sizes
    config = {"num_layers": sizes.layers, "num_kv_heads": sizes.kv_heads, "head_dim": sizes.head_dim}
    cache = tlm.KVCache(config, mesh, layout=kind, max_length=found.length)
    (n, m), (i, j) = layout.grid, mesh.get_coordinate()
    heads, share = slice(i * sizes.kv_heads // n, (i + 1) * sizes.kv_heads // n), -(-sizes.batch // m)
    with torch.no_grad():
        for layer, rows in zip(cache.layers, found.rows, strict=True):
            layer.begin(sizes.batch, found.context)
            layer.append(*(_part(x[:, heads], kind, j, m, share) for x in rows), found.context)
    run = partial(decode, model, found.x, lambda: cache.layers)
    held = [x for layer in cache.layers for x in layer.memory]
    return run, lambda: cache.rewind(cache.length - found.context), held, slice(None)


def _part(x_BKTd: Tensor, kind: str, j: int, m: int, share: int) -> Tensor:
    """Of slice j: every m-th position, or `share` sequences, of which the last ones may be of zeros."""
    if kind == "position":
        return x_BKTd[:, :, j::m].contiguous()
    part = x_BKTd[j * share : (j + 1) * share]
    return torch.cat([part, part.new_zeros(share - len(part), *part.shape[1:])])


def _others(found: Found, layout: Layout, kind: str, mesh: DeviceMesh, model: nn.Module) -> Made:
    sizes, at = found.sizes, {axis: mesh.get_local_rank(axis) for axis in ("dp", "pp", "tp")}
    share = -(-sizes.batch // layout.dp)
    own = slice(at["dp"] * share, (at["dp"] + 1) * share)
    first, last = (rank * sizes.kv_heads // layout.tp for rank in (at["tp"], at["tp"] + 1))
    heads = slice(first, max(last, first + 1))
    each = sizes.layers // layout.pp
    rows = [tuple(x[own, heads] for x in pair) for pair in found.rows[at["pp"] * each : (at["pp"] + 1) * each]]
    cut = [caches_of([tuple(x.chunk(layout.micro_batches)[piece] for x in pair) for pair in rows], found.steps)
           for piece in range(layout.micro_batches)]  # fmt: skip
    x = found.x[:, own]
    if layout.pp == 1:
        run = partial(decode, model, x, lambda: cut[0])
    else:
        run = partial(decode_in_stages, model, x.chunk(layout.micro_batches, 1), cut, mesh.get_group("pp"))

    def before() -> None:
        for cache in (cache for piece in cut for cache in piece):
            cache.length = found.context

    return run, before, [x for piece in cut for cache in piece for x in cache.memory], own


def caches_of(rows: Rows, steps: int) -> list[HeadsCache]:
    """Of each layer, with room for more tokens."""
    return [HeadsCache(*(nn.functional.pad(x, (0, 0, 0, steps)) for x in pair), pair[0].shape[2]) for pair in rows]


def decode(model: nn.Module, x_TB1D: Tensor, caches: Callable[[], list]) -> Tensor:
    """Outputs (steps, B, 1, D) of as many steps."""
    with torch.no_grad():
        return torch.stack([model(x_B1D, caches=caches()) for x_B1D in x_TB1D])


def decode_in_stages(
    model: nn.Module, pieces: tuple[Tensor, ...], caches: list[list[HeadsCache]], group: dist.ProcessGroup
) -> Tensor | None:
    """The same on one stage of a pipeline, for micro-batches (steps, B, 1, D); the last stage has the outputs."""
    at, stages, steps = group.rank(), group.size(), len(pieces[0])
    sent: list[tuple[dist.Work, Tensor]] = []  # under way: nothing waits for a neighbour that is sending itself
    outputs = []

    def send(x: Tensor, to: int) -> None:
        sent.append((dist.isend(x, group=group, group_dst=to), x))

    with torch.no_grad():
        for step in range(steps):
            for piece, cache in zip(pieces, caches, strict=True):
                tokens_B = torch.zeros(piece.shape[1], dtype=torch.int64, device=piece.device)  # as a model's are
                if at > 0:
                    x_B1D = torch.empty_like(piece[step])
                    dist.recv(x_B1D, group=group, group_src=at - 1)
                else:
                    x_B1D = piece[step]
                    if step > 0:
                        dist.recv(tokens_B, group=group, group_src=stages - 1)
                y_B1D = model(x_B1D, caches=cache)
                if at < stages - 1:
                    send(y_B1D, at + 1)
                else:
                    outputs.append(y_B1D)
                    if step < steps - 1:
                        send(tokens_B, 0)
    for work, _ in sent:
        work.wait()
    if not outputs:
        return None
    count = len(pieces)
    return torch.stack([torch.cat(outputs[step * count : (step + 1) * count]) for step in range(steps)])
