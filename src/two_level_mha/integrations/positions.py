"""What acts on queries and keys before attention, where d is whole: a model's norms and its rotary function.

Letters: as in layer.py, and r the dims of a head that are rotated.
"""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from two_level_mha.errors import GridError
from two_level_mha.integrations.forms import (
    ANGLES,
    LATENT_DIMS,
    NORMS,
    OWN_ROTARY,
    PACKED,
    QUERY_SCALES,
    ROTATED,
    SINUSOIDS,
    VALUE_NORM,
    VALUE_SCALE,
    parameters_of,
    rotates_itself,
    takes_shared,
    temperature_of,
    tuning_of,
)
from two_level_mha.layer import Aside, GridAttention
from two_level_mha.low_rank import own_heads
from two_level_mha.operators import ops as _ops

PER_HEAD = "norms"  # a norm's list of one for each head
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in float64 models' norms are float32's


class Positioned(GridAttention):
    """Of a split attention: `use_positions` takes over the original's norms and its rotary function.

    A norm's weights are (d,), of every head, or none; (heads, d), or a list of as many norms, one for each head; or
    (heads * d,), of an RMS norm over all heads, whose sums of squares are summed over the ranks that have the others
    of the same rows.
    """

    config: Any  # of the model
    clip: float | None = None  # queries, keys and values are clamped to it, and minus it, behind norms
    rotary: Callable[..., Any] | None

    def use_positions(self, original: nn.Module, rotates: bool, norms_last: bool) -> None:
        self.rotary = _rotary(original) if rotates else None
        self.temperature, self.tuning = temperature_of(original), tuning_of(original)
        self.takes_scales = QUERY_SCALES in parameters_of(original)
        self.rotary_width, self.norms_last = rotary_width(original, self.head_dim), norms_last
        self.register_buffer(ANGLES, getattr(original, ANGLES, None) if rotates else None, persistent=False)
        if rotates and rotates_itself(original):
            self.add_module(OWN_ROTARY, getattr(original, OWN_ROTARY))
        self.value_scale = getattr(original, VALUE_SCALE, None)
        self.norm_names: dict[str, str] = {}  # letter -> child
        for letter, names in NORMS.items():
            name = next((name for name in names if getattr(original, name, None) is not None), None)
            if name is not None:
                self.norm_names[letter] = name
                self.add_module(name, getattr(original, name))
                self._check_norm(letter)
        self.value_eps, self.queries_alone = _value_eps(original), takes_shared(original)
        self.fused = self.fused_form(self.rotary_width)

    def rows_of(self, given: dict[str, Any], first: int, length: int) -> list[Tensor] | None:
        """What goes with the tokens of a call, `length` from position `first` on: cos and sin, then the factors of the
        queries.
        """
        angles, table = given.get("position_embeddings"), self._buffers[ANGLES]
        if table is not None:
            sin, cos = table[given["position_ids"]].to(given["hidden_states"].dtype).chunk(2, -1)
            angles = cos, sin
        if OWN_ROTARY in self._modules:
            angles = getattr(self, OWN_ROTARY)(given["hidden_states"], given["position_ids"])
        if given.get(SINUSOIDS) is not None:
            sin, cos = given[SINUSOIDS].squeeze(1).chunk(2, -1)
            angles = cos, sin
        if isinstance(angles, Tensor):  # complex numbers
            angles = angles.real, angles.imag
        rows: list[Tensor] = []
        if self.rotary is not None and angles is not None:  # a model may leave them out by its config
            rows = [x.reshape(-1, 1, *x.shape[-2:]) for x in angles]
        if self.temperature is not None:
            parameters = self.config.rope_parameters
            names = "llama_4_scaling_beta", "original_max_position_embeddings"
            rows.append(self.temperature(given["position_ids"], *(parameters.get(name) for name in names)))
        if self.tuning is not None:
            scale, floor = self.tuning
            positions = torch.arange(first + 1.0, first + length + 1.0, device=given["hidden_states"].device)
            rows.append((torch.log1p(torch.floor(positions / floor)) * scale + 1.0).view(1, 1, length, 1))
        if given.get(QUERY_SCALES) is not None:
            rows.append(given[QUERY_SCALES])
        return rows or None

    @property
    def scales_queries(self) -> bool:
        return self.temperature is not None or self.tuning is not None or self.takes_scales

    def norms(self) -> list[nn.Module]:
        """Those of queries and of keys that the model has."""
        return [getattr(self, name) for name in self.norm_names.values()]

    def norm_parameters(self) -> list[Tensor] | None:
        """Of all of them, as attend's `shared`."""
        return [p for norm in self.norms() for p in norm.parameters()] or None

    def positioned(self, q_BHLd: Tensor, k_BKSd: Tensor, aside: Aside) -> tuple[Tensor, Tensor]:
        """Queries and keys as attention takes them: normed and rotated. On a GPU by one kernel, where nothing is
        differentiated and the model's own functions are those that it computes.
        """
        one_kernel = self.fused is not None and aside.q_rows and q_BHLd.is_cuda and q_BHLd.dtype in FUSED_DTYPES
        if one_kernel and not (torch.is_grad_enabled() and q_BHLd.requires_grad):
            return self.by_operator(q_BHLd, k_BKSd, aside)
        return self.by_model(q_BHLd, k_BKSd, aside)

    def by_operator(self, q_BHLd: Tensor, k_BKSd: Tensor, aside: Aside) -> tuple[Tensor, Tensor]:
        assert self.fused is not None
        eps, interleaved = self.fused
        return _ops.norm_rotary(q_BHLd, k_BKSd, aside.shared, eps, aside.q_rows, aside.k_rows, interleaved)

    def by_model(self, q_BHLd: Tensor, k_BKSd: Tensor, aside: Aside) -> tuple[Tensor, Tensor]:
        if self.norms_last:
            return self._normed(*self._rotated(self.clipped(q_BHLd), self.clipped(k_BKSd), aside), aside)
        q, k = self._normed(q_BHLd, k_BKSd, aside)
        return self._rotated(self.clipped(q), self.clipped(k), aside)

    def clipped(self, x: Tensor) -> Tensor:
        return x if self.clip is None else x.clamp(-self.clip, self.clip)

    def normed_values(self, v_BKSe: Tensor) -> Tensor:
        """v as attention takes it; this rank has d whole, or its slice."""
        v_BKSe = self.clipped(v_BKSe)
        if self.value_scale is not None:
            v_BKSe = v_BKSe * self.value_scale
        if self.value_eps is None:
            return v_BKSe
        x = v_BKSe if v_BKSe.dtype == torch.float64 else v_BKSe.float()
        squares = x.square().sum(3, keepdim=True)
        if x.shape[3] < self.head_dim:  # each rank uses the sum for its own slice: its gradient is summed too
            ranks, group = self.place.grid.slices, self.place.groups[0]
            squares = _ops.replicated([_ops.all_reduce(squares, ranks, group)], ranks, group)[0]
        return (x * torch.rsqrt(squares / self.head_dim + self.value_eps)).to(v_BKSe.dtype)

    def _rotated(self, q_BHLd: Tensor, k_BKSd: Tensor, aside: Aside) -> tuple[Tensor, Tensor]:
        q, k = q_BHLd, k_BKSd
        if self.rotary is not None and len(aside.q_rows) >= 2:
            q, k = q[..., : self.rotary_width], k[..., : self.rotary_width]
            q = self.rotary(q, q[:, :0], *(x.squeeze(1) for x in aside.q_rows[:2]))[0]
            if not self.queries_alone:
                k = self.rotary(k[:, :0], k, *(x.squeeze(1) for x in aside.k_rows[:2]))[1]
            if self.rotary_width < self.head_dim:
                rest = slice(self.rotary_width, None)
                q, k = torch.cat([q, q_BHLd[..., rest]], -1), torch.cat([k, k_BKSd[..., rest]], -1)
        if self.scales_queries and len(aside.q_rows) % 2:  # beside cos and sin, or alone
            q = q * aside.q_rows[-1].to(q.dtype)
        return q, k

    def _normed(self, q_BHLd: Tensor, k_BKSd: Tensor, aside: Aside) -> tuple[Tensor, Tensor]:
        shared, xs = iter(aside.shared), {"q": q_BHLd, "k": k_BKSd}
        for letter, name in self.norm_names.items():
            norm = getattr(self, name)
            parameters = {own: next(shared) for own, _ in norm.named_parameters()}
            xs[letter] = self._of_heads(xs[letter], letter, norm, parameters)
        return xs["q"], xs["k"]

    def _of_heads(self, x_BHLd: Tensor, letter: str, norm: nn.Module, parameters: dict[str, Tensor]) -> Tensor:
        heads, d = self._heads(letter), self.head_dim
        shape = _weight_shape(norm)
        if (each := getattr(norm, PER_HEAD, None)) is not None:
            weights_hd = torch.stack(list(parameters.values()))
            ones = {"weight": torch.ones_like(weights_hd[0])}
            unweighted: Tensor = torch.func.functional_call(each[0], ones, (x_BHLd,))
            return unweighted * own_heads(weights_hd, self.place, 0, x_BHLd.shape[1]).unsqueeze(1)
        if shape in (None, (d,)):
            normed: Tensor = torch.func.functional_call(norm, parameters, (x_BHLd,))
            return normed
        held = x_BHLd.shape[1]
        parameters = {part: own_heads(p.view(heads, d), self.place, 0, held) for part, p in parameters.items()}
        if shape == (heads, d):
            normed = torch.func.functional_call(norm, parameters, (x_BHLd.transpose(1, 2),))
            return normed.transpose(1, 2)
        x = x_BHLd if x_BHLd.dtype == torch.float64 else x_BHLd.float()
        mean_B1L1 = self._over_heads(x.square().sum((1, 3), keepdim=True), x.shape[1], heads) / (heads * d)
        eps = _eps(norm)
        assert eps is not None
        x = x * torch.rsqrt(mean_B1L1 + eps)
        return (parameters["weight"].unsqueeze(1) * x).to(x_BHLd.dtype)

    def _over_heads(self, x: Tensor, held: int, heads: int) -> Tensor:
        """The sum of what the ranks have of `heads` heads; held: by a rank, which some may hold alike."""
        grid, groups = self.place.grid, self.place.groups
        if grid.size == 1:
            return x
        by_groups = held * grid.head_groups == heads
        ranks, group = (grid.head_groups, groups[1]) if by_groups else (grid.size, groups[2])
        copies = held * ranks // heads
        if ranks > 1:  # each rank uses the sum for its own heads: its gradient is summed too
            x = _ops.replicated([_ops.all_reduce(x, ranks, group)], ranks, group)[0]
        return x / copies if copies > 1 else x

    def _heads(self, letter: str) -> int:
        return self.num_heads if letter == "q" else self.num_kv_heads

    def _check_norm(self, letter: str) -> None:
        """Raises GridError for a norm of another kind."""
        name, heads, d = self.norm_names[letter], self._heads(letter), self.head_dim
        norm = getattr(self, name)
        kinds = [(d,), (heads, d), (heads * d,)]
        for part, p in norm.named_parameters():
            if tuple(p.shape) not in kinds or tuple(p.shape) != _weight_shape(norm):
                raise GridError(
                    f"{name}.{part} has shape {tuple(p.shape)}: only norms of each head, ({d},) or ({heads}, {d}), or "
                    f"over all of them, ({heads * d},), are supported"
                )
        over_all = heads > 1 and _weight_shape(norm) == (heads * d,)
        if over_all and (len(list(norm.parameters())) > 1 or _eps(norm) is None):
            raise GridError(f"{name} is a norm over all heads, and more than an RMS norm: {type(norm).__name__}")

    def fused_form(self, width: int) -> tuple[float, bool] | None:
        """(eps, interleaved) with which norm_rotary does what the model's own functions do; None: with none. width: of
        the rotary embedding. Tried, on random numbers of no generator that others draw from.
        """
        norms = self.norms()
        single = all(len(list(norm.parameters())) == 1 and _weight_shape(norm) == (self.head_dim,) for norm in norms)
        if len(norms) == 1 or not single or self.rotary is None or self.scales_queries or self.clip is not None:
            return None
        draw = torch.Generator(device="cpu").manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw, device="cpu")

        eps = [_eps(norm) for norm in norms] or [0.0]
        if not isinstance(eps[0], float) or not all(isinstance(each, float) and each == eps[0] for each in eps):
            return None
        q, k = random(2, 2, 3, self.head_dim), random(2, 2, 3, self.head_dim)
        angles = [random(2, 1, 3, width) for _ in ("cos", "sin")]
        aside = Aside(angles, angles, [random(self.head_dim) for _ in norms])
        with torch.no_grad():
            for interleaved in (False, True):
                self.fused = (eps[0], interleaved)
                try:
                    pairs = zip(self.by_operator(q, k, aside), self.by_model(q, k, aside), strict=True)
                except (RuntimeError, TypeError, ValueError):  # a function of other arguments
                    continue
                if all(ours.shape == own.shape and torch.allclose(ours, own, 1e-4, 1e-5) for ours, own in pairs):
                    return self.fused
        return None


