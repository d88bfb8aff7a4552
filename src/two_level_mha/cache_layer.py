"""The KV cache, stored once over the grid.

Rank (i, j) keeps the KV heads of head group i, d whole, and of the tokens or sequences what is slice j's:

    layout       a rank keeps                                    bytes sent by a decode step
    "position"   token p where p % m == j, of all sequences      independent of the context: partial results are merged
                 (or whose turn is j's, for unequal shares)
    "batch"      sequences j*ceil(B/m) ..., all their tokens     independent of the context: sequences move, keys do not

Letters: B batch, K KV heads of a group, L new tokens, d head_dim, m slices.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from two_level_mha.errors import GridError, UsageRuntimeError
from two_level_mha.mesh import Place, place_on
from two_level_mha.operators import ops as _ops

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CACHE_LAYOUTS = ("position", "batch")
Config: TypeAlias = "Mapping[str, Any] | PreTrainedConfig"


class CachedCall(NamedTuple):
    """What a cache decides of a call of attention, as GridAttention.attend takes it; without a cache the defaults."""

    scheme: str | None = None  # the cache's layout; None: the module's scheme
    position: int = 0  # of the first new token
    first_key: int = 0  # position of the first token that is attended to


NO_CACHE = CachedCall()


def check_shares(layout: str, place: Place) -> None:
    """Raises GridError for a layout that takes no account of the shares that the mesh was made with."""
    if layout == "batch" and place.cache_shares:
        raise GridError(
            f"layout 'batch' deals sequences equally, the mesh has cache_shares={list(place.cache_shares)} for tokens: "
            "use layout 'position', or a mesh without cache_shares"
        )


class CacheLayer:
    """Keys and values of one layer, this rank's part. All counts of tokens are those of the whole call, not of a rank.

    A call of attention is `begin`, which says what GridAttention.attend needs, and `append` between its halves.
    window: keeps window - 1 old tokens. recording: keeps older ones too, until the next `trim`, so that `rewind` can
    bring them back. max_length: allocates once; without it the memory grows by at most doubling.
    With gradients a call makes new tensors instead, so that autograd sees through the cache as through a concatenation.
    So does the first call in grad or no_grad mode after calls in inference mode, whose memory is then read-only.
    """

    def __init__(self, place: Place, layout: str, *, max_length: int | None = None, window: int | None = None) -> None:
        if layout not in CACHE_LAYOUTS:
            raise GridError(f"layout must be one of {', '.join(CACHE_LAYOUTS)}, got {layout!r}")
        for name, value in (("max_length", max_length), ("window", window)):
            if value is not None and value < 1:
                raise GridError(f"{name} must be positive, got {value}")
        self.place, self.layout, self.max_length, self.window = place, layout, max_length, window
        self.length = 0  # tokens seen
        self.batch = 0  # B, of all ranks
        self.recording = False
        self._oldest = 0  # position of the first token in memory
        self._base = 0  # where the memory begins: csrc/pass/cache.h
        self._attached = False  # whether the memory is part of a graph, which may have saved it
        self.memory: list[Tensor] = []  # none, or keys and values: (B or its part, K, capacity, d)

    def numbers(self) -> list[int]:
        """The layer but for its memory, as the operators take it: csrc/pass/cache.h says what each one is."""
        return [
            self.place.grid.slices, self.place.slice, int(self.layout == "position"), self.window or 0,
            self.max_length or 0, int(self.recording), *(self.place.turn if self.place.shares else (0, 0, 0)),
            self.batch, self.length, self._oldest, self._base, int(self._attached),
        ]  # fmt: skip

    def keep(self, memory: list[Tensor], numbers: list[int]) -> None:
        """Takes over what an operator gave back."""
        self.batch, self.length, self._oldest, self._base, attached = numbers[-5:]
        self.memory, self._attached = memory, bool(attached)

    @property
    def first_key(self) -> int:
        """Position of the oldest token that the next call attends to."""
        return 0 if self.window is None else max(self.length - self.window + 1, 0)

    @property
    def nbytes(self) -> int:
        """Bytes of memory on this rank."""
        return sum(x.numel() * x.element_size() for x in self.memory)

    def next_call(self, batch: int, new_tokens: int) -> CachedCall:
        """What a call of (batch, new_tokens) inputs would be; changes nothing.

        Raises GridError, on every rank alike, when the tokens do not fit or the batch is another one than before.
        """
        if self.length and batch != self.batch:
            raise GridError(
                f"the cache holds {self.batch} sequences, but the input has {batch}: reset() it, or bring it to "
                "the new batch by select() or repeat_interleave()"
            )
        if self.max_length is not None and self.length + new_tokens > self.max_length:
            raise GridError(
                f"the cache has max_length={self.max_length} and holds {self.length} tokens: {new_tokens} more do not "
                "fit; make it longer, or leave max_length out"
            )
        return CachedCall(self.layout, self.length, self.first_key)

    def begin(self, batch: int, new_tokens: int) -> CachedCall:
        """Begins a call of (batch, new_tokens) inputs. Raises as next_call does."""
        call = self.next_call(batch, new_tokens)
        self.batch = batch
        return call

    def append(
        self, k_BKSd: Tensor, v_BKSd: Tensor, new_tokens: int, *, for_gradients: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Takes this rank's part of new keys and values; returns its part of all that the call attends to, as views.

        Layout "position": (B, K, S_j, d), those of the new_tokens tokens whose position is this rank's, maybe none.
        Layout "batch": (ceil(B / m), K, new_tokens, d).
        for_gradients: whether attention's other inputs, the query or an additive mask, require gradients: then its
        graph saves what is returned, even of frozen keys and values, and no later call may write there.
        """
        self.check_new(k_BKSd)
        memory, numbers, k_BKSd, v_BKSd = _ops.cache_append(
            self.memory, self.numbers(), k_BKSd, v_BKSd, new_tokens, for_gradients
        )  # fmt: skip
        self.keep(memory, numbers)
        return k_BKSd, v_BKSd

    def check_new(self, k_BKSd: Tensor) -> None:
        """Raises GridError, on every rank alike, for keys of another dtype or device than those held."""
        if not self.memory or not self.length:
            return
        held = self.memory[0]
        if held.dtype != k_BKSd.dtype or held.device != k_BKSd.device:
            raise GridError(
                f"the cache holds {held.dtype} keys on {held.device}, the new ones are {k_BKSd.dtype} on "
                f"{k_BKSd.device}: reset() it first"
            )

    def trim(self) -> None:
        """Forgets tokens that only `rewind` could have wanted."""
        self._oldest = self.first_key

    def rewind(self, tokens: int) -> None:
        """Forgets the last `tokens` tokens. Raises GridError when a window has dropped what should come back."""
        if not 0 <= tokens <= self.length:
            raise GridError(f"the cache holds {self.length} tokens: cannot forget {tokens}")
        oldest = self._oldest if self.window is None else max(self.length - tokens - self.window + 1, 0)
        if oldest < self._oldest:
            raise GridError(
                f"a cache layer with window={self.window} has dropped token {oldest}, so it cannot go back {tokens} "
                "tokens: set recording before the calls that may be undone"
            )
        self.length -= tokens

    def reset(self) -> None:
        """Forgets every token; keeps the memory."""
        self.length = self._oldest = self._base = 0

    def select(self, index: Tensor) -> None:
        """Sequence b becomes what sequence index[b] was. index: integers (new batch,), the same on every rank.

        With layout "batch" a collective of the slice group, unless every sequence stays on its rank.
        Raises GridError, on every rank alike, before anything is sent, for what is no index of the cache's sequences;
        an empty cache has none, and takes any.
        """
        self._check_index(index)
        moves = self.length and self.layout == "batch" and self.place.grid.slices > 1
        if moves and any(x.requires_grad for x in self.memory):
            raise UsageRuntimeError("sequences that carry gradients cannot move between ranks: select under no_grad")
        self.keep(*_ops.cache_select(self.memory, self.numbers(), index, self.place.groups[0]))

    def repeat_interleave(self, repeats: int) -> None:
        """Every sequence `repeats` times, one after the other. Raises GridError unless that is at least once."""
        if not isinstance(repeats, int) or repeats < 1:
            raise GridError(f"repeats must be a positive integer, got {repeats!r}: to forget the sequences, reset()")
        self.select(torch.arange(self.batch, device="cpu").repeat_interleave(repeats))

    def _check_index(self, index: Tensor) -> None:
        expected = "index must be a 1-D integer tensor"
        if not isinstance(index, Tensor):
            raise GridError(f"{expected}, got {type(index).__name__}: give torch.tensor([...])")
        integer = index.dtype != torch.bool and not index.is_floating_point() and not index.is_complex()
        if index.dim() != 1 or not integer:
            raise GridError(
                f"{expected}, got shape {tuple(index.shape)} of {index.dtype}: give the numbers of sequences"
            )
        if not self.length:
            return
        if not index.numel():
            raise GridError(f"{expected} of at least one sequence, got none: to forget them all, reset()")
        if self.layout == "position" and not index.is_cpu:
            return  # reading it would wait for the device, and index_select checks it there, alike on every rank
        low, high = torch.stack(index.aminmax()).tolist()
        if low < 0 or high >= self.batch:  # negative ones too: they name no owner
            raise GridError(
                f"{expected} of the sequences 0 to {self.batch - 1} that the cache holds, got values from {low} to "
                f"{high}: count from the first sequence"
            )


