"""The bytes that multi-head latent attention sends are those of the table, forward and backward, with a cache of
latents and without (level E); and what the planner makes of them.
"""

import pytest
import torch
from harness.calls import mesh
from harness.decoders import LATENT, make
from harness.traffic import recorded, table
from transformers import DynamicCache

import two_level_mha as tlm
from two_level_mha import _C
from two_level_mha.mesh import Grid
from two_level_mha.plan_text import LATENT as SIZES
from two_level_mha.testing import record_collectives

# (model, ranks): one head group for each head, or as many as ranks and heads share; slices that are filled up.
LAYERS = [
    ("deepseek v3", 2), ("deepseek v3", 4), ("deepseek v3 without q's", 3), ("6 heads", 4),
    pytest.param("deepseek v3", 8, marks=pytest.mark.slow),
]  # fmt: skip
# scheme, combine, cache, tokens that it has, new ones, of how many sequences, dtype
CALLS = [
    *(
        (scheme, combine, None, 0, 7, 3, torch.float64)
        for scheme in ("slices", "sequence", "batch", "weights")
        for combine in ("reduce", "concat")
    ),
    ("auto", "reduce", "position", 0, 7, 2, torch.float64),
    ("auto", "reduce", "position", 9, 1, 2, torch.float64),
    ("auto", "concat", "position", 5, 3, 1, torch.float32),
    ("auto", "reduce", "position", 5, 3, 2, torch.bfloat16),
    ("auto", "reduce", "batch", 5, 3, 4, torch.float64),
]


def numbers(name: str) -> list[int]:
    """The sizes of a model's latent attention, as the table takes them."""
    config = LATENT[name][1]
    return [config[field] or 0 for field in SIZES]


def call_of(name, ranks, combine, position, length, batch, dtype):
    """The call as the C++ table takes it, and its number of slices."""
    rank, nope, rope, value, query_rank = sizes = numbers(name)
    heads = LATENT[name][1].get("num_attention_heads", 4)
    n, m = (grid := Grid(1, ranks).for_whole_heads(heads)).head_groups, grid.slices
    d = m * -(-max(nope + rope, value) // m)
    call = _C.Call(B=batch, L=length, S=position + length, H=heads // n, K=heads // n, d=d, m=m)
    fields = {"n": n, "D": query_rank or 32, "out_dim": 32, "key_dim": rank, "value_dim": rank, "latent": sizes}
    fields |= {
        "element_size": dtype.itemsize,
        "concat": combine == "concat",
        "position": position,
        "inputs": 2,
        "causal": True,
    }
    for field, x in fields.items():
        setattr(call, field, x)
    return call, m


def sent(name, ranks, calls):
    """What one layer sends in each call, and by which scheme: of inference, and of training."""
    found = []
    for scheme, combine, layout, position, length, batch, dtype in calls:
        options = {"scheme": scheme, "combine": combine, "cache": layout or "position", "rest": False, "overlap": 1}
        model = tlm.parallelize(make(name, dtype), mesh((1, ranks)), **options)
        layer, passes = model.model.layers[0].self_attn, []
        for training in (False, True):
            for _ in range(2):  # the ranks compare their inputs in the first call
                x = torch.randn(batch, position + length, 32, dtype=dtype)
                angles = model.model.rotary_emb(x, torch.arange(position + length).expand(batch, -1))
                cache = None if layout is None else DynamicCache()
                if position:
                    with torch.no_grad():
                        layer(x[:, :position], tuple(a[:, :position] for a in angles), None, past_key_values=cache)
                x = x[:, position:].clone().requires_grad_(training)
                own = tuple(a[:, position:] for a in angles)
                model.requires_grad_(training)
                with torch.set_grad_enabled(training), record_collectives() as record:
                    y, _ = layer(x, own, None, past_key_values=cache)
                    if training:
                        y.sum().backward()
            passes.append(recorded(record, layer.place.groups, layer.place.grid.head_groups, layer.place.grid.slices))
        found.append(passes)
    return found


@pytest.mark.parametrize("name, ranks", LAYERS)
def test_bytes_are_the_table(pool, name, ranks):
    """E. Localises: an exchange too many, or too wide, of latent attention, per scheme, cache and direction."""
    for rank, per_call in enumerate(pool.run(sent, ranks, name, ranks, CALLS, timeout=400)):
        for asked, (inference, training) in zip(CALLS, per_call, strict=True):
            scheme, combine, layout, position, length, batch, dtype = asked
            call, m = call_of(name, ranks, combine, position, length, batch, dtype)
            if layout is not None:
                scheme = "batch" if layout == "batch" else "position" if position else "auto"
            if scheme == "auto":
                scheme = _C.resolve_scheme("auto", call, tlm.Profile.for_device("cpu").numbers)
            call.sealed = scheme != "position"
            forward, backward = table(scheme, call, m)
            assert inference == [forward, {}], (rank, asked)
            call.training = True
            forward, backward = table(scheme, call, m)
            assert training == [forward, backward], (rank, asked)


DEEPSEEK = {
    "embed_dim": 7168, "num_heads": 128, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128,
}  # fmt: skip


def test_numbers_of_a_plan():
    """E. Localises: weights that every rank has whole, what a cache of latents keeps, FLOPs of queries on latents."""
    plan = tlm.plan(**DEEPSEEK, ranks=16, batch=4, seq=4096, decode=True)
    assert [(option.grid, option.scheme) for option in plan.options] == [((16, 1), "batch"), ((16, 1), "position")]
    batch, position = plan.options
    H, D, R, Q, N, T, V = 8, 7168, 512, 1536, 128, 64, 128
    whole = D * (R + T + Q) + R + Q
    assert position.weight_bytes == batch.weight_bytes == 2 * (whole + H * ((N + T) * Q + (N + V) * R + V * D))
    assert position.cache_bytes == 4 * 4096 // 16 * (R + T) * 2
    assert batch.cache_bytes == 4 * 4096 * 2 * H * (N + T) * 2
    assert position.attention_flops == 4 * (4096 // 16) * 128 * 2 * (R + T + R)
    absorbed = H * ((N + T) * Q + N * R + R * V + V * D)
    assert position.projection_flops == 4 * 2 * (D * (R + T + Q) + absorbed)
    assert [row.what for row in position.forward] == ["queries of all heads", "merge", "combine"]
    tokens = 4 * H * 15
    sent = tokens * (R + T) * 2 + tokens * (R + 1) * 4 + 2 * 4 * D * 2 * 15 // 16
    assert position.sent_bytes() == sent
    prefill = tlm.plan(**DEEPSEEK, ranks=16, batch=1, seq=4096)
    assert [option.grid for option in prefill.options] == [(16, 1)] and prefill.pick.name == "grid (16, 1)"
    assert [row.what for row in prefill.pick.forward] == ["combine"]


def test_what_does_not_fit():
    """Localises: sizes of latent attention that are taken for others without a word."""
    for more, words in (
        ({"head_dim": 192}, "leave out head_dim"),
        ({"v_head_dim": None}, "give v_head_dim too"),
        ({"kv_lora_rank": 0}, "kv_lora_rank must be a positive integer"),
        ({"activations": "sequence"}, "activations='replicated' alone"),
        ({"qk_nope_head_dim": 2**62, "qk_rope_head_dim": 2**62}, "too large to price"),
        ({"q_lora_rank": 2**50}, "too large to price"),
    ):
        with pytest.raises(tlm.GridError, match=words):
            tlm.plan(**DEEPSEEK | more, ranks=16, batch=1, seq=64)
