"""The claims of the method's paper, each beside what was measured and what is predicted, with a verdict.

Words of a verdict are written here, numbers come from the results. What a sentence rests on is asked of the results
beside it (`bear_out`): where new results say otherwise the report fails, and the sentence is to be thought over.
"""

from collections.abc import Callable
from dataclasses import dataclass

from report_data import (
    Results,
    caution,
    fastest,
    gain,
    gains,
    gb,
    grid,
    interval,
    is_ours,
    mb,
    ms,
    one,
    percent,
    pipeline,
    rate,
    replicated,
    sent,
    share,
    slices,
    table,
    thousands,
)

# What the paper says of its 16 GPUs.
BEFORE, AFTER = 1.2e6, 1.58e6  # tokens a second, TP8 x PP2 and the method
TPOT_BEFORE, TPOT_AFTER = 0.35e-3, 0.22e-3  # seconds
LESS_SENT, AT_MOST = 0.30, 0.35
SHEET_BANDWIDTH = 3.35e12  # bytes a second of an H100's memory, SXM data sheet


@dataclass(frozen=True)
class Claim:
    says: str
    measured: str
    predicted: str
    verdict: str
    why: str


def bear_out(holds: bool, sentence: str) -> None:
    if not holds:
        raise ValueError(f"the results no longer bear out that {sentence}: read them, and mend the report's words")


def claims(results: Results) -> str:
    found = [make(results) for make in CLAIMS]
    rows = [(one.says, one.measured, one.predicted, f"**{one.verdict}**", one.why) for one in found]
    head = ("the paper says", "measured", "predicted or calculated, full size", "verdict", "why")
    return table(head, rows, numbers=False) + f"\n\n{caution(results)}"


def scalability(results: Results) -> Claim:
    rows = [row for row in results.rows("experiment_decode_grouped") if row["B"] == 64]
    ours = fastest(rows, lambda row: slices(row) > 1)
    copies = fastest(rows, lambda row: row["layout"].startswith("TP4"))
    many = one(results.rows("scale"), way="batch", ranks=1024)
    full = results.predicted("predicted_seed", causal=False)
    plain, same = one(full, layout="TP16"), one(full, layout="ours 16x1, slices, replicated")
    bear_out(copies["cache_bytes"] > 1.9 * ours["cache_bytes"], "copies of KV heads take twice the cache")
    bear_out(many["flops_over_share"] < 1.01, "a rank of 1024 does its share of the FLOPs")
    bear_out(abs(gain(same, plain)) < 0.005, "the grid (16, 1) is plain TP16")
    return Claim(
        says="n x m devices, more than there are heads",
        measured=f"2 KV heads on {ours['ranks']} ranks, decoding 64 sequences: a rank keeps "
        f"{mb(ours['cache_bytes'], 1)} of keys and values, each once; TP4 copies heads and keeps "
        f"{mb(copies['cache_bytes'], 1)} (`experiment_decode_grouped`)",
        predicted=f"recorded: a rank of 1024, grid ({many['grid'][0]}, {many['grid'][1]}), does "
        f"{many['flops_over_share']:.3f} of its share of the FLOPs (`scale`)",
        verdict="holds",
        why="The second level goes on where whole heads end. The paper's own size does not need it: 16 heads on 16 "
        f"GPUs make the grid (16, 1), which is plain tensor parallelism, predicted {thousands(rate(same))} and "
        f"{thousands(rate(plain))} tokens/s.",
    )


