"""Every call of a layer on a grid is compared over the ranks, and nothing is sent for it.

What does not change the sizes of messages rides in an exchange and is a GridError on every rank; what does is compared
before, by the rank that has it, and ends as RankFailure on every rank within the limit of the mesh. The ranks of a test
go on afterwards: a mesh that was closed is made again.
"""

import re
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist
from harness.decoders import make
from harness.pool import Pool

import two_level_mha as tlm
from two_level_mha.testing import record_collectives

pytestmark = pytest.mark.cpu_only("on CUDA differences are noticed later")

ODD, LIMIT = 2, 2.0
FORMS = [{"scheme": s} for s in ("slices", "sequence", "batch", "heads", "weights")] + [{"combine": "concat"}]
GRIDS = [(2, 2), (4, 1), (1, 4)]


def layer_on(mesh, **form):
    torch.manual_seed(0)
    return tlm.TwoLevelMultiheadAttention(32, 8, batch_first=True, mesh=mesh, dtype=torch.float64, **form)


def one_element(layer, x, mask):
    x[1, 2, 3] += 1e-9


def swapped(layer, x, mask):
    x[[0, 1]] = x[[1, 0]]


def mask_element(layer, x, mask):
    mask[1, 2] = -1.0


def own_block(layer, x, mask):
    with torch.no_grad():
        layer.q_weight.to_local().mul_(2)


def replicated_bias(layer, x, mask):
    with torch.no_grad():
        layer.out_bias.to_local().add_(1)


def flipped_bias(layer, x, mask):
    layer.out_bias.to_local().detach().numpy()[3] += 1e-9  # torch does not see this write


SAME_SIZES = {
    one_element: "content of query",
    swapped: "content of query",
    mask_element: "content of the mask",
    own_block: "number of writes to the weights",
    replicated_bias: "content of parameter 0 of every rank",
    flipped_bias: "content of parameter 0 of every rank",
}


def called(layer, x, mask):
    try:
        return layer(x, x, x, need_weights=False, attn_mask=mask)[0].detach()
    except (tlm.GridError, tlm.RankFailure) as error:
        return error


def differences(grid, form) -> list[tuple[str, bool]]:
    """The text of every difference of SAME_SIZES, and whether the next call, alike again, gives what it gave before."""
    found = []
    mesh = tlm.init_mesh("cpu", grid)
    for change in SAME_SIZES:
        layer, x, mask = layer_on(mesh, **form), torch.randn(4, 8, 32, dtype=torch.float64), torch.zeros(8, 8).double()
        for _ in range(2):
            before = called(layer, x, mask)
        assert isinstance(before, torch.Tensor), before
        if dist.get_rank() == ODD:
            change(layer, x, mask)
        error = called(layer, x, mask)
        if dist.get_rank() != ODD:
            change(layer, x, mask)
        again = called(layer, x, mask)
        found.append((repr(error), isinstance(again, torch.Tensor)))
    return found


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form.values()))
@pytest.mark.parametrize("grid", GRIDS)
def test_what_differs_in_a_later_call_is_named(pool, grid, form):
    """E. Localises: what the seal is made of (enter, leave), its digits' sums in each way Y is combined, explain()."""
    for found in pool.run(differences, 4, grid, form):
        for (text, again), name in zip(found, SAME_SIZES.values(), strict=True):
            assert text.startswith("GridError") and name in text and f"on rank {ODD}" in text, text
            assert again, text


