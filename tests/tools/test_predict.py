"""`python -m two_level_mha predict`: prices by formulas, memory against a real run, what is refused, the command."""

import json
import resource
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import two_level_mha as tlm
from two_level_mha.experiment.hardware import GB, hardware
from two_level_mha.experiment.model import SEED, SMALL, Layout, Sizes, layouts
from two_level_mha.experiment.predict import dtype_of, model_flops, predict
from two_level_mha.experiment.pricing import ProfilePrices, link_bytes
from two_level_mha.experiment.recorder import Start, Work
from two_level_mha.experiment.runs import Call, record_layout

ROOT = Path(__file__).resolve().parents[2]
H100 = hardware("h100-16")


def one(layout, machine=H100, mode="prefill", causal=False, sizes=SEED, **options):
    return predict(sizes, [layout], machine, Call(mode, causal, dtype_of(machine), **options))[0]


def test_the_seed_at_its_peak():
    """E. Localises: the FLOPs of the model, against the arithmetic of the paper's sizes done by hand."""
    per_token = 2 * (8 * 8192**2 + 4 * 8192 * 32768) + 2 * 4 * 10000 * 8192
    assert model_flops(SEED, causal=False, training=False) == per_token * SEED.tokens
    ceiling = SEED.tokens * H100.ceiling / model_flops(SEED, causal=False, training=False)
    assert ceiling == pytest.approx(4.08e6, rel=1e-3)


def test_data_parallel_seed_by_hand():
    """T. Localises: a rate that is not the profile's for that work; pieces that are not put together again."""
    found, p = one(Layout(dp=16)), H100.profile
    tokens = SEED.tokens // 16
    products = 2 * tokens * (8 * 8192**2 + 4 * 8192 * 32768) / p.flops
    attention = 2 * tokens * 4 * 10000 * 8192 / p.attention_wide
    # norms, sums and GELU read and write: 5 norms, 4 sums of three tensors, 2 GELUs of the hidden width
    memory = tokens * 2 * (5 * 2 * 8192 + 4 * 3 * 8192 + 2 * 2 * 32768) / p.memory
    assert found.seconds == pytest.approx(products + attention + memory, rel=2e-3)
    assert (found.exposed, found.bubbles, found.slow_bytes, found.bound) == (0, 0, 0, "products")
    assert found.low < found.seconds < found.high and found.pieces > 1
    assert found.flops * 16 == model_flops(SEED, causal=False, training=False)


def test_tensor_parallel_seed_by_hand():
    """T. Localises: the bytes of an all-reduce, the bandwidth of a ring over two nodes, what leaves a node."""
    found = one(Layout(tp=16))
    sent = 4 * 2 * 15 / 16 * SEED.tokens * 8192 * 2
    assert found.fast_bytes + found.slow_bytes == pytest.approx(sent)
    assert found.slow_bytes == pytest.approx(sent / 8)  # one of the 8 ranks of a node
    assert found.exposed == pytest.approx(sent / 350e9 + 4 * 20e-6 * found.pieces)
    inside = one(Layout(tp=16), hardware("h100-nvl-16"))
    assert (inside.slow_bytes, inside.seconds) == (0, pytest.approx(found.seconds))


def test_our_layout_of_whole_heads_is_tensor_parallelism():
    """E. Localises: what (16, 1) does beside plain TP, of which the paper's sizes make it a copy."""
    ours, plain = one(Layout(grid=(16, 1), scheme="slices")), one(Layout(tp=16))
    assert (ours.flops, ours.slow_bytes, ours.fast_bytes) == (plain.flops, plain.slow_bytes, plain.fast_bytes)
    assert ours.seconds == pytest.approx(plain.seconds, rel=2e-3)


@pytest.mark.parametrize(
    "name, ranks, peer, slow, bandwidth",
    [
        ("all_reduce", range(8), None, 0, 350e9),
        ("all_gather", range(16), None, 1 / 8, 350e9),  # 8 adapters carry more than a link
        ("all_gather", (0, 4, 8, 12), None, 1 / 2, 100e9),
        ("reduce_scatter", (0, 8), None, 1, 50e9),
        ("all_to_all", range(16), None, 8 / 15, 50e9 * 15 / 8),
        ("send", (7, 8), 8, 1, 50e9),
        ("send", (3, 5), 5, 0, 350e9),
    ],
)
def test_links(name, ranks, peer, slow, bandwidth):
    """T. Localises: which link a collective uses, and how many adapters carry it."""
    start = Start(name, tuple(ranks), peer, 0, 10**9, False, True)
    fast_bytes, slow_bytes = link_bytes(start, 8)
    assert slow_bytes == pytest.approx(slow * 10**9) and fast_bytes + slow_bytes == pytest.approx(10**9)
    prices = ProfilePrices(H100.profile)
    assert prices.start(start).seconds == pytest.approx(20e-6 + 1e9 / bandwidth)
    assert prices.start(start).held == pytest.approx(0.1 * prices.start(start).seconds)


