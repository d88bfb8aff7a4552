"""How many bytes of tensors live at once."""

import weakref

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operators gave and that live, and their peak; those of `known` count nothing.

    Temporary memory inside an operator is not seen.
    """

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        known = [x._local_tensor if isinstance(x, DTensor) else x for x in known]
        self.sizes = {x.untyped_storage()._cdata: 0 for x in known}
        self.live = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for x in tree_leaves(output):
            x = x._local_tensor if isinstance(x, DTensor) else x
            if isinstance(x, torch.Tensor) and x.device.type != "meta":
                storage = x.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage._cdata)
        self.peak = max(self.peak, self.live)
        return output

    def _freed(self, key: int) -> None:
        self.live -= self.sizes.pop(key)
