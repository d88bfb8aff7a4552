"""Whatever shape, mask, grid and scheme: TwoLevelAttention is the unsplit reference, float64, level T.

hypothesis draws the calls, the same ones in every run; a failure prints the smallest call it found.
"""

import pytest
from harness.two_level_attention import Decoder, off
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import two_level_mha as tlm
from two_level_mha import _C

RANKS = 4
GRIDS = ((4, 1), (2, 2), (1, 4))
BOUNDED = {
    "deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck),
}  # fmt: skip


@st.composite
def calls(draw) -> tuple[tuple[int, int], Decoder, dict]:
    """A grid of four ranks, a call that it takes, and the scheme and combine."""
    n, m = grid = draw(st.sampled_from(GRIDS))
    K, repeats = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    heads, kv_heads = n * K * repeats, n * K
    head_dim = m * draw(st.integers(1, 3)) * (1 if m == 4 else 4)
    schemes = ["slices", "sequence", "batch", "weights", "auto"]
    if _C.whole_heads_fit(K * repeats, K, m):
        schemes.append("heads")
    rope = None
    if head_dim % 2 == 0 and draw(st.booleans()):
        width = 2 * draw(st.integers(1, head_dim // 2))
        rope = tlm.Rotary(50.0, width, draw(st.booleans()))
    is_causal = draw(st.booleans())
    options = {
        "rope": rope,
        "bias": draw(st.sampled_from([False, True, "qkv", "out"])),
        "qk_norm": draw(st.sampled_from([None, 1e-2])),
        "softcap": draw(st.sampled_from([None, 1.0])),
        "scale": draw(st.sampled_from([None, 0.4])),
        "window": draw(st.integers(1, 6)) if is_causal and draw(st.booleans()) else None,
        "dropout": draw(st.sampled_from([0.0, 0.3])),
    }
    case = Decoder(
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, embed_dim=draw(st.integers(1, 9)),
        options={name: value for name, value in options.items() if value is not None},
        batch=draw(st.integers(1, 6)), length=draw(st.integers(1, 13)), is_causal=is_causal,
        mask=draw(st.sampled_from([None, "bias", "documents", "left padding", "empty rows"])),
    )  # fmt: skip
    return (
        grid,
        case,
        {"scheme": draw(st.sampled_from(schemes)), "combine": draw(st.sampled_from(["reduce", "concat"]))},
    )


def off_call(grid, case: Decoder, options: dict) -> dict[str, float]:
    return off(case, grid, **options)


def check(pool, call) -> None:
    grid, case, options = call
    assert pool.run(off_call, RANKS, grid, case, options) == [{}] * RANKS


@settings(max_examples=40, **BOUNDED)
@given(call=calls())
def test_calls(pool, call):
    """T. Localises: what no listed case has: a combination of sizes, masks, options, scheme and grid."""
    check(pool, call)


@pytest.mark.slow
@settings(max_examples=400, **BOUNDED)
@given(call=calls())
def test_many_calls(pool, call):
    """T. Localises: as above, ten times as many."""
    check(pool, call)
