"""transformers' attention whose scores have more of relative positions than a bias: DeBERTa, SEW-D, WavLM, Wav2Vec2's
conformers.

Between the halves of the pass a rank has queries and keys of its own heads, and its own rows, with d whole: what is
added to their scores is made there.

    score(l, s) = scale * ((q_l + u) k_s + (q_l + v) P[c(l, s)] + k_s R[r(l, s)])  or  scale * q_l k_s + g_l b(l, s)

with P and R of relative positions, c and r the indices of those of a row and a key, b a bias and g its gate.

Letters: as in layer.py, and R relative positions.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from two_level_mha.activations import used_apart
from two_level_mha.blocks import dealt, filled, local_blocks
from two_level_mha.class_like import class_like
from two_level_mha.errors import GridError, UsageRuntimeError
from two_level_mha.integrations import forms
from two_level_mha.integrations.projected import Attended, ProjectedAttention, additive, mask_for
from two_level_mha.layer import Aside
from two_level_mha.low_rank import features_of, is_linear, low_rank, own_heads
from two_level_mha.names import Args, Kwargs
from two_level_mha.operators import ops as _ops
from two_level_mha.stock import StockTensor, linear_names

# Where projections are, by letter: of DeBERTa-v2 and SEW-D, of DeBERTa, of the conformers.
PATHS = (
    {"q": "query_proj", "k": "key_proj", "v": "value_proj", "o": "../output.dense"},
    {"qkv": "in_proj", "o": "../output.dense"},
    {"q": "linear_q", "k": "linear_k", "v": "linear_v", "o": "linear_out"},
)
# Of relative positions, to what queries, and keys, are multiplied with; without them those of k and q are taken.
POSITION_PROJECTIONS = {"pos_k": ("pos_key_proj", "pos_proj", "linear_pos"), "pos_q": ("pos_query_proj", "pos_q_proj")}
OWN_BIASES = ("q_bias", "v_bias")  # (h d,), of a projection that has none
TO_KEYS, TO_QUERIES = "c2p", "p2c"  # of pos_att_type: scores of q and P, and of k and R
QUERY_BIASES = ("pos_bias_u", "pos_bias_v")  # (h, d): what is added to queries before k, and before P
DISTANCES = "distance_embedding"  # of distances from -left_max_position_embeddings on, one for all heads
GATE_RATE, BIAS_TABLE = "gru_rel_pos_const", "rel_attn_embed"

DISENTANGLED_PARTS: tuple[str, ...] = (
    *OWN_BIASES,
    *(f"{name}.*" for names in POSITION_PROJECTIONS.values() for name in names),
)
CONFORMER_PARTS: tuple[str, ...] = ("linear_pos.weight", *QUERY_BIASES, f"{DISTANCES}.weight")
GATED_BIAS_PARTS: tuple[str, ...] = (GATE_RATE, f"{forms.BIAS_GATE}.*", f"{BIAS_TABLE}.weight")


class Relative(NamedTuple):
    """What a call has of relative positions, the same on every rank but for gradients, which are summed.

    keys, queries (h, d, R): P and R, each with its indices (B or 1, 1, L, S). biases: u and v. sees (B or 1, 1, L, 1):
    whether a row sees a key; one that does not is the same of all keys, whatever their scores.
    """

    keys: Tensor | None = None
    key_index: Tensor | None = None
    queries: Tensor | None = None
    query_index: Tensor | None = None
    biases: tuple[Tensor, Tensor] | None = None
    sees: Tensor | None = None


class RelativeAttention(ProjectedAttention):
    """A ProjectedAttention whose subclasses say in `relative` what its scores have of relative positions."""

    pos_bias_u: Tensor | None
    pos_bias_v: Tensor | None

    def __init__(self, original: nn.Module, *args: Any, **options: Any) -> None:
        super().__init__(original, *args, **options)
        if self.scheme == "independent":
            raise GridError("scheme 'independent' takes no relative positions: they need the whole head_dim")
        self.take_settings(original)
        for name in ("pos_dropout", DISTANCES):
            if isinstance(getattr(original, name, None), nn.Module):
                self.add_module(name, getattr(original, name))
        for name in QUERY_BIASES:
            self.register_parameter(name, original._parameters.get(name))

    def store_projections(
        self, original: nn.Module, projections: dict[str, nn.Module], paths: dict[str, str], packing: str
    ) -> None:
        h, d = self.num_heads, self.head_dim
        names = forms.names_of(projections, paths, (h, h, d), "groups", d)
        linears = {name: forms.first_of(original, known) for name, known in POSITION_PROJECTIONS.items()}
        linears = {name: linear for name, linear in linears.items() if linear is not None}
        for name, linear in linears.items():
            path = next(path for path in POSITION_PROJECTIONS[name] if getattr(original, path, None) is linear)
            names |= linear_names(name, path, linear, d)
        for name in OWN_BIASES:
            if original._parameters.get(name) is not None:
                names[name] = StockTensor(name, (h * d,), (h, d))
        forms.store_projections(self, projections, paths, names, dict(original.named_parameters()))

    def relative(self, given: dict[str, Any], length: int) -> Relative:
        """Of a call of `length` rows."""
        raise NotImplementedError

    def between_of(self, given: dict[str, Any], first: int, length: int, then: Any) -> dict[str, Any]:
        of_call = self.relative(given, length)
        names = [name for name in ("key_index", "query_index", "sees") if getattr(of_call, name) is not None]

        def between(q: Tensor, k: Tensor, v: Tensor, aside: Aside) -> tuple[Tensor, ...]:
            own: dict[str, Any] = dict(zip(names, aside.q_rows, strict=True))
            return self.scored(q, k, v, of_call._replace(**own))

        return {"rows": [getattr(of_call, name) for name in names], "between": between}

    def scored(self, q_BHLd: Tensor, k_BHSd: Tensor, v: Tensor, own: Relative) -> tuple[Tensor, ...]:
        """q, k, v and what is added to their scores; own: with the indices of this rank's rows."""
        place, H = self.place, q_BHLd.shape[1]
        if own.sees is not None:
            q_BHLd = q_BHLd.masked_fill(~own.sees, 0.0)
        to_keys = q_BHLd
        added: list[Tensor] = []
        if own.biases is not None:
            q_BHLd, to_keys = (q_BHLd + own_heads(x, place, 0, H).unsqueeze(1) for x in own.biases)
        if own.keys is not None and own.key_index is not None:
            scores_BHLR = to_keys @ own_heads(own.keys, place, 0, H)
            added.append(scores_BHLR.gather(3, own.key_index.expand(*scores_BHLR.shape[:3], -1)))
        if own.queries is not None and own.query_index is not None:
            scores_BHRS = (k_BHSd @ own_heads(own.queries, place, 0, H)).transpose(2, 3)
            index = own.query_index.expand(*scores_BHRS.shape[:2], -1, -1)
            scores = scores_BHRS.gather(2, index)
            added.append(scores if own.sees is None else scores.masked_fill(~own.sees, 0.0))
        if not added:
            return q_BHLd, k_BHSd, v
        return q_BHLd, k_BHSd, v, sum(added[1:], added[0]) * self.scaling

    def projected(self, letter: str, x_RD: Tensor) -> Tensor:
        """(h, d, R): x, the same on every rank, by a projection of relative positions, or q's or k's."""
        own = f"pos_{letter}" if f"pos_{letter}_weight" in self._parameters else letter
        weight, bias = local_blocks([self._parameters[f"{own}_weight"], self._parameters.get(f"{own}_bias")])
        assert weight is not None
        heads, width = weight.shape[:2]
        block_HER = weight @ used_apart([x_RD], self.place, self.reduce_dtype)[0].t()
        if bias is not None:
            block_HER = block_HER + bias.unsqueeze(2)
        if own == letter and self.projection_names and (adapted := low_rank(self)) is not None:
            for term in adapted.of_block(letter, x_RD, heads, width):
                block_HER = block_HER + term
        return self._whole(block_HER, by_heads=own == "q" and self.whole_heads)

    def _whole(self, block_HER: Tensor, by_heads: bool) -> Tensor:
        """(h, d, R) of every rank's block: slices of a head group's heads, or by_heads a rank's own heads."""
        place, d = self.place, self.head_dim
        if place.grid.size == 1:
            return block_HER
        if by_heads:
            return _ops.hierarchical_all_gather(block_HER.unsqueeze(0), 0, 1, *place.args[:3]).flatten(0, 1)
        block_HER = filled(block_HER, 1, dealt(d, place.grid.slices, 0)[1])
        return _ops.hierarchical_all_gather(block_HER, 0, 1, *place.args[:3]).narrow(1, 0, d)