def independence(results: Results) -> Claim:
    rows = results.rows("experiment")
    literal = fastest(rows, lambda row: not row["exact"] and slices(row) == 4)
    exact = [row for row in rows if is_ours(row) and grid(row) == (1, 4) and replicated(row)]
    least, most = (pick(row["sent_bytes"] for row in exact if row["of"]["scheme"] != "weights") for pick in (min, max))
    worst = max(row["difference"] for row in rows if is_ours(row))
    full = results.predicted("predicted_seed", causal=False)
    at = {kind: fastest(full, lambda row, kind=kind: grid(row) == (4, 4) and replicated(row) and row["exact"] == kind)
          for kind in (True, False)}  # fmt: skip
    bear_out(least > literal["sent_bytes"], "exact schemes send more than the literal reading")
    return Claim(
        says="each device attends with its own heads and slice, and results are concatenated",
        measured="so taken (`independent`) it is another model, of m times as many heads, and is checked against "
        f"that; our exact layouts differ from the unsplit model by at most {worst:.0e} in float32 (`experiment`)",
        predicted=f"grid (4, 4), replicated activations: taken so {interval(at[False])} tokens/s, the fastest exact "
        f"scheme {interval(at[True])}",
        verdict="does not hold: it is not multi-head attention",
        why="Scores are sums over the whole width of a head and softmax comes after the sum, so a slice cannot "
        f"attend alone. The exchange that makes it exact costs {percent(least / literal['sent_bytes'] - 1)} to "
        f"{percent(most / literal['sent_bytes'] - 1)} bytes on the measured grid (1, 4), by scheme.",
    )


def balance(results: Results) -> Claim:
    def uneven(row: dict) -> float:
        return max(row["sent_bytes_of_ranks"]) * row["ranks"] / (sum(row["sent_bytes_of_ranks"]) or 1)

    rows = results.rows("experiment")
    ours, stages = max(uneven(row) for row in rows if is_ours(row)), uneven(pipeline(rows, many=True))
    full = results.predicted("predicted_seed", causal=False)
    waits = [pipeline(full, many)["bubbles"] / pipeline(full, many)["seconds"] for many in (False, True)]
    shares = [row["flops_over_share"] for row in results.rows("scale") if "flops_over_share" in row]
    bear_out(ours < 1.001 < stages and max(shares) < 1.01, "ranks of a grid do alike")
    return Claim(
        says="heads and dimensions divided evenly balance the load",
        measured=f"what the busiest rank sends over the mean of all: {ours:.3f} on every grid, {stages:.2f} in TP2 x "
        "PP2 (`experiment`)",
        predicted=f"a rank does {min(shares):.3f} to {max(shares):.3f} of its share of the FLOPs, on 1 to 1024 ranks "
        f"(`scale`); in TP8 x PP2 it waits {share(waits[0])} of the time with one micro-batch, {share(waits[1])} with "
        "8",
        verdict="holds, if n divides the KV heads and m a head's width; other grids are refused",
        why="Ranks have equal blocks of the weights and equal shares of the work. Tensor and data parallelism are as "
        "even: it is pipelines that this sets the method apart from.",
    )


def memory(results: Results) -> Claim:
    rows = results.rows("experiment")
    ours = [row for row in rows if is_ours(row)]
    whole = max(
        row["peak_bytes"] for row in ours if replicated(row) and row["of"]["scheme"] == "slices" and grid(row) == (4, 1)
    )
    split = min(row["peak_bytes"] for row in ours if not replicated(row))
    copies, plain = one(rows, layout="DP4"), one(rows, layout="TP4")
    weights = max(row["weight_bytes"] for row in ours)
    decode = results.predicted("predicted_seed_decode", causal=True)
    at = {name: one(decode, layout=name) for name in ("ours 4x4, auto, replicated", "TP16", "DP16")}
    x_bytes = tokens(results) * width(results) * 2
    bear_out(x_bytes > 2 * results.of("predicted_seed")["hardware"]["memory"], "X is more than two GPUs hold")
    bear_out(weights == plain["weight_bytes"] < 0.26 * copies["weight_bytes"], "weights are split as by TP4")
    bear_out(whole > copies["peak_bytes"] and split > copies["peak_bytes"], "DP4 holds the least beside weights")
    return Claim(
        says="each device stores a fraction of the parameters and activations",
        measured=f"weights of a rank {mb(weights)} of {mb(copies['weight_bytes'])}, as in TP4; the peak of the rest "
        f"{mb(whole)} with replicated activations, {mb(split)} at least with split ones, {mb(copies['peak_bytes'])} "
        "in DP4 (`experiment`)",
        predicted="decoding at B=1024, weights and KV cache of a rank: "
        + ", ".join(f"{name.split(',')[0]} {gb(row['peak'], 1)}" for name, row in at.items()),
        verdict="holds for weights and KV cache; for activations only if they are split too",
        why="A rank keeps 1/P of the weights, and keys and values lie once on the grid. With replicated activations "
        f"it holds all of X, which is {gb(x_bytes)} here, more than two H100 have.",
    )


