"""tlm.verify: what it must name, and what it must leave alone, on 4 ranks of Gloo in float32.

A failure here with the rest of training/ green is in verify.py, held.py (what is held by whom) or verdict.py.
"""

import copy
import random

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from harness.calls import mesh, text_of
from harness.decoders import make
from harness.device import DEVICE
from harness.language import BYTES, tokens
from harness.watched import GRID, Net, alike, backward, error_of, flip, train, trained
from torch import nn

import two_level_mha as tlm
from two_level_mha.held import Checksums, held_by, local_of

pytestmark = pytest.mark.cpu_only("bits are flipped by address, in the host's memory")


def quiet(every: int, optimizer: dict) -> str:
    model = Net(dropout=0.3)
    one = torch.optim.AdamW(tlm.param_groups(model), lr=0.01, **optimizer)
    with tlm.verify(model, one, every=every) as handle:
        for step in range(20):
            if step % 7 == 3:  # intended writes between steps
                model.load_state_dict({name: x.clone() for name, x in model.state_dict().items()})
                one.load_state_dict(one.state_dict())
                with torch.no_grad():
                    model.head.weight.clamp_(-1.0, 1.0)
                    model.attentions[0].q_weight.mul_(0.99)
            if step % 7 == 5:
                model.head.weight.data.mul_(0.99)  # which torch does not count
                handle.accept()
            if step == 9:
                with torch.no_grad():
                    model.eval()(tokens(batch=2)[:, :-1])
                model.train()
            for part in range(2):
                backward(model, 2 * step + part)
            tlm.clip_grad_norm_(model.parameters(), 0.5)
            text = error_of(one.step)
            if text != "no error":
                return f"step {step}: {text}"
            model.zero_grad(set_to_none=step % 2 == 0)
    assert handle.step == 20 and handle.model._forward_hooks == {}
    return "quiet"


@pytest.mark.parametrize("every, optimizer", [(1, {}), (3, {"fused": True})])
def test_no_false_alarm(pool, every, optimizer):
    """Localises: a write that was not known as one, a moment in the wrong place, a step counted wrongly."""
    assert pool.run(quiet, 4, every, optimizer) == ["quiet"] * 4


def quiet_with_the_rest(name: str) -> str:
    """A model of transformers whose MLPs, experts and embeddings are split too, trained with several optimizers. In the
    end a token of rank 1 is another one, which a split embedding hides from all that comes after it.
    """
    torch.manual_seed(0)
    model = tlm.parallelize(make(name, torch.float32), mesh(GRID), debug=False).train()
    optimizers = [torch.optim.AdamW([group], lr=0.01) for group in tlm.param_groups(model)]
    assert len(optimizers) > 1
    with tlm.verify(model, optimizers, every=2) as handle:
        for step in range(4):
            text = error_of(train, model, optimizers, step)
            if text != "no error":
                return f"step {step}: {text}"
        ids = tokens()
        ids[0, 1] += dist.get_rank() == 1
        model(input_ids=ids).logits.sum().backward()
        text = error_of(train, model, optimizers, 5)
        assert handle.step == 4 + (text == "no error")
    return text


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_no_false_alarm_with_the_rest_split(pool, name):
    """Localises: placements of what parallelize splits beside attention, several optimizers as one step."""
    text = alike(pool.run(quiet_with_the_rest, 4, name))
    assert text.startswith("before step 5: rank 1: input_ids differs from that of ranks 0, 2, 3. The way out: give")


# -- Flipped bits


