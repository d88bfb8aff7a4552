"""The sections of docs/experiment.md below its table of claims: what each shows, and what a reader should conclude."""

from report_claims import BEFORE, TPOT_AFTER, TPOT_BEFORE, bear_out, kv_bytes, tokens, width
from report_data import (
    ERRORS,
    Results,
    caution,
    fastest,
    gain,
    gb,
    interval,
    is_ours,
    load,
    mb,
    one,
    percent,
    pipeline,
    rate,
    replicated,
    share,
    shown,
    slices,
    spread,
    table,
    thousands,
)

TWO_NODES = {"in node order": "experiment_nodes", "dealt in turn": "experiment_nodes_in_turn"}


def picture(name: str, title: str) -> str:
    return f"![{title}](pictures/{name}.svg)"


def experiment(results: Results) -> str:
    found = results.of("predicted_seed")
    sizes, peak = found["sizes"], found["ceiling_tokens_per_second"]
    x_bytes = tokens(results) * width(results) * 2
    rows = [
        ("model", f"{sizes['layers']} dense Transformer layers, {sizes['heads']} heads of {sizes['head_dim']}, "
         f"embedding {width(results):,}, MLP {sizes['mlp_hidden']:,}, FP16"),
        ("batch", f"{sizes['batch']:,} sequences of {sizes['length']:,} tokens: {tokens(results) / 1e6:.2f} M tokens"),
        ("hardware", f"{found['hardware']['ranks']} H100; taken to be two nodes of "
         f"{found['hardware']['profile']['node_ranks']}, which the paper does not say"),
        ("compared", "tensor parallelism 8 x pipeline parallelism 2, and the method with m x n = 16"),
        ("not given", "the split of 16 into m and n, micro-batches, causal or not, prompt or decoded tokens, software"),
    ]  # fmt: skip
    return "\n\n".join([
        "## What the experiment is",
        table(("", "what the paper gives"), rows, numbers=False),
        f"At their peak of {found['hardware']['peak_flops'] / 1e12:.0f} TFLOP/s 16 H100 could do "
        f"{peak['full'] / 1e6:.2f} M tokens/s of this model, {peak['causal'] / 1e6:.2f} M if causal. One X has "
        f"{gb(x_bytes)}, keys and values of both layers {gb(kv_bytes(results))}. So the {BEFORE / 1e6:g} M of the "
        "baseline are possible, and the batch must go through in pieces, since activations do not fit.",
    ])  # fmt: skip


def small(results: Results) -> str:
    rows = results.rows("experiment")
    nodes = {title: results.rows(name) for title, name in TWO_NODES.items()}
    lines = []
    for row in shown(rows):
        apart = [one(of, layout=row["layout"]) for of in nodes.values()]
        lines.append((
            row["layout"] + " *" * (not row["exact"]), spread(row), *(spread(of) for of in apart),
            mb(row["sent_bytes"]), *(mb(of["link_bytes"]) for of in apart),
        ))  # fmt: skip
    head = ("4 Gloo ranks on 2 cores", "one machine, ms", *(f"two nodes {title}, ms" for title in nodes),
            "a rank sends", *(f"over the link, {title}" for title in nodes))  # fmt: skip
    sizes = rows[0]["sizes"]
    ours, copies, plain = fastest(rows, is_ours), one(rows, layout="DP4"), one(rows, layout="TP4")
    bear_out(copies["ms"] < 0.7 * ours["ms"], "DP4 is the fastest small layout")
    ratio = [one(of, layout="ours 2x2, slices, replicated")["link_bytes"] for of in nodes.values()]
    bear_out(ratio[1] > 2 * ratio[0], "ranks dealt in turn send more over the link")
    return "\n\n".join([
        "## Run small: every layout on 4 ranks",
        "Data parallelism is the fastest here too, and what the others lose is exchanges. Let slice groups lie "
        f"inside a node: with ranks dealt in turn `slices` on (2, 2) sends {ratio[1] / ratio[0]:.1f} times as much "
        "over the link.",
        picture("throughput", "Tokens a second by layout: measured small, predicted at full size"),
        f"Measured: {sizes['layers']} layers, {sizes['heads']} heads of {sizes['head_dim']}, MLP "
        f"{sizes['mlp_hidden']}, B={sizes['batch']}, L={sizes['length']}, float32, causal; median [shortest, longest] "
        f"of {len(rows[0]['runs_ms'])} runs. Every layout was first compared with the unsplit model. Of each grid the "
        f"fastest scheme with whole and with split activations, of {sum(is_ours(row) for row in rows)}. The link has "
        "1 Gbit/s; bytes over it are of a node, by its interface's counters. *: another model. There are more ranks "
        f"than cores, and other work ran beside ({load(results, 'experiment')} on one machine, "
        f"{load(results, 'experiment_nodes')} and {load(results, 'experiment_nodes_in_turn')} on two nodes, the ranks "
        f"among it), so that times of one layout differ by much: TP4 on one machine took {min(plain['runs_ms']):.0f} "
        f"to {max(plain['runs_ms']):.0f} ms. Bytes do not.",
        table(head, lines),
    ])  # fmt: skip


