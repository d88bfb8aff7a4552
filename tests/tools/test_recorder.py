"""What the recorder counts of one rank, against formulas, the planner's table of traffic, and torch's own counter."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.flop_counter import FlopCounterMode

import two_level_mha as tlm
from two_level_mha.experiment.fake import FakeTensors, on_fake_rank
from two_level_mha.experiment.model import Layout, Sizes, build, mesh_of
from two_level_mha.experiment.predict import model_flops
from two_level_mha.experiment.recorder import ATTENTION, PRODUCT, Start, Wait, causal_pairs, record
from two_level_mha.testing import record_collectives

SIZES = Sizes(layers=2, heads=16, kv_heads=16, head_dim=8, mlp_hidden=512, batch=32, length=64)
P = 16


def recorded(layout, training=False, causal=True, rank=0, ranks=None, sizes=SIZES):
    """FLOPs by kind, bytes sent, starts and the number of events of a rank of the model."""

    def run():
        mesh = mesh_of(layout)
        with FakeTensors():
            built = build(sizes, layout, mesh, causal=causal, training=training)
            x = torch.empty(sizes.batch, sizes.length, sizes.embed_dim)
            part, target = built.part(x), built.part(x, target=True)
            call = (lambda: built.step(part, target)) if training else (lambda: built.forward(part))
            call()
            with record() as found:
                call()
        return found.flops(PRODUCT), found.flops(ATTENTION), found.sent(), found.events

    return on_fake_rank(rank, ranks or layout.ranks, run)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_flops_of_the_unsplit_model(causal, training):
    """E. Localises: the formula of a product or of attention, its backward, or what causal leaves out."""
    products, attention, sent, _ = recorded(Layout(), training, causal)
    assert products + attention == model_flops(SIZES, causal=causal, training=training)
    D, h, d, L, B = SIZES.embed_dim, 16, 8, 64, 32
    pairs = L * (L + 1) // 2 if causal else L * L
    assert attention == 2 * B * h * pairs * 4 * d * (7 if training else 2) // 2
    assert products == 2 * B * L * 2 * D * (4 * h * d + 2 * 512) * (3 if training else 1)
    assert sent == 0


@pytest.mark.parametrize("training", [False, True])
def test_tensor_parallelism_does_its_share(training):
    """E. Localises: operators of DTensor counted at the whole shape, or its propagation of shapes counted as work."""
    whole = recorded(Layout(), training)
    parts = recorded(Layout(tp=P), training)
    assert [P * part for part in parts[:2]] == list(whole[:2])
    all_reduce = 2 * (P - 1) * SIZES.tokens * SIZES.embed_dim * 4 // P
    # of the two outputs of a layer, and backward of the gradients of its two inputs
    assert parts[2] == all_reduce * SIZES.layers * (4 if training else 2)


def test_torchs_counter_takes_the_whole_shape():
    """Localises: nothing of ours. Should it fail, torch counts local shapes, and the recorder can use its counter."""

    def run():
        mesh = mesh_of(Layout(tp=P))["tp"]
        with FakeTensors():
            mlp = torch.nn.Sequential(torch.nn.Linear(64, 256, bias=False), torch.nn.Linear(256, 64, bias=False))
            parallelize_module(mlp, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()}, src_data_rank=None)
            x = torch.empty(32, 64)
            mlp(x)
            with FlopCounterMode(display=False) as counter:
                mlp(x)
            with record() as found:
                mlp(x)
        return counter.get_total_flops(), found.flops()

    counted, ours = on_fake_rank(0, P, run)
    assert ours == 2 * 32 * 64 * 256 * 2 // P
    assert counted > 10 * ours


@pytest.mark.parametrize("activations", ["replicated", "sequence", "batch"])
@pytest.mark.parametrize("scheme", ["slices", "sequence", "batch", "heads", "weights"])
def test_a_layer_against_the_planner(scheme, activations):
    """E, but for what whole numbers of bytes round. Localises: a collective or FLOPs that the recorder misses or the
    planner's table has not, forward or backward.
    """

    def run():
        mesh = tlm.init_mesh("cpu", (4, 4))
        with FakeTensors():
            layer = tlm.TwoLevelAttention(128, 16, mesh=mesh, scheme=scheme, activations=activations, overlap=1)
            shape = [32, 64, 128]
            if activations != "replicated":
                shape[activations == "sequence"] //= P
            x = torch.empty(shape, requires_grad=True)
            layer(x).sum().backward()
            with record() as forward:
                y = layer(x).sum()
            with record() as backward:
                y.backward()
        return [(one.flops(PRODUCT), one.flops(ATTENTION), one.sent(), len(one.starts)) for one in (forward, backward)]

    forward, backward = on_fake_rank(0, P, run)
    plan = tlm.plan(
        embed_dim=128, num_heads=16, devices=P, batch=32, seq=64, dtype=torch.float32, activations=activations,
        overlap=1, device_type="cpu",
    )  # fmt: skip
    option = next(one for one in plan.options if (one.grid, one.scheme) == ((4, 4), scheme))
    assert forward[0] == option.projection_flops
    assert forward[1] == pytest.approx(option.attention_flops * 65 / 64)  # the planner leaves out the diagonal's half
    compared = 128  # bytes at most that ranks compare, in each exchange that could carry them; not on a fake group
    for (_, _, sent, count), is_backward in ((forward, False), (backward, True)):
        planned = option.sent_bytes(backward=is_backward)
        assert planned - P * compared <= sent <= planned
        assert count in (option.collectives(backward=is_backward), option.collectives(backward=is_backward) - 1)


def test_what_fsdp_and_pipelines_send():
    """E. Localises: a collective of c10d that is not seen, or its group, peer or bytes."""
    # the last norm stays gathered from the first call on, as FSDP2 has it for what is no layer
    weights = 4 * SIZES.layers * (4 * 128 * 128 + 2 * 128 * 512 + 4 * 128)
    _, _, sent, events = recorded(Layout(dp=4, sharded=True))
    gathers = [event for event in events if isinstance(event, Start)]
    assert {(event.name, event.ranks, event.waited) for event in gathers} == {("all_gather", (0, 1, 2, 3), False)}
    assert sent == weights * 3 // 4
    layout = Layout(tp=2, pp=2, schedule="GPipe", micro_batches=4)
    ends = {rank: recorded(layout, rank=rank)[3] for rank in (0, 2)}
    each = SIZES.tokens * SIZES.embed_dim * 4 // 4
    sends = [event for event in ends[0] if isinstance(event, Start) and event.name == "send"]
    takes = [event for event in ends[2] if isinstance(event, Start) and event.name == "recv"]
    assert [(event.ranks, event.peer, event.bytes, event.sent) for event in sends] == [((0, 2), 2, each, each)] * 4
    assert [(event.ranks, event.peer, event.bytes, event.sent) for event in takes] == [((0, 2), 0, each, 0)] * 4


def test_collectives_of_c10d_only_when_asked():
    """E. Localises: agreements of ranks, which go past the functional collectives, counted as a model's exchanges."""

    def run():
        x = torch.zeros(8)
        with record_collectives() as without, record_collectives(c10d=True) as found:
            dist.all_reduce(x)
            dist.broadcast(x, 1)
        return len(without.calls), [(call.name, call.sent, call.peer, call.ranks) for call in found.calls]

    without, found = on_fake_rank(1, 4, run)
    assert without == 0
    assert found == [("all_reduce", 48, None, (0, 1, 2, 3)), ("broadcast", 32, 1, (0, 1, 2, 3))]


