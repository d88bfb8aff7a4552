"""One rank of the experiment's model in every layout: ours and those of torch's own parts.

    layout = next(one for one in layouts(SMALL, 4, micro_batches=4, overlap=2) if one.name == "TP2 x DP2")
    mesh = mesh_of(layout, "cpu")                       # a collective; under FakeTensorMode make it before
    built = build(SMALL, layout, mesh, training=True)
    y = built.forward(built.part(x_BLD))                # this rank's part of the output, None where it has none
    built.step(built.part(x_BLD), built.part(target_BLD, target=True))

Nothing here times, prints, or starts a process group. Letters: B batch, L length, D embed_dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import two_level_mha as tlm
from two_level_mha.cache_layer import CacheLayer
from two_level_mha.experiment.layouts import ONE_RANK, Layout, baselines, check, layouts, ours
from two_level_mha.experiment.transformer import SEED, SMALL, Attention, HeadsCache, Sizes, Transformer
from two_level_mha.mesh import grid_mesh
from two_level_mha.profile import Profile
from two_level_mha.stacks import MLP, Stack, split_stack

__all__ = [
    "ONE_RANK", "SEED", "SMALL", "Built", "HeadsCache", "Layout", "Sizes", "Transformer", "baselines", "build", "check",
    "layouts", "mesh_of", "ours",
]  # fmt: skip

SCHEDULES = {"GPipe": ScheduleGPipe, "1F1B": Schedule1F1B}


@dataclass
class Built:
    """One rank of the model in a layout. What every rank is given is the same whole x and target (B, L, D).

    part: x -> what this rank begins with; with target=True, target -> what its part of the output is compared with.
    forward: a prefill of that, without gradients; this rank's part of the output, or None.
    step: forward, loss, backward, and the reduction of gradients, which then are those of `loss` over the whole batch.
    whole: this rank's part of the output -> all of it, a collective.
    """

    model: Transformer
    part: Callable[..., Tensor]
    forward: Callable[[Tensor], Tensor | None]
    step: Callable[[Tensor, Tensor], None]
    whole: Callable[[Tensor | None], Tensor]

    def gradients(self) -> dict[str, Tensor]:
        """Whole gradients of the parameters of this rank, by the names of the unsplit model; a collective."""
        return dict(_whole_gradient(name, p) for name, p in self.model.named_parameters())


def loss(y: Tensor, target: Tensor, whole: int) -> Tensor:
    """The share of a part of the output in sum(y * target) / whole, where `whole` counts the elements of all of it."""
    return (y * target).sum() / whole


def build(
    sizes: Sizes,
    layout: Layout,
    mesh: DeviceMesh | None,
    *,
    causal: bool = True,
    training: bool = False,
    stock: bool = False,
    state: dict[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    profile: Profile | None = None,
) -> Built:
    """One rank of a layout on its mesh (mesh_of), the same call on all ranks.

    state: the unsplit model's, alike on every rank; None: what is drawn, which must be alike then.
    profile: the hardware that ours decides for, None: that of the device.
    stock: attention by torch's own kernel where the layout is not ours.
    """
    check(sizes, layout)
    options: dict[str, Any] = {"causal": causal, "dtype": dtype, "device": device}
    if layout.grid is not None:
        assert mesh is not None
        return _build_ours(sizes, layout, mesh, state, options | {"profile": profile})
    if layout.pp == 1:
        return _build_parallel(sizes, layout, mesh, state, options | {"stock": stock}, training)
    assert mesh is not None
    return _build_pipeline(sizes, layout, mesh, state, options | {"stock": stock}, training)


def mesh_of(layout: Layout, device: str = "cpu") -> DeviceMesh | None:
    """The mesh of a layout over all ranks, None for one rank; a collective. Neighbouring ranks share a slice group, or
    a tensor-parallel group.
    """
    if layout.grid is not None:
        return tlm.init_mesh(device, layout.grid)
    if layout.ranks == 1:
        return None
    return init_device_mesh(device, (layout.dp, layout.pp, layout.tp), mesh_dim_names=("dp", "pp", "tp"))


def _load(model: Transformer, state: dict[str, Tensor] | None) -> None:
    if state is not None:
        stage = set(model.layers)
        mine = {key: x for key, x in state.items() if not key.startswith("layers.") or key.split(".")[1] in stage}
        if isinstance(model.norm, nn.Identity):
            mine = {key: x for key, x in mine.items() if not key.startswith("norm.")}
        model.load_state_dict(mine)


def _build_ours(
    sizes: Sizes, layout: Layout, mesh: DeviceMesh, state: dict[str, Tensor] | None, options: dict[str, Any]
) -> Built:
    causal, factory = options["causal"], {"dtype": options["dtype"], "device": options["device"]}
    make = partial(
        _Ours, sizes.embed_dim, sizes.heads, sizes.kv_heads, sizes.head_dim, mesh=mesh, scheme=layout.scheme,
        activations=layout.activations, overlap=layout.overlap, profile=options["profile"], **factory,
    )  # fmt: skip
    model = Transformer(sizes, causal=causal, attention=make, **factory)
    blocks = model.blocks
    for block in blocks:
        assert isinstance(block.attention, _Ours)
        block.attention.causal = causal
    _load(model, state)
    split = layout.activations != "replicated"
    if split:
        _split_hidden_states(model, layout, mesh)
    elif layout.ranks > 1:
        for block in blocks:
            styles = {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()}
            parallelize_module(block.mlp, grid_mesh(mesh), styles, src_data_rank=None)

    def part(x: Tensor, target: bool = False) -> Tensor:
        # the model is given x whole, and keeps its part itself
        return tlm.shard_activations(x, layout.activations, mesh) if split and target else x

    def step(x: Tensor, target: Tensor) -> None:
        model.zero_grad()
        loss(model(x), target, sizes.tokens * sizes.embed_dim).backward()

    def whole(y: Tensor | None) -> Tensor:
        assert y is not None
        return tlm.gather_activations(y, layout.activations, mesh) if split else y

    return Built(model, part, _without_grad(model), step, whole)


class _Ours(tlm.TwoLevelAttention):
    """Called as Attention is."""

    causal = True

    def forward(self, x_BLD: Tensor, cache: CacheLayer | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(x_BLD, is_causal=self.causal or cache is not None, cache=cache)


def _split_hidden_states(model: Transformer, layout: Layout, mesh: DeviceMesh) -> None:
    """What parallelize does for activations that stay split, but that the last ones leave the model as parts."""
    mlps = [block.mlp for block in model.blocks]
    stack = Stack("layers", [model], list(model.layers.values()), batch_first=True)
    if layout.mlp == "split":
        stack.mlps = [MLP(mlp, ("fc1",), "fc2", False) for mlp in mlps]
    else:
        stack.between = {part for mlp in mlps for part in mlp.modules()}
    split_stack(stack, mesh, layout.activations, None)
    attention = model.blocks[0].attention
    assert isinstance(attention, _Ours) and attention.stream is not None
    stream = attention.stream
    stream.to_loss = stream.passes = True
    for mlp in mlps if layout.mlp == "gathered" and layout.ranks > 1 else ():
        fully_shard(mlp, mesh=grid_mesh(mesh), reshard_after_forward=True)  # each is a root, which would keep them
        assert isinstance(mlp, FSDPModule)
        mlp.set_gradient_divide_factor(1.0)  # the sum over the ranks, as for all that acts on parts
        mlp.set_force_sum_reduction_for_comms(True)  # Gloo has no reduction that multiplies


def _without_grad(model: nn.Module) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        with torch.no_grad():
            y: Tensor = model(x)
        return y

    return forward


def _split_tensors(model: Transformer, sizes: Sizes, layout: Layout, mesh: DeviceMesh | None) -> None:
    """Tensor parallelism by torch's styles; of fewer KV heads than ranks, each keeps the one that it needs."""
    if layout.tp == 1:
        return
    assert mesh is not None
    whole_heads = sizes.kv_heads % layout.tp == 0
    styles: dict[str, ParallelStyle] = {
        f"attention.{name}_proj": ColwiseParallel() for name in ("qkv" if whole_heads else "q")
    }
    styles |= {"attention.o_proj": RowwiseParallel(), "mlp.fc1": ColwiseParallel(), "mlp.fc2": RowwiseParallel()}
    if layout.rows:
        styles["attention.o_proj"] = styles["mlp.fc2"] = RowwiseParallel(output_layouts=Shard(1))
        styles["mlp.fc1"] = ColwiseParallel(input_layouts=Shard(1))
        styles["norm1"] = styles["norm2"] = SequenceParallel(use_local_output=True)
        parallelize_module(model.norm, mesh["tp"], SequenceParallel(use_local_output=True), src_data_rank=None)
    if layout.rows or whole_heads:
        # one input of q, k and v: its gradient is summed over them before it is over the ranks
        styles["attention"] = PrepareModuleInput(
            input_layouts=(Shard(1) if layout.rows else Replicate(),), desired_input_layouts=(Replicate(),),
            use_local_output=not whole_heads,
        )  # fmt: skip
    d, head = sizes.head_dim, mesh.get_local_rank("tp") * sizes.kv_heads // layout.tp
    for block in model.blocks:
        parallelize_module(block, mesh["tp"], styles, src_data_rank=None)
        assert isinstance(block.attention, Attention)
        for linear in (block.attention.k_proj, block.attention.v_proj) if not whole_heads else ():
            linear.weight = nn.Parameter(linear.weight.detach()[head * d : (head + 1) * d].clone())


