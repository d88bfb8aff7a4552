"""The experiment: layouts of a whole model, benchmarks/experiment*.py and two_level_mha.experiment.model."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import experiment
import experiment_ranks
import nodes
import pytest
import torch
import torch.distributed as dist
from harness import RankFailure

from two_level_mha.context import ACTIVATIONS
from two_level_mha.experiment import model

ROOT = Path(__file__).resolve().parents[2]
RANKS = 4
TINY = model.Sizes(layers=2, heads=4, kv_heads=4, head_dim=4, mlp_hidden=32, batch=8, length=16)
GROUPED = replace(TINY, kv_heads=2)
SETTING = experiment_ranks.Setting(TINY, torch.float64, batches=(1, 3, 4), context=5, steps=2, repeats=1)


def rows_of(setting, mode, mask):
    """On a rank."""
    return [case.row for case in experiment.cases_of(setting, mode, mask, {})]


@pytest.mark.cpu_only("layouts of torch's own parts over Gloo")
@pytest.mark.parametrize("mode, mask, sizes, overlap", [
    ("prefill", "causal", TINY, 2), ("prefill", "full", GROUPED, 1), ("training", "full", TINY, 1),
    pytest.param("training", "causal", TINY, 2, marks=pytest.mark.slow),
    pytest.param("training", "causal", GROUPED, 1, marks=pytest.mark.slow),
])  # fmt: skip
def test_every_layout_is_the_unsplit_model(pool, mode, mask, sizes, overlap):
    """T. Localises: a layout whose output, or any of whose gradients, is not the model's; one that is missing."""
    found = pool.run(rows_of, RANKS, replace(SETTING, sizes=sizes, overlap=overlap), mode, mask, timeout=180)
    for rows in found:
        assert not [(row["layout"], row["failed"]) for row in rows if "failed" in row]
        assert all(row["difference"] <= 1e-10 for row in rows)
    names = [row["layout"] for row in found[0]]
    assert len(set(names)) == len(names)
    assert [name for name in names if not name.startswith("ours")] == EXPECTED[mode, sizes.kv_heads]
    ours = [row["of"] | {"exact": row["exact"]} for row in found[0] if row["ours"]]
    assert {tuple(of["grid"]) for of in ours} == {(n, RANKS // n) for n in (1, 2, 4) if sizes.kv_heads % n == 0}
    assert {of["activations"] for of in ours} == set(ACTIVATIONS)
    assert {of["overlap"] for of in ours} == {1, overlap} and {of["mlp"] for of in ours} == {"split", "gathered"}
    assert {of["scheme"] for of in ours if not of["exact"]} == ({"independent"} if sizes is TINY else set())


TP, STAGES = ["TP4", "TP4 by rows"], ["TP2 x PP2 GPipe 1", "TP2 x PP2 GPipe 4"]
# Those of torch's own parts, by the number of KV heads: past it there are copies, which do not train.
EXPECTED = {
    ("prefill", 4): ["FSDP4", "DP4", "TP2 x FSDP2", "TP2 x DP2", *STAGES, *TP],
    ("prefill", 2): [
        "FSDP4",
        "DP4",
        "TP2 x FSDP2",
        "TP2 x DP2",
        *STAGES,
        *(f"{name} (KV heads 2 times)" for name in TP),
    ],
    ("training", 4): ["FSDP4", "DP4", "TP2 x FSDP2", *STAGES, "TP2 x PP2 1F1B 4", *TP],
    ("training", 2): ["FSDP4", "DP4", "TP2 x FSDP2", *STAGES, "TP2 x PP2 1F1B 4"],
}


@pytest.mark.cpu_only("layouts of torch's own parts over Gloo")
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_every_layout_decodes_like_the_unsplit_model(pool, kv_heads):
    """T. Localises: a cache that is filled, written or rewound wrongly; micro-batches of a pipeline that change places;
    a batch that does not divide.
    """
    setting = replace(SETTING, sizes=replace(TINY, kv_heads=kv_heads))
    for rows in pool.run(rows_of, RANKS, setting, "decode", "causal", timeout=120):
        assert not [(row["layout"], row["failed"]) for row in rows if "failed" in row]
        assert all(row["difference"] <= 1e-10 for row in rows)
        names = {batch: [row["layout"] for row in rows if row["B"] == batch] for batch in setting.batches}
        assert "DP4" in names[4] and "DP4" not in names[3] and "TP2 x PP2 micro-batches 2" in names[4]
        assert any(name.startswith("TP4") for name in names[1]) and "ours 1x4, cache by batch" in names[3]
    whole = 2 * TINY.layers * kv_heads * TINY.head_dim * (setting.context + setting.steps) * 8
    cache = {row["layout"]: row["cache_bytes"] for row in rows if row["B"] == 4}
    assert cache["DP4"] == whole and cache["ours 1x4, cache by batch"] == whole
    assert next(size for name, size in cache.items() if name.startswith("TP4")) == whole * max(1, 4 // kv_heads)


def broken_row(mode):
    """On a rank: a layout, against a model that has another weight."""
    reference = experiment_ranks.Reference(SETTING, mode == "training", True)
    layout = model.Layout(tp=RANKS)
    reference.of_width(1)
    key = "layers.1.mlp.fc2.weight"
    reference.state = reference.state | {key: reference.state[key] * 1.001}
    case = experiment_ranks.prepared(SETTING, reference, layout, {})
    return case.row


@pytest.mark.cpu_only("layouts of torch's own parts over Gloo")
@pytest.mark.parametrize("mode", ["prefill", "training"])
def test_a_layout_that_differs_is_reported_and_not_timed(pool, mode):
    """Localises: a comparison that cannot fail, or that looks at one rank alone."""
    for row in pool.run(broken_row, RANKS, mode):
        assert "differs from the unsplit model by" in row["failed"] and "ms" not in row
        assert "NOT TIMED: rank 0: AssertionError" in experiment.line(row)


def rows_with_a_wrong_layout(setting):
    """On a rank: a whole run, in which tensor parallelism over all ranks is found to differ."""
    right = experiment_ranks.Reference.difference

    def difference(self, built, layout):
        return 1.0 if layout.tp == RANKS else right(self, built, layout)

    with mock.patch.object(experiment_ranks.Reference, "difference", difference):
        return experiment.run(setting, ["prefill"], ["causal"], {})


@pytest.mark.cpu_only("layouts of torch's own parts over Gloo")
def test_a_run_times_all_but_the_layout_that_differs(pool):
    """Localises: a wrong layout that takes its turn with the others, or that keeps them from theirs."""
    setting = replace(SETTING, only=("TP4", "FSDP4"), overlap=1)
    for rows in pool.run(rows_with_a_wrong_layout, RANKS, setting):
        found = {row["layout"]: row for row in rows}
        assert set(found) == {"FSDP4", "TP4", "TP4 by rows"}
        assert found["FSDP4"]["ms"] > 0 and "failed" not in found["FSDP4"]
        assert all("failed" in found[name] and "ms" not in found[name] for name in ("TP4", "TP4 by rows"))


def worst_of(found, expected):
    """On a rank."""
    return experiment_ranks.worst(found[dist.get_rank()], expected)


def test_the_worst_difference_of_all_ranks(pool):
    """Localises: a NaN that a maximum loses; a gradient that no rank has; a rank that has nothing to compare."""
    one, nan = torch.ones(2), torch.tensor([1.0, float("nan")])
    expected = {"a": 2 * one, "b": one}
    found = [{"a": 2 * one}, {"b": one + torch.tensor([0.0, 0.5])}]
    assert pool.run(worst_of, 2, found, expected) == [0.5, 0.5]
    assert all(x != x for x in pool.run(worst_of, 2, [{"a": 2 * one}, {"b": nan}], expected))
    with pytest.raises(RankFailure, match="no rank has .'b'."):
        pool.run(worst_of, 2, [{"a": one}, {}], expected)


@pytest.mark.parametrize("sizes, layout, message", [
    (TINY, model.Layout(pp=2, schedule="GPipe", micro_batches=3), "3 micro-batches do not divide the batch of 8"),
    (replace(TINY, batch=6), model.Layout(dp=4), "4 data-parallel ranks do not divide the batch of 6"),
    (replace(TINY, length=18), model.Layout(tp=4, rows=True), "4 ranks do not divide the length of 18"),
    (replace(TINY, layers=3), model.Layout(pp=2, schedule="GPipe"), "2 pipeline stages do not divide 3 layers"),
])  # fmt: skip
def test_what_torch_would_do_wrongly_is_refused(sizes, layout, message):
    """Localises: a batch that a pipeline cuts into other pieces than it puts together."""
    with pytest.raises(ValueError, match=message):
        model.build(sizes, layout, None)


def test_presets():
    """Localises: a number that is not the paper's."""
    seed = experiment.PRESETS["seed"]
    numbers = (1024, 10000, 16, 16, 512, 8192, 32768, 2)
    s = seed.sizes
    assert (s.batch, s.length, s.heads, s.kv_heads, s.head_dim, s.embed_dim, s.mlp_hidden, s.layers) == numbers
    assert seed.ranks == 16 and seed.dtype == "float16"
    small, one = experiment.PRESETS["small"], experiment.PRESETS["gpu1"]
    assert small.ranks == small.sizes.heads == 4 and small.sizes.mlp_hidden == 4 * small.sizes.embed_dim
    assert replace(one.sizes, batch=1024) == seed.sizes and one.ranks == 16 and one.without_wire
    args = experiment.arguments(["--preset", "seed", "--kv-heads", "4", "--batch", "32"])
    assert args.sizes == replace(seed.sizes, kv_heads=4, batch=32) and args.dtype is torch.float16


def test_refused_before_anything_starts(capsys):
    """Localises: a batch that micro-batches do not divide, which would first be told of on every rank."""
    with pytest.raises(SystemExit) as stopped:
        experiment.arguments(["--micro-batches", "3"])
    assert stopped.value.code == 2 and "3 micro-batches do not divide the batch of 8" in capsys.readouterr().err
    assert experiment.arguments(["--micro-batches", "3", "--mode", "decode"]).micro_batches == 3


@pytest.mark.parametrize("whole, pieces, part", [(1024, 16, 64), (8, 4, 8), (96, 3, 48), (97, 4, 97), (64, 3, 64)])
def test_what_is_compared_of_a_large_batch(whole, pieces, part):
    """Localises: a part that a layout cannot cut as it cuts the whole."""
    assert experiment_ranks._part_of(whole, 64, pieces) == part


def test_layouts_of_the_paper():
    """Localises: tensor parallelism past the heads, or the baseline of the paper, missing at its size."""
    found = model.layouts(model.SEED, 16, micro_batches=4, overlap=2)
    names = [layout.name for layout in found]
    assert {"TP16", "TP8 x PP2 GPipe 1", "TP8 x PP2 GPipe 4", "DP16", "FSDP16", "ours 4x4, weights, batch"} <= set(
        names
    )
    assert {layout.grid for layout in found} - {None} == {(16, 1), (8, 2), (4, 4), (2, 8), (1, 16)}
    assert "TP32" not in [layout.name for layout in model.layouts(model.SEED, 32, micro_batches=4, overlap=1)]


@pytest.mark.cpu_only("layouts of torch's own parts over Gloo")
def test_bytes_of_tensor_parallel_training(pool):
    """E. Localises: a gradient of q, k and v's input that is summed over the ranks three times."""
    setting = replace(SETTING, only=("TP4", "ours 4x1, slices, replicated"), overlap=1)
    for row in pool.run(rows_of, RANKS, setting, "training", "causal", timeout=120)[0]:
        sums = 4 * TINY.layers * 2 * TINY.tokens * TINY.embed_dim * 8 * 3 // 4  # two a layer, forward and backward
        small = 4096  # what the ranks of a grid compare, gradients of norms that act on rows
        assert 0 <= row["sent_bytes"] - sums <= small, row["layout"]


@pytest.mark.cpu_only("layouts of torch's own parts over Gloo")
def test_bytes_by_hand(pool):
    """E. Localises: a collective that the recorder does not see, in a layout whose bytes are known."""
    found = pool.run(rows_of, RANKS, replace(SETTING, only=("P",)), "prefill", "causal", timeout=120)
    sent = {row["layout"]: row["sent_bytes"] for row in found[0]}
    x = TINY.tokens * TINY.embed_dim * 8
    matrices = (4 * TINY.embed_dim**2 + 2 * TINY.embed_dim * TINY.mlp_hidden) * 8
    assert sent["DP4"] == 0
    assert sent["TP4"] == 2 * TINY.layers * 2 * x * 3 // 4  # two sums a layer
    assert sent["TP2 x DP2"] == 2 * TINY.layers * 2 * (x // 2) // 2
    norms = 2 * TINY.layers * 2 * TINY.embed_dim * 8  # not the last, which FSDP2's root keeps after the first forward
    assert sent["FSDP4"] == (TINY.layers * matrices + norms) * 3 // 4
    assert sent["TP2 x PP2 GPipe 4"] == sent["TP2 x PP2 GPipe 1"] == 2 * x // 2 * 2 + x  # a sum is 2 (g - 1) / g


def test_a_table_of_rows():
    """Localises: a line that leaves out why a layout was not timed, or another model that is called the fastest."""
    common = {"ours": True, "exact": True, "of": {"pp": 1}, "mode": "prefill", "mask": "full", "tokens_per_s": 10}
    common |= {"sent_bytes": 0, "weight_bytes": 1, "peak_bytes": 2, "difference": 1e-7}
    own = [
        {"layout": "slow", "ms": 9.0},
        {"layout": "other", "exact": False, "ms": 1.0},
        {"layout": "wrong", "failed": "rank 1: no"},
        {"layout": "quick", "ms": 2.0},
    ]
    title, *lines, fastest = experiment.table([common | one for one in own])
    assert title == "prefill, full"
    assert [text.split()[0] for text in lines] == ["other", "quick", "slow", "wrong"]
    assert "another model" in lines[0] and lines[-1].endswith("NOT TIMED: rank 1: no")
    assert fastest.strip() == "fastest: independent (another model) 1.0 ms; ours 2.0 ms"


SMALLER = ["--batch", "8", "--length", "16", "--head-dim", "8", "--mlp-hidden", "32", "--repeats", "2"]


def program(path, *arguments, timeout=240):
    """What it printed, and the JSON that it wrote."""
    environment = {name: x for name, x in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    command = [sys.executable, str(ROOT / "benchmarks/experiment.py"), *SMALLER, *arguments, "--json", str(path)]
    done = subprocess.run(
        command, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    return done.stdout, json.loads(path.read_text())


@pytest.mark.slow
def test_the_program(tmp_path):
    """Localises: the command line, the start of the ranks, the table, the JSON."""
    arguments = [
        "--mask",
        "causal",
        "full",
        "--mode",
        "prefill",
        "training",
        "decode",
        "--decode-batch",
        "4",
        "--context",
        "8",
        "--steps",
        "2",
    ]
    printed, written = program(tmp_path / "experiment.json", *arguments)
    rows = written["rows"]
    assert {(row["mode"], row["mask"]) for row in rows} == {
        ("prefill", "causal"), ("prefill", "full"), ("training", "causal"), ("training", "full"), ("decode", "causal")
    }  # fmt: skip
    for row in rows:
        assert len(row["runs_ms"]) == 2 and row["ms"] > 0 and row["tokens_per_s"] > 0 and row["difference"] <= 1e-4
        assert row["weight_bytes"] > 0 and row["peak_bytes"] > 0 and len(row["sent_bytes_of_ranks"]) == RANKS
        assert ("tpot_ms" in row) == (row["mode"] == "decode")
    assert "fastest: " in printed and "decode, causal, B=4, T=8" in printed
    assert "experiment.py" in written["machine"]["command"]


@pytest.mark.slow
def test_one_rank_without_a_wire(tmp_path):
    """Localises: the preset for one GPU, which must neither compare nor wait for ranks that are not there."""
    arguments = ["--preset", "gpu1", "--heads", "16", "--kv-heads", "16", "--dtype", "float32", "--overlap", "1"]
    _, written = program(tmp_path / "gpu1.json", *arguments, "--mode", "prefill", "--mask", "causal", "--batch", "16",
                         "--length", "32")  # fmt: skip
    assert all(row["ranks"] == 16 and row["ms"] > 0 and "difference" not in row for row in written["rows"])
    assert written["machine"]["without_wire"] and {"TP16", "DP16"} <= {row["layout"] for row in written["rows"]}


@pytest.mark.slow
def test_two_nodes(tmp_path):
    """Localises: bytes over the link that are not those predicted; ranks that are not where the layout wants them."""
    if reason := nodes.missing():
        pytest.skip(reason)
    arguments = ["--nodes", "1gbit", "--mask", "full", "--length", "128", "--head-dim", "32"]
    arguments += ["--layout", "TP4", "FSDP4", "GPipe 1", "2x2, slices, replicated"]
    _, written = program(tmp_path / "nodes.json", *arguments)
    rows = {row["layout"]: row for row in written["rows"]}
    assert written["machine"]["link"] == {"rate": "1gbit", "delay_ms": 0.0, "round_robin": False}
    for name in ("TP4", "TP2 x PP2 GPipe 1", "ours 2x2, slices, replicated", "gather, flat ring", "FSDP4"):
        assert rows[name]["link_bytes"] == pytest.approx(rows[name]["predicted_link_bytes"], rel=0.05, abs=4096)
    assert rows["gather, slice axis first"]["link_bytes"] > 1.8 * rows["gather, head axis first"]["link_bytes"]
