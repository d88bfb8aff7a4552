"""torch.library.opcheck of every operator: schema, fake kernel, autograd registration, tracing (not its numbers)."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from harness.layer import Case, decided, place

import two_level_mha  # noqa: F401  registers the operators
from two_level_mha import _C

ops = torch.ops.two_level_mha

B, L, S, D, H, K, d = 2, 5, 7, 10, 4, 2, 6
SCHEMES = ("independent", "slices", "sequence", "batch", "weights")


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, requires_grad=True)


def dropped() -> dict:
    return {"causal": 1, "window": 4, "softcap": 2.0, "dropout_p": 0.3, "seed": torch.tensor([3])}


def backward_arguments() -> tuple[tuple, dict]:
    q, k, v, mask = (x.detach() for x in (random(B, H, L, d), random(B, K, S, d), random(B, K, S, 3), random(H, L, S)))
    out, logsumexp = ops.partial_attention(q, k, v, mask, **dropped())
    grads = torch.randn_like(out), torch.randn_like(logsumexp)
    return (*grads, q, k, v, out, logsumexp, True, mask), dropped()


def blocks(n: int, m: int) -> dict[str, torch.Tensor]:
    """Weights as a rank of an (n, m) grid stores them."""
    return {"q": random(H // n, d // m, D), "k": random(K // n, d // m, D), "v": random(K // n, d // m, D),
            "q bias": random(H // n, d // m), "k bias": random(K // n, d // m), "v bias": random(K // n, d // m),
            "bias_k": random(K // n, d // m), "bias_v": random(K // n, d // m), "out": random(D, H // n, d // m),
            "out bias": random(D)}  # fmt: skip


def case(scheme: str) -> Case:
    return Case(scheme=scheme, heads=H, kv_heads=K, head_dim=d, embed_dim=D, batch=B, length=L, keys=S, causal=1,
                extra_keys=True, dtype=torch.float32)  # fmt: skip


def enter(n: int, m: int, scheme: str) -> tuple:
    weights = [x for name, x in blocks(n, m).items() if not name.startswith("out")]
    inputs, rows, shared = [random(B, L, D), random(B, S, D), random(B, S, D)], [random(B, 1, L, 3)], [random(d)]
    return (*inputs, *weights, rows, shared, *decided(case(scheme), place(n, m)))


def leave(n: int, m: int, scheme: str, gated: bool = False) -> tuple:
    with torch.no_grad():
        q, k, v, *_ = ops.enter(*enter(n, m, scheme))
    qkv = [x.detach().requires_grad_() for x in (q, k, v)]
    weights = blocks(n, m)
    mask = torch.rand(B, 1, L, S + 2) < 0.8
    return (*qkv, weights["out"], weights["out bias"], mask, None, 1, 4, 2.0, 0.3, torch.tensor([3]),
            *decided(replace(case(scheme), gated=gated), place(n, m)))  # fmt: skip


def after() -> list[torch.Tensor]:
    """A gate and sinks of one process."""
    return [random(B, H, L, d), random(H)]


def attention(n: int, m: int, scheme: str) -> tuple:
    weights = list(blocks(n, m).values())
    inputs = [random(B, L, D), random(B, S, D), random(B, S, D)]
    mask = torch.rand(B, 1, L, S + 2) < 0.8
    norms = None if scheme == "independent" else [random(d), random(d)]  # whose heads are slices
    return (*inputs, *weights, None, norms, 1e-6, True, mask, None, 1, 4, 2.0, 0.3, torch.tensor([3]),
            *decided(case(scheme), place(n, m)))  # fmt: skip


def cache(memory: list[torch.Tensor], length: int, batch: int = 3) -> tuple:
    """memory and numbers of a cache layer that is not split."""
    numbers = {"slices": 1, "by_position": 1, "batch": batch, "length": length}
    return memory, [numbers.get(name, 0) for name in _C.cache_fields()]


SIZES = [(B, 4, L, 3), (B, 2, S, 3), (B, 2, S, 1)]
DIMS = [2, -1, -1]


def packed() -> torch.Tensor:
    return ops.pack([random(*size) for size in SIZES], DIMS, 3, True).detach().requires_grad_()


def sealed() -> tuple:
    """What four ranks with one seal have summed."""
    seal = torch.tensor(5)
    return torch.randn(B, L), 4 * ops.seal_digits(seal, torch.float32, 4), seal, 4, "", "layer"


def group_of_one() -> str:
    """Of Gloo."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return dist.group.WORLD.group_name


@pytest.fixture(scope="module", autouse=True)
def closed():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