def deferred_differences(grid, form) -> list[list]:
    """As on a GPU, where a call does not wait for what its exchange says: what the calls after a difference raised."""
    found = []
    mesh = tlm.init_mesh("cpu", grid)
    for change in SAME_SIZES:
        layer, x, mask = layer_on(mesh, **form), torch.randn(4, 8, 32, dtype=torch.float64), torch.zeros(8, 8).double()
        layer.calls.control.deferred.devices = ("cpu",)
        for _ in range(3):
            assert isinstance(called(layer, x, mask), torch.Tensor)
        if dist.get_rank() == ODD:
            change(layer, x, mask)
        found.append([repr(called(layer, x, mask)) for _ in range(3)])
        layer.calls.control.deferred.forget()  # the calls that followed differ too
    mesh_control = layer.calls.control
    try:
        with tlm.guard(mesh):
            layer, x, mask = layer_on(mesh, **form), torch.randn(4, 8, 32, dtype=torch.float64) + 1, None
            for turn in range(2):
                layer(x + (turn and dist.get_rank() == ODD), x, x)
    except tlm.GridError as error:
        found.append([repr(error)])
    mesh_control.deferred.devices = ("cuda",)
    return found


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form.values()))
@pytest.mark.parametrize("grid", GRIDS[:1])
def test_what_differs_is_noticed_where_no_call_waits(pool, grid, form):
    """E. Localises: a verdict that is looked at late, or not at the end of a guarded block. Emulated: on the CPU."""
    for *found, (at_the_end,) in pool.run(deferred_differences, 4, grid, form):
        assert len(found) == len(SAME_SIZES)
        for first, second, third in found:
            assert first.startswith("tensor") and second.startswith("tensor"), (first, second)
            assert third.startswith("GridError") and f"rank {ODD} had not" in third and "in call 4 of" in third, third
        assert f"rank {ODD} had not" in at_the_end and "in call 2 of" in at_the_end


def deferred_in_a_model(what) -> str:
    """One rank has another prompt; or the hash of inputs on a GPU, which is a tensor there, differs."""
    model = tlm.parallelize(make("llama"), tlm.init_mesh("cpu", (2, 2))).eval()
    control, odd = model.model.layers[0].self_attn.calls.control, dist.get_rank() == ODD
    ids = torch.arange(12).reshape(2, 6) + 3
    control.deferred.devices = ("cpu",)
    model.generate(ids, max_new_tokens=3, do_sample=False)
    ids += odd and what == "prompt"
    if what == "seal":
        model.register_forward_pre_hook(lambda *_: setattr(control.inputs, "seal", torch.tensor(int(odd))))
    try:
        with torch.no_grad():
            model.generate(ids, max_new_tokens=3, do_sample=False)
    except tlm.GridError as error:
        return str(error)
    finally:
        control.deferred.forget()
        control.deferred.devices, control.inputs.seal = ("cuda",), None


@pytest.mark.parametrize("what", ["prompt", "seal"])
def test_what_differs_in_generation_is_noticed_where_no_call_waits(pool, what):
    """E. Localises: a verdict of a cached call, a hash that enter does not go on from. Emulated: on the CPU."""
    for text in pool.run(deferred_in_a_model, 4, what):
        assert f"rank {ODD} had not" in text and "in call 4 of" in text, text


COMPARED_COMPILED = (one_element, swapped, mask_element, replicated_bias, flipped_bias)


def compiled_differences(form, backend) -> list[tuple[str, bool]]:
    torch._dynamo.reset()
    found = []
    mesh = tlm.init_mesh("cpu", (2, 2))
    layer = layer_on(mesh, **form)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for change in COMPARED_COMPILED:
        x, mask = torch.randn(4, 8, 32, dtype=torch.float64), torch.zeros(8, 8).double()
        assert isinstance(called(compiled, x, mask), torch.Tensor)
        if dist.get_rank() == ODD:
            change(layer, x, mask)
        error = called(compiled, x, mask)
        if dist.get_rank() != ODD:
            change(layer, x, mask)
        found.append((repr(error), isinstance(called(compiled, x, mask), torch.Tensor)))
    return found


@pytest.mark.parametrize(
    "form, backend",
    [pytest.param(form, "inductor", marks=pytest.mark.slow) for form in FORMS]
    + [(FORMS[0], "aot_eager"), (FORMS[-1], "aot_eager")],
)
def test_what_differs_in_a_compiled_call_is_noticed(pool, form, backend):
    """E. Localises: a hash that is made when the graph is traced, a check that a compiler removes, a handler."""
    for found in pool.run(compiled_differences, 4, form, backend, timeout=300):
        for text, again in found:
            assert text.startswith("GridError") and f"rank {ODD} has not" in text and "MultiheadAttention" in text, text
            assert again, text