def _weight_shape(norm: nn.Module) -> tuple[int, ...] | None:
    return next((tuple(p.shape) for p in norm.parameters()), None)


def _eps(norm: nn.Module) -> float | None:
    eps: float | None = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return eps


def _value_eps(original: nn.Module) -> float | None:
    """Of the norm of its values; None: it has none. Raises GridError for another than an RMS norm without weights."""
    norm = getattr(original, VALUE_NORM, None)
    if norm is None:
        return None
    if _eps(norm) is None or any(True for _ in norm.parameters()):
        raise GridError(f"{VALUE_NORM} is more than an RMS norm without weights: {type(norm).__name__}")
    return _eps(norm)


def _rotary(original: nn.Module) -> Callable[..., Any]:
    """The rotary function of the model's own module: of q, k (B, heads, L, r), cos and sin it gives both."""
    module = sys.modules[type(original).__module__]
    if SINUSOIDS in parameters_of(original):  # of both, and sines and cosines (B, 1, L, 2 pairs)
        kind: Any = type(original)
        turn = kind.apply_rotary_position_embeddings
        return lambda q, k, cos, sin: turn(torch.cat([sin, cos], -1).unsqueeze(1), q, k)
    if PACKED in parameters_of(original):  # of both (T, heads, r)
        of_tokens: Callable[..., Any] = module.apply_rotary_pos_emb_vision

        def of_packed(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
            found = of_tokens(*(x.transpose(1, 2).flatten(0, 1) for x in (q, k)), cos.flatten(0, 1), sin.flatten(0, 1))
            return [x.unflatten(0, (q.shape[0], -1)).transpose(1, 2) for x in found]

        return of_packed
    found: Callable[..., Any] | None = getattr(module, "apply_rotary_pos_emb", None)
    if found is None and takes_complex(original):  # of both (B, L, heads, r), neither of them empty
        rotate: Callable[..., Any] = module.apply_rotary_emb

        def of_one(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            x_BLHr = x.transpose(1, 2)
            if not x.numel():
                return x
            y_BLHr: Tensor = rotate(x_BLHr, x_BLHr[:, :, :1], torch.complex(cos, sin))[0]
            return y_BLHr.transpose(1, 2)

        return lambda q, k, cos, sin: [of_one(x, cos, sin) for x in (q, k)]
    if found is None:
        raise GridError(f"{module.__name__} has no apply_rotary_pos_emb, which its attention would be rotated by")
    if list(inspect.signature(found).parameters)[1:3] == ["cos", "sin"]:  # of one of both
        return lambda q, k, cos, sin: [found(x, cos, sin) for x in (q, k)]
    if hasattr(original, ANGLES):  # GPT-J's, of one (B, L, heads, r), sin and cos
        return lambda q, k, cos, sin: [found(x.transpose(1, 2), sin, cos).transpose(1, 2) for x in (q, k)]
    return found


def takes_complex(original: nn.Module) -> bool:
    """Whether its position_embeddings are complex numbers, cos + i sin."""
    found = getattr(sys.modules[type(original).__module__], "apply_rotary_emb", None)
    return found is not None and "freqs_cis" in inspect.signature(found).parameters


def rotary_width(original: nn.Module, head_dim: int) -> int:
    """How many dims of a head are rotated."""
    if isinstance(own := getattr(original, LATENT_DIMS[1], None), int):
        return own
    if hasattr(original, ANGLES):
        angles: Tensor = getattr(original, ANGLES)
        return angles.shape[-1]
    if isinstance(known := getattr(original, ROTATED, None), int):
        return known
    config = getattr(original, "config", None)
    parameters = getattr(config, "rope_parameters", None) or {}
    share = parameters.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    return int(head_dim * share)


def random_angles(original: nn.Module, head_dim: int, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (2, rows, ..) as the model's function takes them: of every dim that is rotated, or of every pair."""
    width = rotary_width(original, head_dim)
    if isinstance(getattr(original, LATENT_DIMS[1], None), int):  # whose functions go by several names
        cos, sin = torch.randn(2, 2, rows, width // 2 if takes_complex(original) else width, dtype=dtype)
        return cos, sin
    x = torch.zeros(2, 1, rows, width, dtype=dtype)
    for angles in (width, width // 2):
        cos, sin = torch.randn(2, 2, rows, angles, dtype=dtype)
        try:
            if _rotary(original)(x, x, cos, sin)[0].shape == x.shape:
                break
        except (RuntimeError, TypeError, ValueError, GridError):  # of other angles; the trial will say what it takes
            continue
    return cos, sin