class DisentangledAttention(RelativeAttention):
    """DeBERTa's, DeBERTa-v2's and SEW-D's.

    attention_mask: 4-D, broadcastable to (B, 1, L, S), not zero where a row sees a key. relative_pos: (L, S), (B or 1,
    L, S) or (B or 1, 1, L, S), and rel_embeddings (.., D): as the model's encoder makes them.
    """

    relative_attention: bool
    pos_dropout: nn.Dropout

    def __init__(self, original: nn.Module, *args: Any, **options: Any) -> None:
        super().__init__(original, *args, **options)
        kinds: Any = original.pos_att_type
        self.kinds = [kind for kind in (TO_KEYS, TO_QUERIES) if kind in kinds]
        fused = hasattr(original, "in_proj")
        scales = 1 + len(kinds if fused else self.kinds)
        # as the model has it, which takes the root in float32
        self.scaling = 1.0 / float(torch.sqrt(torch.tensor(self.head_dim, dtype=torch.float) * scales))
        self.spans_length = fused  # of the positions that have an embedding it takes those that a call has
        self.middle: int = getattr(original, "pos_ebd_size", getattr(original, "max_relative_positions", 0))

    def mask_of(self, given: dict[str, Any], length: int, keys: int, kept: int = 0) -> Tensor | None:
        mask = given["attention_mask"]
        return None if mask is None else additive(mask.bool(), given["hidden_states"].dtype)

    def check_arguments(self, given: dict[str, Any]) -> None:
        mask = given["attention_mask"]
        if mask is None or mask.dim() != 4 or mask.shape[1] != 1:
            got = None if mask is None else tuple(mask.shape)
            raise UsageRuntimeError(f"attention_mask must be (B, 1, L, S), as the model's encoder makes it, got {got}")
        if given.get("query_states") is not None:
            raise UsageRuntimeError("query_states is not supported by this attention: it is self-attention")
        for name in ("relative_pos", "rel_embeddings") if self.relative_attention else ():
            if given.get(name) is None:
                raise UsageRuntimeError(f"{name} must be given, as the model's encoder does, got None")

    def relative(self, given: dict[str, Any], length: int) -> Relative:
        sees = given["attention_mask"].bool().any(3, keepdim=True).expand(-1, 1, length, 1)
        if not self.relative_attention:
            return Relative(sees=sees)
        found: dict[str, Any] = {}
        span = min(length, self.middle) if self.spans_length else self.middle
        x_RD = self.pos_dropout(given["rel_embeddings"])[self.middle - span : self.middle + span]
        position = given["relative_pos"].long()
        while position.dim() < 4:
            position = position.unsqueeze(position.dim() - 2)
        if tuple(position.shape[1:]) != (1, length, length):
            raise UsageRuntimeError(
                f"relative_pos must be (L, S), (B or 1, L, S) or (B or 1, 1, L, S) with L and S {length}, got "
                f"{tuple(given['relative_pos'].shape)}"
            )
        if TO_KEYS in self.kinds:
            found |= {"keys": self.projected("k", x_RD), "key_index": (position + span).clamp(0, 2 * span - 1)}
        if TO_QUERIES in self.kinds:
            index = (span - position.transpose(2, 3)).clamp(0, 2 * span - 1)
            found |= {"queries": self.projected("q", x_RD), "query_index": index}
        return Relative(**found, sees=sees)


