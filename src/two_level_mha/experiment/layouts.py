"""The layouts of the experiment's model, ours and those of torch's own parts: which there are for sizes and ranks."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import two_level_mha as tlm
from two_level_mha.context import ACTIVATIONS
from two_level_mha.experiment.transformer import Sizes
from two_level_mha.names import Activations, Scheme


@dataclass(frozen=True)
class Layout:
    """How the model lies on the ranks. Ours where there is a grid; else tp * dp * pp ranks.

    scheme, activations, overlap: as TwoLevelAttention has them. mlp: "split" by columns and rows, or "gathered": each
    rank keeps 1 / P of its weights, and gathers them for its own tokens (FSDP2).
    tp: past the number of KV heads these are copied to the ranks that need them, which cannot be trained.
    rows: tensor parallelism with the activations split by rows between layers (sequence parallelism).
    sharded: the weights over the data-parallel ranks (FSDP2); else these have copies.
    schedule, micro_batches: of the pipeline.
    """

    grid: tuple[int, int] | None = None
    scheme: Scheme = "auto"
    activations: Activations = "replicated"
    overlap: int = 1
    mlp: str = "split"
    tp: int = 1
    dp: int = 1
    pp: int = 1
    rows: bool = False
    sharded: bool = False
    schedule: str = ""
    micro_batches: int = 1

    @property
    def ranks(self) -> int:
        return self.tp * self.dp * self.pp if self.grid is None else self.grid[0] * self.grid[1]

    @property
    def exact(self) -> bool:
        return self.scheme != "independent"

    @property
    def name(self) -> str:
        if self.grid is not None:
            words = [f"ours {self.grid[0]}x{self.grid[1]}", self.scheme, self.activations]
            words += ["MLP gathered"] * (self.mlp == "gathered") + [f"overlap {self.overlap}"] * (self.overlap > 1)
            return ", ".join(words)
        words = [f"TP{self.tp}" + " by rows" * self.rows] * (self.tp > 1)
        words += [f"{'FSDP' if self.sharded else 'DP'}{self.dp}"] * (self.dp > 1)
        words += [f"PP{self.pp} {self.schedule} {self.micro_batches}"] * (self.pp > 1)
        return " x ".join(words) or "one rank"


ONE_RANK = Layout()


def layouts(sizes: Sizes, ranks: int, *, micro_batches: int, overlap: int, training: bool = False) -> list[Layout]:
    """All that exist for these sizes: ours of every grid, exact scheme and layout of activations, in one piece and in
    `overlap` chunks where a call can be cut; then the others.

    Raises ValueError where batch and length do not fit a layout that they would be wrong in: see check.
    """
    found = list(ours(sizes, ranks, overlap))
    found += list(baselines(sizes, ranks, micro_batches, training))
    for layout in found:
        check(sizes, layout)
    return found


def ours(sizes: Sizes, ranks: int, overlap: int) -> Iterator[Layout]:
    for activations in ACTIVATIONS:
        for chunks in dict.fromkeys((1, overlap)):
            plan = tlm.plan(
                embed_dim=sizes.embed_dim, num_heads=sizes.heads, num_kv_heads=sizes.kv_heads, head_dim=sizes.head_dim,
                ranks=ranks, batch=sizes.batch, seq=sizes.length, activations=activations, overlap=chunks,
                device_type="cpu",
            )  # fmt: skip
            for option in plan.options:
                assert option.scheme != "position"  # that of a cache
                # of grouped heads its slices would read other key/value heads than the same heads, narrower, do
                paper = sizes.kv_heads == sizes.heads and (activations, chunks) == ("replicated", 1)
                if option.overlap == chunks and (option.exact or paper):
                    one = Layout(option.grid, option.scheme, activations, chunks)
                    yield one
                    if option.scheme == "weights" and activations != "replicated":
                        yield replace(one, mlp="gathered")


def baselines(sizes: Sizes, ranks: int, micro_batches: int, training: bool) -> Iterator[Layout]:
    """Tensor parallelism where its ranks divide the KV heads, and past them with copies, which cannot be trained so."""
    factors = [(a, ranks // a) for a in range(1, ranks + 1) if ranks % a == 0]
    for tp, others in factors:
        if sizes.heads % tp or sizes.kv_heads % tp and (training or tp % sizes.kv_heads):
            continue
        if tp > 1 and others == 1:
            yield Layout(tp=tp)
            yield Layout(tp=tp, rows=True)
        if others > 1:
            yield Layout(tp=tp, dp=others, sharded=True)
            if tp == 1 or not training:  # copies that train beside tensor parallelism: torch has no public form
                yield Layout(tp=tp, dp=others)
            if sizes.layers % others == 0:
                for schedule, pieces in (("GPipe", 1), ("GPipe", micro_batches), ("1F1B", micro_batches)):
                    if schedule == "GPipe" or (training and pieces >= others):
                        yield Layout(tp=tp, pp=others, schedule=schedule, micro_batches=pieces)


def check(sizes: Sizes, layout: Layout) -> None:
    """Raises ValueError where torch's own parts would not refuse, and be wrong."""
    if sizes.batch % layout.micro_batches:
        raise ValueError(
            f"{layout.micro_batches} micro-batches do not divide the batch of {sizes.batch}, with which "
            "torch.distributed.pipelining gives wrong numbers: choose another of the two"
        )
    if sizes.batch % layout.dp:
        raise ValueError(
            f"{layout.dp} data-parallel ranks do not divide the batch of {sizes.batch}: choose another batch"
        )
    if layout.rows and sizes.length % layout.tp:
        raise ValueError(f"{layout.tp} ranks do not divide the length of {sizes.length}: choose another length")
    if layout.pp > 1 and sizes.layers % layout.pp:
        raise ValueError(f"{layout.pp} pipeline stages do not divide {sizes.layers} layers: choose another number")