def flips(count: int) -> list[tuple[str, str, bool]]:
    """For each flip: the rank and tensor that were hit, the error, and whether the step was held back."""
    model, optimizer, handle = trained(layers=1)
    draw = random.Random(0)
    found = []
    for number in range(count):
        held = held_by(model, [optimizer], handle._places)
        kinds = {
            "own": [one for one in held if one.placed and len(one.placed) == 1 and " of " not in one.name],
            "replicated": [one for one in held if len(one.placed) != 1 and not one.buffer and " of " not in one.name],
            "moment": [one for one in held if " of " in one.name],
            "buffer": [one for one in held if one.buffer],
        }
        hit, rank = draw.choice(kinds[draw.choice(list(kinds))]), draw.randrange(4)
        bit = draw.randrange(8 * hit.local.numel() * hit.local.element_size())
        seen, random_state = model.seen.clone(), torch.get_rng_state()
        before = {one.name: one.local.clone() for one in held if one.name not in (hit.name, "seen")}
        if dist.get_rank() == rank:
            flip(hit.local, bit)
        text = error_of(train, model, [optimizer], 3 + number)
        same = all(torch.equal(one.local, before[one.name]) for one in held if one.name in before)
        found.append((f"rank {rank}: {hit.name} changed without", text, same))
        if dist.get_rank() == rank and hit.name != "seen":
            flip(hit.local, bit)
        with torch.no_grad():
            model.seen.copy_(seen)
        handle.accept()  # that write, after the step whose memory is watched
        torch.set_rng_state(random_state)
    train(model, [optimizer], 2)  # all is well again
    return found


def test_every_flipped_bit_is_named(pool):
    """100 flips on any rank in any kind of tensor. Localises: the checksum, what is held, the vote of ranks."""
    found = pool.run(flips, 4, 100)
    for events in zip(*found, strict=True):
        text = alike([text for _, text, _ in events])
        assert text.startswith("before step") and events[0][0] in text, (events[0][0], text)
        assert all(same for *_, same in events)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_checksum(dtype):
    """Localises: the checksum itself: every bit and every exchange counts, shape and place in memory do not."""
    checksum = Checksums()
    x = torch.randint(2 if dtype == torch.bool else 100, (7, 5)).to(dtype)
    x[0, 0], x[6, 4] = 0, 1
    expected = checksum.of(x).item()
    assert checksum.of(x.clone().t().contiguous().t()).item() == expected
    for bit in range(0 if dtype == torch.bool else 8 * 35 * x.element_size()):
        flip(x, bit)
        assert checksum.of(x).item() != expected
        flip(x, bit)
    x[0, 0], x[6, 4] = 1, 0
    assert checksum.of(x).item() != expected
    assert checksum.of(x[:0]).item() == 0


def test_checksum_over_chunks():
    """Localises: words of different chunks, which have the same places."""
    checksum = Checksums()
    x = torch.zeros(3 << 18)
    x[1] = 1.0
    y = x.roll(1 << 18)
    assert len({checksum.of(x).item(), checksum.of(y).item(), checksum.of(x - y).item(), 0}) == 4


# -- Ranks that part, NaN and Inf


def planted(fault: str) -> tuple[str, bool]:
    """The error of a step with a fault of rank 1, and whether the weights of this rank are still finite after it."""
    model, optimizer, _ = trained(dropout=0.3)
    odd = dist.get_rank() == 1
    with torch.no_grad():
        if fault == "own NaN" and odd:
            model.attentions[1].k_weight._local_tensor.view(-1)[3] = torch.nan
        if fault == "replicated" and odd:
            model.norms[0].weight[2] += 1e-6
        if fault == "tie" and dist.get_rank() < 2:
            model.norms[0].weight[2] += 1e-6
        if fault == "DTensor" and odd:
            model.attentions[0].out_bias._local_tensor[0] += 1.0
        if fault == "moment" and odd:
            optimizer.state[model.head.weight]["exp_avg"].mul_(2.0)
        if fault == "moment of a DTensor" and odd:
            optimizer.state[model.attentions[0].q_norm_weight]["exp_avg"]._local_tensor.mul_(2.0)
        if fault == "moment NaN" and odd:
            optimizer.state[model.attentions[1].v_weight]["exp_avg_sq"]._local_tensor.view(-1)[0] = torch.nan
        if fault == "random" and odd:
            torch.rand(1)
    ids = tokens(seed=2)
    if fault == "ids" and odd:
        ids[1, 2] = (ids[1, 2] + 1) % BYTES
    optimizer.zero_grad()
    loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    (loss * (torch.inf if fault == "loss" else 1.0)).backward()
    if fault == "gradient" and odd:
        model.attentions[0].q_weight.grad._local_tensor.view(-1)[0] = -torch.inf
    text = error_of(optimizer.step)
    return text, all(local_of(p).isfinite().all().item() for p in model.parameters())


