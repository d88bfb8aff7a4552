"""What the ranks of links.py run, and where the bytes that they send go."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # noqa: F401  registers the backend "fake"
from nodes import NODES, places, sent
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import two_level_mha as tlm
from two_level_mha.mesh import place_on
from two_level_mha.testing import Collective, record_collectives

TIMEOUT = timedelta(seconds=120)  # of a collective
ACTIVATIONS = ("replicated", "sequence", "batch")
OVERLAPS = {"1": 1, "4": 4, "8": 8, "planned": None}  # values of overlap=; 1: no chunks
HIDDEN = 50  # percent of an exchange, by the profile that "planned" is predicted with


@dataclass(frozen=True)
class Part:
    """What one start of the ranks measures."""

    name: str
    repeats: int
    length: int
    embed_dim: int
    batch: int = 16
    block: int = 0  # bytes of a rank that are gathered, or exchanged by two; 0: no gathers
    duplex: bool = False  # nothing but exchanges of two ranks
    round_robin: bool = False
    only_alone: bool = False  # nothing but computing
    across: bool = False  # one rank a node, and the slice axis between them
    rate: int = 0  # of the link, bits a second, for predictions; 0: nothing is planned
    case: str = ""  # the only one; "": all

    def grid(self, ranks: int) -> tuple[int, int]:
        return (1, ranks) if self.across else (NODES, ranks // NODES)


@dataclass
class Case:
    """Functions that take turns, by what tells them apart, and `alone`: all of it that is not an exchange."""

    name: str
    variants: dict[str, Callable[[], object]]
    alone: Callable[[], object] | None = None
    table_bytes: dict[str, int] = field(default_factory=dict)  # that a rank sends, by the planner's table


def crossing(kind: str, sent_bytes: float, group: list[int], rank: int, node_of: list[int]) -> float:
    """Of the bytes that a rank sends in a collective of a group, those that leave its node."""
    at = group.index(rank)
    others = group[at + 1 :] + group[:at]
    peers = others if kind == "all_to_all" else others[:1]  # pairwise, or a ring in the order of ranks
    return sent_bytes * sum(node_of[peer] != node_of[rank] for peer in peers) / len(peers)


def over_link(calls: list[Collective], node_of: list[int]) -> int:
    """Bytes of the node that sends most over the link in these collectives; a collective."""
    rank = dist.get_rank()
    mine = 0.0
    for call in calls:
        if call.name == "send":
            mine += call.sent * (node_of[call.peer] != node_of[rank])
        else:  # Gloo's reduce-scatter sends what its all-reduce does, twice what it must
            sent_bytes = call.sent * (2 if call.name == "reduce_scatter" else 1)
            mine += crossing(call.name, sent_bytes, list(call.ranks), rank, node_of)
    of_nodes = torch.zeros(NODES, dtype=torch.float64)
    of_nodes[node_of[rank]] = mine
    dist.all_reduce(of_nodes)
    return round(of_nodes.max().item())


def timed(function: Callable[[], object]) -> tuple[float, int]:
    """Milliseconds of the slowest rank, and the bytes that the node which sent most has sent over the link."""
    dist.barrier()
    before = sent()
    dist.barrier()
    start = time.perf_counter()
    function()
    ms = (time.perf_counter() - start) * 1e3
    dist.barrier()
    most = torch.tensor([ms, sent() - before], dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return round(most[0].item(), 2), int(most[1])


def gathers(part: Part, mesh: DeviceMesh) -> list[Case]:
    ops, place = torch.ops.two_level_mha, place_on(mesh)
    x = torch.randn(part.block // 4)
    numbers, slice_group, head_group = [*mesh.shape, *mesh.get_coordinate()], *place.groups[:2]
    staged = partial(ops.hierarchical_all_gather, x, 0, 0, numbers, slice_group, head_group)
    functions = {
        "flat ring": partial(ops.all_gather, x, 0, mesh.size(), place.groups[2]),
        "head axis first": partial(staged, slices_first=False),
        "slice axis first": partial(staged, slices_first=True),
    }
    return [Case(f"gather, {name}", {"1": function}) for name, function in functions.items()]


def pairs(part: Part, group: str) -> list[Case]:
    """Both ways of a link at once, as far as the order in which receives and sends are posted lets them."""
    ours, theirs = torch.randn(NODES, part.block // 4), torch.empty(NODES, part.block // 4)
    peer = 1 - dist.get_rank()

    def post(functions: list[Callable]) -> None:
        buffers = {dist.irecv: theirs, dist.isend: ours}
        for work in [function(buffers[function][peer], peer) for function in functions]:
            work.wait()

    functions = {
        "as layers exchange": partial(torch.ops.two_level_mha.all_to_all, ours, 0, 0, NODES, group),
        "Gloo's all_to_all": partial(dist.all_to_all_single, theirs, ours),
        "receive, then send": partial(post, [dist.irecv, dist.isend]),
        "send, then receive": partial(post, [dist.isend, dist.irecv]),
    }
    return [Case(f"pair, {name}", {"1": function}) for name, function in functions.items()]


def without_wire(mesh: DeviceMesh) -> DeviceMesh:
    """A mesh of the same ranks on which an exchange returns at once, with what is in memory."""
    axes = mesh.mesh_dim_names
    fake = init_device_mesh("cpu", tuple(mesh.shape), mesh_dim_names=axes, backend_override=dict.fromkeys(axes, "fake"))
    if min(mesh.shape) > 1:
        fake._flatten("grid", backend_override="fake")
    return fake


def profile_of(part: Part) -> tlm.Profile:
    """The CPU's rates on this link."""
    link = part.rate // 8
    return replace(tlm.Profile.named("cpu"), name="this link", link=link, network=link, hidden_percent=HIDDEN)


