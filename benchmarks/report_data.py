"""Results on disk as report.py and its parts read them: rows by name, which layouts are shown, numbers as text.

A row is "measured" where it was timed or counted in a run, and "predicted" where `python -m two_level_mha predict` made
it. Both name their layout alike (two_level_mha.experiment.layouts), and that name is all that is read of it here.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

OURS = re.compile(r"ours (\d+)x(\d+), ([^,]+)(?:, ([^,]+))?")  # of a decode step only how it keeps the cache
BASELINE = re.compile(r"TP\d+ x PP\d+ GPipe (\d+)")


@dataclass(frozen=True)
class Results:
    """files: what each JSON of the folder holds, by its name without the suffix."""

    files: dict[str, dict]

    @classmethod
    def read(cls, folder: Path) -> "Results":
        return cls({path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))})

    def of(self, name: str) -> dict:
        if name not in self.files:
            raise ValueError(
                f"benchmarks/results has no {name}.json, which the report is made of: CONTRIBUTING.md says how"
            )
        return self.files[name]

    def rows(self, name: str) -> list[dict]:
        """Measured rows but for those of layouts that failed their comparison, which were not timed."""
        return [row for row in self.of(name)["rows"] if "failed" not in row]

    def predicted(self, name: str, causal: bool) -> list[dict]:
        """Predicted rows of a mask but for those that memory or the batch refused."""
        return [row for row in self.of(name)["predictions"] if row["causal"] == causal and not row["refused"]]

    def source(self, name: str) -> str:
        """What made a file, as a reader would run it."""
        found = self.of(name)
        return found.get("command") or found["machine"]["command"]


def one(rows: Iterable[dict], **wanted) -> dict:
    """The row that has these values. Raises ValueError where there is not exactly one."""
    found = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    if len(found) != 1:
        raise ValueError(f"the results have {len(found)} rows with {wanted}, where the report needs one: measure again")
    return found[0]


def fastest(rows: Iterable[dict], chosen: Callable[[dict], bool] = lambda row: True) -> dict:
    return min((row for row in rows if chosen(row)), key=seconds)


def seconds(row: dict) -> float:
    return row["seconds"] if "seconds" in row else row["ms"] / 1e3


def rate(row: dict) -> float:
    """Tokens a second."""
    return row["tokens"] / seconds(row)


def is_ours(row: dict) -> bool:
    return bool(OURS.match(row["layout"])) and row["exact"]


def grid(row: dict) -> tuple[int, int] | None:
    found = OURS.match(row["layout"])
    return (int(found[1]), int(found[2])) if found else None


def slices(row: dict) -> int:
    """Of each head; 0 of layouts that are not ours."""
    return (grid(row) or (0, 0))[1]


def replicated(row: dict) -> bool:
    """Ours with whole activations on every rank."""
    found = OURS.match(row["layout"])
    return bool(found) and found[4] == "replicated"


def pipeline(rows: Iterable[dict], many: bool) -> dict:
    """The paper's baseline, tensor and pipeline parallelism: with micro-batches, or the batch in one piece."""
    return next(row for row in rows if (found := BASELINE.fullmatch(row["layout"])) and (int(found[1]) > 1) == many)


def shown(rows: Sequence[dict]) -> list[dict]:
    """Those of a picture or table, the fastest first: all that are not ours but FSDP beside tensor parallelism, and of
    each grid the fastest with whole and with split activations; of the other model the fastest.
    """
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        if OURS.match(row["layout"]):
            key = ("ours", *grid(row), replicated(row)) if row["exact"] else ("independent",)
        else:
            key = (row["layout"],)
        if not re.match(r"TP\d+ x FSDP", row["layout"]):
            groups.setdefault(key, []).append(row)
    return sorted((fastest(group) for group in groups.values()), key=seconds)


def gain(new: dict, old: dict) -> float:
    """How much more tokens a second, as a share of the old."""
    return rate(new) / rate(old) - 1


def gains(new: dict, old: dict) -> tuple[float, float]:
    """The same where all rates are at the slow, and at the fast end of their ranges: least and most."""
    ends = [old[end] * new["tokens"] / (new[end] * old["tokens"]) - 1 for end in ("high", "low")]
    return min(ends), max(ends)


def sent(row: dict) -> float:
    """Bytes that a rank sends, predicted."""
    return row["fast_bytes"] + row["slow_bytes"]


# Numbers as text.


def thousands(tokens_per_second: float) -> str:
    return f"{tokens_per_second / 1e3:,.0f} K"


def interval(row: dict) -> str:
    """A predicted rate with that at the slow and the fast end of the hardware's rates."""
    low, high = row["tokens"] / row["high"], row["tokens"] / row["low"]
    return f"{rate(row) / 1e3:,.0f} K [{low / 1e3:,.0f}, {high / 1e3:,.0f}]"


def percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:+.{digits}f} %".replace("-0 %", "0 %")


def share(x: float, digits: int = 0) -> str:
    return f"{100 * x:.{digits}f} %"


def gb(size: float, digits: int = 0) -> str:
    return f"{size / 1e9:,.{digits}f} GB"


def mb(size: float, digits: int = 2) -> str:
    return f"{size / 1e6:,.{digits}f} MB"


def ms(row: dict) -> str:
    return f"{1e3 * seconds(row):.1f} ms"


def spread(row: dict) -> str:
    """A measured time with its shortest and longest run."""
    return f"{row['ms']:.1f} [{min(row['runs_ms']):.1f}, {max(row['runs_ms']):.1f}]"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = True) -> str:
    """In Markdown. numbers: all columns but the first are, and lie to the right."""
    lines = ["| " + " | ".join(head) + " |", "|---" + ("|--:" if numbers else "|---") * (len(head) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


ERRORS = {  # sets of held-out cases of prediction_error.py, by ranks
    "2, first set": "prediction_error_first",
    "2, second set": "prediction_error_second",
    "2, third set": "prediction_error_2",
    "4": "prediction_error_4",
    "8": "prediction_error_8",
}


def caution(results: Results) -> str:
    """What stands beside predictions."""
    found = [results.rows(name)[-1] for name in ERRORS.values()]
    medians = [row["error_median"] for row in found]
    return (
        "Predicted for rates of an H100 that are assumed, not measured; in brackets all rates at the slow and at the "
        "fast end of what is assumed. The predictor itself, on CPUs that it was calibrated on, was off by "
        f"{share(min(medians))} to {share(max(medians))} by median of a set, and by "
        f"{share(max(row['error_worst'] for row in found))} at worst, in cases that it was not fitted to."
    )


def load(results: Results, name: str) -> str:
    """What the machine did while this was measured, the ranks themselves among it: its average of five minutes."""
    return f"load average {results.of(name)['machine']['load_average'][1]:.1f}"