class ConformerAttention(RelativeAttention):
    """Wav2Vec2-conformer's and Wav2Vec2-BERT's: P of relative_position_embeddings (1, 2 L - 1, D), with u and v, or of
    an embedding of distances, or no relative positions.
    """

    distance_embedding: nn.Embedding
    left_max_position_embeddings: int
    right_max_position_embeddings: int

    def mask_of(self, given: dict[str, Any], length: int, keys: int, kept: int = 0) -> Tensor | None:
        mask = super().mask_of(given, length, keys, kept)
        if mask is None or mask.dtype != torch.bool:
            return mask
        return additive(mask, given["hidden_states"].dtype)  # as the model adds it

    def check_arguments(self, given: dict[str, Any]) -> None:
        super().check_arguments(given)
        if self.pos_bias_u is not None and given.get("relative_position_embeddings") is None:
            raise UsageRuntimeError("relative_position_embeddings must be given, as the model's encoder does, got None")

    def relative(self, given: dict[str, Any], length: int) -> Relative:
        at = torch.arange(length, device=given["hidden_states"].device)
        distance = (at - at.unsqueeze(1)).view(1, 1, length, length)
        if self.pos_bias_u is not None and self.pos_bias_v is not None:
            u, v = used_apart([self.pos_bias_u, self.pos_bias_v], self.place, self.reduce_dtype)
            positions_1RD = given["relative_position_embeddings"]
            if tuple(positions_1RD.shape[:2]) != (1, 2 * length - 1):
                raise UsageRuntimeError(
                    f"relative_position_embeddings must be (1, {2 * length - 1}, D) for {length} rows, got "
                    f"{tuple(positions_1RD.shape)}"
                )
            keys = self.projected("k", positions_1RD[0])
            return Relative(keys, distance + (length - 1), biases=(u, v))
        if DISTANCES in self._modules:
            left, right = self.left_max_position_embeddings, self.right_max_position_embeddings
            (table_Rd,) = used_apart([self.distance_embedding.weight], self.place, self.reduce_dtype)
            return Relative(table_Rd.t().expand(self.num_heads, -1, -1), distance.clamp(-left, right) + left)
        return Relative()


