"""Attention on a grid, without a calling convention: the parameters, the agreement of ranks, the pass.

Letters: B batch, L query length, S key length, D embed_dim, h and k heads of all, H and K of a head group, d head_dim,
E its slice.
"""

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from two_level_mha import _C
from two_level_mha.activations import check_activations, stand_in, used_apart, whole_sizes
from two_level_mha.agreement import ALIKE, Calls, check_call, compares, same_on_all_ranks, seals
from two_level_mha.blocks import COMBINES, GATE_DIMS, POSITION_DIMS, SHARDED_DIMS, block, dealt, joined, local_blocks
from two_level_mha.cache_layer import NO_CACHE, CachedCall, CacheLayer
from two_level_mha.context import cast, constants, element_size, layer_numbers, size_numbers
from two_level_mha.errors import GridError
from two_level_mha.low_rank import low_rank, own_heads
from two_level_mha.mesh import Grid, place_on
from two_level_mha.operators import ops as _ops
from two_level_mha.profile import Profile, resolve_profile
from two_level_mha.stock import HoldsStock
from two_level_mha.stream import Stream

if TYPE_CHECKING:
    from two_level_mha.stock import StockTensor

CACHED = "position"  # the scheme of a KV cache by position: not for a call without one
SCHEMES = ("auto", *(name for name, _, _ in _C.schemes() if name != CACHED))
SPLIT_INPUTS = ("query", "key", "value", "x", "hidden_states")  # of which each rank may have its own part
REDUCE_DTYPES = (None, torch.float32)
HOW_IN_WORDS = {"element_size": "bytes of an element", "zero_key": "add_zero_attn", "in_halves": "two operators"}


class Aside(NamedTuple):
    """What a call brings along for its queries and keys: the rows of this rank's, and parameters of every rank."""

    q_rows: list[Tensor]
    k_rows: list[Tensor]
    shared: list[Tensor]


# mypy does not see that a NamedTuple can be called
Between: TypeAlias = "Callable[[Tensor, Tensor, Tensor, Aside], tuple[Tensor, ...]] | NormRotary"


class NormRotary(NamedTuple):
    """A Between that the pass itself knows: norms, whose weights are `shared`, and rotation by cos and sin, the `rows`;
    each may be absent.
    """

    eps: float | None = None  # of the norms
    interleaved: bool = False

    def arguments(self) -> tuple[float, bool]:
        # no default of 0.0: torch.compile(dynamic=True) makes a float that it is given symbolic, and compiles twice
        return 0.0 if self.eps is None else self.eps, self.interleaved

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, aside: Aside) -> tuple[Tensor, Tensor, Tensor]:
        if aside.shared or aside.q_rows:
            eps, interleaved = self.arguments()
            q, k = _ops.norm_rotary(q, k, aside.shared, eps, aside.q_rows, aside.k_rows, interleaved)
        return q, k, v


NOTHING = NormRotary()


class Drops:
    """A module with `dropout`: the probability with which an attention weight is dropped in training."""

    _dropout: float
    _drops: bool

    @property
    def dropout(self) -> float:
        return self._dropout

    @dropout.setter
    def dropout(self, p: float) -> None:
        self._dropout = p
        self._drops = p > 0.0  # forward asks this bool: torch.compile(dynamic=True) traces twice if it meets the float


