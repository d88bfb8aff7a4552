"""Whole models on 3 and 6 ranks, which do not divide their heads of 8 columns, against stock in float64 (level T).

With tests/modules/test_uneven_modules.py green a failure is in what is around attention: files, caches, MLPs.
"""

import pytest
import torch
from harness import decoders, encoders
from harness.calls import mesh
from harness.decoders import EXACT, pair, prompt

GRIDS = [(1, 3), (2, 3)]
NAMES = ["llama", "qwen3"]
# norms over all heads, fused projections, sinks, gates
FORMS = ["olmo2", "phi3", "falcon 40b", "gpt neox", "gpt oss", "qwen3 next"]


def everything(grid, rest: bool) -> list[str]:
    options = {"rest": rest}
    failed = []
    for what, found in (
        ("logits", decoders.logits_off(NAMES, grid, options, EXACT)),
        ("gradients", decoders.gradients_off(NAMES, grid, False, options)),
    ):
        failed += [f"{what} of {name}: {max(errors)}" for name, errors in found.items() if not max(errors) <= 1e-9]
    ids, keep = prompt()
    for name in NAMES:
        tokens = [
            model.generate(ids, attention_mask=keep, max_new_tokens=12, do_sample=False, pad_token_id=0)
            for model in pair(name, grid, tuple(EXACT.items()), **options)
        ]
        if not torch.equal(*tokens):
            failed.append(f"tokens of {name}")
    return failed


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("rest", [pytest.param(False, marks=pytest.mark.slow), True])
def test_decoders(pool, grid, rest):
    """Logits, gradients, a cache, generate(). rest: transformers' own split of MLPs and head on as many ranks."""
    for failed in pool.run(everything, grid[0] * grid[1], grid, rest, timeout=240):
        assert not failed, "\n".join(failed)


def forms(grid) -> list[str]:
    options = {"rest": False}
    found = decoders.logits_off(FORMS, grid, options, EXACT)
    grads = decoders.gradients_off(FORMS, grid, False, options)
    return [
        f"{what} of {name}: {max(errors)}"
        for what, errors_of in (("logits", found), ("gradients", grads))
        for name, errors in errors_of.items()
        if not max(errors) <= (1e-5 if name == "gpt oss" else 1e-9)  # its router is in float32
    ]


def test_forms(pool):
    """Localises: what is shared by the ranks of a slice group, or read by columns, beside attention itself."""
    for failed in pool.run(forms, 3, (1, 3), timeout=400):
        assert not failed, "\n".join(failed)


def encoders_off(grid) -> list[dict[str, float]]:
    kinds = ("BertModel", "ViTModel")
    return [encoders.errors(encoders.make(kind).train(), (), encoders.inputs(kind), mesh(grid)) for kind in kinds]


@pytest.mark.parametrize("grid", [(1, 3), (2, 3), (1, 7)])
def test_encoders(pool, grid):
    """Localises: the same for encoders, with heads of 4 columns."""
    for found in zip(*pool.run(encoders_off, grid[0] * grid[1], grid, timeout=240), strict=True):
        encoders.check(list(found))
