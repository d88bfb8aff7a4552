"""Every private name of transformers that this package uses, in one place, and the version that has them."""

import importlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import nn

from two_level_mha.errors import GridError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FLOOR = (5, 23)

_MODULES = {
    "DistributedConfig": "transformers.distributed",
    "apply_tensor_parallelism": "transformers.distributed.tensor_parallel",
    "ALL_PARALLEL_STYLES": "transformers.distributed.parallel_utils",
    "get_model_conversion_mapping": "transformers.conversion_mapping",
    "WeightConverter": "transformers.core_model_loading",
    "WeightRenaming": "transformers.core_model_loading",
    "rename_source_key": "transformers.core_model_loading",
    "dot_natural_key": "transformers.core_model_loading",
    "SkipParameters": "transformers.core_model_loading",
    "LoadStateDictConfig": "transformers.modeling_utils",
    "LoadStateDictInfo": "transformers.utils.loading_report",
    "_active_collector": "transformers.utils.output_capturing",
}
_METHODS = (
    "_adjust_missing_and_unexpected_keys", "_finalize_model_loading", "_from_config", "_get_dtype_plan",
    "_get_stopping_criteria", "_load_pretrained_model", "_prepare_static_cache", "_resolve_parallel_plans",
)  # fmt: skip


def private(name: str) -> Any:
    """A private name of transformers. Raises GridError where the installed one has it no more."""
    try:
        return getattr(importlib.import_module(_MODULES[name]), name)
    except (ImportError, AttributeError) as error:
        raise _absent(f"{_MODULES[name]}.{name}") from error


def private_method(model: "PreTrainedModel | type[PreTrainedModel]", name: str) -> Callable[..., Any]:
    """A private method of a transformers model. Raises GridError where the installed one has it no more."""
    assert name in _METHODS
    if not hasattr(model, name):
        raise _absent(f"PreTrainedModel.{name}")
    method: Callable[..., Any] = getattr(model, name)
    return method


def is_pretrained(module: nn.Module) -> "TypeGuard[PreTrainedModel]":
    """Whether a module is a model of transformers."""
    modeling = sys.modules.get("transformers.modeling_utils")  # where it was not imported, no model is of it
    return modeling is not None and isinstance(module, modeling.PreTrainedModel)


def pretrained_models(model: nn.Module) -> "dict[str, PreTrainedModel]":
    """The outermost transformers models in `model`, by name; {"": model} if it is one itself.

    Raises GridError if there is one and transformers is too old.
    """
    found: dict[str, PreTrainedModel] = {}
    for name, module in model.named_modules():
        inside = any(not outer or name.startswith(f"{outer}.") for outer in found)
        if is_pretrained(module) and not inside:
            found[name] = module
    if found:
        check_version(sys.modules["transformers"].__version__)
    return found


def check_version(version: str) -> None:
    """Raises GridError for a transformers older than FLOOR."""
    numbers = tuple(int(part) for part in version.split(".")[:2])
    if numbers < FLOOR:
        raise GridError(
            f"transformers {version} is too old: its models are split with transformers {'.'.join(map(str, FLOOR))} or "
            "newer; upgrade it"
        )


def _absent(name: str) -> GridError:
    version = sys.modules["transformers"].__version__
    return GridError(
        f"transformers {version} has no {name}, which transformers {'.'.join(map(str, FLOOR))} has: install that "
        "version, or use parallelize(..., rest=False) and load_state_dict"
    )