class GridAttention(HoldsStock):
    """Owns the weight blocks of rank (i, j) and runs the pass. Its subclasses bring a calling convention.

    Parameters, logical shapes: q_weight (h, d, D), k_weight (k, d, Dk), v_weight (k, d, Dv), out_weight (D, h, d),
    q_bias (h, d), k_bias and v_bias (k, d), bias_k and bias_v (k, d) or None, out_bias (D,). Without a mesh they are
    plain parameters, with one DTensors on ("head", "slice"). Without v_weight, what k_weight and k_bias give is v too;
    without k_weight `between` brings both, in the layout of the call, whose key and value inputs have no token.
    gated: every query head has a gate of its output behind it, so that q_weight is (2 h, d, D) and q_bias (2 h, d), or
    gate_weight (h, d, D) and gate_bias beside q's; gate_shift (h,) is added to the gates. gate_function: of gates, what
    the output is multiplied with.
    """

    gate_function: Callable[[Tensor], Tensor] = staticmethod(torch.sigmoid)
    stock_names: "dict[str, StockTensor]"  # of a subclass: parameter -> where it is in what it replaces
    q_weight: Tensor
    k_weight: Tensor | None
    v_weight: Tensor | None
    out_weight: Tensor
    q_bias: Tensor | None
    out_bias: Tensor | None

    def __init__(
        self,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        mesh: DeviceMesh | None,
        scheme: str,
        combine: str,
        debug: bool | None,
        reduce_dtype: torch.dtype | None = None,
        profile: Profile | str | os.PathLike[str] | None = None,
        activations: str = "replicated",
        overlap: int | None = None,
        gated: bool = False,
    ) -> None:
        nn.Module.__init__(self)  # a subclass may also inherit from the class it replaces, whose __init__ must not run
        check_options(scheme, combine)
        check_activations(activations)
        check_overlap(overlap)
        if reduce_dtype not in REDUCE_DTYPES:
            raise GridError(f"reduce_dtype must be None or torch.float32, got {reduce_dtype}")
        self.place = place_on(mesh)
        self.place.grid.check(num_heads, num_kv_heads, head_dim)
        check_slices(scheme, head_dim, self.place.grid)
        self.whole_heads = stores_whole_heads(scheme, num_heads, num_kv_heads, self.place.grid)
        self.mesh = mesh
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.scheme, self.combine, self.debug, self.reduce_dtype = scheme, combine, debug, reduce_dtype
        self.activations, self.overlap, self.gated = activations, overlap, gated
        self.projection_names: dict[str, str] = {}  # letter -> child that stands for a projection, for adapters
        self.stream: Stream | None = None  # of a model whose hidden states are split, which knows what of
        self.profile = resolve_profile(profile, "cpu" if mesh is None else mesh.device_type)
        self._compared = self._just_compared = False
        self.calls = Calls(self.place.control, type(self).__name__) if self.place.control is not None else None

    def store(self, full: Mapping[str, Tensor | None], requires_grad: dict[str, bool] | None = None) -> None:
        """Keeps this rank's blocks of full tensors, the same on every rank, as the module's parameters."""
        for name in dict.fromkeys((*SHARDED_DIMS, *full)):
            tensor = full.get(name)
            if tensor is None:
                self.register_parameter(name, None)
            else:
                kept = self.block(tensor, name)
                self.register_parameter(name, nn.Parameter(kept, (requires_grad or {}).get(name, True)))
        kinds = dict.fromkeys(("replicated", self.activations))
        self._numbers = {kind: self._layer_numbers(full, kind) for kind in kinds}
        self._texts: dict[tuple[object, ...], str] = {}

    def _layer_numbers(self, full: Mapping[str, Tensor | None], activations: str) -> list[int]:
        held = {name: tensor for name, tensor in full.items() if tensor is not None}
        return layer_numbers(
            self.place,
            self.profile.numbers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            embed_dim=held["q_weight"].shape[2],
            key_dim=held["k_weight" if "k_weight" in held else "q_weight"].shape[2],
            value_dim=held[next(f"{letter}_weight" for letter in "vkq" if f"{letter}_weight" in held)].shape[2],
            out_dim=held["out_weight"].shape[0],
            bias=not held.keys().isdisjoint(("q_bias", "k_bias", "v_bias")),
            out_bias="out_bias" in held,
            bias_kv="bias_k" in held,
            whole_heads=self.whole_heads,
            concat=self.combine == "concat",
            gated=self.gated,
            reduce_dtype=self.reduce_dtype,
            activations=activations,
            overlap=self.overlap,
        )

    def block(self, full: Tensor, name: str) -> Tensor:
        """`full`, the same on every rank, as this module stores parameter `name`."""
        return block(full, name, self.mesh, self.combine, self.whole_heads)

    def check_call(
        self, check: Callable[[], dict[str, object]], tensors: Mapping[str, Tensor | None]
    ) -> dict[str, object]:
        """Returns check(), which raises for this rank's arguments, or returns what else must be alike on every rank.

        Where the call compares (agreement.compares), an error of one rank is raised on all, and so is a difference.
        """
        if not compares(self.place.grid.size, self.debug, self._compared):
            return check()
        assert self.place.control is not None and self.mesh is not None  # of several ranks
        if self.place.control.alone:
            return check()
        options: dict[str, object] = {
            "reduce_dtype": str(self.reduce_dtype),
            "scheme": self.scheme,
            "combine": self.combine,
        }
        options |= {"profile": self.profile.numbers, "overlap": self.overlap}
        if self.splits:
            tensors = {name: x for name, x in tensors.items() if name not in SPLIT_INPUTS}
        settings = check_call(self, self.mesh, options, check, tensors)
        self._compared = self._just_compared = True
        return settings

    @property
    def splits(self) -> bool:
        """Whether this rank is given its part of the activations, and returns that."""
        split = self.activations != "replicated" and self.place.grid.size > 1
        return split and (self.stream is None or self.stream.splits)

    def wholes(self, xs: list[Tensor], batch_first: bool = True) -> list[Tensor]:
        """What stands for the inputs' wholes where their shapes are asked for: themselves, or if they are split tensors
        of the whole shapes without memory, one for all that are one. Then a collective.
        """
        if not self.splits:
            return xs
        if not (self._compared or self.stream is not None or torch.compiler.is_compiling()):
            same_on_all_ranks({"activations": self.activations}, self.mesh, ALIKE)
        distinct = [x for i, x in enumerate(xs) if all(x is not other for other in xs[:i])]
        shapes = [tuple(getattr(x, "shape", ())) for x in distinct]  # who gives no tensor must not miss this
        batched = len(shapes[0]) != 2
        if not batched and self.activations == "batch":
            raise GridError("activations='batch' splits sequences, and an unbatched query is one: give it a batch dim")
        dim = int(batch_first == (self.activations == "sequence")) if batched else 0
        if self.stream is not None:
            sizes = self.stream.whole_sizes(shapes)
        else:
            sizes = whole_sizes(shapes, self.activations, self.place, dim)
        found = [stand_in(x, dim, size) for x, size in zip(distinct, sizes, strict=True)]
        return [next(whole for y, whole in zip(distinct, found, strict=True) if y is x) for x in xs]

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        wholes: list[Tensor] | None = None,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
        causal: int | None = None,
        window: int | None = None,
        softcap: float | None = None,
        dropout_p: float = 0.0,
        batch_first: bool = True,
        add_zero_attn: bool = False,
        need_weights: bool = False,
        average_attn_weights: bool = True,
        rows: list[Tensor] | None = None,
        shared: list[Tensor] | None = None,
        between: Between = NOTHING,
        sinks: Tensor | None = None,
        gate: Tensor | None = None,
        cache: CacheLayer | None = None,
        call: CachedCall = NO_CACHE,
    ) -> tuple[Tensor, Tensor | None]:
        """Exact attention of (B, L, D) over (B, S, Dk), (B, S, Dv); (L, B, D) and so on if not batch_first.

        attn_mask: bool (True = attend) or additive, broadcastable to (B, h, L, S). causal: row l sees keys up to
        position l + causal, and with window only those after l + causal - window. Returns y in the layout of query,
        and the weights (B, h, L, S), or (B, L, S) averaged, or None.
        wholes: what stands for the wholes of query and key, where these are this rank's parts (`wholes`).
        between: what acts where d is whole; given q, k, v of this rank and an Aside, it returns them changed, and may
        return a fourth tensor, broadcastable to this rank's (B, H, L, S), which is added to the scores before the mask.
        rows: tensors (B or 1, 1, L, ..) that go with the tokens: the Aside has those of q's rows and those of k's.
        shared: parameters that every rank holds and `between` uses for its own rows and heads: the Aside has them with
        the sum over the grid as their gradient.
        sinks: (h,), of each head the logit of one key more, whose value is zero. gate: (B, L, h), the same on every
        rank, of each row and head one gate; a gated layer has its own. Attention's output is multiplied by the
        gate_function of it.
        cache: takes the new keys and values, and all of its own are attended to; call: what its begin() said.
        """
        q_weight, k_weight, v_weight, q_bias, k_bias, v_bias, bias_k, bias_v, out_weight, out_bias = self.own_blocks()
        p = self._parameters
        if "gate_weight" in p:
            gates = local_blocks([p.get(name) for name in GATE_DIMS])
            q_weight, q_bias = joined(q_weight, gates[0]), joined(q_bias, gates[1])
        if k_weight is None:
            k_weight = query.new_empty(()).expand(self._key_block)
        if v_weight is None:
            v_weight, v_bias = k_weight, k_bias
        assert q_weight is not None and out_weight is not None
        weights = (q_weight, k_weight, v_weight, q_bias, k_bias, v_bias, bias_k, bias_v)
        after: list[Tensor] = []  # of the output, for `leave`: the gate, the sinks
        if self.gated or gate is not None or sinks is not None:
            rows, shared, between = self._with_after(gate, sinks, rows, shared, between, after)
        adapted = low_rank(self) if self.projection_names else None
        if adapted is not None:
            out_weight, out_bias = adapted.widened(out_weight, out_bias)
            rows, shared, between = adapted.around((query, key, value), batch_first, rows, shared, between)
        if self.splits:  # parts are sent as the projections take them
            query, key, value = cast([query, key, value])
        batch_dim, length_dim = (0, 1) if batch_first else (1, 0)
        in_halves = not isinstance(between, NormRotary) or cache is not None or need_weights
        how: dict[str, Any] = {
            "scheme": call.scheme or self.scheme, "causal": causal is not None, "element_size": element_size(query),
            "zero_key": add_zero_attn, "batch_first": batch_first, "in_halves": in_halves,
        }  # fmt: skip
        whole_query, whole_key = (query, key) if wholes is None else wholes[:2]
        sizes = size_numbers(
            batch=whole_query.shape[batch_dim],
            length=whole_query.shape[length_dim],
            keys=whole_key.shape[length_dim],
            position=call.position,
            first_key=call.first_key,
        )
        text = self._constants(how)
        number = self._begin(how, sizes, need_weights, average_attn_weights, query)
        seed = seal = before = None
        if number and self.calls is not None and not torch.compiler.is_compiling():
            before = self.calls.control.inputs.seal
        try:
            if dropout_p > 0.0:
                seed = torch.randint(2**62, (1,), device=query.device)
            # softcap: as NormRotary's eps
            how_to_attend = (
                attn_mask, scale, causal, window, 0.0 if softcap is None else softcap, dropout_p, seed, text,
            )  # fmt: skip
            entered = sizes if not number else [*sizes, number]
            if not in_halves:
                assert isinstance(between, NormRotary)
                eps, interleaved = between.arguments()
                y = _ops.attention(
                    query, key, value, *weights, out_weight, out_bias, rows, shared, eps, interleaved,
                    *how_to_attend, entered, before,
                )  # fmt: skip
                return y, None
            q, k, v, *aside = _ops.enter(query, key, value, *weights, rows, shared, text, entered, before)
            if number:
                seal = aside.pop()
            at = 0 if rows is None else len(rows)
            q, k, v, *scores = between(q, k, v, Aside(aside[:at], aside[at : 2 * at], aside[2 * at :]))
            assert cache is None or not scores, "a cache keeps keys of other calls, which have no such scores"
            if cache is not None and need_weights:
                for_gradients = q.requires_grad or (attn_mask is not None and attn_mask.requires_grad)
                k, v = cache.append(k, v, sizes[2], for_gradients=for_gradients)
            arguments = (q, k, v, out_weight, out_bias, *how_to_attend, sizes)
            attention_weights = None
            if need_weights:
                y, attention_weights = _ops.leave_with_weights(
                    *arguments, average_attn_weights, seal, after or None, *scores
                )
            elif cache is None:
                y = _ops.leave(*arguments, seal, after or None, *scores)
            else:
                cache.check_new(k)
                y, memory, numbers = _ops.leave_with_cache(
                    *arguments, cache.memory, cache.numbers(), seal, after or None
                )
                cache.keep(memory, numbers)
            return y if adapted is None else adapted.finished(y), attention_weights
        except torch.distributed.DistError as error:
            if not number or type(error) is not torch.distributed.DistError:  # those of a backend
                raise
            assert self.calls is not None
            options: dict[str, object] = {"scale": scale, "causal": causal, "window": window, "softcap": softcap}
            options |= {"dropout_p": dropout_p, "position": call.position}
            tensors: dict[str, Tensor | None] = {}
            if not self.splits:
                tensors = {"query": query, "key": key, "value": value}
            tensors |= {"the mask": attn_mask, "the seed of dropout": seed}
            tensors |= {f"parameter {i} of every rank": x for i, x in enumerate([out_bias, *(shared or ())])}
            tensors |= {f"what goes with tokens, {i}": x for i, x in enumerate(rows or ())}
            self.calls.explain(self._blocks(), options, tensors)
        finally:
            if number is not None and self.calls is not None and not torch.compiler.is_compiling():
                self.calls.end()

    def own_blocks(self) -> list[Tensor | None]:
        """This rank's blocks of the parameters, in the order of SHARDED_DIMS, as the pass takes them."""
        # nn.Module finds parameters by a slow path; pruned and parametrized ones are attributes
        p = self._parameters
        return local_blocks([p[name] if name in p else getattr(self, name) for name in SHARDED_DIMS])

    def spread(self, x: Tensor, dim: int) -> Tensor:
        """x, whose entries along `dim` are the columns of a head of a projection, as the pass has heads."""
        return x

    def _with_after(
        self, gate: Tensor | None, sinks: Tensor | None, rows: list[Tensor] | None, shared: list[Tensor] | None,
        between: Between, after: list[Tensor],
    ) -> tuple[list[Tensor] | None, list[Tensor] | None, Between]:  # fmt: skip
        """`rows`, `shared` and `between` of a call that takes out of them, into `after`, what acts on attention's
        output.
        """
        if gate is not None:
            gate_B1Lh = used_apart([gate], self.place, self.reduce_dtype)[0].unsqueeze(1)
            rows = [*(rows or ()), gate_B1Lh]
        if sinks is not None:
            shared = [*(shared or ()), sinks]
        shift = self._parameters.get("gate_shift")
        if shift is not None:
            shared = [*(shared or ()), *local_blocks([shift])]

        def take(q: Tensor, k: Tensor, v: Tensor, aside: Aside) -> tuple[Tensor, ...]:
            if self.gated:
                q, own = q.unflatten(1, (-1, 2)).unbind(2)
                if shift is not None:
                    own = own + own_heads(aside.shared[-1], self.place, 0, q.shape[1]).view(-1, 1, 1)
                    aside = aside._replace(shared=aside.shared[:-1])
                after.append(self.gate_function(own))
            if gate is not None:
                all_BLh = self.gate_function(aside.q_rows[-1]).squeeze(1)
                own_BHL = own_heads(all_BLh, self.place, 2, q.shape[1]).transpose(1, 2)
                after.append(own_BHL.unsqueeze(3).expand(-1, -1, -1, self.head_dim))
                aside = aside._replace(q_rows=aside.q_rows[:-1], k_rows=aside.k_rows[:-1])
            if sinks is not None:
                after.append(aside.shared[-1])
                aside = aside._replace(shared=aside.shared[:-1])
            return between(q, k, v, aside)

        return rows, shared, take

    @property
    def _key_block(self) -> tuple[int, int, int]:
        """The shape of this rank's k_weight, where it has none."""
        width = dealt(self.head_dim, self.place.grid.slices, self.place.slice)[1]
        return self.num_kv_heads // self.place.grid.head_groups, width, self.q_weight.shape[2]

    def _begin(
        self, how: dict[str, Any], sizes: list[int], need_weights: bool, average: bool, query: Tensor
    ) -> int | None:
        """Begins a call that the ranks compare: what its exchanges carry, 0 where they do not. None: no such call."""
        if self.calls is None or self.calls.control.alone or not seals(self.debug):
            return None
        if torch.compiler.is_compiling():  # a graph has no number that counts: it compares the rest
            return 1
        batch, length, keys, *_ = sizes
        what = {HOW_IN_WORDS.get(name, name): value for name, value in how.items()}
        what |= {"batch": batch, "length": length, "keys": keys, "dtype": query.dtype}
        what |= {"attention weights": (need_weights, need_weights and average)}
        captured = query.is_cuda and torch.cuda.is_current_stream_capturing()
        what |= {"grad mode": torch.is_grad_enabled(), "in the capture of a CUDA graph": captured}
        compared, self._just_compared = self._just_compared, False
        self.calls.begin(what, compared)
        return 0 if captured else self.calls.number(self._blocks())

    def _blocks(self) -> list[Tensor | None]:
        """The parameters that no other rank holds alike, and to which code writes as often on every rank.

        None where slices differ: a checkpoint comes into those in one piece, in several or, where empty, in none.
        """
        if self.head_dim % self.place.grid.slices:
            return []
        return [
            self._parameters.get(name) for name in (*SHARDED_DIMS, *GATE_DIMS, *POSITION_DIMS) if name != "out_bias"
        ]

    def _constants(self, how: dict[str, Any]) -> str:
        """The constants of a call; made once for each way in which calls run the layer."""
        activations = self.activations if self.splits else "replicated"
        key = (*how.values(), activations)
        if key not in self._texts:
            name = "" if self.calls is None else self.calls.name
            self._texts[key] = constants(
                self._numbers[activations], self.place.groups, shares=self.place.shares, **how, name=name
            )
        return self._texts[key]

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
            f"grid=({self.place.grid.head_groups}, {self.place.grid.slices}), scheme={self.scheme!r}, "
            f"combine={self.combine!r}"
        )