def full(results: Results) -> str:
    both = {causal: results.predicted("predicted_seed", causal) for causal in (False, True)}
    lines = []
    for row in shown(both[False]):
        causal = one(both[True], layout=row["layout"])
        lines.append((
            row["layout"] + " *" * (not row["exact"]), interval(row), interval(causal), gb(row["fast_bytes"]),
            gb(row["slow_bytes"]), f"{gb(row['peak'])}, {row['pieces']}", row["bound"],
        ))  # fmt: skip
    head = (
        "16 H100, predicted",
        "tokens/s, not causal",
        "causal",
        "sent inside nodes",
        "between nodes",
        "held, pieces",
        "bound by",
    )
    ours, copies = fastest(both[False], is_ours), one(both[False], layout="DP16")
    more = [gain(fastest(both[causal], is_ours), pipeline(both[causal], many=True)) for causal in both]
    whole = fastest(both[False], lambda row: is_ours(row) and replicated(row) and slices(row) > 1)
    base = pipeline(both[False], many=True)
    bear_out(rate(whole) < rate(base), "with replicated activations ours is slower than the baseline")
    return "\n\n".join([
        "## Predicted at full size",
        "The fastest of our layouts lets weights travel and is then as fast as copies of the model, "
        f"{thousands(rate(ours))} against {thousands(rate(copies))} tokens/s: {percent(more[0])} over TP8 x PP2 with "
        f"8 micro-batches, {percent(more[1])} if causal. With replicated activations, as the paper describes it, the "
        f"fastest exact layout with more than one slice is at {percent(gain(whole, base))}.",
        caution(results),
        table(head, lines),
        "Sent: by one rank, for the whole batch. Held: the most that a rank holds while the batch goes through in so "
        "many pieces, each as large as 80 GB allow, so that columns of memory are not to be compared; the next "
        "picture has memory where they are. *: another model.",
        picture("bytes", "Bytes by layout, over fast and slow links"),
        picture("memory", "Memory of a rank by layout"),
    ])  # fmt: skip


def gathers(results: Results) -> str:
    ranks = results.of("links")["machine"]["grid"]
    n, m = ranks
    P, size = n * m, results.of("links")["machine"]["parts"][0]["block"]
    formulas = {"flat ring": ("(P - 1) N", P - 1), "head axis first": ("(P - m) N", P - m),
                "slice axis first": ("m (P - m) N", m * (P - m))}  # fmt: skip
    lines = []
    for name, (formula, times) in formulas.items():
        found = [one(results.rows("links"), part=part, case=f"gather, {name}") for part in ("short", "wrong order")]
        moved = [row["measured"]["link_bytes"]["1"] / size for row in found]
        bear_out(abs(moved[0] / times - 1) < 0.01, f"a gather with {name} sends {formula}")
        lines.append((name, formula, str(times), *(text for row, x in zip(found, moved, strict=True)
                      for text in (f"{x:.2f}", f"{row['measured']['ms']['1']:.0f} ms"))))  # fmt: skip
    head = (
        "all-gather",
        "a node sends, in node order",
        f"n={n}, m={m}",
        "measured / N",
        "time",
        "dealt in turn / N",
        "time",
    )
    return "\n\n".join([
        "## Hierarchical gathers against a flat one",
        "Gather first along the axis that goes between nodes, the head axis where slice groups lie inside a node: "
        "that is the least that a node can send. The other order costs m times as much; the flat ring is in between.",
        table(head, lines),
        f"Measured on two network namespaces with two ranks each, joined by a link of 100 Mbit/s, N = {size:,} bytes "
        f"a rank, by the interface's counters without headers (`{results.source('links')}`, {load(results, 'links')}).",
    ])  # fmt: skip


DECODED = {
    1: "predicted_seed_decode_1",
    13: "predicted_seed_decode_13",
    64: "predicted_seed_decode_64",
    1024: "predicted_seed_decode",
}