@pytest.mark.parametrize(
    "fault, expected",
    [
        ("own NaN", "rank 1: attentions.1.k_weight has 1 NaN and 0 Inf among 96 values. The way out: load the last"),
        ("replicated", "rank 1: norms.0.weight differs from that of ranks 0, 2, 3. The way out: handle.repair()"),
        ("tie", "norms.0.weight differs between ranks 0, 1 and ranks 2, 3, no majority. The way out: load the last"),
        ("DTensor", "rank 1: attentions.0.out_bias differs from that of ranks 0, 2, 3; rank 1: seen"),
        ("moment", "rank 1: exp_avg of head.weight differs from that of ranks 0, 2, 3. "),
        ("moment of a DTensor", "rank 1: exp_avg of attentions.0.q_norm_weight differs from that of ranks 0, 2, 3. "),
        ("moment NaN", "rank 1: exp_avg_sq of attentions.1.v_weight has 1 NaN and 0 Inf among 96 values. "),
        ("random", "rank 1: the state of torch's random generator differs from that of ranks 0, 2, 3. "),
        ("ids", "rank 1: input 0 differs from that of ranks 0, 2, 3; rank 1: seen differs"),
        ("gradient", "rank 1: the gradient of attentions.0.q_weight has 0 NaN and 1 Inf among "),
        ("loss", "rank 0: the gradient of embedding.weight has "),
    ],
)
def test_a_fault_is_named_before_the_step(pool, fault, expected):
    """Localises: by the fault, what is compared or looked at. Nobody's weights are poisoned."""
    found = pool.run(planted, 4, fault)
    assert alike([text for text, _ in found]).startswith(f"before step 3: {expected}")
    assert [finite for _, finite in found] == [True, fault != "own NaN", True, True]


def output_of_a_layer() -> str:
    """A layer of rank 2 that gives an Inf for finite weights and inputs."""
    model, optimizer, _ = trained()
    if dist.get_rank() == 2:
        model.norms[1].register_forward_hook(lambda module, args, y: y * torch.inf)
    return error_of(train, model, [optimizer], 2)


def test_the_first_layer_is_named(pool):
    """Localises: the order of outputs, and the hooks on layers, which must run after those that the user has."""
    text = alike(pool.run(output_of_a_layer, 4))
    assert text.startswith("before step 3: rank 2: norms.1 is the first layer whose output is not finite; rank 0: the")


def accumulated() -> str:
    """The second of two batches of a step differs on rank 0."""
    model, optimizer, _ = trained()
    for part in range(2):
        backward(model, part + (part == 1 and dist.get_rank() == 0))
    return error_of(optimizer.step)


def test_inputs_of_every_batch_are_compared(pool):
    """Localises: the inputs of several forward calls before a step."""
    text = alike(pool.run(accumulated, 4))
    assert "rank 0: input 0 of call 2 since the last step differs from that of ranks 1, 2, 3; rank" in text


def later() -> list[bool]:
    """A replicated weight of rank 3 is another from the start: which of 8 steps say so with every=3."""
    model = Net()
    optimizer = torch.optim.SGD(tlm.param_groups(model), lr=0.01)
    tlm.verify(model, optimizer, every=3)
    found = []
    for step in range(8):
        ids = tokens(seed=step)
        model(ids[:, :-1]).mean().backward()
        with torch.no_grad():
            model.head.bias.copy_(torch.full_like(model.head.bias, float(dist.get_rank() == 3)))
        found.append(error_of(optimizer.step) != "no error")
        with torch.no_grad():
            model.head.bias.zero_()
        if found[-1]:
            optimizer.step()
    return found


def test_which_steps(pool):
    """Localises: the count of steps; a step that was refused is looked at when it is tried again."""
    assert pool.run(later, 4) == [[True, False, False, True, False, False, True, False]] * 4


# -- Repair


