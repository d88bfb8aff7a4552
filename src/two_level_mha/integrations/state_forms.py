"""How layers that keep a state are cut: delta rules, state spaces, lightning attention, short convolutions.

Every column of a state, a value index, has its own recurrence. So heads are dealt to the head groups, and what a head
gives, or the heads that share one key, to the slices. A form says of one class which dim is which, by letters: g groups
of heads with keys of their own, which head groups share, or channels where there are no heads; r or h heads of one of
them; v or p what a head gives; k or s what its keys have. "gk,gk,grv" is a dim of three parts, each of dims by letters;
"g:k,k,rv,rv" is one of such parts for every g, and "gp:," two numbers for every p of every g.
Attention to no more than a call's own rows, such as that of images, is a layer of this kind too: heads, and no states.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from two_level_mha.blocks import dealt
from two_level_mha.errors import GridError
from two_level_mha.mesh import Grid
from two_level_mha.stock import StockTensor

SLICES, HEADS, ALL = range(3)  # axes along which ranks do something together, in the order of Place.groups


class Form(NamedTuple):
    """One class. What it does not name, a rank has whole."""

    sizes: dict[str, str]  # attribute -> what it counts; the first with a new letter tells that letter's size
    rows: dict[str, str]  # linear -> what it gives
    out: tuple[str, str]  # the linear whose output is summed over the ranks, what it takes
    vectors: dict[str, tuple[str, int]]  # parameters and buffers -> what lies along which dim
    slices: tuple[str, ...] = ()  # letters of which slices can have parts, the first that fits is taken
    norm: tuple[str, str] | None = None  # where it is, and over what it takes squares together
    inner: tuple[str, str] | None = None  # a linear inside, of the same kind as out
    gives_pair: bool = False  # a tuple, whose first is its output
    gives_weights: bool = False  # attention weights behind it: None here, since a rank has some heads' alone
    inner_dims: dict[str, tuple[str, int]] = {}  # of vectors what lies along a second dim
    # An argument, a list of the states of all layers, (.., layers), which it gives behind its output: which entries are
    # of such layers, and what lies along which dim.
    states: tuple[str, tuple[int, ...], str, int] | None = None
    products: tuple[str, ...] = ()  # vectors that are matrices: slices' products with them are summed
    shape: tuple[int, ...] = (6,)  # of a sequence's rows in a trial

    @property
    def columns(self) -> list[tuple[str, str]]:
        """Those linears that are cut by what they take."""
        return [self.out] if self.inner is None else [self.inner, self.out]


_DELTA = {
    "num_k_heads": "g", "num_v_heads": "gr", "head_k_dim": "k", "head_v_dim": "v", "key_dim": "gk", "value_dim": "grv",
    "conv_dim": "gk,gk,grv",
}  # fmt: skip
_DELTA_VECTORS = {"conv1d.weight": ("gk,gk,grv", 0), "A_log": ("gr", 0), "dt_bias": ("gr", 0), "norm.weight": ("v", 0)}

_QWEN_NEXT = Form(
    _DELTA,
    {"in_proj_qkvz": "g:k,k,rv,rv", "in_proj_ba": "g:r,r"},
    ("out_proj", "grv"),
    _DELTA_VECTORS,
    ("r", "v"),
    ("norm", "v"),
)
_QWEN = _QWEN_NEXT._replace(rows={"in_proj_qkv": "gk,gk,grv", "in_proj_z": "grv", "in_proj_b": "gr", "in_proj_a": "gr"})
_OLMO = Form(
    _DELTA,
    {"q_proj": "gk", "k_proj": "gk", "v_proj": "grv", "g_proj": "grv", "a_proj": "gr", "b_proj": "gr"},
    ("o_proj", "grv"),
    _DELTA_VECTORS | {"o_norm.weight": ("v", 0)},
    ("r", "v"),
    ("o_norm", "v"),
)

# Kimi's delta rule: keys, values and decays of one width, which the module's code takes for the same number.
_KIMI = Form(
    {"num_heads": "g", "head_dim": "v", "qkv_dim": "gv", "forget_gate.num_heads": "g"},
    {"q_proj": "gv", "k_proj": "gv", "v_proj": "gv", "b_proj": "g", "g_b_proj": "gv", "forget_gate.f_b_proj": "gv"},
    ("o_proj", "gv"),
    {"conv1d.weight": ("gv,gv,gv", 0), "forget_gate.A_log": ("g", 2), "forget_gate.dt_bias": ("gv", 0)},
)
_BAILING = _KIMI._replace(
    rows={"q_proj": "gv", "k_proj": "gv", "v_proj": "gv", "b_proj": "g", "g_proj": "gv", "forget_gate.f_proj": "gv"},
    vectors=_KIMI.vectors | {"forget_gate.A_log": ("g", 0)},
)

_MAMBA_2 = Form(
    {
        "n_groups": "g", "num_heads": "gh", "head_dim": "p", "ssm_state_size": "s", "intermediate_size": "ghp",
        "conv_dim": "ghp,gs,gs", "norm.n_groups": "g",
    },
    {"in_proj": "ghp,ghp,gs,gs,gh"},
    ("out_proj", "ghp"),
    {
        "conv1d.weight": ("ghp,gs,gs", 0), "conv1d.bias": ("ghp,gs,gs", 0), "A_log": ("gh", 0), "D": ("gh", 0),
        "dt_bias": ("gh", 0), "norm.weight": ("ghp", 0), "mup_vector": ("ghp,ghp,gs,gs,gh", 2),
    },
    ("h", "p"),
    ("norm", "hp"),
)  # fmt: skip

# Channels alone are cut, and g counts these.
_MAMBA = Form(
    {"intermediate_size": "g"},
    {"in_proj": "g,g", "dt_proj": "g"},
    ("out_proj", "g"),
    {"conv1d.weight": ("g", 0), "conv1d.bias": ("g", 0), "A_log": ("g", 0), "D": ("g", 0)},
    inner=("x_proj", "g"),
)
_SHORT = Form(
    {"conv.in_channels": "g"},
    {"in_proj": "g,g,g"},
    ("out_proj", "g"),
    {"conv.weight": ("g", 0), "conv.bias": ("g", 0)},
)

_LIGHTNING = Form(
    {"num_attention_heads": "g", "head_dim": "v"},
    {"qkv_proj": "g:v,v,v", "output_gate": "gv"},
    ("out_proj", "gv"),
    {
        "norm.weight": ("gv", 0), "slope_rate": ("g", 0), "query_decay": ("g", 0), "key_decay": ("g", 0),
        "diagonal_decay": ("g", 1),
    },
    norm=("norm", "gv"),
    gives_pair=True,
)  # fmt: skip

_ZAMBA = Form(
    {"n_mamba_heads": "g", "mamba_head_dim": "p", "intermediate_size": "gp"},
    {"in_proj": "gp:,"},
    ("out_proj", "gp"),
    {
        "conv1d.weight": ("gp", 0), "conv1d.bias": ("gp", 0), "x_proj_weight": ("g", 0), "dt_proj_weight": ("g", 0),
        "dt_proj_bias": ("g", 0), "A_log": ("g", 0), "D": ("g", 0),
    },
    ("p",),
    inner_dims={
        "x_proj_weight": ("p", 2), "dt_proj_weight": ("p", 1), "dt_proj_bias": ("p", 1), "A_log": ("p", 1),
        "D": ("p", 1),
    },
    products=("x_proj_weight",),
)  # fmt: skip

# Its gates are linears of whole heads.
_RG_LRU = Form(
    {
        "rg_lru.num_attention_heads": "g", "rg_lru.block_width": "v", "lru_width": "gv", "hidden_size": "gv",
        "conv_1d.groups": "gv",
    },
    {"linear_y": "gv", "linear_x": "gv"},
    ("linear_out", "gv"),
    {
        "conv_1d.weight": ("gv", 0), "conv_1d.bias": ("gv", 0), "rg_lru.recurrent_param": ("gv", 0),
        "rg_lru.input_gate_weight": ("g", 0), "rg_lru.input_gate_bias": ("g", 0),
        "rg_lru.recurrent_gate_weight": ("g", 0), "rg_lru.recurrent_gate_bias": ("g", 0),
    },
    gives_pair=True,
)  # fmt: skip

# Channels; the model keeps the states of all layers in one list of tensors (B, channels, layers).
_RWKV = Form(
    {"attention_hidden_size": "g"},
    {"key": "g", "value": "g", "receptance": "g"},
    ("output", "g"),
    {"time_decay": ("g", 0), "time_first": ("g", 0)},
    gives_pair=True,
    states=("state", (2, 3, 4), "g", 1),
)

# Of images: q is also multiplied with tables of distances, which all heads share.
_IMAGE = Form(
    {"num_attention_heads": "g", "proj.in_features": "gv"},
    {"qkv": "gv,gv,gv"},
    ("proj", "gv"),
    {},
    gives_pair=True,
    gives_weights=True,
    shape=(2, 3),
)

FORMS = {
    "Qwen3NextGatedDeltaNet": _QWEN_NEXT,
    "Qwen3_5GatedDeltaNet": _QWEN,
    "Qwen3_5MoeGatedDeltaNet": _QWEN,
    "Qwen4ExpTextGatedDeltaNet": _QWEN,
    "OlmoHybridGatedDeltaNet": _OLMO,
    "KimiLinearDeltaAttention": _KIMI,
    "BailingHybridDeltaAttention": _BAILING,
    "Mamba2Mixer": _MAMBA_2,
    "BambaMixer": _MAMBA_2,
    "NemotronHMamba2Mixer": _MAMBA_2,
    "FalconH1Mixer": _MAMBA_2,
    "Zamba2MambaMixer": _MAMBA_2,
    "GraniteMoeHybridMambaLayer": _MAMBA_2,
    "MambaMixer": _MAMBA,
    "FalconMambaMixer": _MAMBA,
    "JambaMambaMixer": _MAMBA,
    "Lfm2ShortConv": _SHORT,
    "Lfm2MoeShortConv": _SHORT,
    "Lfm3ShortConv": _SHORT,
    "MiniMaxLightningAttention": _LIGHTNING,
    "ZambaMambaMixer": _ZAMBA,
    "RecurrentGemmaRecurrentBlock": _RG_LRU,
    "GotOcr2VisionAttention": _IMAGE,
    "RwkvSelfAttention": _RWKV,
}


def has_form(module: nn.Module) -> bool:
    return type(module).__name__ in FORMS


def form_of(module: nn.Module) -> Form:
    return FORMS[type(module).__name__]


def letters_of(text: str) -> tuple[str, list[str]]:
    """What is outside of all parts, and the parts."""
    outer, _, parts = text.rpartition(":")
    return outer, parts.split(",")


class Cut:
    """What one rank of a grid has of a module: by letter the whole size, and of those that are cut first and count."""

    def __init__(self, module: nn.Module, form: Form, grid: Grid, head_group: int = 0, slice_: int = 0) -> None:
        """grid: any of as many ranks; `self.grid` is the one by which the module is cut.

        Raises GridError where the ranks of a slice group cannot share the module.
        """
        self.form, self.whole = form, _sizes_of(module, form)
        self.grid = grid.for_whole_heads(self.whole["g"])
        self.sliced = self._sliced()
        self.own = {"g": dealt(self.whole["g"], self.grid.head_groups, head_group)}
        if self.sliced is not None:
            self.own[self.sliced] = dealt(self.whole[self.sliced], self.grid.slices, slice_)
        self.counts = self.whole | {letter: count for letter, (_, count) in self.own.items()}

    def _sliced(self) -> str | None:
        """The letter of which slices have parts; None where there is one slice."""
        m, sizes = self.grid.slices, self.whole
        if m == 1:
            return None
        for letter in self.form.slices:
            if sizes[letter] % m == 0:
                return letter
        last = self.form.slices[-1] if self.form.slices else None
        if last is None or dealt(sizes[last], m, m - 1)[1] <= 0:
            raise GridError(f"its {sizes['g']} groups of heads cannot be shared by {self.grid.size} ranks")
        return last

    def size(self, text: str, counts: dict[str, int] | None = None) -> int:
        """Of a dim, of this rank."""
        counts = self.counts if counts is None else counts
        outer, parts = letters_of(text)
        return math.prod(counts[x] for x in outer) * sum(math.prod(counts[x] for x in part) for part in parts)

    def groups(self, text: str) -> int:
        """How often this rank has each part of a dim."""
        return math.prod(self.counts[letter] for letter in letters_of(text)[0])

    def take(self, x: Tensor, text: str, dim: int) -> Tensor:
        """This rank's of a tensor whose dim `dim` is whole."""
        outer, parts = letters_of(text)
        if not any([letter in self.own for letter in text]):
            return x
        last = dim + len(outer)
        x = x.unflatten(dim, [*[self.whole[letter] for letter in outer], -1])
        widths = [math.prod([self.whole[letter] for letter in part]) for part in parts]
        pieces = []
        for part, piece in zip(parts, x.split(widths, last), strict=True):
            inner = [self.whole[letter] for letter in part] or [1]
            piece = piece.unflatten(last, inner)
            for i, letter in enumerate(outer + part):
                piece = piece.narrow(dim + i, *self.own[letter]) if letter in self.own else piece
            pieces.append(piece.flatten(last, last + len(inner) - 1))
        return (torch.cat(pieces, last) if len(pieces) > 1 else pieces[0]).flatten(dim, last)

    def stock(
        self, key: str, shape: tuple[int, ...], text: str, dim: int
    ) -> list[tuple[StockTensor, tuple[int | None, ...]]]:
        """The parts of a tensor as parameters: where each is, and its dims that lie over head and slice axis."""
        outer, parts = letters_of(text)
        groups, start, found = math.prod(self.whole[letter] for letter in outer), 0, []
        for part in parts:
            letters = outer + part
            own = (*shape[:dim], *(self.whole[letter] for letter in letters), *shape[dim + 1 :])
            dims = tuple(dim + letters.index(x) if x and x in letters else None for x in ("g", self.sliced))
            found.append((StockTensor(key, shape, own, dim, start, groups=groups), dims))
            start += math.prod(self.whole[letter] for letter in part)
        return found

    def norm_axis(self) -> int | None:
        """Over which of a place's groups the norm takes squares together; None: each rank does by itself."""
        if self.form.norm is None:
            return None
        letters = self.form.norm[1]
        sliced = self.sliced is not None and self.sliced in letters
        grouped = "g" in letters and self.grid.head_groups > 1
        return ALL if sliced and grouped else SLICES if sliced else HEADS if grouped else None


def _sizes_of(module: nn.Module, form: Form) -> dict[str, int]:
    """By letter. Raises GridError where the module's attributes are not of the form."""
    sizes: dict[str, int] = {}
    for path, text in form.sizes.items():
        value, (outer, parts) = getattr(*owner_of(module, path), None), letters_of(text)
        new = [letter for letter in text if letter.isalpha() and letter not in sizes]
        if value is None and not new:
            continue
        for letter in new:
            known = math.prod(sizes[other] for other in text if other in sizes)
            sizes[letter] = value // known if isinstance(value, int) else 0
        if math.prod(sizes[x] for x in outer) * sum(math.prod(sizes[x] for x in part) for part in parts) != value:
            raise GridError(f"its {path} is {value}, which does not count {text} of sizes {sizes}")
    return sizes


def owner_of(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Of which module something is, and its name there."""
    owner, _, name = path.rpartition(".")
    return module.get_submodule(owner), name