def test_waits_name_their_collective():
    """E. Localises: what says that an exchange runs beside computing. In chunks one is begun before the last is waited
    for; in one piece never.
    """

    def most_open(overlap):
        layout = Layout(grid=(2, 2), scheme="batch", activations="sequence", overlap=overlap)
        _, _, _, events = recorded(layout)
        begun, most = set(), 0
        for i, event in enumerate(events):
            if isinstance(event, Start):
                begun.add(i)
            elif isinstance(event, Wait):
                begun.remove(event.start)
            most = max(most, len(begun))
        assert not begun
        return most

    assert (most_open(1), most_open(4) > 1) == (1, True)


@pytest.mark.parametrize(
    "L, S, causal, window, stride", [(5, 7, 1, None, 1), (6, 6, 0, 3, 1), (4, 9, 8, 5, 2), (3, 2, -2, None, 1)]
)
def test_pairs_that_see_each_other(L, S, causal, window, stride):
    """E. Localises: the count of a causal mask, of a window, or of keys that are dealt to ranks."""
    row, key = torch.arange(L)[:, None] + causal, torch.arange(S)[None] * stride
    seen = (key <= row) & ((key > row - window) if window else True)
    assert causal_pairs(L, S, causal, window, stride) == seen.sum()
    assert causal_pairs(L, S, None) == L * S


def test_memory_that_is_held():
    """E. Localises: a view, or what was freed, counted as memory; what was there before left out."""
    with FakeTensors():
        x = torch.empty(1000)
        with record([x]) as found:
            y = x * 2
            z = y.view(10, 100)[3:]
            del y
            assert found.held == 8000
            del z
            assert (found.held, found.peak) == (4000, 8000)
            w = x + 1  # noqa: F841
        with record([x, x.view(10, 100)]) as again:
            assert again.peak == 4000
    work = found.work
    assert [(one.name, one.bytes) for one in work] == [("aten.mul", 8000), ("aten.add", 8000)]


def test_copies_of_a_layout_do_alike():
    """E. Localises: what differs between ranks of one stage, of which only the first is recorded."""
    for layout in (Layout(grid=(2, 2), scheme="sequence", activations="sequence"), Layout(tp=2, dp=2, sharded=True)):
        first, last = (recorded(layout, sizes=replace(SIZES, length=64), rank=rank) for rank in (0, 3))
        assert first[0] == last[0] and first[2] == last[2]