def communication(results: Results) -> Claim:
    rows = results.rows("experiment")
    stages = pipeline(rows, many=True)["sent_bytes"]
    least = min(row["sent_bytes"] for row in rows if is_ours(row))
    literal = min(row["sent_bytes"] for row in rows if not row["exact"])
    full = results.predicted("predicted_seed", causal=False)
    base = sent(pipeline(full, many=True))
    ours = min((row for row in full if is_ours(row) and slices(row) > 1), key=sent)
    taken = min(sent(row) for row in full if not row["exact"])
    fsdp, copies = (sent(one(full, layout=name)) for name in ("FSDP16", "DP16"))
    bear_out(literal > stages and taken > base, "the literal method sends more than the baseline")
    bear_out(sent(ours) < (1 - LESS_SENT) * base and copies == 0, "weights that travel are fewer bytes")
    return Claim(
        says=f"{share(LESS_SENT)} less communication, and more",
        measured=f"bytes a rank sends: TP2 x PP2 {mb(stages)}, the method taken literally {mb(literal)} "
        f"({percent(literal / stages - 1)}), ours at least {mb(least)} ({percent(least / stages - 1)}), TP4 "
        f"{mb(one(rows, layout='TP4')['sent_bytes'])} (`experiment`)",
        predicted=f"TP8 x PP2 {gb(base)}, taken literally {gb(taken)} ({percent(taken / base - 1)}), {ours['layout']} "
        f"{gb(sent(ours))} ({percent(sent(ours) / base - 1)}), FSDP16 {gb(fsdp)}, DP16 none",
        verdict="holds only if weights travel in place of activations",
        why="The method sums outputs over 16 ranks, the baseline over 8, and hands them over once. One X of this "
        f"batch has {gb(tokens(results) * width(results) * 2)} and the weights "
        f"{gb(one(full, layout='DP16')['weights'], 1)}, so gathering weights sends far less, and so do FSDP16 and "
        "DP16.",
    )


def hierarchy(results: Results) -> Claim:
    rows = [row for row in results.rows("links") if row["part"] == "short"]
    found = {name: one(rows, case=f"gather, {name}")["measured"]
             for name in ("flat ring", "head axis first", "slice axis first")}  # fmt: skip
    moved = {name: f"{mb(row['link_bytes']['1'])}, {row['ms']['1']:.0f} ms" for name, row in found.items()}
    size = {name: row["link_bytes"]["1"] for name, row in found.items()}
    bear_out(size["head axis first"] < size["flat ring"] < size["slice axis first"], "the order of the axes decides")
    n, m = 2, 8
    P = n * m
    return Claim(
        says="hierarchical concatenation localises what is sent",
        measured="an all-gather on two nodes of two ranks, link of 100 Mbit/s, what a node sends and the time: flat "
        "ring "
        + "; ".join(f"{name} {text}" if name != "flat ring" else text for name, text in moved.items())
        + " (`links`)",
        predicted=f"two nodes of 8, N bytes a rank: {P - m} N with the head axis first, {P - 1} N flat, {m * (P - m)} "
        "N with the slice axis first",
        verdict="holds only if the axis between nodes goes first and slice groups lie inside a node",
        why="What crosses the slow link must be small, before it is gathered inside the node. In the other order "
        f"every rank of a node sends the same again, {m} times as much.",
    )


