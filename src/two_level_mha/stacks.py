"""Stacks of layers whose hidden states can stay split: found before the model is changed, by structure and a trial.

A stack is an nn.ModuleList each of whose entries has an attention that is split. What else is in a layer must act on
each row by itself, which a copy shows, without its attention and its MLPs: these take all rows.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard

from two_level_mha.adapters import Adapter
from two_level_mha.class_like import become
from two_level_mha.families import later
from two_level_mha.integrations.forms import keeps_projection, takes_shared
from two_level_mha.integrations.head import head_of, split_head
from two_level_mha.integrations.lora import mark
from two_level_mha.integrations.packed import is_packed
from two_level_mha.integrations.private import is_pretrained, pretrained_models
from two_level_mha.layer import GridAttention
from two_level_mha.low_rank import is_conv
from two_level_mha.mesh import grid_mesh
from two_level_mha.probe import first_output, random_copy
from two_level_mha.rest import Rest
from two_level_mha.state_trial import States
from two_level_mha.stock import split_parameters, take_full_tensors
from two_level_mha.stream import DropoutOnParts, OnParts, SplitColumns, SplitMLP, SplitRows, Stream

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HEADS = ("colwise_gather_output", "colwise_rep")  # styles of a plan
_LAST = ("norm", "ln_f", "final_layernorm", "final_layer_norm")  # norms behind the layers, in the same module


class Attention(Protocol):
    """What is known of an attention that will be replaced: convert.Found."""

    module: nn.Module
    adapter: Adapter
    name: str


@dataclass(frozen=True)
class MLP:
    """Linears split by columns, and one by rows behind them, of one module."""

    module: nn.Module
    columns: tuple[str, ...]
    rows: str
    gathers: bool  # the module is called with the hidden states alone, and gives all of its columns that input

    @property
    def linears(self) -> list[nn.Linear]:
        found = []
        for path in (*self.columns, self.rows):
            linear = self.module.get_submodule(path)
            assert isinstance(linear, nn.Linear)
            found.append(linear)
        return found


@dataclass
class Stack:
    """Layers whose hidden states stay split, and the modules in them that are not given parts."""

    name: str
    around: list[nn.Module]  # from the model to the module whose forward runs the layers
    layers: list[nn.Module]
    batch_first: bool
    attentions: list[nn.Module] = field(default_factory=list)
    states: list[States] = field(default_factory=list)
    mlps: list[MLP] = field(default_factory=list)
    whole: list[nn.Module] = field(default_factory=list)  # take all rows: split by a plan, or of Conv1D
    between: set[nn.Module] = field(default_factory=set)  # act on columns, between linears
    head: "tuple[PreTrainedModel, nn.Linear] | None" = (
        None  # a model that computes its loss of these hidden states, its head
    )
    split_head: bool = False  # by columns, as the model's plan says

    @property
    def owner(self) -> nn.Module:
        """Whose forward runs the layers."""
        return self.around[-1]

    @property
    def linears(self) -> set[nn.Module]:
        """Those that the stack splits itself."""
        found: set[nn.Module] = {linear for mlp in self.mlps for linear in mlp.linears}
        return found | {self.head[1]} if self.head is not None and self.split_head else found

    @property
    def recording(self) -> list[nn.Module]:
        """What may give the hidden states between the layers: the owner, and what is around it up to the innermost
        model of transformers, which records them.
        """
        models = [i for i, module in enumerate(self.around) if is_pretrained(module)]
        return self.around[models[-1] if models else -1 :]

    @property
    def last(self) -> nn.Module:
        """What is called last with parts."""
        children = list(self.owner._modules.items())
        at = [name for name, _ in children].index(self.name.rpartition(".")[2])
        behind = [child for name, child in children[at + 1 :] if name in _LAST and child is not None]
        return behind[0] if behind else self.layers[-1]


def find_stacks(
    model: nn.Module, found: Iterable[Attention], rest: Rest, states: Mapping[str, States]
) -> tuple[list[Stack], dict[str, str]]:
    """The stacks of a model whose attentions `found` will be split, `rest` and `states` too; and why others are none.

    Takes from `rest` the MLPs that a stack splits. Sends nothing.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    members: dict[str, dict[str, list[Attention | States]]] = {}
    left_out: dict[str, str] = {}
    both: list[Attention | States] = [*found, *states.values()]
    for one in both:
        parts = one.name.split(".")
        at = next((i for i in range(len(parts) - 1, 0, -1) if ".".join(parts[:i]) in lists), None)
        if at is None or at == len(parts) - 1:
            left_out[one.name] = "it is no part of a layer in an nn.ModuleList"
        else:
            members.setdefault(".".join(parts[:at]), {}).setdefault(parts[at], []).append(one)
    stacks: list[Stack] = []
    tried: dict[object, tuple[str | None, tuple[str, ...]]] = {}
    for name, by_layer in members.items():
        problem = None
        if missing := [i for i in range(len(lists[name])) if str(i) not in by_layer]:
            problem = f"layer {missing[0]} has no attention that is split"
        kinds = {one.module.batch_first if isinstance(one.module, nn.MultiheadAttention) else True
                 for ones in by_layer.values() for one in ones}  # fmt: skip
        if len(kinds) > 1:
            problem = "batch_first differs between its attentions"
        inside = [one for ones in by_layer.values() for one in ones if not isinstance(one, States)]
        if crossing := [one.name for one in inside if one.adapter.crosses]:
            problem = f"{crossing[0]} is cross-attention, of states that are whole"
        if together := [one.name for one in inside if not keeps_projection(one.module, "o")]:
            problem = f"in {together[0]} something acts on all heads together"
        if packed := [one.name for one in inside if is_packed(one.module)]:
            problem = f"{packed[0]} attends to sequences that are packed one after the other"
        if taking := [one.name for one in inside if takes_shared(one.module)]:
            problem = f"{taking[0]} attends to keys of another layer"
        if not problem:
            path = name.split(".")[:-1]
            around = [model.get_submodule(".".join(path[:i])) for i in range(len(path) + 1)]
            stack = Stack(name, around, list(lists[name]), kinds.pop())
            stack.attentions = [one.module for one in inside]
            stack.states = [one for ones in by_layer.values() for one in ones if isinstance(one, States)]
            _take_mlps(stack, rest)
            width = _width(by_layer["0"][0])
            for i, layer in enumerate(stack.layers):
                refused, routed = _tried(layer, stack, width, tried)
                stack.whole += [layer.get_submodule(child) for child in routed]
                problem = problem or (refused and f"layer {i} {refused}")
        if problem:
            left_out[name] = problem
        else:
            stacks.append(stack)
    _take_heads(stacks, model, rest)
    return stacks, {f"the hidden states of {name}": why for name, why in left_out.items()}