def test_rates_of_work():
    """T. Localises: the rate of a kind, an element size or a width; padding of values; the roof of memory."""
    prices, p = ProfilePrices(H100.profile), H100.profile

    def seconds(kind, flops, size, shape, moved=0):
        return prices.work(Work("x", kind, flops, moved, size, shape, False)).seconds

    assert seconds("product", 10**12, 2, (1, 1, 1)) == pytest.approx(1e12 / p.flops)
    assert seconds("product", 10**12, 4, (1, 1, 1)) == pytest.approx(1e12 / p.flops_single)
    assert seconds("attention", 10**12, 2, (1, 1, 1, 512, 128)) == pytest.approx(1e12 / p.attention_wide)
    assert seconds("attention", 10**12, 2, (1, 1, 1, 256, 128)) == pytest.approx(1e12 * 512 / 384 / p.attention_256)
    assert seconds("attention", 10**12, 4, (1, 1, 1, 64, 64)) == pytest.approx(1e12 / p.attention_single_128)
    assert seconds("product", 1, 2, (1, 1, 1), 10**12) == pytest.approx(1e12 / p.memory)


def test_sums_of_split_activations_are_nccls():
    """E. Localises: the all-to-all of which the CPU makes a reduce-scatter, priced for a GPU that has one."""
    layout = Layout(grid=(4, 4), scheme="sequence", activations="sequence")
    for machine, expected in ((H100, {"all_gather", "all_to_all", "reduce_scatter"}), (hardware("cpu-16"), None)):
        sizes = SEED if machine.device == "cuda" else replace(SMALL, heads=16, head_dim=16, kv_heads=16)
        run = record_layout(sizes, layout, machine, Call("prefill", False, torch.float32))
        names = {event.name for event in run.events[0] if isinstance(event, Start)}
        assert names == (expected or {"all_gather", "all_to_all"})


def test_the_paper_s_pipeline():
    """Localises: micro-batches that change nothing, or pieces of a pipeline that are run as one when they are not."""
    once = one(Layout(tp=8, pp=2, schedule="GPipe", micro_batches=1))
    many = one(Layout(tp=8, pp=2, schedule="GPipe", micro_batches=8))
    assert once.bubbles / once.seconds == pytest.approx(0.5, abs=0.1)  # (p - 1) / (m + p - 1), and messages
    assert many.bubbles / many.seconds < 0.02
    assert many.tokens_per_second > 1.5 * once.tokens_per_second


def test_what_does_not_fit_is_refused():
    """Localises: a peak that is not compared with the memory, a piece that is larger than what fits."""
    small = replace(H100, memory=6 * GB)
    assert one(Layout(tp=16), small).peak <= 6 * GB
    refused = one(Layout(dp=16), replace(H100, memory=3 * GB))
    assert refused.refused.startswith("does not fit: ") and not refused.seconds
    assert one(Layout(dp=16), replace(H100, memory=45 * GB), mode="decode").refused


@pytest.mark.parametrize("cache", ["position", "batch"])
def test_decode_reads_its_share_of_the_cache(cache):
    """T. Localises: a KV cache that is not split, not read, or not counted as memory. B=1024, T=10000: 12.5 ms at the
    full rate of the data sheet, so that 0.22 ms, as the paper has it, cannot belong to these sizes.
    """
    for layout in (Layout(grid=(4, 4)), Layout(tp=16), Layout(dp=16)):
        found = one(layout, mode="decode", causal=True, cache=cache)
        cache_bytes = 2 * 2 * SEED.tokens * 8192 * 2 / 16
        assert found.peak == pytest.approx(cache_bytes + found.weights, rel=0.01)
        assert found.seconds >= (cache_bytes + found.weights) / H100.profile.memory * 0.99
        assert found.bound == "memory" and found.tokens == 1024


def test_training_is_predicted():
    """Localises: a backward pass, or the sum of gradients of copies, that is left out."""
    sizes = replace(SEED, batch=64)
    forward = one(Layout(dp=16), sizes=sizes)
    training = one(Layout(dp=16), mode="training", sizes=sizes)
    assert training.flops * 16 == model_flops(sizes, causal=False, training=True)
    weights = 2 * (2 * (4 * 8192**2 + 2 * 8192 * 32768 + 4 * 8192) + 2 * 8192)
    assert training.fast_bytes + training.slow_bytes == pytest.approx(2 * 15 / 16 * weights * training.pieces)
    assert training.seconds > 3 * forward.seconds
    assert one(Layout(grid=(4, 4), scheme="batch"), mode="training", sizes=sizes).exposed > 0


