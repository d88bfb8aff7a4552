"""Whole models on 3 and 6 ranks, which do not divide their heads of 8 columns, against stock in float64 (level T).

With tests/modules/test_uneven_modules.py green a failure is in what is around attention: files, caches, MLPs.
"""

import pytest
import torch
from harness import decoders
from harness.decoders import EXACT, pair, prompt

GRIDS = [(1, 3), (2, 3)]
NAMES = ["llama", "qwen3"]


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
@pytest.mark.parametrize("rest", [False, True])
def test_decoders(pool, grid, rest):
    """Logits, gradients, a cache, generate(). rest: transformers' own split of MLPs and head on as many ranks."""
    for failed in pool.run(everything, grid[0] * grid[1], grid, rest, timeout=240):
        assert not failed, "\n".join(failed)
