"""The KV cache, stored once over the grid.

Rank (i, j) keeps the KV heads of head group i, d whole, and of the tokens or sequences what is slice j's:

    layout       a rank keeps                                    bytes sent by a decode step
    "position"   token p where p % m == j, of all sequences      independent of the context: partial results are merged
    "batch"      sequences j*ceil(B/m) ..., all their tokens     independent of the context: sequences move, keys do not

Letters: B batch, K KV heads of a group, L new tokens, d head_dim, m slices.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from two_level_mha.errors import GridError, UsageRuntimeError
from two_level_mha.mesh import Place, place_on

LAYOUTS = ("position", "batch")


class CacheLayer:
    """Keys and values of one layer, this rank's part. All counts of tokens are those of the whole call, not of a rank.

    A call of attention is `begin`, which says what GridAttention.attend needs, and `append` between its halves.
    window: keeps window - 1 old tokens. recording: keeps older ones too, until the next `trim`, so that `rewind` can
    bring them back. max_length: allocates once; without it the memory grows by at most doubling.
    With gradients a call makes new tensors instead, so that autograd sees through the cache as through a concatenation.
    So does the first call in grad or no_grad mode after calls in inference mode, whose memory is then read-only.
    """

    def __init__(self, place: Place, layout: str, *, max_length: int | None = None, window: int | None = None) -> None:
        if layout not in LAYOUTS:
            raise GridError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
        for name, value in (("max_length", max_length), ("window", window)):
            if value is not None and value < 1:
                raise GridError(f"{name} must be positive, got {value}")
        self.place, self.layout, self.max_length, self.window = place, layout, max_length, window
        by_position = layout == "position"
        self._stride, self._first = (place.grid.slices, place.slice) if by_position else (1, 0)
        self.length = 0  # tokens seen
        self.batch = 0  # B, of all ranks
        self.recording = False
        self._oldest = 0  # position of the first token in memory
        self._start = 0  # where it lies
        self._memory: tuple[Tensor, Tensor] | None = None  # keys, values: (B or its part, K, capacity, d)
        self._attached = False  # whether the memory is part of a graph, which may have saved it

    @property
    def first_key(self) -> int:
        """Position of the oldest token that the next call attends to."""
        return 0 if self.window is None else max(self.length - self.window + 1, 0)

    @property
    def nbytes(self) -> int:
        """Bytes of memory on this rank."""
        return 0 if self._memory is None else sum(x.numel() * x.element_size() for x in self._memory)

    def begin(self, batch: int, new_tokens: int) -> dict[str, object]:
        """Arguments of GridAttention.attend for a call of (batch, new_tokens) inputs, before it.

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
        self.batch = batch
        return {"scheme": self.layout, "position": self.length, "first_key": self.first_key}

    def append(
        self, k_BKSd: Tensor, v_BKSd: Tensor, new_tokens: int, *, for_gradients: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Takes this rank's part of new keys and values; returns its part of all that the call attends to, as views.

        Layout "position": (B, K, S_j, d), those of the new_tokens tokens whose position is this rank's, maybe none.
        Layout "batch": (ceil(B / m), K, new_tokens, d).
        for_gradients: whether attention's other inputs, the query or an additive mask, require gradients: then its
        graph saves what is returned, even of frozen keys and values, and no later call may write there.
        """
        new = (k_BKSd, v_BKSd)
        first, oldest = self.first_key, self._oldest
        kept, seen = self._own(oldest, self.length), self._own(first, self.length)
        parts = self.place.grid.slices if self.layout == "batch" else 1
        assert k_BKSd.shape[0] == -(-self.batch // parts), "begin() was not told of this call"
        assert k_BKSd.shape[2] == self._own(self.length, self.length + new_tokens), "not this rank's new tokens"
        if self._memory is not None and not self._fits(k_BKSd):
            if self.length:
                held = self._memory[0]
                raise GridError(
                    f"the cache holds {held.dtype} keys on {held.device}, the new ones are {k_BKSd.dtype} on "
                    f"{k_BKSd.device}: reset() it first"
                )
            self._memory, self._attached = None, False
        self.length += new_tokens
        if not self.recording:
            oldest = self.first_key
        keep = self._own(oldest, self.length)
        trained = for_gradients or self._attached or any(x.requires_grad for x in new)
        graph = trained and torch.is_grad_enabled()
        if graph or keep < k_BKSd.shape[2]:  # the second: more new tokens than a window keeps
            whole = [torch.cat([x, y], 2) for x, y in zip(self._tail(kept, kept), new, strict=True)] if kept else new
            if graph:
                self._memory, self._start, self._attached = tuple(whole), whole[0].shape[2] - keep, True
            else:
                self._start = 0
                self._reserve(0, keep, new)
                self._write(0, [x[:, :, x.shape[2] - keep :] for x in whole])
            visible = [x[:, :, kept - seen :] for x in whole]
        else:
            self._reserve(kept, k_BKSd.shape[2], new)
            self._write(self._start + kept, new)
            end = self._start + kept + k_BKSd.shape[2]
            visible = [x[:, :, self._start + kept - seen : end] for x in self._memory]
            self._start = end - keep
        self._oldest = oldest
        return tuple(visible)

    def trim(self) -> None:
        """Forgets tokens that only `rewind` could have wanted."""
        self._start += self._own(self._oldest, self.first_key)
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
        self.length = self._oldest = self._start = 0

    def select(self, index: Tensor) -> None:
        """Sequence b becomes what sequence index[b] was. index: integers (new batch,), the same on every rank.

        With layout "batch" a collective of the slice group, unless every sequence stays on its rank.
        Raises GridError, on every rank alike, before anything is sent, for what is no index of the cache's sequences;
        an empty cache has none, and takes any.
        """
        self._check_index(index)
        if self._memory is not None and self.length:
            kept = self._own(self._oldest, self.length)
            if self.layout == "batch" and self.place.grid.slices > 1:
                parts = self._moved(index.tolist(), kept)
            else:
                parts = [x.index_select(0, index.to(x.device, torch.int64)) for x in self._tail(kept, kept)]
            if self._attached:
                self._memory, self._start = tuple(parts), 0
            else:
                if not self._writable or parts[0].shape[0] != self._memory[0].shape[0]:
                    self._allocate(self._memory[0].shape[2], parts)
                self._write(self._start, parts)
        self.batch = index.numel()

    def repeat_interleave(self, repeats: int) -> None:
        """Every sequence `repeats` times, one after the other. Raises GridError unless that is at least once."""
        if not isinstance(repeats, int) or repeats < 1:
            raise GridError(f"repeats must be a positive integer, got {repeats!r}: to forget the sequences, reset()")
        self.select(torch.arange(self.batch).repeat_interleave(repeats))

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

    @property
    def _writable(self) -> bool:
        """Whether the memory may be written to: not what a graph may have saved, nor, once inference mode is left,
        what was made in it.
        """
        if self._memory is None or self._attached:
            return False
        if torch.compiler.is_compiling():  # cannot ask for the mode
            return True
        return torch.is_inference_mode_enabled() or not self._memory[0].is_inference()

    def _own(self, first: int, end: int) -> int:
        """How many of the tokens at positions first, ..., end - 1 are this rank's."""
        before = self._stride - 1 - self._first
        return (end + before) // self._stride - (first + before) // self._stride

    def _fits(self, k_BKSd: Tensor) -> bool:
        memory = self._memory[0]
        return memory.shape[0] == k_BKSd.shape[0] and memory.dtype == k_BKSd.dtype and memory.device == k_BKSd.device

    def _tail(self, kept: int, count: int) -> list[Tensor]:
        """The last `count` of `kept` tokens."""
        return [x[:, :, self._start + kept - count : self._start + kept] for x in self._memory]

    def _write(self, at: int, parts) -> None:
        with torch.no_grad():
            for memory, part in zip(self._memory, parts, strict=True):
                memory[:, :, at : at + part.shape[2]] = part

    def _reserve(self, kept: int, more: int, like) -> None:
        """Makes room for `more` tokens behind the `kept` ones from _start on; may move them."""
        needed = kept + more
        capacity = 0 if self._memory is None else self._memory[0].shape[2]
        writable = self._writable
        if writable and self._start + needed <= capacity:
            return
        old = self._tail(kept, kept) if kept else []
        if not (writable and needed <= capacity and self._start >= kept):
            self._allocate(max(needed, self._roomy(capacity)), like)
        self._start = 0
        if kept:
            self._write(0, old)

    def _roomy(self, capacity: int) -> int:
        """Tokens to allocate for when `capacity` does not do."""
        most = [] if self.max_length is None else [-(-self.max_length // self._stride)]
        if self.window is not None:
            most.append(2 * -(-self.window // self._stride))  # moved to the front once in a window
        roomy = 2 * capacity if self.max_length is None else most[0]
        return min([roomy, *most])

    def _allocate(self, capacity: int, like) -> None:
        self._memory = tuple(x.detach().new_empty(*x.shape[:2], capacity, x.shape[3]) for x in like)
        self._attached = False

    def _moved(self, index: list[int], kept: int) -> list[Tensor]:
        """This rank's sequences of the new batch; each crosses once to a rank that wants it."""
        m, j = self.place.grid.slices, self.place.slice
        old, new = self._memory[0].shape[0], -(-len(index) // m)
        wanted = [sorted(set(index[t * new : (t + 1) * new])) for t in range(m)]
        mine = index[j * new : (j + 1) * new]
        x = torch.stack(self._tail(kept, kept), 1)
        if x.requires_grad:
            raise UsageRuntimeError("sequences that carry gradients cannot move between ranks: select under no_grad")
        owner = [[b // old for b in ids] for ids in wanted]
        if any(rank != t for t in range(m) for rank in owner[t]):
            sent = [[b - j * old for b in wanted[t] if b // old == j] for t in range(m)]
            rows = torch.tensor([b for part in sent for b in part], dtype=torch.int64, device=x.device)
            ops = torch.ops._c10d_functional
            x = ops.wait_tensor(
                ops.all_to_all_single(
                    x.index_select(0, rows),
                    [owner[j].count(t) for t in range(m)],
                    [len(part) for part in sent],
                    self.place.groups[0],
                )  # fmt: skip
            )
            at = [wanted[j].index(b) for b in mine]
        else:
            at = [b - j * old for b in mine]
        moved = x.new_zeros(new, *x.shape[1:])
        moved[: len(at)] = x.index_select(0, torch.tensor(at, dtype=torch.int64, device=x.device))
        return list(moved.unbind(1))


class KVCache:
    """One CacheLayer per layer, as `layers`: given to TwoLevelAttention layer by layer, or to a transformers model
    as past_key_values (then made from its config).

    config: a transformers config, or the sizes: dict(num_layers=, num_kv_heads=, head_dim=), and window= an int for
    all layers or one int or None for each. mesh: that of the model, or None. layout: see the top of this file.
    Raises GridError for a size that is missing or that the grid does not fit.
    """

    layer_class = CacheLayer

    def __new__(cls, config=None, *args, **options):  # deepcopy and pickle name the class alone
        if cls is KVCache and hasattr(config, "get_text_config"):
            from two_level_mha.integrations.cache import ModelCache

            cls = ModelCache
        return super().__new__(cls)

    def __init__(
        self,
        config: Mapping[str, object],
        mesh: DeviceMesh | None,
        *,
        layout: str = "position",
        max_length: int | None = None,
    ) -> None:
        place = place_on(mesh)
        self.layers = [
            self.layer_class(place, layout, max_length=max_length, window=window)
            for window in self.windows_of(config, place)
        ]

    def windows_of(self, config: Mapping[str, object], place: Place) -> list[int | None]:
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