def test_every_layout_can_be_recorded():
    """Localises: a layout that fails on fake tensors: at small sizes, forward and training."""
    sizes = replace(SMALL, batch=16, length=32)
    for mode in ("prefill", "training"):
        found = layouts(sizes, 4, micro_batches=4, overlap=2, training=mode == "training")
        machine = hardware("cpu-4")
        for layout in found[::3]:
            prediction = one(layout, machine, mode=mode, sizes=sizes)
            assert prediction.seconds > 0 and not prediction.refused, prediction


REAL = """
import sys; sys.path[:0] = {path!r}
import torch
from common import peak_mib
from two_level_mha.experiment.model import Layout, Sizes, build
torch.set_num_threads(1)
sizes = Sizes(**{sizes!r})
built = build(sizes, Layout(), None, causal=True)
x = torch.randn(sizes.batch, sizes.length, sizes.embed_dim)
built.forward(x[:1])
print(peak_mib(lambda: built.forward(x)))
"""


def test_peak_of_memory_against_a_real_run():
    """R. Localises: memory that a real run holds and the recorder does not, or the other way round: within 10 %."""
    sizes = Sizes(layers=2, heads=4, kv_heads=4, head_dim=64, mlp_hidden=1024, batch=32, length=1024)
    path = [str(ROOT / "src"), str(ROOT / "benchmarks")]
    program = REAL.format(path=path, sizes=asdict(sizes))
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    machine = replace(hardware("cpu-1"), memory=64 * GB)
    run = record_layout(sizes, Layout(), machine, Call("prefill", True, torch.float32))
    given = sizes.tokens * sizes.embed_dim * 4
    above = (run.peak - run.weights - given) / 2**20  # what the real run adds to the model and its input
    assert float(out.stdout) == pytest.approx(above, rel=0.1), (float(out.stdout), above)


def test_hardware():
    """Localises: a machine under another name's numbers, or rates that are given and not taken."""
    assert hardware("h200-16").memory == 141 * GB > H100.memory
    assert (H100.profile.node_ranks, hardware("h100-nvl-16").profile.node_ranks) == (8, 16)
    slow, fast = H100.end(0).profile, H100.end(1).profile
    assert slow.flops < H100.profile.flops < fast.flops and slow.latency_ns > fast.latency_ns
    mine = replace(H100.profile, flops=600 * 10**12, source="mine")
    assert hardware("h100-16", mine).profile.flops == 600 * 10**12
    assert "mine" in hardware("h100-16", mine).sources["rates"] and not hardware("h100-16", mine).ranges
    for wrong in ("h100", "a100-16", "h100-0", "cpu-x"):
        with pytest.raises(tlm.GridError, match="h100, h100-nvl, h200, cpu"):
            hardware(wrong)


def test_a_batch_that_does_not_fit_a_layout():
    """Localises: one layout's refusal that ends the table of all, or a row that is missing for it."""
    sizes = replace(SEED, batch=13)
    assert "the batch of 13 does not fit" in one(Layout(dp=16), mode="decode", causal=True, sizes=sizes).refused
    assert one(Layout(tp=16), mode="decode", causal=True, sizes=sizes).tokens == 13


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "two_level_mha", "predict", *arguments], capture_output=True, text=True, timeout=120
    )


def test_the_command():
    """Localises: the command as a user calls it: a table, within a minute, with what is predicted and from what."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    out = command("--preset", "seed", "--hardware", "h100-16", "--layout", "TP8 x PP2 GPipe 8")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 60  # of one core; others may be busy
    assert out.returncode == 0, out.stderr
    for words in ("PREDICTED", "rates assumed", "4.08 M tokens/s", "not causal", "TP8 x PP2 GPipe 8", "400 TFLOP/s"):
        assert words in " ".join(out.stdout.split()), out.stdout
    assert all(len(line) <= 130 for line in out.stdout.splitlines())


def test_the_command_as_json():
    """Localises: numbers that are in the table and not in the JSON, or the other way round."""
    out = command("--layout", "TP16", "--mask", "causal", "--json", "--batch", "64", "--hardware", "h200-16")
    found = json.loads(out.stdout)
    assert found["hardware"]["name"] == "h200-16" and found["sizes"]["batch"] == 64
    assert found["command"].startswith("python -m two_level_mha predict --layout TP16 --mask causal")
    assert {row["layout"] for row in found["predictions"]} == {"TP16", "TP16 by rows"}
    assert all(row["causal"] and row["low"] < row["seconds"] < row["high"] for row in found["predictions"])
    assert found["ceiling_tokens_per_second"]["causal"] > 4.08e6


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--layout", "nothing"], "--layout must be words of one of these: ours 16x1"),
        (["--hardware", "a100-16"], "hardware must be one of"),
        (["--batch", "0"], "--batch must be positive"),
        (["--calibration", "/nowhere"], "is no calibration"),
    ],
)
def test_what_the_command_refuses(arguments, text):
    """Localises: an argument that ends in a traceback, or with another exit code than 2."""
    out = command(*arguments)
    assert (out.returncode, text in out.stderr) == (2, True), out.stderr
