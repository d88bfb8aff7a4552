"""What the ranks of experiment.py run: every layout checked against the unsplit model, recorded, and timed in turns."""

import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial

import torch
import torch.distributed as dist
from link_ranks import Part, gathers, over_link
from link_ranks import one_run as one_gather
from link_ranks import prepared as prepared_gather
from link_ranks import timed as timed_over_link
from live import LiveBytes
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

import two_level_mha as tlm
from two_level_mha.experiment.model import ONE_RANK, Built, Layout, Sizes, build, mesh_of
from two_level_mha.testing import record_collectives

TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.bfloat16: 5e-2,
    torch.float16: 1e-2,
}  # of the largest element
CHECKED = {"batch": 64, "length": 256}  # at most as much is compared, since the unsplit model must run it too
GATHERED = 1 << 19  # bytes of a rank


@dataclass
class Case:
    """What takes its turn: `before` is not timed. Its row of the results is filled as things come to be known."""

    row: dict
    run: Callable[[], object] = lambda: None
    before: Callable[[], object] = lambda: None
    holds: tuple[Tensor, ...] = ()  # what is no activation, beside the weights
    runs: list[tuple[float, int]] = field(default_factory=list)  # ms, bytes over the link


@dataclass(frozen=True)
class Setting:
    """What was asked for, alike on every rank."""

    sizes: Sizes
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    stock: bool = False  # attention of the layouts that are not ours by torch's kernel
    micro_batches: int = 4
    overlap: int = 2
    repeats: int = 3
    only: tuple[str, ...] = ("",)  # layouts whose names contain one of them
    node_of: tuple[int, ...] = ()  # of each rank; empty: one machine
    without_wire: bool = False
    batches: tuple[int, ...] = ()  # of decode, as is what follows
    context: int = 0  # tokens in the cache before the first step
    steps: int = 0

    @property
    def factory(self) -> dict:
        return {"dtype": self.dtype, "device": self.device}

    def asked(self, name: str) -> bool:
        return any(text in name for text in self.only)

    @property
    def compared(self) -> Sizes:
        """Parts of batch and length that every layout can cut as it cuts the whole, or the whole."""
        pieces = {"batch": math.lcm(self.micro_batches, dist.get_world_size()), "length": dist.get_world_size()}
        own = {name: _part_of(getattr(self.sizes, name), most, pieces[name]) for name, most in CHECKED.items()}
        return replace(self.sizes, **own)


def _part_of(whole: int, most: int, pieces: int) -> int:
    """The largest divisor of `whole` up to `most` that `pieces` divides; where there is none, all of it."""
    if whole <= most:
        return whole
    return max((part for part in range(1, most + 1) if whole % part == 0 == part % pieces), default=whole)


