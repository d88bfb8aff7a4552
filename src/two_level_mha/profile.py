"""The rates of hardware that predictions are made with: known by name, by type of device, or from a file.

A file is JSON with the fields of Profile:

    {"name": "my node", "flops": 600000000000000, "memory": 3000000000000, "link": 350000000000,
     "network": 45000000000, "latency_ns": 15000, "node_ranks": 8, "padded_head_dim": 256, "source": "measured",
     "flops_single": 50000000000000, "attention_wide": 130000000000000}
"""

import json
import os
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path

from two_level_mha import _C
from two_level_mha.errors import GridError

DEVICE_TYPES = tuple(device for _, device, _, _ in _C.profiles())

# Field -> the least and the most that it can be: prices are integers below 2**63, of whole FLOPs for each byte.
RANGES = {
    "flops": (10**9, 10**17),
    "memory": (1, 10**15),
    "link": (1, 10**15),
    "network": (1, 10**12),
    "latency_ns": (0, 10**9),
    "node_ranks": (1, 2**20),
    "padded_head_dim": (0, 2**20),
    "flops_single": (10**9, 10**17),
    "attention_128": (10**9, 10**17),
    "attention_256": (10**9, 10**17),
    "attention_wide": (10**9, 10**17),
    "attention_single_128": (10**9, 10**17),
    "attention_single_256": (10**9, 10**17),
    "attention_single_wide": (10**9, 10**17),
    "hidden_percent": (0, 100),
}


@dataclass(frozen=True)
class Profile:
    """Rates of one kind of hardware, as one rank has it.

    flops: FLOP/s that projections reach in half precision. memory: bytes/s read from memory, at most flops. link,
    network: bytes/s that a rank sends to ranks of its node, and that its adapter sends to others, at most flops.
    latency_ns: of one collective. node_ranks: ranks in a node; the sum over a grid inside one is one all-reduce.
    padded_head_dim: the head_dim up to which half precision pads values to the width of keys, 0: it does not. source:
    where the numbers are from. flops_single: as flops, with elements of 4 bytes or more. attention_128, .._256,
    .._wide: FLOP/s that attention reaches in half precision with heads up to 128 wide, up to 256, and wider;
    attention_single_128, ..: with elements of 4 bytes or more. None, for these seven: as flops. hidden_percent: of an
    exchange's time, what computing beside it hides; 0: nothing, and so overlap=None is off.
    Raises GridError, naming the field, for a value out of range.
    """

    name: str
    flops: int
    memory: int
    link: int
    network: int
    latency_ns: int
    node_ranks: int
    padded_head_dim: int
    source: str
    flops_single: int | None = None
    attention_128: int | None = None
    attention_256: int | None = None
    attention_wide: int | None = None
    attention_single_128: int | None = None
    attention_single_256: int | None = None
    attention_single_wide: int | None = None
    hidden_percent: int = 0

    def __post_init__(self) -> None:
        for field in ("name", "source"):
            if not isinstance(getattr(self, field), str):
                raise GridError(f"{field} of a profile must be a text, got {getattr(self, field)!r}")
        for (field, (least, most)), value in zip(RANGES.items(), self.numbers, strict=True):
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise GridError(
                    f"{field} of profile {self.name!r} must be an integer from {least:,} to {most:,}, got {value!r}"
                )
        for field in ("memory", "link", "network"):
            if getattr(self, field) > self.flops:
                raise GridError(
                    f"{field} of profile {self.name!r} must be at most its flops, {self.flops:,}, got "
                    f"{getattr(self, field):,}: prices count whole FLOPs for each byte"
                )

    @property
    def numbers(self) -> tuple[int, ...]:
        """The integers, as RANGES has them, that csrc/plan/profiles.h predicts with."""
        found = (getattr(self, field) for field in RANGES)
        return tuple(self.flops if number is None else number for number in found)

    @staticmethod
    def named(name: str) -> "Profile":
        """A known profile. Raises GridError for another name, with those that are."""
        known = _known()
        if name not in known:
            raise GridError(f"profile must be one of {', '.join(known)}, or a JSON file, got {name!r}")
        return known[name]

    @staticmethod
    def for_device(device_type: str) -> "Profile":
        """The profile that stands for a type of device where none is named."""
        names = {device: name for name, device, _, _ in _C.profiles()}
        if device_type not in names:
            raise GridError(
                f"device_type must be one of {', '.join(DEVICE_TYPES)}, got {device_type!r}; or give a profile"
            )
        return Profile.named(names[device_type])

    @staticmethod
    def from_file(path: str | os.PathLike[str]) -> "Profile":
        """A profile from a JSON file of its fields. Raises GridError, naming file and field, where it is none."""
        try:
            found = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise GridError(f"profile {os.fspath(path)!r} cannot be read as a JSON file: {error}") from error
        names = [field.name for field in fields(Profile)]
        keys = set(found) if isinstance(found, dict) else set()
        wrong = [
            f"has no {field.name}" for field in fields(Profile) if field.name not in keys and field.default is MISSING
        ]
        wrong += [f"has {name}, which is no field" for name in sorted(keys - set(names))]
        if wrong:
            raise GridError(f"profile {os.fspath(path)!r} {', '.join(wrong)}; the fields are {', '.join(names)}")
        try:
            return Profile(**found)
        except GridError as error:
            raise GridError(f"profile {os.fspath(path)!r}: {error}") from None

    def to_file(self, path: str | os.PathLike[str]) -> None:
        """Writes what from_file reads."""
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n")


def resolve_profile(profile: "Profile | str | os.PathLike[str] | None", device_type: str) -> Profile:
    """The profile that a `profile=` argument means: a Profile, a name, a JSON file; None: that of the device's type."""
    if isinstance(profile, Profile):
        return profile
    if profile is None:
        return Profile.for_device(device_type)
    if not isinstance(profile, (str, os.PathLike)):
        raise GridError(f"profile must be a Profile, a name, a JSON file or None, got {profile!r}")
    if isinstance(profile, str) and (profile in _known() or not Path(profile).is_file()):
        return Profile.named(profile)
    return Profile.from_file(profile)


def _known() -> dict[str, Profile]:
    return {
        name: Profile(name=name, source=source, **dict(zip(RANGES, numbers, strict=True)))
        for name, _, numbers, source in _C.profiles()
    }