def without_optimizer() -> list[str]:
    model = Net().eval()
    handle = tlm.verify(model, every=2)
    found = []
    with torch.no_grad():
        for call in range(7):
            if call == 3 and dist.get_rank() == 3:  # seen by call 5, the third that is looked at
                flip(local_of(model.attentions[0].out_weight), 5)
            found.append(error_of(model, tokens(seed=call)[:, :-1]).partition(" without")[0])
    handle.remove()
    return found


def test_calls_without_an_optimizer(pool):
    """Localises: the count of calls, and that a changed weight is named however long ago it changed."""
    wrong = "forward call 5: rank 3: attentions.0.out_weight changed"
    # a call that was withheld is not counted: the next one is looked at again
    assert pool.run(without_optimizer, 4) == [["no error"] * 4 + [wrong] * 3] * 4


def one_process() -> tuple[nn.Module, torch.optim.Optimizer, tlm.verify]:
    model = Net(None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    handle = tlm.verify(model, optimizer, every=1)
    for step in range(2):
        train(model, [optimizer], step)
    return model, optimizer, handle


def test_one_process():
    """Localises: what is done without a mesh, where nothing is sent; remove()."""
    model, optimizer, handle = one_process()
    flip(model.head.weight.detach(), 30)
    expected = "before step 3: rank 0: head.weight changed without being written to"
    assert error_of(train, model, [optimizer], 2).startswith(expected)
    with pytest.raises(tlm.IntegrityError, match="head.weight on rank 0 exists once"):
        handle.repair()
    handle.remove()
    train(model, [optimizer], 2)
    hooks = [model._forward_hooks, model._forward_pre_hooks, model.head._forward_hooks]
    assert not any([*hooks, optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks])


def test_nan_in_the_output_without_an_optimizer():
    """Localises: outputs of layers of the call itself, which is withheld."""
    model = Net(None)
    with tlm.verify(model, every=1):
        model(tokens())
        model.norms[0].register_forward_hook(lambda module, args, y: y * torch.nan)
        text = error_of(model, tokens())
    assert text.startswith("forward call 2: rank 0: norms.0 is the first layer whose output is not finite. The way")


@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler_may_find_infinities(fused):
    """Localises: scaled gradients, whose infinities skip the step as they should."""
    model = Net(None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**127)
    before = model.head.weight.detach().clone()
    with tlm.verify(model, optimizer, every=1):
        for step in range(3):
            optimizer.zero_grad()
            loss = model(tokens(seed=step)).square().mean()
            scaler.scale(loss * 1e4).backward()
            scaler.step(optimizer)
            scaler.update()
    assert scaler.get_scale() == 2.0**124 and torch.equal(model.head.weight, before)


def test_a_copy_of_the_model_is_not_watched():
    """Localises: hooks in a deep copy, such as one for an average of weights."""
    model, optimizer, handle = one_process()
    average = copy.deepcopy(model)
    average(tokens(seed=3))
    assert not handle._inputs
    train(model, [optimizer], 2)


# -- Arguments


def refused(arguments: list) -> list[str]:
    model = Net()
    optimizer = torch.optim.SGD(tlm.param_groups(model), lr=0.1)
    every, other = arguments[dist.get_rank() % len(arguments)]
    texts = [text_of(tlm.verify, model, optimizer if other is None else other, every)]
    assert not model._forward_hooks and not optimizer._optimizer_step_pre_hooks
    return texts


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ([(0, None)], "every must be a positive integer, the number of steps from look to look, got 0"),
        ([(True, None)], "every must be a positive integer, the number of steps from look to look, got True"),
        ([(1.5, None)], "every must be a positive integer, the number of steps from look to look, got 1.5"),
        ([(1, [3])], "optimizer must be a torch.optim.Optimizer, several, or None, got int"),
        (
            [(1, None), (2, None)],
            "every differs between ranks of the grid: 1 on rank 0, 2 on rank 1; call",
        ),
    ],
)
def test_arguments_are_refused(pool, arguments, expected):
    """Localises: the check of arguments; nothing is installed on any rank."""
    for texts in pool.run(refused, 4, arguments):
        assert texts[0].startswith(expected)


def test_a_model_is_asked_for():
    with pytest.raises(tlm.GridError, match="model must be an nn.Module, got int"):
        tlm.verify(3)