# Of operators that are told a grid or a group: alone, where they send nothing.
CASES = {
    "qkv_projection": lambda: (
        (random(B, L, D), random(B, S, D), random(B, S, D), *list(blocks(1, 1).values())[:6]),
        {"batch_first": False},
    ),
    "partial_attention": lambda: (
        (random(B, H, L, d), random(B, K, S, d), random(B, K, S, 3), random(H, L, S)),
        dropped(),
    ),
    "partial_attention_backward": backward_arguments,
    "dropout_keep_mask": lambda: ((torch.tensor([3]), 0.5, [1, 2, 3, 4], [0, 1, 2]), {}),
    "merge_partials": lambda: ((random(3, B, H, L, d), random(3, B, H, L)), {}),
    "pack": lambda: (([random(*size) for size in SIZES], DIMS, 3, True), {}),
    "unpack": lambda: ((packed(), list(itertools.chain(*SIZES)), DIMS, 3, True), {}),
    "all_gather": lambda: ((random(B, L), 1, 1, ""), {}),
    "reduce_scatter": lambda: ((random(B, L), 1, 1, ""), {}),
    "all_to_all": lambda: ((random(B, L), 0, 1, 1, ""), {}),
    "_all_to_all_pairs": lambda: ((torch.randn(B, L), [B], [B], group_of_one()), {}),
    "_all_gather_pairs": lambda: ((torch.randn(B, L), 1, group_of_one()), {}),
    "all_reduce": lambda: ((random(B, L), 1, ""), {}),
    "hierarchical_all_gather": lambda: ((random(B, 2, L, 3), 1, 3, [1, 1, 0, 0], "", ""), {}),
    "shard_activations": lambda: ((random(B, L, D), True, [1, 1, 0, 0], ""), {}),
    "gather_activations": lambda: ((random(B, L, D), L, True, [1, 1, 0, 0], ""), {}),
    "project_activations": lambda: (
        (random(B, L, D), [random(3, D), random(5, D)], [random(3), None], L, True, [1, 1, 0, 0], ""),
        {},
    ),
    "sum_activations": lambda: ((random(B, L, D), random(D), True, [1, 1, 0, 0], ""), {}),
    "seal": lambda: (([random(B, L), random(D)], [1, 2], "layer", torch.tensor(5)), {}),
    "seal_digits": lambda: ((torch.tensor(5), torch.float32, 4), {}),
    "seal_verdict": lambda: ((*sealed()[1:4], torch.zeros(2, dtype=torch.int64)), {}),
    "opened": lambda: (sealed(), {}),
    "enter": lambda: (enter(1, 1, "slices"), {}),
    "leave": lambda: (leave(1, 1, "slices", gated=True), {"after": after(), "scores": random(B, H, L, S + 2)}),
    "attention": lambda: (attention(1, 1, "slices"), {}),
    "leave_with_weights": lambda: (
        leave(1, 1, "slices"),
        {"average": False, "after": after()[1:], "scores": random(B, H, L, S + 2)},
    ),
    "leave_with_cache": lambda: ((*leave(1, 1, "batch", gated=True), *cache([], 0, batch=B)), {"after": after()}),
    "cache_append": lambda: ((*cache([], 0), random(3, K, L, d), random(3, K, L, d), L), {}),
    "cache_select": lambda: (
        (*cache([torch.randn(3, K, 8, d), torch.randn(3, K, 8, d)], L), torch.tensor([2, 0, 0]), ""),
        {},
    ),
    "rotary": lambda: ((random(B, H, L, d), random(B, 1, L, 4), random(1, 1, L, 4), True), {}),
    "head_norm": lambda: ((random(B, H, L, d), random(d), 1e-6), {}),
    "norm_rotary": lambda: (
        (
            random(B, H, L, d),
            random(B, K, S, d),
            [random(d), random(d)],
            1e-6,
            [random(B, 1, L, 4), random(B, 1, L, 4)],
            [random(1, 1, S, 4), random(1, 1, S, 4)],
            True,
        ),
        {},
    ),
    "replicated": lambda: (([random(B, L), random(D)], 1, ""), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    torch.manual_seed(0)
    args, kwargs = CASES[name]()
    torch.library.opcheck(getattr(ops, name).default, args, kwargs)


@pytest.mark.parametrize("name", CASES)
def test_opcheck_without_gradients(name):
    torch.manual_seed(0)
    args, kwargs = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, CASES[name]())
    torch.library.opcheck(getattr(ops, name).default, args, kwargs)


def test_every_operator_is_checked():
    names = {name.removeprefix("two_level_mha::") for name in torch._C._dispatch_get_all_op_names()
             if name.startswith("two_level_mha::")}  # fmt: skip
    assert names == CASES.keys()


def on_ranks(name: str, n: int, m: int) -> None:
    build = {"enter": enter, "attention": attention}.get(name, leave)
    for scheme in SCHEMES:
        # only this one: the others stumble over torch's own wait_tensor, which returns what it was given
        torch.library.opcheck(
            getattr(ops, name).default, build(n, m, scheme), test_utils=("test_aot_dispatch_dynamic",)
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["enter", "leave", "attention", "leave_with_weights"])
def test_tracing_on_a_grid(pool, name):
    """With the exchanges and their adjoints in the graph, with symbolic sizes, per scheme: the eager numbers."""
    pool.run(on_ranks, 4, name, 2, 2, timeout=180)
