"""What is not attention, split over the flattened grid: a transformers model by its own tensor-parallel plan, where it
has one; where no plan goes, MLPs of two linears or three, by torch's tensor-parallel styles.

Of an MLP structure proposes, a probe decides: the split is exact only if what is between the linears leaves columns
apart.
"""

import copy
import inspect
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from two_level_mha.class_like import become
from two_level_mha.errors import GridError
from two_level_mha.integrations.conv import ConvParallel
from two_level_mha.integrations.forms import at, is_known_linear
from two_level_mha.integrations.lora import mark
from two_level_mha.integrations.private import pretrained_models
from two_level_mha.integrations.tp_plan import apply_tp_plan, find_tp_plan
from two_level_mha.low_rank import features_of, is_conv, is_linear
from two_level_mha.mesh import grid_mesh
from two_level_mha.names import Args
from two_level_mha.probe import (
    first_output,
    has_hooks,
    in_eval,
    is_inside,
    named_layers,
    owners_of,
    random_copy,
    settings,
)
from two_level_mha.stock import take_full_tensors
from two_level_mha.stream import DropoutOnColumns
from two_level_mha.vocabulary import Vocabulary, find_vocabularies, split_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Paths of the linears inside the module that is called with (B, L, D): all but the last by columns, that one by rows.
_MLPS = (
    ("gate_proj", "up_proj", "down_proj"),  # StableLM, the tower of Qwen2.5-VL
    ("w1", "w3", "w2"),  # LFM2
    ("linear1", "linear2"),  # nn.TransformerEncoderLayer, nn.TransformerDecoderLayer
    ("intermediate.dense", "output.dense"),  # BERT, RoBERTa
    ("fc1", "fc2"),  # ViT, BART, Whisper
    ("linear_fc1", "linear_fc2"),  # the tower of Qwen3-VL
    ("intermediate_dense", "output_dense"),  # wav2vec2
    ("dense_h_to_4h", "dense_4h_to_h"),  # Bloom
    ("fc_in", "fc_out"),  # GPT-J
    ("c_fc", "c_proj"),  # GPT-Neo
    ("up_proj", "down_proj"),  # MPT
    ("lin1", "lin2"),  # DistilBERT
    ("ffn", "ffn_output"),  # ALBERT
    ("0", "2"),  # CTRL, an nn.Sequential
    ("linear_1", "linear_2"),  # projectors of towers
)

PLAN_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # relative; others 0.1

_Mlps: TypeAlias = dict[str, tuple[nn.Module, tuple[str, ...], tuple[str, ...]]]  # and what is between the linears


@dataclass
class Rest:
    """What can be split besides attention, by name, and why the rest of what looks like it stays unsplit."""

    # transformers model, its rules
    tp_plans: "dict[str, tuple[PreTrainedModel, dict[str, str]]]" = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)  # modules with a rule
    mlps: _Mlps = field(default_factory=dict)
    left_out_mlps: dict[str, str] = field(default_factory=dict)
    vocabularies: list[Vocabulary] = field(default_factory=list)
    untried: dict[str, str] = field(default_factory=dict)  # models that are not run as a whole, and why
    other_ways: dict[str, str] = field(default_factory=dict)  # modules whose code goes another way since they are split

    def splits(self, name: str) -> bool:
        """Whether the parameter of a name will be split."""
        planned = (
            f"{model}.{rule}" if model else rule for model, (_, rules) in self.tp_plans.items() for rule in rules
        )
        mlps = (f"{mlp}.{path}" for mlp, (_, paths, _) in self.mlps.items() for path in paths)
        return is_inside(name, (*planned, *mlps, *self.shared()))

    def shared(self) -> set[str]:
        """Names of the embeddings and heads whose weight will be split."""
        return {name for one in self.vocabularies for name in one.names()}


def find_rest(
    model: nn.Module, ranks: int, replaced: set[str], skips: Callable[[str], bool] = lambda name: False
) -> Rest:
    """What can be split over `ranks`, of a model whose modules called `replaced` are split already or will be; and not
    what `skips` says of by name.

    Runs a copy of one of each kind of MLP, before the model is changed; sends nothing. Raises GridError where a
    transformers model's plan cannot be applied.
    """
    owners = owners_of(model)
    rest = Rest()
    for name, part in pretrained_models(model).items():
        prefix = f"{name}." if name else ""
        inside = {other.removeprefix(prefix) for other in replaced if other.startswith(prefix)}
        inside |= {other for other, _ in part.named_modules() if skips(prefix + other)}
        if (found := find_tp_plan(part, ranks, inside, owners)) is not None:
            rest.tp_plans[name] = (part, found[0])
            rest.left_out |= {prefix + owner: why for owner, why in found[1].items()}
    rules = {f"{name}.{rule}" if name else rule for name, (_, found) in rest.tp_plans.items() for rule in found}
    rest.vocabularies, problems = find_vocabularies(
        model, ranks, owners, lambda name: skips(name) or is_inside(name, {*replaced, *rules})
    )
    shared = rest.shared()
    rest.left_out = {name: why for name, why in (rest.left_out | problems).items() if name not in shared}
    planned = {*rules, *rest.left_out}
    taken = {*replaced, *planned}

    def is_taken(name: str) -> bool:
        """Whether a module is inside what is replaced, or a plan has a word in it."""
        return skips(name) or is_inside(name, taken) or any(is_inside(rule, (name,)) for rule in planned)

    _find_mlps(model, ranks, owners, rest, is_taken)
    return rest