def _width(one: Attention | States) -> int:
    if isinstance(one, States):
        return one.width
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        x: Tensor = one.adapter.inputs(one.module, torch.float64)[0][0][0]
        return x.shape[-1]


def _take_mlps(stack: Stack, rest: Rest) -> None:
    """Notes which modules of the layers take all rows, and how."""
    inside = {module for layer in stack.layers for module in layer.modules()}
    for module, paths, between in rest.mlps.values():
        if module not in inside:
            continue
        if any(is_conv(module.get_submodule(path)) for path in paths):
            stack.whole.append(module)
        else:
            stack.mlps.append(MLP(module, paths[:-1], paths[-1], False))
            stack.between |= {module.get_submodule(path) for path in between}
    for name, (_, tp_plan) in rest.tp_plans.items():
        prefix = f"{name}." if name else ""
        for i, layer in enumerate(stack.layers):
            start = f"{stack.name}.{i}.".removeprefix(prefix)
            rules: dict[str, dict[str, str]] = {}
            for rule, style in tp_plan.items():
                if rule.startswith(start) and rule.rpartition(".")[0] not in tp_plan:  # a module's, not its weight's
                    child, _, path = rule.removeprefix(start).partition(".")
                    rules.setdefault(child, {})[path] = style
            for child, styles in rules.items():
                module = layer.get_submodule(child)
                if (mlp := _dense(module, styles)) is None:
                    stack.whole.append(module)
                else:
                    stack.mlps.append(mlp)


def _take_heads(stacks: list[Stack], model: nn.Module, rest: Rest) -> None:
    """Notes the models that compute a loss of the hidden states of one stack."""
    for name, part in pretrained_models(model).items():
        inside = [stack for stack in stacks if stack.owner in set(part.modules())]
        head = head_of(part)
        if head is None or len(inside) != 1:
            continue
        path = next(path for path, module in part.named_modules() if module is head)
        style = rest.tp_plans.get(name, (None, {}))[1].get(path)
        if style in (None, *_HEADS):
            inside[0].head, inside[0].split_head = (part, head), style is not None