class GatedBiasAttention(ProjectedAttention):
    """WavLM's: a bias by distance times a gate of each row and head.

    attention_mask (B, S), 1 where a key is seen. position_bias: that of the first layer, (h, L, S) or (B h, L, S), or
    None: made here. It is given behind the weights, for other layers, as (h, L, S).
    """

    gru_rel_pos_const: Tensor

    def __init__(self, original: nn.Module, *args: Any, **options: Any) -> None:
        super().__init__(original, *args, **options)
        self.gives_bias = False  # between the output and the weights
        if self.scheme == "independent":
            raise GridError("scheme 'independent' takes no bias of the scores of whole heads")
        self.take_settings(original)  # of which compute_bias, which is this class's too, makes it
        self.register_parameter(GATE_RATE, getattr(original, GATE_RATE))
        for name in (forms.BIAS_GATE, BIAS_TABLE):
            if hasattr(original, name):
                self.add_module(name, getattr(original, name))

    def mask_of(self, given: dict[str, Any], length: int, keys: int, kept: int = 0) -> Tensor | None:
        mask: Tensor | None = given["attention_mask"]
        return None if mask is None else (mask == 1).view(-1, 1, 1, mask.shape[-1])

    def check_arguments(self, given: dict[str, Any]) -> None:
        bias = given.get("position_bias")
        if bias is None and BIAS_TABLE not in self._modules:
            raise UsageRuntimeError("position_bias must be given, as the model's first layer makes it, got None")
        if bias is not None and (bias.dim() != 3 or bias.shape[0] % self.num_heads):
            raise UsageRuntimeError(f"position_bias must be (h, L, S) or (B h, L, S), got {tuple(bias.shape)}")

    def attended(
        self, given: dict[str, Any], states: Tensor, wholes: list[Tensor], *args: Any, **options: Any
    ) -> Attended:
        length = wholes[0].shape[1]
        if given.get("position_bias") is None:
            given["position_bias"] = self.compute_bias(length, length)
        x_BLhd = states.unflatten(2, (self.num_heads, -1))
        gates = self.whole_rows(self.of_rows(forms.BIAS_GATE, x_BLhd).flatten(2), wholes[0])
        first, second = gates.unflatten(2, (self.num_heads, 2, 4)).sum(4).sigmoid().unbind(3)
        given["gate"] = first * (second * self.gru_rel_pos_const.view(-1) - 1.0) + 2.0
        return super().attended(given, states, wholes, *args, **options)

    def between_of(self, given: dict[str, Any], first: int, length: int, then: Any) -> dict[str, Any]:
        h, bias = self.num_heads, given["position_bias"]
        bias_BLhS = bias.view(-1, h, *bias.shape[1:]).transpose(1, 2)
        rows = used_apart([given["gate"], bias_BLhS], self.place, self.reduce_dtype)

        def between(q: Tensor, k: Tensor, v: Tensor, aside: Aside) -> tuple[Tensor, ...]:
            gate, bias = (own_heads(x.squeeze(1), self.place, 2, q.shape[1]).transpose(1, 2) for x in aside.q_rows)
            return q, k, v, gate.unsqueeze(3) * bias

        return {"rows": [x.unsqueeze(1) for x in rows], "between": between}

    def attended_inputs(self, *args: Any, **options: Any) -> Attended:
        given = args[1]
        y_BLD, weights = super().attended_inputs(*args, **options)
        return (
            y_BLD,
            None if weights is None else weights.mean(1, keepdim=True).expand_as(weights),
            given["position_bias"],
        )


