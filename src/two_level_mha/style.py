"""TwoLevelParallel: attention on a grid as one of torch's parallel styles, for plans that name modules."""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor.parallel import ParallelStyle
from torch.utils._pytree import tree_map_only

from two_level_mha.attentions import by_structure
from two_level_mha.convert import parallelize
from two_level_mha.errors import GridError
from two_level_mha.layer import GridAttention
from two_level_mha.low_rank import Projection
from two_level_mha.mesh import Grid, grid_group, grid_mesh, grid_of_axis
from two_level_mha.names import Args, CachedOptions, CacheLayout, Combine, Kwargs, Scheme
from two_level_mha.profile import Profile
from two_level_mha.stock import take_stock_keys
from two_level_mha.stream import Output


class TwoLevelParallel(ParallelStyle):
    """Splits an attention over a grid, in place, where torch.distributed.tensor.parallel takes a style:

        parallelize_module(model, mesh, {"layers.*.self_attn": tlm.TwoLevelParallel(), "layers.*.linear1": ..})

    The module is one that parallelize knows: nn.MultiheadAttention, self-attention of transformers, or attention of
    torchtitan's shape (forward(x, table), with wq, wk, wv, wo, and apply_rotary_emb beside its class); or one with such
    modules inside. Others raise GridError, as do those whose numbers differ on random inputs.

    grid: (n, m) where parallelize_module is given a mesh of one axis ("tp" of a bigger one); None: the first of
        Grid.candidates for the module's heads. A mesh of ("head", "slice") is the grid itself.
    output_layouts: how the output lies over all ranks of the grid, as for RowwiseParallel: None is Replicate().
    use_local_output: whether that is a plain tensor, this rank's part, or a DTensor.
    scheme, combine, cache, debug, reduce_dtype, profile, overlap: as for parallelize.

    Inputs are plain tensors, the same on every rank, or DTensors, which are gathered. parallelize_module's
    src_data_rank is whose weights count; with None they must be alike. Weights can be on "meta", and be loaded by the
    original's names; a method of the original that fills its projections finds none.
    """

    def __init__(
        self,
        grid: tuple[int, int] | None = None,
        *,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
        scheme: Scheme = "auto",
        combine: Combine = "reduce",
        cache: CacheLayout = "position",
        debug: bool | None = None,
        reduce_dtype: torch.dtype | None = None,
        profile: Profile | str | os.PathLike[str] | None = None,
        overlap: int | None = None,
    ) -> None:
        super().__init__()
        self.grid, self.output_layouts, self.use_local_output = grid, output_layouts or Replicate(), use_local_output
        self.options: CachedOptions = {
            "scheme": scheme, "combine": combine, "cache": cache, "debug": debug, "overlap": overlap,
            "reduce_dtype": reduce_dtype, "profile": profile,
        }  # fmt: skip

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        holder = nn.ModuleDict({"attention": module})
        mesh = self._mesh(holder, device_mesh)
        if self.src_data_rank is not None and mesh.size() > 1:
            for x in (*module.parameters(), *module.buffers()):
                if not x.is_meta:
                    dist.broadcast(x.detach(), group=grid_group(mesh), group_src=self.src_data_rank)
        parallelize(holder, mesh, rest=False, **self.options)
        if holder["attention"] is not module:
            _take_place(module, holder["attention"])
            module.register_forward_pre_hook(_with_plain, with_kwargs=True)
            axis = device_mesh if device_mesh.ndim == 1 else grid_mesh(mesh)
            module.register_forward_hook(_Laid(axis, self.output_layouts, self.use_local_output))
        return module

    def _mesh(self, holder: nn.Module, device_mesh: DeviceMesh) -> DeviceMesh:
        """The grid of this mesh. Raises GridError for one of other axes, and where `grid` says another."""
        if not isinstance(device_mesh, DeviceMesh) or device_mesh.ndim > 1:
            if self.grid is not None and tuple(self.grid) != tuple(getattr(device_mesh, "shape", ())):
                raise GridError(f"grid={self.grid} is for a mesh of one axis, the mesh is {device_mesh}: leave it out")
            return device_mesh  # parallelize says what is wrong
        if self.grid is not None:
            grid = Grid(*self.grid)
        else:
            ranks, kind, profile = device_mesh.size(), device_mesh.device_type, self.options["profile"]
            sizes = [one.sizes() for one in by_structure(holder)]
            fits = [Grid.candidates(ranks, h, k, d, device_type=kind, profile=profile) for h, k, d in sizes]
            grid = next(one for one in fits[0] if all(one in others for others in fits))  # (1, P) is for every layer
        return grid_of_axis(device_mesh, grid)

    def __repr__(self) -> str:
        return f"TwoLevelParallel(grid={self.grid}, output_layouts={self.output_layouts}, {self.options})"


class _Laid:
    """A forward hook that lays an attention's output over the ranks."""

    def __init__(self, mesh: DeviceMesh, layout: Placement, local: bool) -> None:
        self.mesh, self.layout, self.local = mesh, layout, local

    def __call__(self, module: nn.Module, args: Args, output: Output) -> object:
        first, *others = output if isinstance(output, tuple) else (output,)
        if self.local and self.layout.is_replicate():
            return output
        whole = DTensor.from_local(first, self.mesh, [Replicate()], run_check=False)
        laid = whole.redistribute(placements=[self.layout])
        given = laid.to_local() if self.local else laid
        return (given, *others) if isinstance(output, tuple) else given


def _with_plain(module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """A forward pre-hook: DTensors gathered. The gradient of what is given is the same on every rank."""
    return tree_map_only(DTensor, _plain, args), tree_map_only(DTensor, _plain, kwargs)


def _plain(x: DTensor) -> Tensor:
    return x.full_tensor(grad_placements=[Replicate()] * x.device_mesh.ndim)


def _take_place(module: nn.Module, ours: nn.Module) -> None:
    """Makes a module, in place, what replaced it: a plan has not its parent, in which it would be exchanged."""
    module.__class__ = type(ours)
    vars(module).clear()
    vars(module).update(vars(ours))
    module._load_state_dict_pre_hooks.clear()  # of `ours`, which is gone
    take_stock_keys(module)
    for part in module.children():
        if isinstance(part, Projection):
            assert isinstance(module, GridAttention)  # since its class is that of `ours`
            part.whose = (module, part.whose[1])
