"""Exact multi-head attention split over more ranks than it has heads."""

from two_level_mha._load import PACKAGE, load

load()

from two_level_mha.checkpoint import full_state_dict  # noqa: E402
from two_level_mha.convert import parallelize  # noqa: E402
from two_level_mha.loading import load_pretrained  # noqa: E402
from two_level_mha.mesh import Grid, GridError, init_mesh  # noqa: E402
from two_level_mha.multihead import TwoLevelMultiheadAttention  # noqa: E402
from two_level_mha.training import clip_grad_norm_, param_groups  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "Grid",
    "GridError",
    "TwoLevelMultiheadAttention",
    "clip_grad_norm_",
    "full_state_dict",
    "init_mesh",
    "load_pretrained",
    "parallelize",
    "param_groups",
]
cmake_prefix_path = str(PACKAGE / "share" / "cmake")
