"""What is not attention in a transformers model: split by the model's own tensor-parallel plan and transformers' code.

A plan gives modules and parameters a style by name. The rules inside an attention that was replaced are left out; all
others are applied on the flattened grid, so MLPs, experts, embeddings and the head become DTensors on it.
"""

import copy
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from two_level_mha.errors import GridError
from two_level_mha.integrations.private import private, private_method
from two_level_mha.mesh import grid_mesh
from two_level_mha.names import Args
from two_level_mha.probe import changed_linear, has_hooks, is_inside
from two_level_mha.stock import take_full_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Styles whose module takes and gives full activations: leaving one out changes nothing else.
_ALONE = {
    "embedding_rowwise", "embedding_colwise", "colwise_gather_output", "colwise_rep", "rowwise_split_input",
    "rowwise_rep", "replicate",
}  # fmt: skip
# Classes that write to what a child of theirs gives, which a plan may make a view of something else.
_WRITES = {"Llama4TextMoe": "shared_expert"}
_ROW_BYTES = 16  # of which torch's grouped_mm takes rows of a multiple
_ATTENTION = re.compile(r"(^|[._])(attn|attention)([._]|$)")  # in the name of a module


def find_tp_plan(
    model: "PreTrainedModel", ranks: int, replaced: set[str], owners: dict[int, list[str]]
) -> tuple[dict[str, str], dict[str, str]] | None:
    """The rules to apply, name -> style, and what stays unsplit, name -> why. None if the model has no plan.

    replaced: names of the attentions, and of projections outside them, that are split already. owners: id of a
    parameter -> number of modules that have it. Raises GridError where a rule cannot be applied and others need it.
    """
    if not model.tp_plan:
        return None
    config = private("DistributedConfig")(tp_size=ranks)
    tp_plan = private_method(model, "_resolve_parallel_plans")(config)[0]
    tp_plan = {name: style for name, style in tp_plan.items() if not is_inside(name, replaced)}
    modules = dict(model.named_modules())
    left_out: dict[str, str] = {}
    for name, style in tp_plan.items():
        owner = name if name in modules else name.rpartition(".")[0]
        if problem := _problem(modules[owner], owner, name, tp_plan, owners):
            if style not in _ALONE and not _ATTENTION.search(owner):
                raise GridError(
                    f"{name} cannot be split by the model's tensor-parallel plan ({style}): {problem}; or call "
                    "parallelize(..., rest=False)"
                )
            left_out[owner] = problem
    for name, style in tp_plan.items():
        block = name.rpartition(".")[0]
        if style == "colwise" and isinstance(modules.get(name), nn.Linear) and not is_inside(name, set(left_out)):
            names = (f"{block}.{own}" for own, _ in modules[block].named_parameters())
            if alone := next((own for own in names if not is_inside(own, set(tp_plan))), None):
                left_out[block] = f"the gradient of {alone}, which has no rule, would be that of a part of the columns"
    return {name: style for name, style in tp_plan.items() if not is_inside(name, set(left_out))}, left_out


def _problem(
    module: nn.Module, owner: str, name: str, tp_plan: dict[str, str], owners: dict[int, list[str]]
) -> str | None:
    """Why a rule, for the module called `owner` or a parameter of it, cannot be applied, or None."""
    if _ATTENTION.search(owner) and tp_plan[name] not in _ALONE:
        return "it belongs to an attention that is not replaced"
    if has_hooks(module):
        return "it has hooks, which would see a part of the columns: remove them first"
    if problem := changed_linear(module):
        return f"it {problem}"
    for own, p in module.named_parameters():
        if isinstance(p, DTensor):
            return f"its {own} is a DTensor already"
        if len(owners[id(p)]) > 1:
            return f"its {own} is tied to another module's"
        if name == owner and f"{owner}.{own}" not in tp_plan:
            return f"the plan has no rule for its {own}: it is not the module that transformers knows"
    return None


def apply_tp_plan(model: nn.Module, tp_plan: dict[str, str], mesh: DeviceMesh) -> dict[str, str]:
    """Applies what find_tp_plan found. load_state_dict takes full tensors afterwards too.

    Gives the modules whose code goes another way since they are split, and why.
    """
    modules, styles = dict(model.named_modules()), private("ALL_PARALLEL_STYLES")
    forwards = {name: modules[name].forward for name in tp_plan if name in modules}
    private("apply_tensor_parallelism")(model, grid_mesh(mesh), tp_plan)
    for name, forward in forwards.items():
        module, style = modules[name], styles[tp_plan[name]]
        own = module.__dict__
        installed = own.get("forward")
        if getattr(installed, "__qualname__", "").startswith("TensorParallelLayer."):  # what nearly every style has
            own["forward"] = StyledForward(module, forward, style, grid_mesh(mesh))
        elif installed is not None:
            own["forward"] = SharedForward(installed, f"{name} ({tp_plan[name]})")
    for name, module in modules.items():
        child = _WRITES.get(type(module).__name__)
        if child is not None and any(is_inside(rule, (f"{name}.{child}",)) for rule in tp_plan):
            module.get_submodule(child).register_forward_hook(_copied)
    for owner in {name if name in modules else name.rpartition(".")[0] for name in tp_plan}:
        take_full_tensors(modules[owner])
    return {
        name: why
        for name, style in tp_plan.items()
        if style == "moe_tp_experts" and (why := _one_expert_after_the_other(modules[name]))
    }


def _one_expert_after_the_other(experts: nn.Module) -> str | None:
    """Has experts multiplied one after the other where grouped_mm would die of a rank's columns; and then why."""
    transposed, down = getattr(experts, "is_transposed", None), getattr(experts, "down_proj", None)
    if transposed is None or not isinstance(down, DTensor):  # it chooses between no implementations
        return None
    config: Any = experts.config
    columns, ranks = down.shape[-2 if transposed else -1], down.device_mesh.size()
    fits = columns * down.element_size() % (ranks * _ROW_BYTES) == 0
    if fits or config._experts_implementation != "grouped_mm":
        return None
    experts.config = own = copy.deepcopy(config)  # the model's says how whole experts are multiplied
    own._experts_implementation = "eager"
    return (
        f"multiplies one expert after the other: of its {columns} columns of {down.dtype} each of {ranks} ranks would "
        f"need a multiple of {_ROW_BYTES} bytes for grouped_mm"
    )


def _copied(module: nn.Module, args: Args, output: Tensor) -> Tensor:
    return output.clone()


class StyledForward:
    """The forward of a module by a style of transformers, which its `install_forward` makes a closure over the module:
    a copy of the module would share it, and run the original with the original's weights. This goes with the copy.
    """

    def __init__(self, module: nn.Module, forward: Callable[..., Any], style: Any, mesh: DeviceMesh) -> None:
        self.module, self.forward, self.style, self.mesh = module, forward, style, mesh

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self.style.transform_inputs_pre_forward(self.module, args, kwargs, self.mesh)
        with self.style.context_around_forward(self.module, self.mesh):
            output = self.forward(*args, **kwargs)
        return self.style.transform_output_post_forward(self.module, output, self.mesh)


class SharedForward:
    """A closure over a module, of a style that installs it in a way of its own. It refuses to go with a copy."""

    def __init__(self, forward: Callable[..., Any], what: str) -> None:
        self.forward, self.what = forward, what

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def __reduce__(self) -> NoReturn:
        raise GridError(
            f"a model cannot be copied or pickled after parallelize where transformers changes {self.what}: copy it "
            "first, and split both"
        )