def throughput(results: Results) -> Claim:
    rows, full = results.rows("experiment"), results.predicted("predicted_seed", causal=False)
    base, once = pipeline(full, many=True), pipeline(full, many=False)
    ours, copies = fastest(full, is_ours), one(full, layout="DP16")
    taken = fastest(full, lambda row: not row["exact"])
    low, high = gains(ours, base)
    small, stages = (
        fastest(rows, is_ours),
        min((pipeline(rows, many) for many in (True, False)), key=lambda row: row["ms"]),
    )
    bear_out(gain(taken, base) < 0.1, "the literal method gains next to nothing over the baseline")
    bear_out(
        abs(gain(ours, copies)) < 0.02 and ours["layout"].split(", ")[1] == "weights", "our fastest is close to DP16"
    )
    bear_out(rate(base) / rate(once) > AFTER / BEFORE, "micro-batches matter more than the gain")
    return Claim(
        says=f"{percent(AFTER / BEFORE - 1, 1)} throughput: {BEFORE / 1e6:g} M to {AFTER / 1e6:g} M tokens/s",
        measured=f"4 ranks on 2 cores: ours at best {thousands(rate(small))} tokens/s, TP2 x PP2 "
        f"{thousands(rate(stages))}, DP4 {thousands(rate(one(rows, layout='DP4')))} (`experiment`): says nothing of "
        "GPUs",
        predicted=f"TP8 x PP2 {interval(base)} with 8 micro-batches, {interval(once)} with one; taken literally "
        f"{interval(taken)} ({percent(gain(taken, base))}); {ours['layout']} {interval(ours)}, "
        f"{percent(gain(ours, base))} ({percent(low)} to {percent(high)} at common rates); DP16 {interval(copies)}",
        verdict="holds only if weights travel, and DP16 is then as fast; not for the method as written",
        why="With this batch the fastest of our layouts is nearly data parallelism, which needs no second level. "
        f"Micro-batches alone speed the baseline up {rate(base) / rate(once):.1f} times, more than the gain, and the "
        "paper does not say how many it had.",
    )


def token_time(results: Results) -> Claim:
    rows = [row for row in results.rows("experiment_decode") if row["B"] == 1]
    ours, plain, stages = (fastest(rows, lambda row, words=words: words in row["layout"])
                           for words in ("ours", "TP4", "PP2"))  # fmt: skip
    small = ", ".join(f"{row['layout']} {row['tpot_ms']:.1f} ms" for row in (stages, plain, ours))
    many, single = (
        results.predicted(name, causal=True) for name in ("predicted_seed_decode", "predicted_seed_decode_1")
    )
    idle = [row for row in many if row["bubbles"] > 0.2 * row["seconds"]]
    slowest = max((row for row in many if row not in idle), key=lambda row: row["seconds"])
    base, plain, whole = pipeline(single, many=False), one(single, layout="TP16"), fastest(single, is_ours)
    cut = one(single, layout="ours 4x4, auto, replicated")
    less = {name: f"{1e3 * row['seconds']:.2f} ms ({percent(row['seconds'] / base['seconds'] - 1)})"
            for name, row in (("TP16", plain), ("ours (16, 1)", whole), ("ours (4, 4)", cut))}  # fmt: skip
    read = kv_bytes(results) / results.of("predicted_seed")["hardware"]["ranks"]
    bear_out(min(row["seconds"] for row in many) > 50 * TPOT_AFTER, "0.22 ms cannot be of B=1024")
    bear_out(grid(whole) == (16, 1) and abs(gain(whole, plain)) < 0.05, "for one token ours is at best TP16")
    bear_out(base["seconds"] > 1.3 * plain["seconds"], "one token gains where there are no stages")
    return Claim(
        says=f"{percent(TPOT_AFTER / TPOT_BEFORE - 1, 1)} time per output token: {1e3 * TPOT_BEFORE:g} to "
        f"{1e3 * TPOT_AFTER:g} ms",
        measured=f"4 ranks, B=1, T=1024: {small} (`experiment_decode`); more ranks than cores favour stages",
        predicted=f"B=1024: {ms(fastest(many))} to {ms(slowest)}, a pipeline without micro-batches "
        f"{ms(pipeline(many, many=False))}; B=1: TP8 x PP2 {1e3 * base['seconds']:.2f} ms, "
        + ", ".join(f"{name} {text}" for name, text in less.items()),
        verdict="holds only if a few sequences are decoded, on the grid (16, 1), which is TP16; not for B=1024, "
        "T=10000",
        why=f"Each GPU reads {gb(read, 1)} of keys and values a token, {1e3 * read / SHEET_BANDWIDTH:.1f} ms at the "
        f"data sheet's rate: {1e3 * TPOT_AFTER:g} ms would be {read / TPOT_AFTER / 1e12:.0f} TB/s. For one sequence "
        "the stages of a pipeline wait for each other, which any split without stages saves.",
    )


