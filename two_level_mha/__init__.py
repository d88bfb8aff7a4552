"""Exact multi-head attention split over more ranks than it has heads."""

from two_level_mha._load import PACKAGE, load

load()

from two_level_mha.adapters import register_adapter  # noqa: E402
from two_level_mha.cache import KVCache  # noqa: E402
from two_level_mha.checkpoint import full_state_dict  # noqa: E402
from two_level_mha.convert import parallelize  # noqa: E402
from two_level_mha.decoder import Rotary, TwoLevelAttention  # noqa: E402
from two_level_mha.errors import GridError, IntegrityError  # noqa: E402
from two_level_mha.loading import load_pretrained  # noqa: E402
from two_level_mha.mesh import Grid, init_mesh  # noqa: E402
from two_level_mha.multihead import TwoLevelMultiheadAttention  # noqa: E402
from two_level_mha.planner import plan  # noqa: E402
from two_level_mha.profile import Profile  # noqa: E402
from two_level_mha.report import report  # noqa: E402
from two_level_mha.training import clip_grad_norm_, param_groups, shard_embed_dim, unscale_  # noqa: E402
from two_level_mha.verify import verify  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "Grid",
    "GridError",
    "IntegrityError",
    "KVCache",
    "Profile",
    "Rotary",
    "TwoLevelAttention",
    "TwoLevelMultiheadAttention",
    "clip_grad_norm_",
    "full_state_dict",
    "init_mesh",
    "load_pretrained",
    "parallelize",
    "param_groups",
    "plan",
    "register_adapter",
    "report",
    "shard_embed_dim",
    "unscale_",
    "verify",
]
cmake_prefix_path = str(PACKAGE / "share" / "cmake")