@dataclass
class PlanTrial:
    """One module of each kind that a model's plan splits, and what it gave before for a small input."""

    name: str
    module: nn.Module
    x_BLD: Tensor
    expected: Tensor

    def check(self) -> None:
        """Raises GridError if the split module gives other numbers: the plan is another library's, and may be wrong."""
        try:
            with torch.no_grad(), in_eval(self.module):
                got = first_output(self.module(self.x_BLD))
            off = ((got - self.expected).abs().max() / self.expected.abs().max().clamp(min=1e-30)).item()
            found = None if off <= PLAN_TOLERANCE.get(got.dtype, 0.1) else f"gives numbers that are off by {off:.1e}"
        except Exception as error:  # of any kind: it is another's code
            found = f"dies of {error!r}"
        if found is not None:
            raise GridError(
                f"{self.name} ({type(self.module).__name__}), split by the model's tensor-parallel plan, "
                f"{found}: make the model again, and leave it whole by skip=[{self.name!r}]"
            )


def plan_trials(rest: Rest) -> list[PlanTrial]:
    """Of every kind of module that stands in a layer and is split by a plan in part, if it can be called with hidden
    states and holds weights; before anything is split.
    """
    trials: dict[tuple[object, ...], PlanTrial] = {}
    for model, (part, rules) in rest.tp_plans.items():
        for name, layer in named_layers(part, model):
            for child, module in _parts(layer):
                path = f"{name}.{child}"
                inside = path.removeprefix(f"{model}.") if model else path
                own = tuple(style for rule, style in rules.items() if is_inside(rule, (inside,)))
                if not own or isinstance(module, nn.Linear):  # which alone gives a part, or a part of a sum
                    continue
                kind = (_kind(module), own)
                if kind not in trials and (trial := _plan_trial(path, module, part.config)):
                    trials[kind] = trial
    return list(trials.values())