def layers(part: Part, mesh: DeviceMesh) -> list[Case]:
    fake, cases = without_wire(mesh), []
    layer = {"embed_dim": part.embed_dim, "num_heads": 2 * mesh.size() // NODES}
    x = torch.randn(part.batch, part.length, part.embed_dim)
    for activations in ACTIVATIONS:
        mine = tlm.shard_activations(x, activations, mesh)
        found: dict[str, Case] = {}
        for name, overlap in OVERLAPS.items():
            if overlap is None and part.rate == 0:
                continue
            chosen = {"overlap": overlap} | ({} if overlap else {"profile": profile_of(part)})
            plan = tlm.plan(
                **layer, **chosen, devices=mesh.size(), batch=part.batch, seq=part.length, causal=False,
                dtype=torch.float32, activations=activations, device_type="cpu",
            )  # fmt: skip
            for option in plan.options:
                if option.grid != tuple(mesh.shape):
                    continue
                make = partial(
                    tlm.TwoLevelMultiheadAttention, **layer, **chosen, bias=False, batch_first=True,
                    scheme=option.scheme, activations=activations,
                )  # fmt: skip
                if option.scheme not in found:
                    # debug=False: what an exchange without a wire leaves in memory would not compare
                    alone = _call(make(mesh=fake, debug=False), mine)
                    found[option.scheme] = Case(f"{option.scheme}, {activations}", {}, alone)
                is_cut = option.overlap == overlap or (overlap is None and option.overlap > 1)
                if not part.only_alone and is_cut:
                    found[option.scheme].variants[name] = _call(make(mesh=mesh), mine)
                    found[option.scheme].table_bytes[name] = option.sent_bytes()
        cases += found.values()
    return cases


def _call(layer: tlm.TwoLevelMultiheadAttention, x: Tensor) -> Callable[[], object]:
    return lambda: layer(x, x, x, need_weights=False)


def prepared(case: Case, node_of: list[int]) -> dict:
    """Calls everything twice, and returns what is predicted. Raises AssertionError where a rank sends another number of
    bytes than the table says.
    """
    link_bytes = {}
    for name, function in (case.variants or {"alone": case.alone}).items():
        function()  # in the first call of a layer its ranks compare their inputs
        with record_collectives(c10d=case.alone is None) as record:  # of a layer, not what its ranks compare
            function()
        link_bytes[name] = over_link(record.calls, node_of)
        if name in case.table_bytes:
            assert record.sent() == case.table_bytes[name], (case.name, name, record.sent(), case.table_bytes)
    return {"case": case.name, "predicted": {"bytes_of_a_rank": case.table_bytes, "link_bytes": link_bytes}}


def one_run(case: Case, backwards: bool) -> dict:
    """Times and bytes of all that a case has, computing alone before and after the others."""
    found = {"alone_ms": [], "around_link_bytes": [], "ms": {}, "link_bytes": {}}

    def time_alone() -> None:
        if case.alone is not None:
            ms, around = timed(case.alone)
            found["alone_ms"].append(ms)
            found["around_link_bytes"].append(around)

    time_alone()
    for name in list(case.variants)[:: -1 if backwards else 1]:
        found["ms"][name], found["link_bytes"][name] = timed(case.variants[name])
    time_alone()
    return found


def run(part: Part) -> None:
    """Prints the rows of a part on rank 0, in JSON, as its last line."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # they would slow down what computes with whatever is in memory
    torch.manual_seed(0)
    dist.init_process_group("gloo", timeout=TIMEOUT)
    mesh = tlm.init_mesh("cpu", part.grid(dist.get_world_size()))
    node_of = places(mesh.size(), part.round_robin)
    with torch.no_grad():
        if part.duplex:
            cases = pairs(part, place_on(mesh).groups[2])
        else:
            cases = (gathers(part, mesh) if part.block else []) + layers(part, mesh)
        cases = [case for case in cases if part.case in ("", case.name)]
        rows = [{"part": part.name, **prepared(case, node_of), "runs": []} for case in cases]
        for repeat in range(part.repeats):
            for case, row in zip(cases, rows, strict=True):
                row["runs"].append(one_run(case, repeat % 2 == 1))
    if dist.get_rank() == 0:
        print(json.dumps(rows))
    tlm.close(mesh)  # ends its thread before the interpreter ends
    dist.barrier()
    dist.destroy_process_group()
