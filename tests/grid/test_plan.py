"""The planner: what it lists, what it picks, that scheme="auto" and the pass agree with it, and its command line."""

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness.device import DEVICE

import two_level_mha as tlm
from two_level_mha import _C
from two_level_mha.testing import record_collectives

ROOT = Path(__file__).resolve().parents[2]
LLAMA = {"embed_dim": 8192, "num_heads": 64, "num_kv_heads": 8, "head_dim": 128, "devices": 16}
CALL = {"batch": 8, "seq": 8192}
CHOSEN_PER_CALL = ("slices", "sequence", "batch", "weights")


def options(plan, grid):
    return {option.scheme: option for option in plan.options if option.grid == grid}


def test_every_grid_with_every_scheme():
    """Localises: grids or schemes that are left out; whole heads only where the rule holds."""
    plan = tlm.plan(**LLAMA, **CALL)
    assert [grid for grid in dict.fromkeys(option.grid for option in plan.options)] == [(8, 2), (4, 4), (2, 8), (1, 16)]
    for grid in ((8, 2), (4, 4), (2, 8), (1, 16)):
        assert list(options(plan, grid)) == ["independent", "slices", "sequence", "batch", "heads", "weights"]
    assert not any(option.exact for option in plan.options if option.scheme == "independent")
    assert {option.scheme for option in tlm.plan(**LLAMA, **CALL, decode=True).options} == {"position", "batch"}
    # 20 query heads on 5 KV heads cannot be dealt to 2 ranks as whole heads
    odd = tlm.plan(embed_dim=1280, num_heads=20, num_kv_heads=5, devices=2, batch=1, seq=64)
    assert list(options(odd, (1, 2))) == ["independent", "slices", "sequence", "batch", "weights"]
    # on one slice all schemes are the same
    for ranks in (1, 4):
        plan = tlm.plan(embed_dim=64, num_heads=4, devices=ranks, batch=1, seq=8)
        assert len(options(plan, (ranks, 1))) == 1


