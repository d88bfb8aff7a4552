"""Hardware profiles: names, files, what each number does to a prediction, and everywhere a profile can be given."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness.device import DEVICE

import two_level_mha as tlm
from two_level_mha import _C
from two_level_mha.profile import DEVICE_TYPES, RANGES

ROOT = Path(__file__).resolve().parents[2]
LAYER = {"embed_dim": 1024, "num_heads": 16, "num_kv_heads": 4, "devices": 8, "batch": 4, "seq": 512}
MINE = tlm.Profile(
    name="mine", flops=10**13, memory=10**12, link=10**11, network=10**10, latency_ns=10_000, node_ranks=4,
    padded_head_dim=256, source="made up",
)  # fmt: skip


def option(profile: tlm.Profile, scheme: str = "slices", grid: tuple[int, int] = (4, 2), **other):
    plan = tlm.plan(**LAYER | other, profile=profile)
    return next(one for one in plan.options if (one.grid, one.scheme) == (grid, scheme))


def changed(field: str, factor: float) -> tlm.Profile:
    return dataclasses.replace(MINE, **{field: int(getattr(MINE, field) * factor)})


def test_names_and_device_types():
    """Localises: the table of csrc/plan/profiles.h as Python has it; a type of device that stands for the wrong row."""
    assert DEVICE_TYPES == ("cuda", "cpu")
    assert [tlm.Profile.for_device(kind).name for kind in DEVICE_TYPES] == ["h100", "cpu"]
    h100 = tlm.Profile.named("h100")
    assert (h100.flops, h100.latency_ns, h100.node_ranks, h100.padded_head_dim) == (400 * 10**12, 20_000, 8, 256)
    assert {name for name, _, _, _ in _C.profiles()} == {"h100", "cpu"}
    with pytest.raises(tlm.GridError, match="profile must be one of h100, cpu, or a JSON file, got 'tpu'"):
        tlm.Profile.named("tpu")
    with pytest.raises(tlm.GridError, match="device_type must be one of cuda, cpu, got 'tpu'; or give a profile"):
        tlm.Profile.for_device("tpu")


def test_every_number_does_what_it_says():
    """E. Localises: two of the seven integers exchanged, or one lost, on their way to C++ (numbers, from_numbers)."""
    base, cross = option(MINE).predicted_seconds, option(MINE, grid=(1, 8)).predicted_seconds
    for field, part, other in (
        ("flops", "compute", 2.0),
        ("memory", "memory", 2.0),
        ("latency_ns", "latency", 0.5),
    ):
        seconds = option(changed(field, 2)).predicted_seconds
        assert {name for name in base if seconds[name] != pytest.approx(base[name])} == {part, "total"}
        assert seconds[part] * other == pytest.approx(base[part])
    # a group of 2 is inside a node of 4, one of 8 is not
    linked, far = (option(changed(field, 2)).predicted_seconds for field in ("link", "network"))
    assert linked["sending"] < base["sending"] and far["sending"] < base["sending"]
    assert option(changed("link", 2), grid=(1, 8)).predicted_seconds == cross
    wider = option(changed("network", 2), grid=(1, 8)).predicted_seconds
    assert wider["sending"] * 2 == pytest.approx(cross["sending"])
    near = option(changed("node_ranks", 2), grid=(1, 8)).predicted_seconds
    assert near["sending"] * 4 < cross["sending"]  # all of it by the links
    # half precision: values as wide as keys
    narrow = option(changed("padded_head_dim", 0)).predicted_seconds
    assert narrow["compute"] < base["compute"]
    assert option(MINE, dtype=torch.float32).predicted_seconds["compute"] == pytest.approx(narrow["compute"])


def test_each_kind_of_work_has_its_rate():
    """E. Localises: one of the rates of attention and projections exchanged with another, or lost, on its way to C++; a
    width or size of elements that takes the rate of another.
    """
    calls = {
        f"attention{single}_{width}": {"head_dim": head_dim, "dtype": dtype, "scheme": "sequence"}
        for single, dtype in (("", torch.bfloat16), ("_single", torch.float32))
        for width, head_dim in (("128", 128), ("256", 256), ("wide", 320))
    }
    assert {"flops_single", *calls} == {field for field in RANGES if getattr(MINE, field) is None}
    explicit = dataclasses.replace(MINE, **dict.fromkeys([*calls, "flops_single"], MINE.flops))
    assert explicit.numbers == MINE.numbers  # what is not given is as flops
    for field in ("flops", "flops_single", *calls):
        fast = dataclasses.replace(explicit, **{field: 2 * MINE.flops})
        for name, call in calls.items():
            old, new = (option(profile, **call) for profile in (explicit, fast))
            saved = old.predicted_seconds["compute"] - new.predicted_seconds["compute"]
            projects = field == ("flops_single" if "single" in name else "flops")
            work = old.projection_flops if projects else old.attention_flops if field == name else 0
            assert saved == pytest.approx(work / MINE.flops / 2), (field, name)
    # slices: as wide as the wider of keys and values
    narrow, wide = ({"head_dim": d, "dtype": torch.float32, "scheme": "slices"} for d in (128, 256))
    for field, one, other in (("attention_single_128", narrow, wide), ("attention_single_256", wide, narrow)):
        fast = dataclasses.replace(explicit, **{field: 2 * MINE.flops})
        assert option(fast, **one).predicted_seconds["compute"] < option(explicit, **one).predicted_seconds["compute"]
        assert option(fast, **other).predicted_seconds == option(explicit, **other).predicted_seconds


def test_a_file_is_read_as_it_was_written(tmp_path):
    """E. Localises: to_file and from_file; a Profile, its file and its name resolved to different rates."""
    path = tmp_path / "mine.json"
    MINE.to_file(path)
    assert tlm.Profile.from_file(path) == MINE and json.loads(path.read_text())["latency_ns"] == 10_000
    path.write_text(json.dumps({name: x for name, x in dataclasses.asdict(MINE).items() if x is not None}))
    assert tlm.Profile.from_file(path) == MINE
    plans = [tlm.plan(**LAYER, profile=profile).to_dict() for profile in (MINE, path, str(path))]
    assert plans[0] == plans[1] == plans[2] and plans[0]["profile"] == dataclasses.asdict(MINE)
    for kind, name in (("cuda", "h100"), ("cpu", "cpu")):
        named = tlm.plan(**LAYER, profile=name, device_type=kind)
        assert named == tlm.plan(**LAYER, device_type=kind)


REFUSED = {
    "no field": ({"flops": None}, "has no flops; the fields are name, flops"),
    "another field": ({"speed": 1}, "has speed, which is no field; the fields are name, flops"),
    "a float": ({"flops": 4e14}, "flops of profile 'mine' must be an integer from 1,000,000,000 to .*, got 4"),
    "a bool": ({"node_ranks": True}, "node_ranks of profile 'mine' must be an integer from 1 to 1,048,576, got True"),
    "zero": ({"memory": 0}, "memory of profile 'mine' must be an integer from 1 to .*, got 0"),
    "zero attention": ({"attention_256": 0}, "attention_256 of profile 'mine' must be an integer from 1,000,000,000 "),
    "negative": ({"latency_ns": -1}, "latency_ns of profile 'mine' must be an integer from 0 to .*, got -1"),
    "too much": ({"network": 10**13}, "network of profile 'mine' must be an integer from 1 to .*, got 10"),
    "a byte in less than a FLOP": ({"link": 2 * 10**13}, "link of profile 'mine' must be at most its flops, 10,000,"),
    "no text": ({"source": 3}, "source of a profile must be a text, got 3"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_files(tmp_path, case):
    """Localises: the checks of a file, which name it and the field."""
    change, message = REFUSED[case]
    found = {name: value for name, value in (dataclasses.asdict(MINE) | change).items() if value is not None}
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(found))
    with pytest.raises(tlm.GridError, match=f"^profile '{re.escape(str(path))}':? {message}"):
        tlm.plan(**LAYER, profile=path)


def test_what_is_no_profile(tmp_path):
    """Localises: the refusal of a file that is none, and of other objects."""
    (tmp_path / "text").write_text("400 TFLOP/s")
    for wrong, message in (
        (tmp_path / "absent.json", "cannot be read as a JSON file: .*absent.json"),
        (tmp_path / "text", "cannot be read as a JSON file"),
        ("absent.json", "profile must be one of h100, cpu, or a JSON file, got 'absent.json'"),
        (3, "profile must be a Profile, a name, a JSON file or None, got 3"),
    ):
        with pytest.raises(tlm.GridError, match=message):
            tlm.plan(**LAYER, profile=wrong)


def test_ranges_hold_what_is_known_and_what_cpp_multiplies():
    """Localises: a range so wide that numbers of a profile alone overflow in csrc/plan/."""
    most = {field: most for field, (_, most) in RANGES.items()}
    assert most["network"] * most["node_ranks"] < 2**63
    assert most["flops"] // 10**9 * most["latency_ns"] * 64 < 2**63  # of more collectives than a call has
    for name, _, _, _ in _C.profiles():
        assert tlm.Profile.named(name).numbers


SLOW_NETWORK = dataclasses.replace(MINE, network=10**6, node_ranks=2)
FREE_NETWORK = dataclasses.replace(MINE, network=10**11, node_ranks=2, latency_ns=0)


def test_the_order_of_grids_follows_the_profile():
    """Localises: Grid.candidates predicting for another profile than it was given."""
    grids = [tlm.Grid.candidates(8, 64, 8, 128, profile=profile) for profile in (SLOW_NETWORK, FREE_NETWORK)]
    assert grids[0] != grids[1] and sorted(map(str, grids[0])) == sorted(map(str, grids[1]))
    assert tlm.Grid.candidates(16, 64, 8, 128, profile="h100") == tlm.Grid.candidates(16, 64, 8, 128)
    with pytest.raises(tlm.GridError, match="device_type must be one of cuda, cpu, got 'xpu'; or give a profile"):
        tlm.Grid.candidates(8, 64, 8, 128, device_type="xpu")


def chosen_mesh(profile: tlm.Profile) -> tuple[int, ...]:
    return tuple(tlm.init_mesh(DEVICE, num_heads=8, num_kv_heads=4, head_dim=64, profile=profile).shape)


def test_init_mesh_takes_a_profile(pool):
    """Localises: init_mesh without a grid choosing by another profile."""
    for profile in (SLOW_NETWORK, FREE_NETWORK):
        first = tlm.Grid.candidates(4, 8, 4, 64, profile=profile)[0]
        assert set(pool.run(chosen_mesh, 4, profile)) == {(first.head_groups, first.slices)}


def test_command_line(tmp_path):
    """Localises: --profile of the command, with a name and with a file."""
    path = tmp_path / "mine.json"
    MINE.to_file(path)
    line = "plan --embed-dim 1024 --heads 16 --kv-heads 4 --devices 8 --batch 4 --seq 512 --profile".split()
    for profile in (str(path), "cpu"):
        shown = subprocess.run(
            [sys.executable, "-m", "two_level_mha", *line, profile],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert shown.returncode == 0, shown.stderr
        assert shown.stdout.rstrip("\n") == str(tlm.plan(**LAYER, profile=profile))
