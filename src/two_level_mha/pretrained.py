"""from_pretrained: a transformers model of a folder, split, with every rank reading its shares, in one call."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.distributed.device_mesh import DeviceMesh

from two_level_mha.agreement import same_on_all_ranks
from two_level_mha.convert import parallelize
from two_level_mha.errors import GridError
from two_level_mha.integrations.private import private_method
from two_level_mha.loading import load_pretrained
from two_level_mha.names import ModelOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from typing_extensions import Unpack


def from_pretrained(
    folder: str | os.PathLike[str],
    mesh: DeviceMesh | None,
    *,
    dtype: torch.dtype | None = None,
    sha256: dict[str, str] | None = None,
    **options: "Unpack[ModelOptions]",
) -> "PreTrainedModel":
    """The transformers model of a folder of config.json and safetensors files, split over the mesh, in eval mode.

    Its class is the one that config.json names. It is made on meta, split by parallelize(model, mesh, **options), and
    filled by load_pretrained, so that no rank holds more than its shares. dtype: of the weights; None: as config.json
    says. sha256: as for load_pretrained. A collective of the grid.
    Raises GridError for a folder without a config.json, for a class that transformers has not, for quantised weights,
    and as parallelize and load_pretrained do.
    """
    model: PreTrainedModel | None = None
    refusal: Exception | None = None
    try:
        model = on_meta(Path(folder), dtype)
    except Exception as error:  # whatever it is, the others would wait for this rank
        refusal = error
    made: dict[str, object] = {
        "refusal": refusal,
        "the model": type(model).__name__,
        "dtype": str(getattr(model, "dtype", None)),
    }
    same_on_all_ranks(made, mesh, "give every rank the same folder and dtype")
    assert model is not None  # or there was a refusal
    return load_pretrained(parallelize(model, mesh, **options), folder, sha256=sha256)


def on_meta(path: Path, dtype: torch.dtype | None, quantised: bool = False) -> "PreTrainedModel":
    """The model of a folder, without memory; quantised: one that is may be taken as it was before."""
    import transformers

    if not (path / "config.json").is_file():
        raise GridError(
            f"folder must be a directory with a config.json, got {str(path)!r}; a model of a hub is brought to one by "
            "huggingface_hub.snapshot_download"
        )
    config = transformers.AutoConfig.from_pretrained(path)
    if quantised and hasattr(config, "quantization_config"):
        del config.quantization_config
    if getattr(config, "quantization_config", None) is not None:
        raise GridError(f"{path}: quantised weights cannot be split; save the model in float32, bfloat16 or float16")
    names = config.architectures or []
    kinds = [getattr(transformers, name) for name in names if hasattr(transformers, name)]
    if not kinds:
        raise GridError(f"{path / 'config.json'} must name a class of transformers in architectures, got {names}")
    with torch.device("meta"):
        make = private_method(kinds[0], "_from_config")
        model: PreTrainedModel = make(config, dtype=dtype or config.dtype or torch.float32)
    return model