def both_figures(results: Results) -> Claim:
    flying = BEFORE * TPOT_BEFORE, AFTER * TPOT_AFTER
    batch = results.of("predicted_seed")["sizes"]["batch"]
    return Claim(
        says="both figures are of the same set-up, batch 1024",
        measured="-",
        predicted=f"tokens/s times time per token is the number of sequences under way: {flying[0]:.0f} before, "
        f"{flying[1]:.0f} after; {batch} would take {1e3 * batch / BEFORE:.2f} and {1e3 * batch / AFTER:.2f} ms",
        verdict="does not hold",
        why="If tokens/s are decoded tokens, the two figures are of different batches. If they are prompt tokens, "
        "the time per output token cannot be of this batch, as the line above has it.",
    )


def at_most(results: Results) -> Claim:
    found = []
    for causal in (False, True):
        full = results.predicted("predicted_seed", causal)
        found += gains(fastest(full, is_ours), pipeline(full, many=True))
    return Claim(
        says=f"throughput up to {share(AT_MOST)} higher",
        measured="-",
        predicted="our fastest over TP8 x PP2 with 8 micro-batches, both masks, all rates slow or fast: "
        f"{percent(min(found))} to {percent(max(found))}",
        verdict="nothing in the paper shows it",
        why=f"Its one comparison is {percent(AFTER / BEFORE - 1, 1)}. How much it is depends on rates, mask and "
        "micro-batches that the paper does not give.",
    )


def utilization(results: Results) -> Claim:
    full = results.predicted("predicted_seed", causal=False)
    peak = results.of("predicted_seed")["ceiling_tokens_per_second"]["full"]
    of = {
        "TP8 x PP2": pipeline(full, many=True),
        "taken literally": fastest(full, lambda row: not row["exact"]),
        "ours": fastest(full, is_ours),
        "DP16": one(full, layout="DP16"),
    }
    return Claim(
        says="better use of the hardware",
        measured="-",
        predicted=f"of the {peak / 1e6:.2f} M tokens/s that 16 GPUs could do at their peak, not causal: "
        + ", ".join(f"{name} {share(rate(row) / peak)}" for name, row in of.items())
        + f"; the paper's own figures are {share(BEFORE / peak)} and {share(AFTER / peak)}",
        verdict="holds as the throughput does: only if weights travel",
        why="Products and attention are the same FLOPs in every layout. What differs is how long they wait for "
        "exchanges and for other stages.",
    )


def tokens(results: Results) -> int:
    sizes = results.of("predicted_seed")["sizes"]
    return sizes["batch"] * sizes["length"]


def width(results: Results) -> int:
    sizes = results.of("predicted_seed")["sizes"]
    return sizes["heads"] * sizes["head_dim"]


def kv_bytes(results: Results) -> int:
    """Keys and values of all tokens and layers, in two bytes an element."""
    return 2 * results.of("predicted_seed")["sizes"]["layers"] * tokens(results) * width(results) * 2


CLAIMS: tuple[Callable[[Results], Claim], ...] = (
    scalability, independence, balance, memory, communication, hierarchy, throughput, token_time, both_figures, at_most,
    utilization,
)  # fmt: skip
