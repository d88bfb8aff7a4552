"""parallelize: every attention of a model on a grid, in place. Structure proposes, a probe decides."""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from two_level_mha.integrations.projected import probe_inputs, projected_like
from two_level_mha.mesh import GridError
from two_level_mha.multihead import TwoLevelMultiheadAttention, check_same_weights
from two_level_mha.rest import split_rest

_PROJECTION_NAMES = {
    "query", "key", "value", "q_proj", "k_proj", "v_proj", "q_lin", "k_lin", "v_lin", "c_attn", "qkv", "qkv_proj",
    "in_proj", "Wqkv", "query_key_value", "q", "k", "v",
}  # fmt: skip
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One structure of attention: how to recognise it, what its projections are, how to replace and to call it."""

    name: str
    matches: Callable[[nn.Module, nn.Module], bool]  # (module, parent)
    projections: Callable[[nn.Module, nn.Module], dict[str, nn.Module]]
    replace: Callable[..., nn.Module]  # (module, projections, mesh, **options)
    inputs: Callable[[nn.Module, torch.dtype], tuple[tuple, dict]]
    out_in_parent: bool = False  # the output projection belongs to the parent: output.dense


def _is_bert(module: nn.Module, parent: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("query", "key", "value", "scaling", "num_attention_heads")) and hasattr(
        getattr(parent, "output", None), "dense"
    )


def _is_vit(module: nn.Module, parent: nn.Module) -> bool:
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "scaling", "num_attention_heads")
    return all(hasattr(module, name) for name in names)


def _torch_inputs(mha: nn.MultiheadAttention, dtype: torch.dtype) -> tuple[tuple, dict]:
    widths = (mha.embed_dim, mha.kdim, mha.vdim)
    query, key, value = (torch.randn(*((2, n) if mha.batch_first else (n, 2)), w, dtype=dtype)
                         for n, w in zip((4, 5, 5), widths, strict=True))  # fmt: skip
    hidden_BS = torch.zeros(2, 5, dtype=torch.bool)
    hidden_BS[1, 3:] = True
    return (query, key, value), {"key_padding_mask": hidden_BS}


FAMILIES = (
    Family(
        "nn.MultiheadAttention",
        lambda module, parent: isinstance(module, nn.MultiheadAttention),
        lambda module, parent: {"o": module.out_proj},
        lambda module, projections, mesh, **options: TwoLevelMultiheadAttention.from_torch(module, mesh, **options),
        _torch_inputs,
    ),
    Family(
        "BERT",
        _is_bert,
        lambda module, parent: {"q": module.query, "k": module.key, "v": module.value, "o": parent.output.dense},
        projected_like,
        probe_inputs,
        out_in_parent=True,
    ),
    Family(
        "ViT",
        _is_vit,
        lambda module, parent: {"q": module.q_proj, "k": module.k_proj, "v": module.v_proj, "o": module.o_proj},
        projected_like,
        probe_inputs,
    ),
)


@dataclass
class Found:
    """An attention module and every place where the model refers to it."""

    name: str
    module: nn.Module
    parent: nn.Module
    family: Family
    projections: dict[str, nn.Module]


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh | None,
    *,
    scheme: str = "auto",
    combine: str = "reduce",
    rest: bool = True,
    debug: bool | None = None,
) -> nn.Module:
    """Replaces every supported attention of `model` by its split form, in place; returns the model.

    Supported: nn.MultiheadAttention, and transformers' BERT, RoBERTa and ViT attention. A replacement must give the
    original's numbers on a small random input, once per class and configuration, or GridError names it.
    rest: also split the MLPs of nn.TransformerEncoderLayer / DecoderLayer, BERT and ViT over the flattened grid, by
    torch's ColwiseParallel and RowwiseParallel, where P divides their width.
    A collective over the grid. Raises GridError, before anything is changed, when nothing is found, when an attention
    is found that is not supported, or when the ranks' weights differ.
    """
    found = _find(model)
    options = {"scheme": scheme, "combine": combine, "debug": debug}
    if mesh is not None:
        check_same_weights([model], mesh, any(getattr(m, "p", 0) for m in model.modules() if isinstance(m, nn.Dropout)))
    probed: set = set()
    for one in found:
        features = _features(one)
        if features not in probed:
            _probe(one, options)
            probed.add(features)
    for one in found:
        _replace(model, one, mesh, options)
    split = split_rest(model, mesh) if rest and mesh is not None and mesh.size() > 1 else []
    if mesh is not None and mesh.get_rank() == 0:
        print(_report(model, [one.name for one in found], split), flush=True)
    return model


def _looks_like_attention(module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return True
    children = dict(module.named_children())
    return "Attention" in type(module).__name__ and bool(_PROJECTION_NAMES & children.keys())


def _find(model: nn.Module) -> list[Found]:
    """Every attention of the model. Raises GridError, naming it, for one that is not supported."""
    owners: dict[int, set[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(p), set()).add(name)
    found: list[Found] = []
    for name, module in model.named_modules():
        if not _looks_like_attention(module):
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        where = f"{name or 'the model'} ({type(module).__name__})"
        if not name:
            raise GridError(f"{where} is itself an attention: use TwoLevelMultiheadAttention.from_torch")
        family = next((f for f in FAMILIES if f.matches(module, parent)), None)
        if family is None:
            raise GridError(
                f"{where} looks like attention of a structure that is not supported; supported: "
                + ", ".join(f.name for f in FAMILIES)
            )
        projections = family.projections(module, parent)
        if problem := _problem(module, projections, owners):
            raise GridError(f"{where} is not supported: {problem}")
        found.append(Found(name, module, parent, family, projections))
    if not found:
        raise GridError(f"no attention was found in {type(model).__name__}; supported: {[f.name for f in FAMILIES]}")
    return found


def _problem(module: nn.Module, projections: dict[str, nn.Module], owners: dict[int, set[str]]) -> str | None:
    """Why a module of a known structure cannot be replaced, or None."""
    if isinstance(module, nn.MultiheadAttention) and type(module) is not nn.MultiheadAttention:
        return f"it is a subclass of nn.MultiheadAttention ({type(module).__module__}.{type(module).__name__})"
    if "CrossAttention" in type(module).__name__:
        return "it is cross-attention"
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", "sdpa")
    if implementation not in ("sdpa", "eager"):
        return f'its attention implementation is {implementation!r}: call model.set_attn_implementation("sdpa") first'
    plain = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
    for letter, projection in projections.items():
        what = f"its {letter} projection"
        if type(projection) not in plain:
            return (
                f"{what} is a {type(projection).__module__}.{type(projection).__name__}, not a plain nn.Linear (merge "
                "adapters, or undo quantisation, first)"
            )
        if hasattr(projection, "parametrizations"):
            return f"{what} is parametrized: call torch.nn.utils.parametrize.remove_parametrizations first"
        if any(getattr(projection, hooks) for hooks in _HOOKS):
            return f"{what} has hooks, which would no longer run: remove them first"
    params = [*module.parameters(), *(p for projection in projections.values() for p in projection.parameters())]
    for p in params:
        if len(modules := {name.rpartition(".")[0] for name in owners[id(p)]}) > 1:
            return f"it shares a parameter between {', '.join(sorted(modules))}: untie it first"
    return None


def _features(one: Found) -> tuple:
    """What makes two modules of one class behave differently."""
    settings = {k: v for k, v in vars(one.module).items() if isinstance(v, (int, float, bool, str)) and k[0] != "_"}
    settings.pop("layer_idx", None)
    shapes = tuple((k, tuple(p.weight.shape), p.bias is None) for k, p in one.projections.items())
    implementation = getattr(getattr(one.module, "config", None), "_attn_implementation", None)
    return type(one.module), implementation, shapes, tuple(sorted(settings.items()))


def _probe(one: Found, options: dict) -> None:
    """Runs a copy of the original and its replacement on a small random input; raises GridError if they differ."""
    module = one.module
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        first = next(module.parameters())
        original, projections = copy.deepcopy((module, one.projections))
        if first.is_meta:
            for part in (original, *projections.values()):
                part.to_empty(device="cpu")
                for p in part.parameters():
                    p.normal_(std=p.shape[-1] ** -0.5)
        for part in (original, *projections.values()):
            part.cpu().float().eval()
        ours = one.family.replace(original, projections, None, **options).eval()
        args, kwargs = one.family.inputs(original, torch.float32)
        # outputs that are not projected yet are projected here
        expected = original(*args, **kwargs)[0]
        if one.family.out_in_parent:
            expected = projections["o"](expected)
        got = ours(*args, **kwargs)[0]
    difference = (expected - got).abs().max().item() if expected.shape == got.shape else float("inf")
    if not difference <= 1e-4 * max(1.0, expected.abs().max().item()):
        raise GridError(
            f"{one.name} ({type(module).__name__}) has the structure of {one.family.name} attention, but its numbers "
            f"differ from it by {difference:.1e} on a small input: it does something else, and is not supported"
        )


def _replace(model: nn.Module, one: Found, mesh: DeviceMesh | None, options: dict) -> None:
    ours = one.family.replace(one.module, one.projections, mesh, **options).train(one.module.training)
    for name, value in vars(one.module).items():  # what others may read or hook stays
        if name in _HOOKS or (not name.startswith("_") and name not in vars(ours)):
            vars(ours)[name] = value
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module is one.module:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, ours)
    if one.family.out_in_parent:
        one.parent.output.dense = nn.Identity()


def _report(model: nn.Module, attentions: list[str], mlps: list[str]) -> str:
    """Parameters per rank, split and whole, and what stayed whole, by class name."""
    split = whole = total = 0
    stayed: dict[str, int] = {}
    for name, p in model.named_parameters():
        local: Tensor = p._local_tensor if isinstance(p, DTensor) else p
        total += p.numel()
        if local.numel() < p.numel():
            split += local.numel()
        else:
            whole += p.numel()
            kind = re.sub(r"\.\d+\.", ".*.", name.rpartition(".")[0])
            stayed[kind] = stayed.get(kind, 0) + p.numel()
    largest = sorted(stayed.items(), key=lambda item: -item[1])[:6]
    return (
        f"two_level_mha: {len(attentions)} attention modules and {len(mlps)} MLPs split; parameters per rank "
        f"{split + whole:,} of {total:,}: {split:,} split, {whole:,} whole ("
        + ", ".join(f"{name} {count:,}" for name, count in largest)
        + (", ..." if len(stayed) > len(largest) else "")
        + ")"
    )
