"""transformers' Conv1D, a linear that stores (in, out), by columns or rows: torch's styles take no such module."""

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import ParallelStyle

from two_level_mha.stock import split_parameters


class ConvParallel(ParallelStyle):
    """`ColwiseParallel` or `RowwiseParallel` of a Conv1D: from whole inputs to columns of outputs, or from columns of
    inputs to whole outputs.
    """

    def __init__(self, columns: bool) -> None:
        super().__init__()
        whole, part = Replicate(), Shard(-1)
        self.takes: Placement = whole if columns else part
        self.gives: Placement = part if columns else whole
        self.held: dict[str, Placement] = (
            {"weight": Shard(1), "bias": Shard(0)} if columns else {"weight": Shard(0), "bias": whole}
        )

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        enter: Any = self._enter  # annotated as if it gave nothing
        leave: Any = self._leave
        return distribute_module(module, device_mesh, self._partition, enter, leave)

    def _partition(self, name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        split_parameters(module, mesh, self.held)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], mesh: DeviceMesh) -> DTensor:
        return DTensor.from_local(args[0], mesh, [self.takes], run_check=False)

    def _leave(self, module: nn.Module, y: DTensor, mesh: DeviceMesh) -> Tensor:
        return y.redistribute(placements=[self.gives]).to_local()
