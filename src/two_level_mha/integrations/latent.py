"""transformers' multi-head latent attention: DeepSeek-V2 and V3, GLM-4-MoE-lite, MiniCPM3, Youtu, Kimi Linear and kin.

Letters: as in layer.py, and R the width of the latent of keys and values, N and T the widths of what is not rotated of
a head of q and k, and of what is, V that of a head of v.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from two_level_mha.activations import keep_part, used_apart
from two_level_mha.blocks import SHARDED_DIMS, dealt, filled
from two_level_mha.cache_layer import NO_CACHE, CachedCall, CacheLayer
from two_level_mha.class_like import class_like
from two_level_mha.errors import UsageRuntimeError
from two_level_mha.integrations import forms
from two_level_mha.integrations.decoder import DecoderAttention
from two_level_mha.integrations.latent_cache import attended_latents, own_latents
from two_level_mha.integrations.projected import Attended
from two_level_mha.layer import Aside
from two_level_mha.mesh import Grid, Place, mesh_of, place_on
from two_level_mha.stock import StockTensor, linear_names


class LatentAttention(DecoderAttention):
    """A DecoderAttention whose keys and values are projected from a latent (B, L, R), and perhaps its queries from
    another; linears and norms before them are children that every rank has whole.

    Parameters, logical shapes: q_weight (h, N + T, D or q's latent), k_weight (h, N, R), v_weight (h, V, R), out_weight
    (D, h, V). The pass takes heads of one width: this rank's slices of each are filled up with zeros for a call. One
    rotary key (B, L, T) is of all heads, and goes with the tokens.
    rotary: the function beside the original's class that rotates, or None.
    A cache by position keeps latents and rotary keys, over all ranks in a row; one by batch heads' keys and values.
    """

    def __init__(
        self,
        original: nn.Module,
        projections: dict[str, nn.Module],
        paths: dict[str, str],
        mesh: DeviceMesh | None,
        *,
        rotary: str | None,
        **options: Any,
    ) -> None:
        self.slices = 1 if mesh is None else mesh.shape[1]
        self.row = place_on(mesh_of(mesh, lambda grid: Grid(1, grid.size)))
        self.nope, self.rope, _, self.rank = (getattr(original, name) for name in forms.LATENT_DIMS)
        super().__init__(original, projections, paths, mesh, **options)
        self.filled_up = tuple(name for name, (_, dim) in SHARDED_DIMS.items() if dim is not None)
        self.rotary = None if rotary is None else getattr(sys.modules[type(original).__module__], rotary)
        self.complex_angles = rotary == forms.ROTARIES[-1]
        self.query_latent = forms.LATENT_QUERY if paths["q"] == forms.LATENT_PATHS["q"][0] else None
        self.latent_scales = {}
        for name in (forms.LATENT, self.query_latent) if self.query_latent else (forms.LATENT,):
            self.latent_scales[name] = forms.first_of(original, forms.LATENT_SCALES[name])
            for child in (name, forms.LATENT_NORMS[name]):
                self.add_module(child, getattr(original, child))
        for child in (forms.ROTARY_KEY_NORM, forms.INDEXER):
            if getattr(original, child, None) is not None:
                self.add_module(child, getattr(original, child))
        self.chooses = forms.INDEXER in self._modules or forms.CHOSEN in self.argument_names

    def sizes_of(self, original: nn.Module, projections: dict[str, nn.Module]) -> tuple[int, int, int, bool]:
        h, k, widest = forms.latent_sizes(original, projections)
        return h, k, self.slices * -(-widest // self.slices), False

    def store_projections(
        self, original: nn.Module, projections: dict[str, nn.Module], paths: dict[str, str], packing: str
    ) -> None:
        names = linear_names("q", paths["q"], projections["q"], self.nope + self.rope)
        names |= linear_names("out", paths["o"], projections["o"], self.v_dim)
        h = self.num_heads
        for part, p in projections["kv"].named_parameters():
            for letter, width, start in (("k", self.nope, 0), ("v", self.v_dim, self.nope)):
                own = (h, width, *p.shape[1:])
                key = f"{paths['kv']}.{part}"
                names[f"{letter}_{part}"] = StockTensor(key, tuple(p.shape), own, start=start, groups=h)
        forms.store_projections(self, projections, paths, names)

    def use_positions(self, original: nn.Module, rotates: bool, norms_last: bool) -> None:
        self.temperature, self.tuning = forms.temperature_of(original), None
        self.register_buffer(forms.ANGLES, None, persistent=False)

    def check_arguments(self, given: dict[str, Any]) -> None:
        super().check_arguments(given)
        if self.chooses and given["attention_mask"] is None:
            raise UsageRuntimeError("attention with an indexer chooses among the keys of a mask: give attention_mask")
        if self.chooses and forms.INDEXER not in self._modules and given.get(forms.CHOSEN) is None:
            raise UsageRuntimeError(f"attention without an indexer of its own attends to {forms.CHOSEN}: give it")

    def cache_place(self, layout: str) -> Place:
        return self.row if layout == "position" else self.place

    def attended(  # type: ignore[override]  # with all that DecoderAttention gives
        self,
        given: dict[str, Any],
        states: Tensor,
        wholes: list[Tensor],
        mask: Tensor | None,
        causal: int | None,
        *,
        cache: CacheLayer | None,
        call: CachedCall,
        softcap: float,
    ) -> Attended:
        rows = self.rows_of(given, call.position, wholes[0].shape[1]) or []
        found = self.latents(given, wholes[0], rows)
        chosen: tuple[Tensor, ...] = ()
        if self.chooses:
            assert mask is not None  # check_arguments
            chosen = (self.chosen_keys(given, found[0], wholes[0], mask),)
            mask = with_chosen(mask, *chosen)
        output = self._attended(given, found, rows, wholes, mask, causal, cache, call, softcap)
        return (*output, *chosen) if forms.CHOSEN in self.argument_names else output

    def _attended(
        self,
        given: dict[str, Any],
        latents: tuple[Tensor, Tensor, Tensor],
        rows: list[Tensor],
        wholes: list[Tensor],
        mask: Tensor | None,
        causal: int | None,
        cache: CacheLayer | None,
        call: CachedCall,
        softcap: float,
    ) -> Attended:
        whole, (query, latent, k_B1LT) = wholes[0], latents
        if cache is not None and cache.layout == "position":
            (all_BLR,) = used_apart([self.whole_rows(latent, whole)], self.place, self.reduce_dtype)
            new = *own_latents(all_BLR.unsqueeze(1), k_B1LT, cache, call.position), whole.shape[1]
            if call.position:
                y_BLD = attended_latents(
                    self,
                    self.whole_rows(query, whole),
                    cache,
                    call,
                    rows,
                    new=new,
                    mask=mask,
                    causal=causal,
                    softcap=softcap,
                    gate=self.gate_of_heads(given["hidden_states"], whole),
                )
                if self.splits:
                    y_BLD = keep_part(y_BLD, self.activations, self.place, True)
                return self.finished(y_BLD, given), None
            cache.append(*new, for_gradients=query.requires_grad)
            cache, call = None, NO_CACHE
        options: dict[str, Any] = {"rows": [*rows, k_B1LT], "softcap": softcap, "cache": cache, "call": call}
        return self.attended_inputs((query, latent, latent), given, wholes, mask, causal, **options)

    @torch.no_grad()
    def chosen_keys(self, given: dict[str, Any], query: Tensor, whole: Tensor, mask: Tensor) -> Tensor:
        """The keys (B, L, any number) that the indexer chooses for a row, which every rank runs, and keeps its keys,
        whole; or those of an earlier layer.
        """
        if forms.INDEXER not in self._modules:
            earlier: Tensor = given[forms.CHOSEN]
            return earlier
        x_BLD, q_BLR = (self.whole_rows(x, whole) for x in (given["hidden_states"], query))
        others = given["position_embeddings"], mask[:, 0], given.get("position_ids")
        indexer = self.get_submodule(forms.INDEXER)
        chosen: Tensor = indexer(x_BLD, q_BLR, *others, past_key_values=self.cache_of(given))
        return chosen

    def latents(self, given: dict[str, Any], whole: Tensor, rows: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """What queries, and what keys and values, are projected from, of this rank's rows; the rotated key (B, 1, L, T)
        of all rows, with the sum over the ranks as its gradient. rows: of `rows_of`.
        """
        x_BLD = given["hidden_states"]
        query = x_BLD
        if self.query_latent is not None:
            query = self._normed_latent(self.query_latent, self.of_rows(self.query_latent, x_BLD))
        latent, key = self.of_rows(forms.LATENT, x_BLD).split([self.rank, self.rope], -1)
        if forms.ROTARY_KEY_NORM in self._modules:
            key = self.of_rows(forms.ROTARY_KEY_NORM, key)
        (key,) = used_apart([self.whole_rows(key, whole)], self.place, self.reduce_dtype)
        k_B1LT = self.turned(key.unsqueeze(1), rows)
        return query, self._normed_latent(forms.LATENT, latent), k_B1LT

    def _normed_latent(self, name: str, x_BLR: Tensor) -> Tensor:
        normed, scale = self.of_rows(forms.LATENT_NORMS[name], x_BLR), self.latent_scales[name]
        return normed if scale is None else normed * scale

    def turned(self, x_BHLT: Tensor, rows: list[Tensor]) -> Tensor:
        """What is rotated of heads, by the angles that `rows_of` begins with."""
        if self.rotary is None:
            return x_BHLT
        angles = [x.squeeze(1) for x in rows[:2]]
        if self.complex_angles:
            angles = [torch.complex(*angles)]
        turned: Tensor = self.rotary(x_BHLT, x_BHLT[:, :1], *angles)[0]  # of q and k
        return turned

    def between_of(
        self, given: dict[str, Any], first: int, length: int, then: Callable[..., Any] | None
    ) -> dict[str, Any]:
        def between(q: Tensor, k: Tensor, v: Tensor, aside: Aside) -> tuple[Tensor, Tensor, Tensor]:
            *_, key_B1ST = aside.k_rows
            nope, rope = self.gathered(q, self.nope + self.rope).split([self.nope, self.rope], -1)
            q = torch.cat([nope, self.turned(rope, aside.q_rows)], -1)
            if self.temperature is not None:
                q = q * aside.q_rows[-2].to(q.dtype)
            k = torch.cat([self.gathered(k, self.nope), key_B1ST.to(k.dtype).expand(*k.shape[:3], -1)], -1)
            return filled(q, 3, self.head_dim), filled(k, 3, self.head_dim), v

        return {"between": between}

    def gathered(self, x: Tensor, width: int) -> Tensor:
        """Heads of `width` of what was moved: slices that were filled up."""
        parts = x.unflatten(3, (self.slices, -1)).unbind(3)
        own = [part[..., : dealt(width, self.slices, j)[1]] for j, part in enumerate(parts)]
        return own[0] if len(own) == 1 else torch.cat(own, -1)

    def _blocks(self) -> list[Tensor | None]:
        even = all(width % self.slices == 0 for width in (self.nope + self.rope, self.nope))
        return super()._blocks() if even else []


def with_chosen(mask: Tensor, chosen_BLk: Tensor) -> Tensor:
    """A mask (B, 1, L, S), bool or additive, which shows those of its keys alone."""
    hidden_BLS = mask.new_ones(*chosen_BLk.shape[:2], mask.shape[3], dtype=torch.bool)
    hidden_B1LS = hidden_BLS.scatter(2, chosen_BLk.long(), False).unsqueeze(1)
    if mask.dtype == torch.bool:
        return mask & ~hidden_B1LS
    return mask.masked_fill(hidden_B1LS, torch.finfo(mask.dtype).min)


def latent_like(original: nn.Module, *args: Any, **options: Any) -> LatentAttention:
    """A LatentAttention of the original's class too."""
    return class_like(LatentAttention, type(original))(original, *args, **options)