def disentangled_like(original: nn.Module, *args: Any, **options: Any) -> DisentangledAttention:
    """A DisentangledAttention of the original's class too."""
    return class_like(DisentangledAttention, type(original))(original, *args, **options)


def conformer_like(original: nn.Module, *args: Any, **options: Any) -> ConformerAttention:
    """A ConformerAttention of the original's class too."""
    return class_like(ConformerAttention, type(original))(original, *args, **options)


def gated_bias_like(original: nn.Module, *args: Any, **options: Any) -> GatedBiasAttention:
    """A GatedBiasAttention of the original's class too."""
    return class_like(GatedBiasAttention, type(original))(original, *args, **options)


def paths_of(module: nn.Module, parent: nn.Module | None) -> dict[str, str] | None:
    """Where its projections are, by letter; None for a module that has not all of them."""
    return next((one for one in PATHS if all(is_linear(forms.at(module, parent, p)) for p in one.values())), None)


def is_disentangled(module: nn.Module, parent: nn.Module | None) -> bool:
    """Whether a module is attention of DeBERTa's kind."""
    known = hasattr(module, "pos_att_type") and hasattr(module, "relative_attention")
    return known and paths_of(module, parent) is not None


def is_conformer(module: nn.Module, parent: nn.Module | None) -> bool:
    """Whether a module is attention of Wav2Vec2's conformers."""
    return hasattr(module, "position_embeddings_type") and paths_of(module, parent) is not None


def is_gated_bias(module: nn.Module, parent: nn.Module | None) -> bool:
    """Whether a module is attention of WavLM's kind."""
    return hasattr(module, forms.BIAS_GATE) and forms.paths_of(module, parent) is not None


def conformer_problem(module: nn.Module) -> str | None:
    """What the conformers' kind has not, or None."""
    rotates: bool = module.position_embeddings_type == "rotary"
    return "it rotates its input before the projections" if rotates else None


def _random_states(projection: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two sequences of 5 rows, and which keys a row sees: the second sequence has 3."""
    keep_BS = torch.ones(2, 5, dtype=torch.bool)
    keep_BS[1, 3:] = False
    return torch.randn(2, 5, features_of(projection)[0], dtype=dtype), keep_BS


def disentangled_inputs(original: Any, dtype: torch.dtype) -> list[tuple[Args, Kwargs]]:
    """A small batch, of which some rows see no key, with any relative positions, some too far."""
    x_BLD, keep_BS = _random_states(forms.first_of(original, ("query_proj", "in_proj")), dtype)
    given: dict[str, Any] = {"attention_mask": keep_BS.view(2, 1, 1, 5) & keep_BS.view(2, 1, 5, 1)}
    if original.relative_attention:
        most = getattr(original, "pos_ebd_size", original.max_relative_positions)
        given["relative_pos"] = torch.randint(-most - 1, most + 2, (1, 5, 5))
        given["rel_embeddings"] = torch.randn(2 * most, x_BLD.shape[2], dtype=dtype)
    return [((x_BLD,), given)]


def conformer_inputs(original: Any, dtype: torch.dtype) -> list[tuple[Args, Kwargs]]:
    """A small batch with a mask and without."""
    x_BLD, keep_BS = _random_states(original.linear_q, dtype)
    given = {"relative_position_embeddings": torch.randn(1, 9, x_BLD.shape[2], dtype=dtype)}
    return [
        ((x_BLD,), given | {"attention_mask": mask})
        for mask in (mask_for(original, keep_BS.view(2, 1, 1, 5), dtype), None)
    ]


def gated_bias_inputs(original: Any, dtype: torch.dtype) -> list[tuple[Args, Kwargs]]:
    """A small batch with a mask and without; with another layer's bias, of all sequences or each, and its own."""
    x_BLD, keep_BS = _random_states(original.q_proj, dtype)
    biases: list[Tensor | None] = [torch.randn(2 * original.num_heads, 5, 5, dtype=dtype)]
    biases += [None] if hasattr(original, BIAS_TABLE) else []
    return [
        ((x_BLD,), {"attention_mask": mask, "position_bias": bias})
        for mask in (keep_BS.long(), None)
        for bias in biases
    ]