def decode(results: Results) -> str:
    rows = results.rows("experiment_decode")
    batches = sorted({row["B"] for row in rows})
    names = dict.fromkeys(row["layout"] for row in sorted(rows, key=lambda row: (-row["B"], row["ms"])))
    lines = [(name, *(_measured_ms(rows, name, batch) for batch in batches)) for name in names]
    predicted = {batch: results.predicted(name, causal=True) for batch, name in DECODED.items()}
    wide = [
        (row["layout"].replace(", auto, replicated", ", cache by position"),
         *(_predicted_ms(of, row["layout"]) for of in predicted.values()))
        for row in sorted(predicted[1024], key=lambda row: row["seconds"])
    ]  # fmt: skip
    alone, base = (one(predicted[1], layout=name) for name in ("TP16", "TP8 x PP2 GPipe 1"))
    few = {name: one(predicted[64], layout=name) for name in ("TP16", "ours 4x4, auto, replicated", "DP16")}
    bear_out(alone["seconds"] < 2 * TPOT_AFTER and base["seconds"] < 2 * TPOT_BEFORE, "B=1 is of the paper's size")
    bear_out([*few] == sorted(few, key=lambda name: few[name]["seconds"]), "at B=64 copies are behind, TP16 ahead")
    return "\n\n".join([
        "## Decoding at B = 1, 13, 64, 1024",
        "At B=1024 every layout without idle stages takes about as long as reading its share of the keys and values, "
        "so no way to split can win a third. At B=1 weights and latency count: TP8 x PP2, whose stages wait, takes "
        f"{ms_of(base)} ms and TP16 {ms_of(alone)} ms; the paper's {1e3 * TPOT_BEFORE:g} and {1e3 * TPOT_AFTER:g} ms "
        "can only be of a few sequences. At B=64 copies of the model, each of which reads all weights, fall behind: "
        + ", ".join(f"{name.split(',')[0]} {ms_of(row)} ms" for name, row in few.items()) + ".",
        table(("measured, T=1024, ms a token", *(f"B={batch}" for batch in batches)), lines),
        f"Measured: the small model on 4 ranks and 2 cores (`{results.source('experiment_decode')}`, "
        f"{load(results, 'experiment_decode')}); stages of a pipeline that wait leave their core to the others.",
        table(("16 H100, predicted, T=10000, ms a token", *(f"B={batch}" for batch in DECODED)), wide),
        f"-: fewer sequences than data-parallel ranks, or a number that these do not divide. {caution(results)} A "
        "small batch is bound by latencies, of which a profile knows one, assumed: the least certain of these "
        "numbers.",
    ])  # fmt: skip


def ms_of(row: dict) -> str:
    return f"{1e3 * row['seconds']:.2f}"


def _measured_ms(rows: list[dict], name: str, batch: int) -> str:
    found = [f"{row['tpot_ms']:.1f}" for row in rows if (row["layout"], row["B"]) == (name, batch)]
    return "".join(found) or "-"


def _predicted_ms(rows: list[dict], name: str) -> str:
    found = [f"{ms_of(row)} [{1e3 * row['low']:.2f}, {1e3 * row['high']:.2f}]" for row in rows if row["layout"] == name]
    return "".join(found) or "-"


def scale(results: Results) -> str:
    rows = results.rows("scale")
    ways = list(dict.fromkeys(row["way"] for row in rows if row["way"] != "overhead"))
    ranks = sorted({row["ranks"] for row in rows})
    lines = []
    for P in ranks:
        of = {way: one(rows, way=way, ranks=P) for way in [*ways, "overhead"]}
        shares = [of[way]["flops_over_share"] for way in ways]
        lines.append((
            f"{P}, ({of['overhead']['grid'][0]}, {of['overhead']['grid'][1]})", f"{max(shares):.4f}",
            *(gb(of[way]["sent_bytes"]) for way in ways), f"{of['overhead']['call_ms']:.1f} ms",
            f"{of['overhead']['make_ms']:.0f} ms", f"{of['overhead']['model_python_bytes'] / 1e3:.0f} KB",
        ))  # fmt: skip
    first, last = (one(rows, way="batch", ranks=P)["sent_bytes"] for P in (16, 1024))
    travel = [one(rows, way=ways[-1], ranks=P)["sent_bytes"] for P in (16, 1024)]
    bear_out(last > first and travel[1] < travel[0] / 10, "only weights that travel are sent less by more ranks")
    return "\n\n".join([
        "## From 1 to 1024 ranks",
        "Work divides exactly, and what Python does for a call does not grow. What a rank sends with replicated "
        "activations does not shrink, so that 1024 ranks would mostly wait; where weights travel it falls from "
        f"{gb(travel[0])} on 16 ranks to {gb(travel[1])} on 1024.",
        picture("scale", "Work, bytes and overhead of a rank as ranks grow from 1 to 1024"),
        table(("ranks, grid", "FLOPs over share", *(f"sent, {way}" for way in ways), "a call", "making a model",
               "held by Python"), lines),
        "Recorded, not predicted: one rank of the paper's model on fake tensors, the whole batch in one call; "
        "overhead is timed of a small model whose exchanges return at once (`benchmarks/scale.py`).",
    ])  # fmt: skip