def _dense(module: nn.Module, styles: dict[str, str]) -> MLP | None:
    """An MLP of plain linears that a plan splits, all but the last of which are given the module's input."""
    columns = tuple(path for path, style in styles.items() if style == "colwise")
    rows = [path for path, style in styles.items() if style == "rowwise"]
    modules = dict(module.named_modules())
    plain = all(path and type(modules.get(path)) is nn.Linear for path in styles)
    if not plain or len(rows) != 1 or len(columns) + 1 != len(styles) or not columns:
        return None
    mlp = MLP(module, columns, rows[0], True)
    known = {id(p) for linear in mlp.linears for p in linear.parameters()}
    others = any(isinstance(part, nn.Dropout) for part in module.modules())
    if others or any(id(p) not in known for p in module.parameters()) or not _called_with_input(mlp):
        return None
    return mlp


def _called_with_input(mlp: MLP) -> bool:
    """Whether each linear that is split by columns is given the very tensor that the module is."""
    weight, given = mlp.linears[0].weight, []
    x = torch.empty(1, 1, weight.shape[1], dtype=weight.dtype, device=weight.device)
    hooks = [linear.register_forward_pre_hook(lambda _, args: given.append(args[0])) for linear in mlp.linears[:-1]]
    try:
        with torch.no_grad():
            mlp.module(x)
    except Exception:  # of any kind: it is another's code
        return False
    finally:
        for hook in hooks:
            hook.remove()
    return len(given) == len(mlp.columns) and all(one is x for one in given)


class _Stub(nn.Module):
    """Stands for an attention, or for an MLP."""

    def __init__(self, pair: bool) -> None:
        super().__init__()
        self.pair = pair

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        return (x, None) if self.pair else x


def _tried(
    layer: nn.Module, stack: Stack, width: int, tried: dict[object, tuple[str | None, tuple[str, ...]]]
) -> tuple[str | None, tuple[str, ...]]:
    """Why a layer does not act on each row by itself, but for its attention and its MLPs, or None; and which of its
    children must be given all rows even so, since where there is no row for them they give their parameters no
    gradient, which ranks would wait for.
    """
    stubs: dict[int, nn.Module] = {id(module): _Stub(True) for module in stack.attentions}
    stubs |= {id(one.module): _Stub(one.gives_pair) for one in stack.states}
    inner = [mlp.module for mlp in stack.mlps if mlp.module is not layer]
    stubs |= {id(module): _Stub(False) for module in (*stack.whole, *inner)}
    kind = tuple((name, type(module)) for name, module in layer.named_modules())
    if kind not in tried:
        tried[kind] = _trial(layer, stubs, width)
    problem, routed = tried[kind]
    return problem or _drops(layer, stack), routed


def _drops(layer: nn.Module, stack: Stack) -> str | None:
    """Dropout that is no nn.Dropout module."""
    taken = [*stack.attentions, *(one.module for one in stack.states)]
    own = {part for module in taken for part in module.modules()} | stack.between
    for name, module in layer.named_modules():
        if isinstance(module, nn.Dropout) or module in own:
            continue
        for key, value in vars(module).items():
            if "drop" in key and isinstance(value, float) and value > 0.0:
                return f"drops by {name or type(module).__name__}.{key} = {value}, which is no nn.Dropout"
    return None


def _trial(layer: nn.Module, stubs: dict[int, nn.Module], width: int) -> tuple[str | None, tuple[str, ...]]:
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.device("cpu"):
        torch.default_generator.manual_seed(0)
        try:
            (trial,) = random_copy([copy.deepcopy(layer, dict(stubs))])
            for part in trial.requires_grad_().modules():
                part.training = True
                if isinstance(part, nn.Dropout):
                    part.p = 0.0
                if hasattr(part, "gradient_checkpointing"):
                    vars(part)["gradient_checkpointing"] = False
            x = torch.randn(6, 6, width, dtype=torch.float64)
            rows = (slice(1, 4), slice(2, 4))
            inputs = (x, x) if isinstance(layer, nn.TransformerDecoderLayer) else (x,)
            whole, again = (first_output(trial(*inputs)) for _ in range(2))
            alone = first_output(trial(*(one[rows].contiguous() for one in inputs)))
            trained = _trained(trial, whole)
            without_rows = _trained(trial, first_output(trial(*(one[:0] for one in inputs))))
        except Exception as error:  # of any kind: it is another's code
            return f"cannot be run on a part of its rows: {error!r}", ()
    if whole.shape != x.shape or alone.shape != x[rows].shape:
        return "gives another shape than it is given", ()
    if not torch.equal(whole, again):
        return "draws random numbers without an nn.Dropout", ()
    if not (alone - whole[rows]).abs().max() <= 1e-9 * whole.abs().max():
        return "does not act on each row by itself", ()
    if own := [name for name in trained - without_rows if "." not in name]:
        return f"gives {own[0]} no gradient where it has no row", ()
    return None, tuple(dict.fromkeys(name.partition(".")[0] for name in sorted(trained - without_rows)))