def _build_parallel(
    sizes: Sizes,
    layout: Layout,
    mesh: DeviceMesh | None,
    state: dict[str, Tensor] | None,
    options: dict[str, Any],
    training: bool,
) -> Built:
    """TP, DP, FSDP2, and both."""
    model = Transformer(sizes, **options)
    _load(model, state)
    _split_tensors(model, sizes, layout, mesh)
    called: nn.Module = model
    if layout.sharded and mesh is not None:
        for block in model.blocks:
            fully_shard(block, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
    elif layout.dp > 1 and training and mesh is not None:
        called = DistributedDataParallel(model, process_group=mesh.get_group("dp"), gradient_as_bucket_view=True)

    def part(x: Tensor, target: bool = False) -> Tensor:
        if mesh is None:
            return x
        if layout.dp > 1:
            x = x.chunk(layout.dp)[mesh.get_local_rank("dp")]
        return x.chunk(layout.tp, 1)[mesh.get_local_rank("tp")] if layout.rows else x

    def step(x: Tensor, target: Tensor) -> None:
        model.zero_grad()
        # times dp: both ways take the mean of the ranks' gradients
        loss(called(x), target, sizes.tokens * sizes.embed_dim // layout.dp).backward()

    def whole(y: Tensor | None) -> Tensor:
        assert y is not None
        if mesh is None:
            return y
        y = _gathered(y, 1, mesh.get_group("tp")) if layout.rows else y
        return _gathered(y, 0, mesh.get_group("dp")) if layout.dp > 1 else y

    return Built(model, part, _without_grad(model), step, whole)


def _gathered(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim)


def _build_pipeline(
    sizes: Sizes,
    layout: Layout,
    mesh: DeviceMesh,
    state: dict[str, Tensor] | None,
    options: dict[str, Any],
    training: bool,
) -> Built:
    """Stages of equal numbers of layers, each split by tensors."""
    at, each = mesh.get_local_rank("pp"), sizes.layers // layout.pp
    model = Transformer(sizes, only=range(at * each, (at + 1) * each), **options)
    _load(model, state)
    _split_tensors(model, sizes, layout, mesh)
    shape = (sizes.batch // layout.micro_batches, sizes.length, sizes.embed_dim)

    def example(grad: bool) -> Tensor:
        return torch.empty(shape, dtype=options["dtype"], device=options["device"], requires_grad=grad)

    stage = PipelineStage(
        model, at, layout.pp, torch.device(options["device"]), input_args=(example(training and at > 0),),
        output_args=(example(training),), group=mesh.get_group("pp"),
    )  # fmt: skip
    first, last = at == 0, at == layout.pp - 1
    schedule = SCHEDULES[layout.schedule](
        stage, layout.micro_batches, loss_fn=partial(loss, whole=sizes.tokens * sizes.embed_dim) if training else None,
        scale_grads=False,
    )  # fmt: skip

    def forward(x: Tensor) -> Tensor | None:
        with torch.no_grad():
            y: Tensor | None = schedule.eval(*([x] if first else []))
        return y

    def step(x: Tensor, target: Tensor) -> None:
        model.zero_grad()
        compared: dict[str, Any] = {"target": target} if last else {}
        schedule.step(*([x] if first else []), **compared, return_outputs=False)

    def whole(y: Tensor | None) -> Tensor:
        y = torch.empty(sizes.batch, *shape[1:], dtype=options["dtype"], device=options["device"]) if y is None else y
        group = mesh.get_group("pp")
        dist.broadcast(y, dist.get_global_rank(group, layout.pp - 1), group=group)
        return y

    return Built(model, lambda x, target=False: x, forward, step, whole)


def _whole_gradient(name: str, p: nn.Parameter) -> tuple[str, Tensor]:
    assert p.grad is not None
    gradient = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
    for letter in ("q", "k", "v", "out"):
        if name.endswith(f"attention.{letter}_weight"):  # ours: (h, d, D), that of the output (D, h, d)
            stock = name.replace(f"{letter}_weight", f"{letter[0]}_proj.weight")
            return stock, gradient.flatten(1) if letter == "out" else gradient.flatten(0, 1)
    return name, gradient
