"""A plan as a picture: predicted time and storage of every grid with every scheme."""

import os

from two_level_mha.errors import GridError
from two_level_mha.planner import Plan

ROW, WIDTH = 0.28, 11.0  # inches


def plot(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Writes bars of microseconds and MB of a rank, an option a row, the pick in bold, in the format of the name.

    Raises GridError without matplotlib, and where the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise GridError("a picture needs matplotlib: pip install matplotlib, or leave out --plot") from None
    rows = [f"{option.grid} {option.scheme}" + ("" if option.exact else "*") for option in plan.options]
    seconds = [option.predicted_seconds for option in plan.options]
    times = {
        "computing": [max(s["compute"], s["memory"]) * 1e6 for s in seconds],
        "exchanges, not hidden": [(s["sending"] - s["hidden"]) * 1e6 for s in seconds],
        "latency of exchanges": [s["latency"] * 1e6 for s in seconds],
    }
    storage = {
        "weights": [option.weight_bytes / 1e6 for option in plan.options],
        "KV cache": [option.cache_bytes / 1e6 for option in plan.options],
    }
    figure = Figure(figsize=(WIDTH, 1.6 + ROW * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, parts, unit in ((left, times, "microseconds of a forward pass"), (right, storage, "MB of a rank")):
        start = [0.0] * len(rows)
        for name, values in parts.items():
            axes.barh(rows, values, left=start, label=name)
            start = [a + b for a, b in zip(start, values, strict=True)]
        axes.set_xlabel(f"{unit}, predicted")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(parts), frameon=False, fontsize="small")
        axes.margins(y=0.01)
        axes.spines[["top", "right"]].set_visible(False)
    left.invert_yaxis()
    left.get_yticklabels()[plan.options.index(plan.pick)].set_fontweight("bold")
    call, layer = plan.call, plan.layer
    figure.suptitle(
        f"{layer['num_heads']} heads, {layer['num_kv_heads']} KV heads, on {call['devices']} ranks: predicted by the "
        f"profile {plan.profile.name}" + ("" if all(o.exact for o in plan.options) else "; *: another model"),
        fontsize="medium",
    )
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise GridError(f"--plot {os.fspath(path)}: {error}") from None