def deferred_compiled_differences(form, backend) -> list[str]:
    torch._dynamo.reset()
    layer = layer_on(tlm.init_mesh("cpu", (2, 2)), **form)
    deferred, compiled = layer.calls.control.deferred, torch.compile(layer, fullgraph=True, backend=backend)
    x, mask = torch.randn(4, 8, 32, dtype=torch.float64), torch.zeros(8, 8).double()
    called(compiled, x, mask)
    deferred.devices = ("cpu",)
    found = [called(compiled, x, mask) for _ in range(2)]
    x[1, 2, 3] += 1e-9 * (dist.get_rank() == ODD)
    found += [called(compiled, x, mask) for _ in range(3)]
    deferred.forget()
    deferred.devices = ("cuda",)
    return [repr(one) for one in found]


@pytest.mark.parametrize("form", [FORMS[0], FORMS[-1]], ids=lambda form: "-".join(form.values()))
def test_what_differs_in_a_compiled_call_is_noticed_where_no_call_waits(pool, form):
    """E. Localises: the verdict that the operator of a compiled call asks for, or who looks at it. On the CPU."""
    for *found, last in pool.run(deferred_compiled_differences, 4, form, "aot_eager", timeout=300):
        assert all(text.startswith("tensor") for text in found), found
        assert last.startswith("GridError") and f"rank {ODD} had not" in last and "a compiled call of" in last, last


def shapes(layer, x, mask):
    return layer, x[:, :4], mask[:4, :4]


def transposed(layer, x, mask):
    return layer, x.reshape(8, 4, 32), mask[:4, :4]


def dtypes(layer, x, mask):
    return layer.float(), x.float(), mask.float()


def schemes(layer, x, mask):
    layer.scheme = "sequence" if layer.scheme != "sequence" else "slices"
    return layer, x, mask


OTHER_SIZES = {shapes: "length 4 (was 8)", transposed: "batch 8 (was 4)", dtypes: "float32", schemes: "sequence"}


def other_sizes(grid) -> list[tuple[str, float, str]]:
    """The text, the seconds until it came, and the text of the next call on the closed mesh."""
    found = []
    for change in OTHER_SIZES:
        mesh = tlm.init_mesh("cpu", grid, timeout=LIMIT)
        layer, x, mask = layer_on(mesh, scheme="slices"), torch.randn(4, 8, 32).double(), torch.zeros(8, 8).double()
        called(layer, x, mask)
        dist.barrier()
        start = time.monotonic()
        arguments = change(layer, x, mask) if dist.get_rank() == ODD else (layer, x, mask)
        error = called(*arguments)
        found.append((repr(error), time.monotonic() - start, repr(called(*arguments))))
        dist.barrier()
    return found


def test_other_sizes_end_all_ranks():
    """Localises: a message of another size, which ends a process, or ranks that wait beyond the limit."""
    ranks = Pool()
    try:
        for found in ranks.run(other_sizes, 4, (2, 2), timeout=120):
            for (text, seconds, after), what in zip(found, OTHER_SIZES.values(), strict=True):
                assert text.startswith("RankFailure") and re.search(rf"rank {ODD} .*comparing its call 2", text), text
                assert what in text and "TwoLevelMultiheadAttention" in text, text
                assert seconds < LIMIT + 5, text
                assert after.startswith("RankFailure") and "closed after a failure" in after, after
    finally:
        ranks.close()


def other_tokens(names: list[str]) -> list[tuple[str, str]]:
    """Of models with a split embedding: one rank's ids, then its mask, differ at a later call."""
    found = []
    for name in names:
        model = tlm.parallelize(make(name), tlm.init_mesh("cpu", (2, 2), timeout=LIMIT))
        ids = torch.arange(12).reshape(2, 6) + 3
        texts = []
        for what in ("none", "ids", "none", "layers", "mask"):
            mask, odd = torch.ones_like(ids), dist.get_rank() == ODD
            given = ids.clone()
            if what == "ids" and odd:
                given[1, 2] += 1
            if what == "mask" and odd:
                mask[1, 0] = 0
            layers = model.model.layers
            if what in ("layers", "mask") and odd:  # and back
                layers[0].self_attn, layers[1].self_attn = layers[1].self_attn, layers[0].self_attn
            try:
                model(given, attention_mask=mask, use_cache=False)
                texts.append("")
            except (tlm.GridError, tlm.RankFailure) as error:
                texts.append(str(error))
        found.append(texts)
    return found