class Reference:
    """The unsplit model, alike on every rank, and what it gives for one x and target."""

    def __init__(self, setting: Setting, training: bool, causal: bool) -> None:
        self.setting, self.training, self.causal = setting, training, causal
        torch.manual_seed(0)
        self.state = self._built(setting.compared).model.state_dict()
        shape = (setting.compared.batch, setting.compared.length, setting.sizes.embed_dim)
        self.x, self.target = (torch.randn(shape, **setting.factory) for _ in range(2))
        self.of_width = cache(self._run)

    def _built(self, sizes: Sizes) -> Built:
        options = {"causal": self.causal, "training": self.training, "stock": True}
        return build(sizes, ONE_RANK, None, **options, **self.setting.factory)

    def _run(self, slices: int) -> dict[str, Tensor]:
        """Output or gradients of the model whose heads are cut into as many heads of their own: 1, of itself."""
        own = self.setting.compared
        cut = {"heads": own.heads * slices, "kv_heads": own.kv_heads * slices, "head_dim": own.head_dim // slices}
        built = self._built(replace(own, **cut))
        built.model.load_state_dict(self.state)
        if not self.training:
            return {"output": built.forward(self.x)}
        built.step(self.x, self.target)
        return built.gradients()

    def difference(self, built: Built, layout: Layout) -> float:
        """Of the largest element of the output, or of the gradient that differs most; on every rank the same.

        Raises AssertionError where the ranks together lack a gradient.
        """
        expected = self.of_width(1 if layout.exact else layout.grid[1])
        if self.training:
            built.step(built.part(self.x), built.part(self.target, target=True))
            found = built.gradients()
        else:
            found = {"output": built.whole(built.forward(built.part(self.x)))}
        return worst(found, expected)


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of what the ranks have, over the largest element of its kind; a collective.

    Raises AssertionError where no rank has some of what is expected.
    """
    own = [(x.float() - expected[name].float()).abs().max() / expected[name].abs().max() for name, x in found.items()]
    everyone = of_all((torch.stack(own).max().item() if own else 0.0, set(found)))
    lacking = set(expected) - set().union(*(names for _, names in everyone))
    assert not lacking, f"no rank has {sorted(lacking)}"
    return torch.tensor([difference for difference, _ in everyone]).max().item()  # NaN, where any is


def of_all(value: object) -> list:
    """The value of every rank; without a wire, of this one."""
    if dist.get_backend() == "fake":
        return [value]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def attempt(row: dict, function: Callable[[], None]) -> None:
    """Calls function on every rank; what it raised on the first that failed is noted in the row of all."""
    text = None
    try:
        function()
    except Exception as error:  # of any kind: it is reported
        text = f"{type(error).__name__}: {error}"
    failed = [f"rank {rank}: {text}" for rank, text in enumerate(of_all(text)) if text is not None]
    if failed:
        row["failed"] = failed[0]


def mesh_for(layout: Layout, setting: Setting, meshes: dict) -> DeviceMesh | None:
    """One for all layouts of its shape; a collective when it is the first of them."""
    key = ("grid", *layout.grid) if layout.grid else (layout.dp, layout.pp, layout.tp)
    if key not in meshes:
        meshes[key] = mesh_of(layout, setting.device)
    return meshes[key]


def prepared(setting: Setting, reference: Reference, layout: Layout, meshes: dict) -> Case:
    """A layout that was checked and recorded, or whose row says why it is not to be timed; a collective."""
    sizes, training = setting.sizes, reference.training
    case = Case(row_of(setting, layout, "training" if training else "prefill", reference.causal))
    options = {"causal": reference.causal, "training": training, "stock": setting.stock, **setting.factory}

    def made(of: Sizes) -> Built:
        return build(of, layout, mesh_for(layout, setting, meshes), state=reference.state, **options)

    def prepare() -> None:
        built = made(setting.compared)
        if not setting.without_wire:
            check(case.row, reference.difference(built, layout), setting)
        x, target = reference.x, reference.target
        if sizes != setting.compared:
            built = made(sizes)
            x, target = (torch.randn(sizes.batch, sizes.length, sizes.embed_dim, **setting.factory) for _ in range(2))
        x, target = built.part(x), built.part(target, target=True)
        case.run = partial(built.step, x, target) if training else partial(built.forward, x)
        record(case, built.model, setting)

    attempt(case.row, prepare)
    return case


def check(row: dict, difference: float, setting: Setting) -> None:
    """Raises AssertionError for a difference that is too large, which then is not timed."""
    row["difference"], row["tolerance"] = difference, TOLERANCE[setting.dtype]
    if not difference <= row["tolerance"]:
        raise AssertionError(f"it differs from the unsplit model by {difference:.1e}, more than {row['tolerance']:.0e}")


def row_of(setting: Setting, layout: Layout, mode: str, causal: bool) -> dict:
    copies = max(1, layout.tp // setting.sizes.kv_heads)
    return {
        "layout": layout.name + f" (KV heads {copies} times)" * (copies > 1), "ours": layout.grid is not None,
        "exact": layout.exact, "of": asdict(layout), "ranks": dist.get_world_size(), "mode": mode,
        "mask": "causal" if causal else "full", "sizes": asdict(setting.sizes), "tokens": setting.sizes.tokens,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "kernel": "stock" if setting.stock and layout.grid is None else "ours",
    }  # fmt: skip


def record(case: Case, model: nn.Module, setting: Setting) -> None:
    """One run, with what it sends and holds: the largest of all ranks."""
    weights = [p._local_tensor if isinstance(p, DTensor) else p for p in model.parameters()]
    case.before()
    with LiveBytes([*weights, *case.holds]) as live, record_collectives(c10d=True) as recorded:
        case.run()
    weight_bytes = sum(p.numel() * p.element_size() for p in weights)
    everyone = of_all((recorded.sent(), recorded.sent(backward=True), live.peak, weight_bytes, recorded.counts()))
    sent, backward, peak, weight, counts = zip(*everyone, strict=True)
    case.row |= {
        "sent_bytes": max(sent), "sent_bytes_of_ranks": sent, "sent_bytes_in_backward": max(backward),
        "collectives": counts[0], "weight_bytes": max(weight), "peak_bytes": max(peak),
    }  # fmt: skip
    if setting.node_of:
        case.row["predicted_link_bytes"] = over_link(recorded.calls, setting.node_of)


def timed(run: Callable[[], object], device: str) -> float:
    """Milliseconds of this rank."""
    dist.barrier()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def measure(turns: Iterable[Case], setting: Setting) -> None:
    """One run of each case whose turn it is."""
    for case in turns:
        case.before()
        case.runs.append(timed_over_link(case.run) if setting.node_of else (timed(case.run, setting.device), 0))


def finish(cases: list[Case], setting: Setting) -> None:
    """Fills in the times of the slowest rank, and their medians; a collective."""
    for case in cases:
        runs_ms = [round(max(of_one), 3) for of_one in zip(*of_all([ms for ms, _ in case.runs]), strict=True)]
        ms = statistics.median(runs_ms)
        case.row |= {"ms": ms, "runs_ms": runs_ms, "tokens_per_s": round(case.row["tokens"] / ms * 1e3)}
        if "steps" in case.row:
            case.row["tpot_ms"] = round(ms / case.row["steps"], 3)
        if setting.node_of:
            sizes = [size for _, size in case.runs]
            case.row |= {"link_bytes": round(statistics.median(sizes)), "runs_link_bytes": sizes}


def gather_rows(setting: Setting) -> list[dict]:
    """The hierarchical gather in both orders against a flat one, as links.py has them, on two nodes."""
    part = Part("gathers", setting.repeats, length=0, embed_dim=0, block=GATHERED)
    mesh, rows = tlm.init_mesh("cpu", part.grid(dist.get_world_size())), []
    for case in gathers(part, mesh):
        predicted = prepared_gather(case, list(setting.node_of))["predicted"]["link_bytes"]
        runs = [one_gather(case, False) for _ in range(setting.repeats)]
        ms, sizes = ([one[key]["1"] for one in runs] for key in ("ms", "link_bytes"))
        rows.append({
            "layout": case.name, "mode": "gather", "mask": "", "ranks": mesh.size(), "bytes_of_a_rank": GATHERED,
            "ms": statistics.median(ms), "runs_ms": ms, "link_bytes": round(statistics.median(sizes)),
            "runs_link_bytes": sizes, "predicted_link_bytes": predicted["1"],
        })  # fmt: skip
    return rows