def overlap(results: Results) -> str:
    rows = results.rows("overlap")
    cases: dict[str, list[dict]] = {}
    for row in rows:
        cases.setdefault(row["case"].rpartition(", ")[0], []).append(row)
    lines = [(name, *(f"{row['ms']:.0f} ms, {share(row['hidden'])}" for row in of)) for name, of in cases.items()]
    first = next(iter(cases.values()))
    bear_out(first[-1]["ratio"] < 0.9, "chunks are faster over a slow link")
    return "\n\n".join([
        "## With and without overlap",
        "Over a link as slow as this one, chunks that compute while others travel save "
        f"{share(1 - first[-1]['ratio'])} of a training step; where exchanges are short beside computing there is "
        "nothing to gain.",
        picture("timeline", "One training step in one chunk and in four: computing and exchanging"),
        table((f"2 Gloo ranks, links of {rows[0]['rate']}", "1 chunk", "2 chunks", "4 chunks"), lines),
        "Measured: the median time of a step, and the share of the exchanges in which rank 0 computed, by torch's "
        "profiler (`benchmarks/overlap.py --rate 1gbit`). The picture is one traced step of the first row; a trace "
        "slows the step itself.",
    ])  # fmt: skip


def prediction(results: Results) -> str:
    lines = []
    for name, file in ERRORS.items():
        row = results.rows(file)[-1]
        limit = f"{share(row['limit_median'])}, {share(row['limit_worst'])}" if "limit_median" in row else "none"
        lines.append((
            name, f"{row['cases']}, {row['rejected']}",
            f"{share(row['error_median'], 1)}, {share(row['error_worst'], 1)}", limit,
            f"{share(row['repeat_error_median'], 1)}, {share(row['repeat_error_worst'], 1)}",
        ))  # fmt: skip
    return "\n\n".join([
        "## How far predictions are off",
        "Differences of a few percent between predictions mean nothing: on CPUs that were calibrated half of the "
        "predictions are off by more than that. On GPUs nothing was timed; there the assumed rates are uncertain "
        "too, which the brackets span.",
        table(("Gloo ranks on 2 cores", "cases, rejected", "error: median, worst", "limit", "a second pass differs by"),
              lines),
        "Cases and the form of the fit were fixed before they were run (`benchmarks/held_out.json`). After the first "
        "set on 2 ranks the form was changed; in the second the calibration was disturbed. Cases are rejected by "
        "what else ran on the machine, not by their error, and all are listed in the results.",
    ])  # fmt: skip


MADE_BY = {  # those that do not say it themselves
    "overlap": "benchmarks/overlap.py --rate 1gbit",
    "scale": "benchmarks/scale.py",
    **{name: f"benchmarks/prediction_error.py --ranks {ranks[0]}" for ranks, name in ERRORS.items()},
}


def sources(results: Results) -> str:
    names = ["experiment", *TWO_NODES.values(), "experiment_decode", "experiment_decode_grouped", "links", *MADE_BY,
             "predicted_seed", *DECODED.values()]  # fmt: skip
    lines = []
    for name in names:
        machine = results.of(name).get("machine", {})
        command = MADE_BY.get(name) or results.source(name)
        lines.append((f"`{name}.json`", f"`{command}`", machine.get("commit", "")))
    return "\n\n".join([
        "## Where the numbers are from",
        "All of them are in benchmarks/results. Measured on one machine with 2 cores, shared with other work; "
        "nothing here was run on a GPU.",
        table(("file", "made by", "at commit"), lines, numbers=False),
        "`make predictions` makes what is predicted, `make report` this page and its pictures.",
    ])  # fmt: skip


SECTIONS = (small, full, gathers, decode, scale, overlap, prediction, sources)