def test_numbers_of_one_option():
    """E. Localises: a column of the table: FLOPs, bytes, collectives, weights, cache, kept activations."""
    option = options(tlm.plan(**LLAMA, **CALL, overlap=1), (8, 2))["heads"]
    tokens, D, h, k, d, P = 8 * 8192, 8192, 64, 8, 128, 16
    assert option.attention_flops == 8 * (8192 * 4096) * (h // P) * 2 * 2 * d  # half of the keys
    assert option.projection_flops == 2 * tokens * D * (2 * h + 2 * k) * d // P
    exchange = tokens * 2 * (d // 2)  # r * 2 * K * d, r = 1/2
    combine = tokens * D * 2 * (P - 1) // P  # three stages send what a flat sum does
    assert [row.what for row in option.forward] == ["move in", "combine", "combine"]
    compared = 20 * 2 * 2 * (P - 1) // P  # 10 digits of 2 bits, each as two numbers
    assert option.sent_bytes(backward=True) == 2 * (exchange + combine) == option.sent_bytes() - compared
    assert option.collectives() == option.collectives(backward=True) == 4
    assert option.weight_bytes == 2 * D * (2 * h + 2 * k) * d // P
    assert option.cache_bytes == 2 * 2 * tokens * k * d // P
    own = 2 * tokens * (h // P) * d + 2 * tokens * d  # q and o, k and v of the KV head
    assert option.activation_bytes == 2 * (tokens * D + own) + 4 * tokens * (h // P)


def test_half_precision_pads_values_on_a_gpu():
    """E. Localises: `slices` predicted too fast where the kernels want values as wide as keys, up to head_dim 256; the
    rate of another width or size of elements.
    """
    for head_dim, dtype, factor, rate, projections in (
        (128, torch.bfloat16, 2 * 128 / (128 + 64), 400e12, 400e12),
        (256, torch.float16, 2 * 256 / (256 + 128), 300e12, 400e12),
        (512, torch.bfloat16, 1, 130e12, 400e12),
        (128, torch.float32, 1, 80e12, 50e12),
        (256, torch.float32, 1, 80e12, 50e12),
        (512, torch.float64, 1, 40e12, 50e12),
    ):
        layer = {"embed_dim": 1024, "num_heads": 8, "num_kv_heads": 2, "head_dim": head_dim, "dtype": dtype}
        gpu, cpu = (
            options(tlm.plan(**layer, devices=4, batch=2, seq=512, device_type=kind), (2, 2))["slices"]
            for kind in ("cuda", "cpu")
        )
        seconds = gpu.attention_flops * factor / rate + gpu.projection_flops / projections
        assert gpu.predicted_seconds["compute"] == pytest.approx(seconds, rel=1e-3)  # to a 1024th
        assert cpu.predicted_seconds["compute"] == pytest.approx((cpu.attention_flops + cpu.projection_flops) / 90e9)


def test_sums_inside_a_node():
    """E. Localises: a sum over a grid inside one node that is planned in three stages, or one over nodes in one; the
    bytes are the same.
    """
    profile = tlm.Profile.named("h100")
    for ranks, devices, sums in ((8, 16, 3), (16, 16, 1), (8, 8, 1), (7, 8, 3)):
        here = dataclasses.replace(profile, node_ranks=ranks)
        layer = {"embed_dim": 1024, "num_heads": 16, "num_kv_heads": 4, "devices": devices}
        option = options(tlm.plan(**layer, batch=2, seq=512, profile=here), (4, devices // 4))["sequence"]
        for rows, what in ((option.forward, "combine"), (option.backward, "dX")):
            found = [row for row in rows if row.what == what]
            assert sum(row.collectives for row in found) == sums, (ranks, devices, rows)
            sent = 2 * 2 * 2 * 512 * 1024 * (devices - 1) / devices
            assert sum(row.bytes for row in found) == pytest.approx(sent, rel=1e-3)  # and what the ranks compare


def test_the_pick_is_the_fastest_exact_one():
    """Localises: the pick and its reason."""
    for decode in (False, True):
        plan = tlm.plan(**LLAMA, **CALL, decode=decode)
        exact = [option for option in plan.options if option.exact]
        assert plan.pick is min(exact, key=lambda option: option.predicted_seconds["total"])
        seconds = plan.pick.predicted_seconds
        shown = sum(seconds[part] for part in ("compute", "memory", "sending", "latency")) - seconds["hidden"]
        assert shown == pytest.approx(seconds["total"])
        assert plan.why.startswith(f"grid {plan.pick.grid}") and "predicted" in plan.why
        assert plan.profile.name == "h100" and "assumed" in plan.profile.source


@pytest.mark.parametrize("device_type", ["cuda", "cpu"])
def test_auto_is_the_planners_choice(device_type):
    """Localises: resolve_scheme and the planner deciding by different prices."""
    seen = set()
    for D, h, B, L in itertools.product((1024, 4096), (8, 64), (1, 2, 8), (1, 512, 2048, 2049, 4096)):
        sizes = {"embed_dim": D, "num_heads": h, "head_dim": 128, "devices": 8, "batch": B, "seq": L}
        plan = tlm.plan(**sizes, device_type=device_type)
        for n, m in ((4, 2), (2, 4), (1, 8)):
            at = options(plan, (n, m))
            best = min(CHOSEN_PER_CALL, key=lambda scheme: at[scheme].predicted_seconds["total"])
            assert [scheme for scheme, option in at.items() if option.auto] == [best], (sizes, n, m)
            call = _C.Call(B=B, L=L, S=L, H=h // n, K=h // n, d=128, m=m)
            call.n, call.D, call.element_size, call.causal, call.overlap = n, D, 2, True, 0
            assert _C.resolve_scheme("auto", call, tlm.Profile.for_device(device_type).numbers) == best
            seen.add(best)
    assert seen == set(CHOSEN_PER_CALL)
    # heads that share keys and values are stored whole, and stay where they are projected
    assert options(tlm.plan(**LLAMA, **CALL), (8, 2))["heads"].auto


def run_auto(n, m, cases, node_ranks):
    """Bytes and collectives that a module with scheme="auto" sends in eval and in training, and those planned."""
    mesh, found = tlm.init_mesh(DEVICE, (n, m)), []
    profile = dataclasses.replace(tlm.Profile.for_device(DEVICE), node_ranks=node_ranks)
    for embed_dim, batch, seq in cases:
        layer = tlm.TwoLevelMultiheadAttention(embed_dim, 4, bias=False, batch_first=True, mesh=mesh, profile=profile)
        x = torch.randn(batch, seq, embed_dim, requires_grad=True)
        for _ in range(2):  # the ranks compare their inputs in the first call
            with record_collectives() as record:
                layer(x, x, x, need_weights=False)[0].sum().backward()
        sizes = {"embed_dim": embed_dim, "num_heads": 4, "devices": n * m, "batch": batch, "seq": seq}
        plan = tlm.plan(**sizes, causal=False, dtype=torch.float32, profile=profile)
        option = next(option for option in plan.options if option.grid == (n, m) and option.auto)
        kept = sum(p.numel() * 4 for p in map(lambda p: p.to_local(), layer.parameters()))
        seen = (record.sent(backward=False), record.sent(backward=True), len(record.calls), kept)
        collectives = option.collectives() + option.collectives(backward=True)
        planned = (option.sent_bytes(), option.sent_bytes(backward=True), collectives, option.weight_bytes)
        found.append((option.scheme, seen, planned))
    return found


@pytest.mark.parametrize("node_ranks", [1, 2, 4])
def test_the_pass_runs_what_the_planner_says(pool, node_ranks):
    """E. Localises: the pass resolving "auto" from other sizes than the planner is given, or sending otherwise; with 4,
    a sum inside the node that is in three stages here or there.
    """
    cases = [(16, 1, 1), (64, 4, 256), (64, 3, 301), (1024, 1, 512), (1024, 2, 256)]
    results = pool.run(run_auto, 4, 2, 2, cases, node_ranks, timeout=240)
    for per_case in results:
        for scheme, seen, planned in per_case:
            assert seen == planned, scheme
    chosen = {scheme for scheme, _, _ in results[0]}
    assert chosen == set(CHOSEN_PER_CALL) - ({"weights"} if node_ranks == 4 else set())  # its sums are as they were


def kept(n, m, cases):
    """Bytes of what autograd keeps of one forward pass, parameters apart, and those planned."""
    mesh, found = tlm.init_mesh(DEVICE, (n, m)), []
    for scheme, combine, batch in cases:
        layer = tlm.TwoLevelMultiheadAttention(
            32, 8, bias=False, batch_first=True, mesh=mesh, scheme=scheme, combine=combine
        )
        x = torch.randn(batch, 8, 32).requires_grad_()
        storages = {}

        def keep(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        layer(x, x, x, need_weights=False)  # the ranks compare their inputs in the first call
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            layer(x, x, x, need_weights=False)
        for parameter in layer.parameters():
            storages.pop(parameter.to_local().untyped_storage().data_ptr(), None)
        sizes = {"embed_dim": 32, "num_heads": 8, "devices": n * m, "batch": batch, "seq": 8}
        plan = tlm.plan(**sizes, causal=False, dtype=torch.float32, combine=combine, device_type=DEVICE)
        found.append((sum(storages.values()), options(plan, (n, m))[scheme].activation_bytes))
    return found


def test_kept_activations(pool):
    """E. Localises: a tensor that the pass keeps for its backward and the planner does not know, or the reverse."""
    cases = list(itertools.product([*CHOSEN_PER_CALL, "heads", "independent"], ["reduce", "concat"], [2, 3]))
    for per_case in pool.run(kept, 4, 2, 2, cases, timeout=240):
        for case, (seen, planned) in zip(cases, per_case, strict=True):
            assert seen == planned, case


def test_kv_cache_is_stored_once():
    """E. Localises: the cache's size per rank: 1/P of the whole on every grid, for both layouts."""
    plan = tlm.plan(**LLAMA, batch=16, seq=4096, decode=True)
    assert {option.cache_bytes for option in plan.options} == {2 * 2 * 16 * 4096 * 8 * 128 // 16}


def test_decode_sends_the_same_at_every_context():
    """E. Localises: bytes of a decode step that grow with the context."""
    plans = [tlm.plan(**LLAMA, batch=8, seq=seq, decode=True) for seq in (1025, 4097, 65537)]
    assert len({tuple(option.sent_bytes() for option in plan.options) for plan in plans}) == 1


def test_no_grid():
    """Localises: the refusal, and the numbers of ranks it names."""
    with pytest.raises(
        tlm.GridError, match=r"no grid of 1000000000039 ranks is valid; for 1024: \(8, 128\), .*\(1, 1024\)$"
    ):
        tlm.plan(**LLAMA | {"devices": 10**12 + 39}, **CALL)
    assert tlm.Grid.candidates(10**12, 64, 8, 128) == []


def test_slices_that_do_not_divide():
    """E. Localises: costs of narrow slices that are not those of the widest; schemes that cannot have them; words."""
    plan = tlm.plan(**LLAMA | {"devices": 12}, **CALL, overlap=1)
    assert list(dict.fromkeys(option.grid for option in plan.options)) == [(4, 3), (2, 6), (1, 12)]
    assert {option.scheme for option in plan.options} == {"slices", "sequence", "batch", "weights"}
    tokens, D, h, k, d, c = 8 * 8192, 8192, 64, 8, 128, 43
    option = options(plan, (4, 3))["slices"]
    assert option.weight_bytes == 2 * D * (2 * h + 2 * k) // 4 * c
    assert option.projection_flops == 2 * tokens * D * (2 * h + 2 * k) // 4 * c
    assert option.attention_flops == 8 * (8192 * 4096) * (h // 4) * 2 * (d + c)
    assert option.forward[0].bytes == 2 * tokens * (h + k) // 4 * c * 2  # to each of 2 others
    assert "12 does not divide head_dim 128: a slice has 11 columns, the last one 7." in plan.why
    few = tlm.plan(embed_dim=32, num_heads=4, num_kv_heads=2, ranks=7, batch=1, seq=8, device_type="cpu")
    assert "a slice has 2 columns, and 3 of 7 slices have none." in few.why
    assert "7 ranks share no factor with 2 key/value heads" in few.why
    assert "6 would take grid (2, 3)" in few.why and "8 would take grid (2, 4)" in few.why
    for ranks in range(1, 14):  # every number has a grid
        found = tlm.Grid.candidates(ranks, 8, 4, 10)
        assert tlm.Grid(1, ranks) in found and all(8 % grid.head_groups == 0 for grid in found)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"devices": 0}, "devices must be a positive integer, got 0"),
        ({"seq": 2.5}, "seq must be a positive integer, got 2.5"),
        ({"num_kv_heads": 7}, "num_kv_heads=7 must divide num_heads=64"),
        (
            {"num_heads": 60, "num_kv_heads": 4, "head_dim": None},
            "num_heads=60 does not divide embed_dim=8192: give head_dim",
        ),
        ({"combine": "sum"}, "combine must be one of reduce, concat, got 'sum'"),
        ({"device_type": "tpu"}, "device_type must be one of cuda, cpu, got 'tpu'"),
        ({"dtype": torch.int8}, "dtype must be a floating point torch.dtype, got torch.int8"),
    ],
)
def test_refused_arguments(wrong, message):
    """Localises: the checks of `plan`."""
    with pytest.raises(tlm.GridError, match=message.replace("(", r"\(")):
        tlm.plan(**LLAMA | CALL | wrong)


HUGE = {"embed_dim": 16384, "num_heads": 128, "head_dim": 128}


def test_sizes_that_overflow_are_refused():
    """Localises: numbers of csrc/plan/ that wrap around 2**63."""
    with pytest.raises(tlm.GridError, match="batch=1024 with seq=10000000 is too large to price"):
        tlm.plan(**HUGE, devices=16, batch=1024, seq=10**7)
    for devices, decode in itertools.product((1, 16, 1024), (False, True)):
        tlm.plan(**HUGE, devices=devices, batch=64, seq=2**20, decode=decode, causal=False)


def numbers(option):
    sent = [row.bytes for row in option.forward + option.backward]
    return [option.activation_bytes, option.cache_bytes, *option.predicted_seconds.values(), *sent]


@pytest.mark.parametrize("device_type", ["cuda", "cpu"])
@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize(("combine", "overlap"), [("reduce", 1), ("reduce", 4), ("concat", 1)])
def test_the_largest_sizes_that_are_not_refused(device_type, decode, combine, overlap):
    """Localises: a bound that lets something overflow: twice the sequences would not cost more."""
    layers = (
        (HUGE | {"devices": 16}, 2**20),
        (HUGE | {"num_kv_heads": 1, "devices": 128, "bias": True}, 5),
        ({"embed_dim": 2**20, "num_heads": 4, "head_dim": 16, "devices": 64, "dtype": torch.float64}, 1000),
        ({"embed_dim": 8, "num_heads": 8192, "head_dim": 1, "devices": 8192}, 1),
    )
    for layer, seq in layers:

        def priced(batch, layer=layer, seq=seq):
            try:
                call = {"batch": batch, "seq": seq, "decode": decode, "overlap": overlap}
                return tlm.plan(**layer, **call, combine=combine, device_type=device_type).options
            except tlm.GridError as error:
                assert "too large to price" in str(error)

        most = next(2**bits for bits in range(63, -1, -1) if priced(2**bits))
        assert most > 1
        for large, small in zip(priced(most), priced(most // 2), strict=True):
            assert large.flops >= 1.9 * small.flops > 0, large
            for more, fewer in zip(numbers(large), numbers(small), strict=True):
                assert more >= fewer >= 0, large


def command(*arguments):
    line = "plan --embed-dim 8192 --heads 64 --kv-heads 8 --head-dim 128 --batch 8 --seq 8192".split()
    return subprocess.run(
        [sys.executable, "-m", "two_level_mha", *line, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_command_line():
    """Localises: the command: the table, --json, and exit code 2 where there is no grid."""
    shown = command("--devices", "16")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.rstrip("\n") == str(tlm.plan(**LLAMA, **CALL))
    assert max(map(len, shown.stdout.splitlines())) <= 96
    found = json.loads(command("--devices", "16", "--decode", "--json").stdout)
    assert found == json.loads(json.dumps(tlm.plan(**LLAMA, **CALL, decode=True).to_dict()))
    assert sum(option["pick"] for option in found["options"]) == 1
    refused = command("--devices", "9999999")
    assert refused.returncode == 2 and "no grid of 9999999 ranks is valid; for" in refused.stderr and not refused.stdout


def test_candidates_are_the_valid_grids():
    """Localises: the order of Grid.candidates losing or inventing grids."""
    for ranks, h, k, d in ((16, 64, 8, 128), (8, 28, 4, 128), (8, 14, 2, 64), (12, 12, 12, 32), (7, 8, 8, 64)):
        valid = [(n, ranks // n) for n in range(1, ranks + 1) if ranks % n == 0 and k % n == 0]
        found = [(grid.head_groups, grid.slices) for grid in tlm.Grid.candidates(ranks, h, k, d)]
        assert sorted(found) == sorted(valid)
    # nothing is exchanged before the sum where whole KV heads can be dealt out
    assert tlm.Grid.candidates(8, 16, 16, 128)[0] == tlm.Grid(8, 1)
    assert tlm.Grid.candidates(16, 64, 8, 128)[0] == tlm.Grid(8, 2)


def chosen_mesh(num_heads, num_kv_heads, head_dim):
    return tuple(tlm.init_mesh(DEVICE, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim).shape)


def test_init_mesh_takes_the_first_candidate(pool):
    """Localises: init_mesh without a grid."""
    for heads in ((14, 2, 64), (4, None, 16), (12, 12, 8)):
        first = tlm.Grid.candidates(4, *heads, device_type=DEVICE)[0]
        assert set(pool.run(chosen_mesh, 4, *heads)) == {(first.head_groups, first.slices)}