def check_options(scheme: str, combine: str) -> None:
    """Raises GridError for a name that is none."""
    if scheme not in SCHEMES:
        raise GridError(f"scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    if combine not in COMBINES:
        raise GridError(f"combine must be one of {', '.join(COMBINES)}, got {combine!r}")


def check_overlap(overlap: int | None) -> None:
    """Raises GridError for what is no number of chunks."""
    number = isinstance(overlap, int) and not isinstance(overlap, bool)
    if overlap is not None and not (number and 1 <= overlap <= _C.most_chunks):
        raise GridError(
            f"overlap must be a number of chunks from 1 (off) to {_C.most_chunks}, or None (as predicted), got "
            f"{overlap!r}"
        )


def check_slices(scheme: str, head_dim: int, grid: Grid) -> None:
    """Raises GridError where scheme "independent", whose slices are heads, would have some of another width."""
    if scheme == "independent" and head_dim % grid.slices:
        raise GridError(
            f"scheme 'independent' makes a head of every slice: slices={grid.slices} must divide head_dim={head_dim}; "
            "take another grid, or an exact scheme, such as 'auto', which takes slices of any width"
        )


def stores_whole_heads(scheme: str, h: int, k: int, grid: Grid) -> bool:
    """Whether the query side is stored by whole heads. Raises GridError where scheme "heads" cannot."""
    H, K, m = h // grid.head_groups, k // grid.head_groups, grid.slices
    if scheme == "heads" and not _C.whole_heads_fit(H, K, m):
        raise GridError(
            f"scheme 'heads' deals the {H} query heads of a head group, with {K} key/value heads, to {m} slices: "
            f"slices must divide {H}, and slices must divide {K} or the other way round; take another grid or scheme"
        )
    return scheme == "heads" or (scheme == "auto" and _C.stores_whole_heads(h, k, grid.head_groups, m))
