"""Pictures of docs/experiment.md, from the results alone. What is measured is filled, what is predicted is hollow.

Files are SVG with text as text, on a white ground, so that they can be read on a dark page. The same results make the
same bytes: nothing in them depends on the time, and names inside them are hashed with a fixed salt.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from report_data import Results, is_ours, one, rate, shown

STYLE = {
    "svg.hashsalt": "two_level_mha", "svg.fonttype": "none", "font.size": 9, "axes.titlesize": 10,
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.edgecolor": "#52606d", "text.color": "#1f2933", "axes.labelcolor": "#1f2933", "hatch.linewidth": 0.6,
}  # fmt: skip
OURS, OTHERS, LITERAL = "#2563eb", "#7b8794", "#d97706"
FAST, SLOW = "#93c5fd", "#b91c1c"
COMPUTING, EXCHANGING, HIDDEN = "#8fb8de", "#e08a5b", "#5a3a22"
GB = 1e9


def color(row: dict) -> str:
    return OURS if is_ours(row) else OTHERS if row["exact"] else LITERAL


def name(row: dict) -> str:
    return row["layout"].replace(", auto, replicated", "") + " *" * (not row["exact"])


def layouts(axis: Axes, rows: Sequence[dict], title: str, unit: str) -> None:
    """A line for each layout, the first above."""
    axis.set_yticks(range(len(rows)), [name(row) for row in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    for label, row in zip(axis.get_yticklabels(), rows, strict=True):
        label.set_color(color(row))
    axis.grid(axis="x", color="#e4e7eb")
    axis.tick_params(length=0)
    axis.set_title(title)
    axis.set_xlabel(unit)
    axis.set_xlim(left=0)


def throughput(results: Results, figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    measured = shown(results.rows("experiment"))
    for y, row in enumerate(measured):
        runs = [row["tokens"] / ms for ms in row["runs_ms"]]
        left.plot(runs, [y] * len(runs), "|", color=color(row), markersize=7)
        left.plot(rate(row) / 1e3, y, "o", color=color(row), markersize=6)
    layouts(left, measured, "MEASURED: small, 4 ranks", "K tokens/s\ndot: median, strokes: single runs")
    predicted = shown(results.predicted("predicted_seed", causal=False))
    for y, row in enumerate(predicted):
        low, high = (row["tokens"] / row[end] / 1e3 for end in ("high", "low"))
        right.plot([low, high], [y, y], "--", color=color(row), linewidth=1)
        right.plot(rate(row) / 1e3, y, "o", markerfacecolor="white", markeredgecolor=color(row), markersize=6)
    layouts(
        right,
        predicted,
        "PREDICTED: full size, 16 H100",
        "K tokens/s, not causal\ndashed: all assumed rates slow to fast",
    )
    legend(figure)


def below(axis: Axes, columns: int = 2) -> None:
    axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.4, -0.16), ncols=columns)


def legend(figure: Figure) -> None:
    kinds = (
        ("ours, exact", OURS),
        ("torch's own parts", OTHERS),
        ("* the paper's literal reading: another model", LITERAL),
    )
    figure.legend(
        handles=[Patch(color=c, label=text) for text, c in kinds], loc="outside lower center", ncols=3, frameon=False
    )


def moved(results: Results, figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    rows = shown(results.rows("experiment"))
    places = (("experiment_nodes", FAST, "ranks in node order"), ("experiment_nodes_in_turn", SLOW, "dealt in turn"))
    for at, (file, fill, label) in enumerate(places):
        sizes = [one(results.rows(file), layout=row["layout"])["link_bytes"] / 1e6 for row in rows]
        left.barh([y + 0.4 * at - 0.2 for y in range(len(rows))], sizes, 0.4, color=fill, label=label)
    layouts(left, rows, "MEASURED: small, 2 nodes of 2", "MB that a node sends over their link")
    below(left)
    predicted = shown(results.predicted("predicted_seed", causal=False))
    fast, slow = ([row[key] / GB for row in predicted] for key in ("fast_bytes", "slow_bytes"))
    common = {"height": 0.7, "fill": False, "linewidth": 1}
    right.barh(range(len(predicted)), fast, edgecolor="#3b82f6", label="inside its node (fast links)", **common)
    right.barh(
        range(len(predicted)),
        slow,
        left=fast,
        edgecolor=SLOW,
        hatch="////",
        label="to other nodes (slow links)",
        **common,
    )
    layouts(right, predicted, "PREDICTED: full size, 2 nodes of 8", "GB that a rank sends for the whole batch")
    below(right)


def memory(results: Results, figure: Figure) -> None:
    axes = figure.subplots(1, 3)
    rows = sorted(shown(results.rows("experiment")), key=lambda row: row["weight_bytes"] + row["peak_bytes"])
    held(axes[0], rows, megabytes(rows, "weight_bytes"), megabytes(rows, "peak_bytes"), "the rest at its peak")
    layouts(axes[0], rows, "MEASURED: small, prefill", "MB of a rank")
    cached = [row for row in results.rows("experiment_decode_grouped") if row["B"] == 64]
    cached.sort(key=lambda row: row["weight_bytes"] + row["cache_bytes"])
    held(axes[1], cached, megabytes(cached, "weight_bytes"), megabytes(cached, "cache_bytes"), "KV cache")
    layouts(axes[1], cached, "MEASURED: small, 2 KV heads, decoding", "MB of a rank")
    predicted = sorted(results.predicted("predicted_seed_decode", causal=True), key=lambda row: row["peak"])
    weights = [row["weights"] / GB for row in predicted]
    rest = [(row["peak"] - row["weights"]) / GB for row in predicted]
    held(axes[2], predicted, weights, rest, "KV cache and the rest", hollow=True)
    layouts(axes[2], predicted, "PREDICTED: full size, decoding", "GB of a rank")


def megabytes(rows: Sequence[dict], key: str) -> list[float]:
    return [row[key] / 1e6 for row in rows]


def held(
    axis: Axes, rows: Sequence[dict], weights: list[float], rest: list[float], label: str, hollow: bool = False
) -> None:
    for left, sizes, what, fill in ((None, weights, "weights", "#1e3a8a"), (weights, rest, label, FAST)):
        look = {"fill": False, "edgecolor": fill, "linewidth": 1, "hatch": "////" if left is None else None}
        axis.barh(range(len(rows)), sizes, 0.7, left=left, label=what, **(look if hollow else {"color": fill}))
    below(axis)


def scale(results: Results, figure: Figure) -> None:
    left, middle, right = figure.subplots(1, 3)
    rows = results.rows("scale")
    ways = [way for way in dict.fromkeys(row["way"] for row in rows) if way != "overhead"]
    ranks = sorted({row["ranks"] for row in rows})
    for way, c, mark in zip(ways, (OURS, LITERAL, "#059669"), "osD", strict=True):
        of = [one(rows, way=way, ranks=P) for P in ranks]
        left.plot(
            ranks,
            [row["flops"] / 1e15 for row in of],
            mark,
            color=c,
            fillstyle="none",
            markersize={"o": 10, "s": 7, "D": 3}[mark],
        )
        middle.plot(
            ranks[1:], [row["sent_bytes"] / GB for row in of[1:]], mark + "-", color=c, fillstyle="none", label=way
        )
    whole = one(rows, way=ways[0], ranks=1)["flops"] / 1e15
    left.plot(ranks, [whole / P for P in ranks], ":", color=OTHERS, label="1 / P of the model")
    for what, c in (("make_ms", OTHERS), ("call_ms", OURS)):
        text = {"make_ms": "making a small model", "call_ms": "a call without its exchanges"}[what]
        right.plot(ranks, [one(rows, way="overhead", ranks=P)[what] for P in ranks], "o-", color=c, label=text)
    for axis, title, unit in (
        (left, "RECORDED: work of a rank", "10^15 FLOPs for the whole batch"),
        (middle, "RECORDED: bytes a rank sends", "GB for the whole batch"),
        (right, "MEASURED: overhead", "ms"),
    ):
        axis.set(title=title, xlabel="ranks", ylabel=unit, xscale="log", yscale="log")
        axis.set_xticks(ranks, [str(P) for P in ranks], minor=False)
        axis.minorticks_off()
        axis.grid(color="#e4e7eb")
        below(axis, columns=1)


def timeline(axis: Axes, row: dict, title: str) -> None:
    """Two lines of a traced step, in ms: computing above, exchanging below, dark where something is computed beside."""
    for y, spans, c in ((1, "computing", COMPUTING), (0, "exchanging", EXCHANGING), (0, "both", HIDDEN)):
        axis.broken_barh([(start, end - start) for start, end in row[spans]], (y + 0.1, 0.8), color=c)
    axis.set_yticks([0.5, 1.5], ["exchanging", "computing"])
    axis.set_title(title, fontsize=9)


def timelines(results: Results, figure: Figure) -> None:
    rows = [row for row in results.rows("overlap") if "computing" in row]
    rows = [rows[0], rows[-1]]
    axes = figure.subplots(len(rows), 1, sharex=True)
    for axis, row in zip(axes, rows, strict=True):
        title = f"MEASURED: {row['case']}; {row['hidden']:.0%} of the exchanges beside computing (dark)"
        timeline(axis, row, title)
    axes[-1].set_xlabel(f"ms of one traced step, rank 0 of {rows[0]['ranks']}, links of {rows[0]['rate']}")


def training(results: Results, figure: Figure) -> None:
    """Losses of one process, of the schemes, which lie on them, and of the literal form; their differences below."""
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    rows = results.rows("curves")
    above.plot(rows[0]["unsplit"], color=OTHERS, linewidth=4, alpha=0.5, label="one process, unsplit")
    says = {OURS: "4 ranks, 2 KV heads: every exact scheme", LITERAL: '"independent", which is another model'}
    for row in rows:
        color = LITERAL if row["case"] == "independent" else OURS
        above.plot(row["split"], color=color, linewidth=0.8, label=says.pop(color, None))
        apart = [max(abs(a - b), 1e-16) for a, b in zip(row["split"], row["unsplit"], strict=True)]
        below.plot(apart, color=color, linewidth=0.8)
    above.set(title="MEASURED: loss of a small language model, nats a byte")
    above.legend(frameon=False, fontsize=8)
    below.set(title="difference from one process (float64)", yscale="log", xlabel="step")
    for axis in (above, below):
        axis.grid(color="#e4e7eb")


PICTURES: dict[str, tuple[Callable[[Results, Figure], None], tuple[float, float]]] = {  # and inches
    "training": (training, (8, 4.4)),
    "throughput": (throughput, (12, 6)),
    "bytes": (moved, (12, 5.6)),
    "memory": (memory, (13, 4.6)),
    "scale": (scale, (12, 4)),
    "timeline": (timelines, (10, 3.4)),
}


def save(pictures: Mapping[str, tuple[Callable[[Figure], None], tuple[float, float]]], folder: Path) -> None:
    """Writes every picture, by name what draws it and its size in inches, into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):
        for file, (make, size) in pictures.items():
            figure = Figure(figsize=size, layout="constrained", facecolor="white")
            make(figure)
            figure.savefig(folder / f"{file}.svg", metadata={"Date": None})


def draw(results: Results, folder: Path) -> None:
    """Writes the pictures of the page."""
    save({file: (partial(make, results), size) for file, (make, size) in PICTURES.items()}, folder)