def _trained(module: nn.Module, y: Tensor) -> set[str]:
    """Names of the parameters that get a gradient from y."""
    parameters = dict(module.named_parameters())
    if not y.requires_grad:
        return set()
    gradients = torch.autograd.grad(y.sum(), list(parameters.values()), allow_unused=True)
    return {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}


def split_stack(stack: Stack, mesh: DeviceMesh, activations: str, reduce_dtype: torch.dtype | None) -> None:
    """Lets the hidden states of a stack stay split; its attentions were replaced, and what takes all rows split."""
    stream = Stream(activations, mesh, stack.batch_first, reduce_dtype)
    taken = stack.between | stack.linears
    for mlp in stack.mlps:
        _split_mlp(mlp, mesh, stream)
    for module in stack.whole:
        module.register_forward_pre_hook(stream.gather_input, with_kwargs=True)
        module.register_forward_hook(stream.keep_output)
        taken |= set(module.modules())
    for attention in [part for layer in stack.layers for part in layer.modules() if isinstance(part, GridAttention)]:
        attention.stream = stream
        taken |= {part for part in attention.modules() if not isinstance(part, nn.Dropout)}
    for one in stack.states:
        later("states", "split_hidden")(one.module, stream)
        taken |= set(one.module.modules())
    for module in [part for layer in (*stack.layers, stack.last) for part in layer.modules()]:
        if module in taken:
            continue
        taken.add(module)
        if isinstance(module, nn.Dropout):
            become(module, DropoutOnParts, stream=stream)
        elif any(p is not None for p in module._parameters.values()):
            become(module, OnParts, stream=stream)
    stack.layers[0].register_forward_pre_hook(stream.enter, with_kwargs=True)
    for layer in stack.layers if isinstance(stack.layers[0], nn.TransformerDecoderLayer) else ():
        layer.register_forward_pre_hook(stream.enter_memory, with_kwargs=True)
    stack.last.register_forward_hook(stream.leave)
    stack.owner.register_forward_pre_hook(stream.begin)
    stack.owner.register_forward_hook(stream.end, always_call=True)
    for module in stack.recording:
        module.register_forward_hook(stream.make_whole)
    if stack.head is not None:
        model, head = stack.head
        if stack.split_head:
            _distribute(head, mesh, {"weight": Shard(0), "bias": Shard(0)})
        mark(model, {next(path for path, part in model.named_modules() if part is head): activations}, mesh)
        split_head(model, head, stack.owner, stream, mesh)


def _split_mlp(mlp: MLP, mesh: DeviceMesh, stream: Stream) -> None:
    for path in mlp.columns:
        linear = mlp.module.get_submodule(path)
        _distribute(linear, mesh, {"weight": Shard(0), "bias": Shard(0)})
        become(linear, SplitColumns, stream=stream, alone=not mlp.gathers)
    rows = mlp.module.get_submodule(mlp.rows)
    _distribute(rows, mesh, {"weight": Shard(1), "bias": Replicate()})
    become(rows, SplitRows, stream=stream)
    mark(mlp.module, dict.fromkeys((*mlp.columns, mlp.rows), stream.activations), mesh)
    if mlp.gathers:
        become(mlp.module, SplitMLP, stream=stream, columns=mlp.columns)


def _distribute(linear: nn.Module, mesh: DeviceMesh, placements: dict[str, Placement]) -> None:
    """Over the flattened grid; load_state_dict takes full tensors."""
    split_parameters(linear, grid_mesh(mesh), placements)
    take_full_tensors(linear)
