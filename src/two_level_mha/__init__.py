"""Exact multi-head attention split over more ranks than it has heads."""

from two_level_mha import _load

_load.load()

from two_level_mha.activations import gather_activations, shard_activations  # noqa: E402
from two_level_mha.adapters import register_adapter  # noqa: E402
from two_level_mha.cache import KVCache  # noqa: E402
from two_level_mha.cache_layer import CacheLayer  # noqa: E402
from two_level_mha.checkpoint import full_state_dict  # noqa: E402
from two_level_mha.convert import parallelize  # noqa: E402
from two_level_mha.decoder import Rotary, TwoLevelAttention  # noqa: E402
from two_level_mha.errors import GridError, IntegrityError, RankFailure  # noqa: E402
from two_level_mha.guard import guard  # noqa: E402
from two_level_mha.integrations.lora import adaptable  # noqa: E402
from two_level_mha.loading import load_pretrained  # noqa: E402
from two_level_mha.mesh import Grid, close, init_mesh, reopen  # noqa: E402
from two_level_mha.multihead import TwoLevelMultiheadAttention  # noqa: E402
from two_level_mha.partial import partial_attention  # noqa: E402
from two_level_mha.planner import Option, Plan, plan  # noqa: E402
from two_level_mha.pretrained import from_pretrained  # noqa: E402
from two_level_mha.profile import Profile  # noqa: E402
from two_level_mha.report import Report, report  # noqa: E402
from two_level_mha.saving import Loaded, load, save  # noqa: E402
from two_level_mha.style import TwoLevelParallel  # noqa: E402
from two_level_mha.training import clip_grad_norm_, param_groups, shard_embed_dim, unscale_  # noqa: E402
from two_level_mha.verify import verify  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "CacheLayer",
    "Grid",
    "GridError",
    "IntegrityError",
    "KVCache",
    "Loaded",
    "Option",
    "Plan",
    "Profile",
    "RankFailure",
    "Report",
    "Rotary",
    "TwoLevelAttention",
    "TwoLevelMultiheadAttention",
    "TwoLevelParallel",
    "adaptable",
    "clip_grad_norm_",
    "close",
    "from_pretrained",
    "full_state_dict",
    "gather_activations",
    "guard",
    "init_mesh",
    "load",
    "load_pretrained",
    "parallelize",
    "param_groups",
    "partial_attention",
    "plan",
    "register_adapter",
    "reopen",
    "report",
    "save",
    "shard_activations",
    "shard_embed_dim",
    "unscale_",
    "verify",
]
cmake_prefix_path = str(_load.PACKAGE / "share" / "cmake")