def _parts(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Children of a layer, by name; of a list, such as LongCat's two MLPs, its entries."""
    for name, child in layer.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{name}.{inner}", module) for inner, module in child.named_children())
        else:
            yield name, child


def _plan_trial(name: str, module: nn.Module, config: "PreTrainedConfig") -> PlanTrial | None:
    held = list(module.parameters())
    width = getattr(config.get_text_config(), "hidden_size", None)
    if width is None or any(p.is_meta or isinstance(p, DTensor) for p in held):
        return None
    draw = torch.Generator(device="cpu").manual_seed(0)
    x_BLD = torch.randn(1, 3, width, generator=draw, device="cpu").to(held[0].device, held[0].dtype)
    try:
        with torch.no_grad(), in_eval(module):
            expected = first_output(module(x_BLD))
    except Exception:  # it is called in another way: nobody knows how
        return None
    return PlanTrial(name, module, x_BLD, expected) if isinstance(expected, Tensor) else None


def split_rest(rest: Rest, mesh: DeviceMesh, taken: Collection[nn.Module] = ()) -> None:
    """Splits what find_rest found, but for the linears `taken`."""
    for model, (part, tp_plan) in rest.tp_plans.items():
        names = {name for name, module in part.named_modules() if module in taken}
        others = {name: style for name, style in tp_plan.items() if names.isdisjoint((name, name.rpartition(".")[0]))}
        changed = apply_tp_plan(part, others, mesh)
        rest.other_ways |= {f"{model}.{name}" if model else name: why for name, why in changed.items()}
        mark(part, others, mesh)
    for vocabulary in rest.vocabularies:
        split_vocabulary(vocabulary, mesh)
    grid = grid_mesh(mesh)
    for module, paths, between in rest.mlps.values():
        _drop_columns(module, paths, between, grid)
        if module.get_submodule(paths[0]) in taken:
            continue
        *columns, rows = paths
        styles = {path: _style(module.get_submodule(path), by_columns=path in columns) for path in paths}
        parallelize_module(module, grid, styles, src_data_rank=None)
        module.get_submodule(rows).register_forward_hook(_writable)
        for path in paths:
            take_full_tensors(module.get_submodule(path))
        mark(module, dict.fromkeys(columns, "colwise") | {rows: "rowwise"}, mesh)


def _writable(module: nn.Module, args: Args, y: Tensor) -> Tensor:
    """What styles give is a view, which autograd lets nobody write to, as Falcon's layers do."""
    return y.clone() if torch.is_grad_enabled() else y


def _style(linear: nn.Module, by_columns: bool) -> ParallelStyle:
    if is_conv(linear):
        return ConvParallel(by_columns)
    return ColwiseParallel() if by_columns else RowwiseParallel()


def _drop_columns(module: nn.Module, paths: tuple[str, ...], between: tuple[str, ...], grid: DeviceMesh) -> None:
    """Makes dropout between the linears of an MLP know its columns; before these are split."""
    width, _ = features_of(module.get_submodule(paths[-1]))
    share = width // grid.size()
    for path in between:
        if isinstance(part := module.get_submodule(path), nn.Dropout):
            become(part, DropoutOnColumns, width=width, first=share * grid.get_local_rank())


def _find_mlps(
    model: nn.Module, ranks: int, owners: dict[int, list[str]], rest: Rest, is_taken: Callable[[str], bool]
) -> None:
    """Adds the MLPs to `rest`, but for those of which `is_taken` says so by name."""
    probed: dict[tuple[object, ...], str | tuple[str, ...]] = {}
    lists = {id(module) for part in model.modules() if isinstance(part, nn.ModuleList) for module in part}
    for name, module in model.named_modules():
        known = (paths for paths in _MLPS if all(isinstance(at(module, None, path), nn.Module) for path in paths))
        paths = next(known, None)
        if paths is None or is_taken(name):
            continue
        if paths[0] == "0" and not isinstance(module, nn.Sequential):  # a list
            continue
        if paths[0] == "0" and not all(is_linear(at(module, None, path)) for path in paths):  # of other things
            continue
        if len(paths) > 2 and id(module) in lists:  # experts, which not every token goes to
            continue
        between: tuple[str, ...] = ()
        problem = _problem(module, paths, owners, ranks)
        if not problem:
            if (kind := _kind(module)) not in probed:
                probed[kind] = _probe(module, paths, features_of(module.get_submodule(paths[-1]))[0] // ranks)
            found = probed[kind]
            if isinstance(found, str):
                problem = found
            else:
                between = found
                hooked = [path for path in between if has_hooks(module.get_submodule(path))]
                problem = f"{hooked[0]} has hooks" if hooked else None
        if problem:
            rest.left_out_mlps[name] = problem
        else:
            rest.mlps[name] = (module, paths, between)


def _problem(module: nn.Module, paths: tuple[str, ...], owners: dict[int, list[str]], ranks: int) -> str | None:
    """Why what is at these paths are not the linears of an MLP that can be split, or None."""
    for path in paths:
        linear = module.get_submodule(path)
        if not is_known_linear(linear):
            return f"{path} is a {type(linear).__name__}, not a plain nn.Linear"
        if has_hooks(linear):
            return f"{path} has hooks"
        if any(len(owners[id(p)]) > 1 for p in linear.parameters()):
            return f"{path} shares a parameter"
    width, _ = features_of(module.get_submodule(paths[-1]))
    for path in paths[:-1]:
        if (given := features_of(module.get_submodule(path))[1]) != width:
            return f"{path} gives {given} features and {paths[-1]} takes {width}"
    return f"{ranks} does not divide its width {width}" if width % ranks else None


def _kind(module: nn.Module) -> tuple[object, ...]:
    parts = tuple((name, type(part), settings(part)) for name, part in module.named_modules())
    return parts, tuple((name, tuple(p.shape)) for name, p in module.named_parameters())


def _probe(module: nn.Module, paths: tuple[str, ...], share: int) -> str | tuple[str, ...]:
    """Does by hand, on a random copy, what the split does: one rank with `share` columns, one with all others.

    Why the numbers would not be the module's, or the paths of the modules that would see a part of the columns.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.enable_grad():  # no grad: torch's fast path
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed those of GPUs too
        try:
            (original,) = random_copy([module])
            x_BLD = torch.randn(2, 3, features_of(original.get_submodule(paths[0]))[0], dtype=torch.float64)
            args = (x_BLD, *_others(original, x_BLD))
            expected = first_output(original(*args))
            parts = [_Part(original, paths, columns) for columns in (slice(0, share), slice(share, None))]
            total = parts[0].run(args) + parts[1].run(args)
            last: Any = original.get_submodule(paths[-1])
            total = total if last.bias is None else total + last.bias
            got = parts[0].run(args, total)
            trained = _parameters_between(original, paths, args)
            drops = _drops_between(original, paths, args)
        except Exception as error:
            return f"it cannot be called like an MLP, or not with a part of its columns: {error!r}"
    difference = (expected - got).abs().max().item() if expected.shape == got.shape else float("inf")
    if not difference <= 1e-6 * expected.abs().max().item():
        columns = ", ".join(f"{path}(x)" for path in paths[:-1])
        return f"its numbers differ by {difference:.1e} from {paths[-1]}(activation({columns})) on a small input"
    if drops:
        return "something drops columns between them that is no nn.Dropout"
    if trained:
        return f"the gradient of {trained[0]}, which acts between them, would be that of a part of the columns"
    return parts[0].between


def _others(module: nn.Module, x_BLD: Tensor) -> list[Tensor | None]:
    """What a module must be given besides hidden states: such states, or no mask."""
    named = list(inspect.signature(module.forward).parameters.values())[1:]
    required = [p.name for p in named if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    return [None if "mask" in name or "position" in name else x_BLD for name in required]


def _parameters_between(module: nn.Module, paths: tuple[str, ...], args: Args) -> list[str]:
    """Names of the parameters that act on what the linears by columns give before the last one takes it."""
    *columns, last = map(module.get_submodule, paths)
    taken = []
    hooks = [linear.register_forward_hook(lambda module, args, y: y.detach().requires_grad_()) for linear in columns]
    hooks.append(last.register_forward_pre_hook(lambda module, args: taken.append(args[0])))
    names, parameters = zip(*module.requires_grad_().named_parameters(), strict=True)
    module(*args)
    for hook in hooks:
        hook.remove()
    gradients = torch.autograd.grad(taken[0].sum(), parameters, allow_unused=True)
    return [name for name, gradient in zip(names, gradients, strict=True) if gradient is not None]


def _drops_between(module: nn.Module, paths: tuple[str, ...], args: Args) -> bool:
    """Whether in training something but an nn.Dropout draws random numbers between the linears."""
    *columns, last = map(module.get_submodule, paths)
    for part in module.train().modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    first: dict[nn.Module, Tensor] = {}
    taken = []
    for linear in columns:
        linear.register_forward_hook(lambda module, args, y: first.setdefault(module, y.detach()))
    last.register_forward_pre_hook(lambda module, args: taken.append(args[0].detach()))
    for _ in range(2):
        module(*args)
    return not torch.equal(*taken)


def _take(linear: Any, dim: int, own: slice) -> None:
    """Leaves a linear `own` of its outputs (dim 0), or of its inputs, without what must be added once."""
    weight, bias = linear.weight.detach(), linear.bias
    transposed = is_conv(linear)
    linear.weight = nn.Parameter(weight[(slice(None), own) if dim != transposed else (own,)])
    if bias is not None:
        linear.bias = nn.Parameter(torch.zeros_like(bias) if dim else bias.detach()[own])
    if transposed:
        linear.nf = linear.weight.shape[1]


class _Part:
    """A rank's part of an MLP: some columns of what is between the linears."""

    def __init__(self, original: nn.Module, paths: tuple[str, ...], columns: slice) -> None:
        self.module = copy.deepcopy(original)
        *by_columns, last = map(self.module.get_submodule, paths)
        for linear in by_columns:
            _take(linear, 0, columns)
        _take(last, 1, columns)
        self.calls: list[tuple[str, str]] = []  # begin or end, path
        for path, part in self.module.named_modules():
            part.register_forward_pre_hook(lambda *_, path=path: self.calls.append(("begin", path)))
            part.register_forward_hook(lambda *_, path=path: self.calls.append(("end", path)))
        self.paths, self.last = paths, last

    def run(self, args: Args, total: Tensor | None = None) -> Tensor:
        """This part's product with the last linear; or the module's output, given the sum of all parts'."""
        products: list[Tensor] = []

        def exchange(module: nn.Module, args: Args, y: Tensor) -> Tensor | None:
            products.append(y)
            return total

        hook = self.last.register_forward_hook(exchange)
        output = first_output(self.module(*args))
        hook.remove()
        (product,) = products
        return product if total is None else output

    @property
    def between(self) -> tuple[str, ...]:
        """Paths of the modules that got or gave what is between the linears."""
        begin, end = self.calls.index(("end", self.paths[0])), self.calls.index(("begin", self.paths[-1]))
        return tuple(dict.fromkeys(path for _, path in self.calls[begin + 1 : end] if path not in self.paths))
