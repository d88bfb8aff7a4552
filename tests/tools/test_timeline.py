"""The clock of recorded ranks: pipelines against their formula, overlap, processors that ranks share."""

from dataclasses import dataclass

import pytest
import torch

from two_level_mha.experiment.hardware import hardware
from two_level_mha.experiment.model import Layout, Sizes
from two_level_mha.experiment.pricing import Cost
from two_level_mha.experiment.recorder import Start, Wait, Work
from two_level_mha.experiment.runs import Call, record_layout, stages_of
from two_level_mha.experiment.timeline import simulate

SIZES = Sizes(layers=4, heads=4, kv_heads=4, head_dim=8, mlp_hidden=64, batch=16, length=8)


@dataclass
class Seconds:
    """Prices: work by its bytes, backward work by twice that; collectives by their bytes."""

    hidden: float = 1.0
    cores: int | None = None

    def work(self, work):
        return Cost(work.bytes * (2 if work.backward else 1), "memory")

    def start(self, start):
        return Cost(start.bytes, "fast links", held=(1 - self.hidden) * start.bytes)


@dataclass
class Products(Seconds):
    """A product takes a second in all of a stage's micro-batch, forward; everything else, and sending, nothing."""

    each: float = 1.0

    def work(self, work):
        return Cost(self.each if work.kind == "product" else 0.0, "products")

    def start(self, start):
        return Cost(0.0, "fast links")


def work(seconds, backward=False):
    return Work("work", "memory", 0, seconds, 4, (), backward)


def exchange(seconds, name="all_reduce", ranks=(0, 1), peer=None, waited=True):
    return Start(name, ranks, peer, seconds, seconds, False, waited)


def of_stage(layout, mode="prefill"):
    run = record_layout(SIZES, layout, hardware(f"cpu-{layout.ranks}"), Call(mode, True, torch.float32))
    assert not run.refused
    return run.events


@pytest.mark.parametrize("p, m", [(2, 1), (2, 4), (4, 4), (4, 16)])
def test_bubbles_of_gpipe(p, m):
    """E. Localises: a message that does not hold up its receiver, or does its sender; the order of a schedule."""
    lanes = simulate(of_stage(Layout(pp=p, schedule="GPipe", micro_batches=m)), Products())
    computing = {rank: lane.computing for rank, lane in lanes.items()}
    assert set(computing.values()) == {m * 6 * SIZES.layers / p}
    total = max(lane.now for lane in lanes.values())
    assert 1 - computing[0] / total == pytest.approx((p - 1) / (m + p - 1))


@pytest.mark.parametrize("schedule", ["GPipe", "1F1B"])
@pytest.mark.parametrize("p, m", [(2, 4), (4, 8)])
def test_bubbles_of_training(schedule, p, m):
    """E. Localises: backward messages; both schedules are empty for the same share, (p - 1) / (m + p - 1)."""
    lanes = simulate(of_stage(Layout(pp=p, schedule=schedule, micro_batches=m), "training"), Products())
    total = max(lane.now for lane in lanes.values())
    busiest = max(lane.computing for lane in lanes.values())
    assert 1 - busiest / total == pytest.approx((p - 1) / (m + p - 1), abs=0.02)  # the first stage needs no dX


def test_pieces_of_a_pipeline_follow_each_other():
    """E. Localises: a pipeline that is emptied between pieces, or repeats that are not the same events."""
    events = of_stage(Layout(pp=2, schedule="GPipe", micro_batches=4))
    one, four = (max(lane.now for lane in simulate(events, Products(), repeats=n).values()) for n in (1, 4))
    piece = 4 * 6 * 2
    assert one == piece * 5 / 4
    assert four == 4 * piece + piece / 4


@pytest.mark.parametrize("hidden, expected", [(1.0, 10), (0.5, 13), (0.0, 16)])
def test_what_an_exchange_hides(hidden, expected):
    """E. Localises: the share of an exchange that computing beside it hides."""
    events = [exchange(6), work(10), Wait(0)]
    lane = simulate({0: events}, Seconds(hidden))[0]
    assert (lane.now, lane.computing, lane.exposed) == (expected, 10, expected - 10)


def test_exchanges_take_turns():
    """E. Localises: two exchanges of a rank at a time."""
    lane = simulate({0: [exchange(6), exchange(6), work(1), Wait(0), work(1), Wait(1)]}, Seconds())[0]
    assert (lane.now, lane.exposed) == (12, 10)


def test_messages_take_their_time():
    """E. Localises: a message that is there before it was sent, or that holds up its sender."""
    send, take = exchange(3, "send", (0, 1), 1), exchange(0, "recv", (0, 1), 0)
    lanes = simulate({0: [work(10), send, work(5)], 1: [take, work(1)]}, Seconds())
    assert (lanes[0].now, lanes[0].exposed) == (15, 0)
    assert (lanes[1].now, lanes[1].waiting) == (14, 13)


def test_weights_are_gathered_ahead():
    """E. Localises: an all-gather of FSDP2 that waits for the layer before, or runs two layers ahead."""
    gather = exchange(4, "all_gather", waited=False)
    sums = exchange(5, "reduce_scatter", waited=False)
    lane = simulate({0: [gather, work(10), gather, work(10), sums]}, Seconds())[0]
    assert (lane.now, lane.exposed) == (4 + 20 + 5, 9)


def test_ranks_that_share_a_processor():
    """E. Localises: the time of a rank that waits, which the other one has."""
    send, take = exchange(0, "send", (0, 2), 2), exchange(0, "recv", (0, 2), 0)
    alone = {0: [work(10), send], 2: [take, work(10)]}
    assert simulate(alone, Seconds(cores=2))[2].now == 10  # each at twice the speed of both at once
    assert simulate(alone, Seconds(cores=4))[2].now == 20
    both = simulate({0: [work(10)], 2: [work(4)]}, Seconds(cores=2))
    assert (both[2].now, both[0].now) == (4, 7)


def test_ranks_that_wait_for_ever():
    """Localises: a pipeline of which a stage is missing, or sends less."""
    with pytest.raises(ValueError, match=r"ranks \[1\] wait for messages"):
        simulate({0: [work(1)], 1: [exchange(1, "recv", (0, 1), 0)]}, Seconds())


def test_stages():
    """E. Localises: which rank stands for a stage."""
    assert stages_of(Layout(tp=8, pp=2)) == [0, 8]
