"""Pictures of the documentation that nothing is measured for: what a rank attends with, and what more ranks change.

    python benchmarks/pictures.py          # docs/pictures/schemes.svg, docs/pictures/ranks.svg

The second is predicted, by the planner's profile of an H100, whose rates are assumed.
"""

from pathlib import Path

from common import ROOT
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from report_pictures import save

import two_level_mha as tlm

FOLDER = ROOT.parent / "docs" / "pictures"
OWN, CAME = "#2563eb", "#93c5fd"
ALL = (0.0, 1.0)
# Of slice 0 of 2, after the exchange: the share of the tokens (from, to) and of a head's dims that it has of Q, K, V;
# stripes: every second token.
HELD = {
    "projected": [(ALL, (0.0, 0.5))] * 3,
    "slices": [(ALL, ALL), (ALL, ALL), (ALL, (0.0, 0.5))],
    "sequence": [((0.0, 0.5), ALL), (ALL, ALL), (ALL, ALL)],
    "batch": [((0.0, 0.5), ALL)] * 3,
    "weights": [((0.0, 0.5), ALL), (ALL, ALL), (ALL, ALL)],
    "position": [(ALL, ALL), ("stripes", ALL), ("stripes", ALL)],
}
SAYS = {
    "projected": "after the projection:\nits dims of every head",
    "slices": "Q and K gathered,\nits own dims of V",
    "sequence": "its rows of Q,\nK and V gathered",
    "batch": "its sequences",
    "weights": "its rows, projected with\nthe group's weights",
    "position": "with a cache: all of Q,\nits positions of K and V",
}
RANKS = (1, 2, 4, 8, 16, 32, 64)
LLAMA_70B = {"embed_dim": 8192, "num_heads": 64, "num_kv_heads": 8, "head_dim": 128}


def matrix(axis: Axes, left: float, letter: str, tokens, dims: tuple[float, float]) -> None:
    """One of Q, K, V of two heads: tokens down, a head's dims across, filled where this rank has them."""
    runs = [(i / 8, i / 8 + 0.125) for i in range(0, 8, 2)] if tokens == "stripes" else [tokens]
    for first, end in runs:
        for own, color in ((False, CAME), (True, OWN)):
            low, high = (dims[0], min(dims[1], 0.5)) if own else dims
            axis.add_patch(Rectangle((left + low, 1 - end), high - low, end - first, color=color, linewidth=0))
    axis.add_patch(Rectangle((left, 0), 1, 1, fill=False, edgecolor="#52606d", linewidth=0.8))
    axis.text(left + 0.5, 1.12, letter, ha="center", fontsize=9)


def schemes(figure: Figure) -> None:
    for axis, (name, held) in zip(figure.subplots(2, 3).flat, HELD.items(), strict=True):
        for i, (letter, (tokens, dims)) in enumerate(zip("QKV", held, strict=True)):
            matrix(axis, i * 1.25, letter, tokens, dims)
        axis.set_xlim(-0.1, 3.6)
        axis.set_ylim(-0.5, 1.3)
        axis.set_aspect("equal")
        axis.set_axis_off()
        axis.set_title("projected" if name == "projected" else f'"{name}"', fontweight="bold", loc="center")
        axis.text(1.75, -0.12, SAYS[name], ha="center", va="top", fontsize=8.5)
    figure.suptitle("What the first of two ranks of a slice group has of a head: tokens down, dims across.\n"
                    "Dark: it projected that itself; light: it came from the other rank.", fontsize=9)  # fmt: skip


def ranks(figure: Figure) -> None:
    left, middle, right = figure.subplots(1, 3)
    call = {"batch": 8, "seq": 8192}
    calls = {"decode, 8 x 8192": call | {"decode": True}, "prefill, 8 x 8192": call}
    decode = [tlm.plan(**LLAMA_70B, **calls["decode, 8 x 8192"], ranks=P).pick for P in RANKS]
    copied = [decode[0].cache_bytes / min(P, LLAMA_70B["num_kv_heads"]) / 1e6 for P in RANKS]
    left.plot(RANKS, [pick.cache_bytes / 1e6 for pick in decode], "o-", color=OWN, label="two levels")
    left.plot(RANKS, copied, "s--", color="#d97706", label="KV heads copied")
    left.plot(RANKS[:4], copied[:4], "^:", color="#7b8794", label="tensor parallelism: ends at 8")
    left.set(title="KV cache, MB a layer")
    left.legend(frameon=False, fontsize=8)
    middle.plot(RANKS, [pick.weight_bytes / 1e6 for pick in decode], "o-", color=OWN)
    middle.set(title="attention weights, MB a layer")
    for (name, call), marker in zip(calls.items(), "ov", strict=True):
        picks = [tlm.plan(**LLAMA_70B, **call, ranks=P).pick for P in RANKS]
        times = [pick.predicted_seconds["total"] * 1e3 for pick in picks]
        right.plot(RANKS, times, f"{marker}--", color=OWN, markerfacecolor="white", label=name)
    right.axvline(8, color="#b91c1c", linewidth=0.8)
    right.text(8.6, 1, "a node ends", color="#b91c1c", fontsize=8)
    right.set(title="PREDICTED: ms a layer")
    right.legend(frameon=False, fontsize=8, loc="center right", bbox_to_anchor=(1, 0.3))
    for axis in (left, middle, right):
        axis.set(xscale="log", yscale="log", xlabel="ranks", xticks=RANKS, xticklabels=map(str, RANKS))
        axis.minorticks_off()
        axis.grid(color="#e4e7eb")


PICTURES = {"schemes": (schemes, (7.6, 4.0)), "ranks": (ranks, (9.6, 3.0))}


def main(folder: Path = FOLDER) -> None:
    save(PICTURES, folder)


if __name__ == "__main__":
    main()