class LayersCache:
    """One CacheLayer per layer, as `layers`. KVCache, in cache.py, makes it, and says what its arguments are."""

    layer_class = CacheLayer

    def __init__(
        self,
        config: Config,
        mesh: DeviceMesh | None,
        *,
        layout: str = "position",
        max_length: int | None = None,
    ) -> None:
        place = place_on(mesh)
        check_shares(layout, place)
        self.layers = [
            self.layer_class(place, layout, max_length=max_length, window=window)
            for window in self.windows_of(config, place)
        ]

    def windows_of(self, config: Config, place: Place) -> list[int | None]:
        """The window of every layer, after the sizes were checked against the grid."""
        known = {"num_layers", "num_kv_heads", "head_dim", "window"}
        if not isinstance(config, Mapping) or not known - {"window"} <= config.keys() <= known:
            raise GridError(
                "config must be a transformers config, or dict(num_layers=, num_kv_heads=, head_dim=) and perhaps "
                f"window=, got {config!r}"
            )
        layers, heads = config["num_layers"], config["num_kv_heads"]
        place.grid.check(heads, heads, config["head_dim"])
        window = config.get("window")
        windows = list(window) if isinstance(window, (list, tuple)) else [window] * layers
        if len(windows) != layers:
            raise GridError(f"window has {len(windows)} entries for num_layers={layers}")
        return windows

    @property
    def length(self) -> int:
        """Tokens seen."""
        return self.layers[0].length

    @property
    def nbytes(self) -> int:
        """Bytes of memory on this rank."""
        return sum(layer.nbytes for layer in self.layers)

    def select(self, index: Tensor) -> None:
        """Sequence b becomes what sequence index[b] was, in every layer: the order of beams, a part of a batch."""
        for layer in self.layers:
            layer.select(index)

    def repeat_interleave(self, repeats: int) -> None:
        """Every sequence `repeats` times, one after the other."""
        for layer in self.layers:
            layer.repeat_interleave(repeats)

    def rewind(self, tokens: int) -> None:
        """Forgets the last `tokens` tokens."""
        for layer in self.layers:
            layer.rewind(tokens)

    def reset(self) -> None:
        """Forgets every token; keeps the memory."""
        for layer in self.layers:
            layer.reset()