def test_other_tokens_on_a_rank():
    """Localises: ModelInputs: a split embedding sums rows of different tokens into one x that is equal everywhere.

    A mask that hides something is another way to call attention than one that hides nothing, so it ends all ranks.
    """
    ranks = Pool()
    try:
        for found in ranks.run(other_tokens, 4, ["llama"], timeout=120):
            for none, ids, again, layers, mask in found:
                assert none == again == ""
                assert "input 0 of the model differs" in ids and f"on rank {ODD}" in ids, ids
                assert layers.startswith("layer differs") and "model.layers.1.self_attn on rank 2" in layers, layers
                assert f"rank {ODD} " in mask and "model.layers.0.self_attn" in mask and "causal" in mask, mask
    finally:
        ranks.close()


def sent(grid) -> list[int]:
    """Collectives of a call, and gathers of its agreements: of a second call, and of one with another length."""
    mesh = tlm.init_mesh("cpu", grid)
    layer, x = layer_on(mesh, scheme="slices"), torch.randn(2, 8, 32).double()
    counts, gather = [], layer.place.control._all_gather
    layer.place.control._all_gather = lambda *given: counts.append(1) or gather(*given)
    found = []
    for length in (8, 8, 5, 5):
        counts.clear()
        with record_collectives() as record:
            layer(x[:, :length], x[:, :length], x[:, :length], need_weights=False)
        found.append((sum(record.counts().values()), len(counts)))
    del layer.place.control._all_gather
    return found


def test_agreement_sends_nothing_of_its_own(pool):
    """E. Localises: a collective for a call whose sizes are those of the last one."""
    for found in pool.run(sent, 4, (2, 2)):
        assert found == [(2, 1), (2, 0), (2, 1), (2, 0)]


ONE_OF_SIXTEEN = """
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
import two_level_mha as tlm
dist.init_process_group("fake", rank=5, world_size=16, store=FakeStore())
layer = tlm.TwoLevelMultiheadAttention(64, 4, batch_first=True, mesh=tlm.init_mesh("cpu", (4, 4)))
x = torch.randn(2, 8, 64, requires_grad=True)
for call in (layer, layer, torch.compile(layer, backend="aot_eager")):
    call(x, x, x, need_weights=False)[0].sum().backward()
print(x.grad.shape)
"""


def test_one_rank_of_a_fake_group():
    """Localises: ranks that compare what a fake group, which sends nothing, says of them."""
    done = subprocess.run([sys.executable, "-c", ONE_OF_SIXTEEN], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "[2, 8, 64]" in done.stdout, done.stderr[-2000:]


def gathers_of_a_model() -> list[int]:
    """Gathers of each call of a model of several layers: two of one length, then two of another."""
    model = tlm.parallelize(make("llama"), tlm.init_mesh("cpu", (2, 2))).eval()
    control = next(m for m in model.modules() if getattr(m, "calls", None)).place.control
    counts, gather, found = [], control._all_gather, []
    control._all_gather = lambda *given: counts.append(1) or gather(*given)
    with torch.no_grad():
        for length in (6, 6, 5, 5):
            counts.clear()
            model(torch.arange(2 * length).reshape(2, length), use_cache=False)
            found.append(len(counts))
    del control._all_gather
    return found


def test_one_layer_compares_for_all(pool):
    """E. Localises: an agreement a layer, where one of the model is enough."""
    for first, again, shorter, once_more in pool.run(gathers_of_a_model, 4):
        assert first > 0 and [again, shorter, once_more] == [0, 1, 0]


def two_threads() -> str:
    """A second thread calls while the first is held between the halves of its call."""
    layer = layer_on(tlm.init_mesh("cpu", (2, 2)))
    x, texts = torch.randn(2, 8, 32).double(), []
    called(layer, x, None)
    inside, go_on = threading.Event(), threading.Event()
    enter_call = layer.place.control.enter_call

    def held():
        enter_call()
        inside.set()
        go_on.wait(10)

    layer.place.control.enter_call = held
    first = threading.Thread(target=lambda: texts.append(type(called(layer, x, None)).__name__))
    first.start()
    inside.wait(10)
    del layer.place.control.enter_call
    texts.append(repr(called(layer, x, None)))
    go_on.set()
    first.join(30)
    return texts


def test_two_threads_are_refused(pool):
    """Localises: calls of two threads that meet another rank's other thread."""
    for second, first in pool.run(two_threads, 4):
        assert second.startswith("GridError") and "two threads" in second
        assert first == "Tensor"
