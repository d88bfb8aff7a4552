"""benchmarks/scale.py: what one rank does as ranks grow, and what its limits are."""

import scale


def test_a_rank_of_many_does_its_share():
    """E. Localises: FLOPs of a rank that do not shrink with the number of ranks, up to 1024."""
    for name, way in scale.WAYS.items():
        for ranks in (16, 1024):
            layout = scale.layout_of(ranks, way)
            found = scale.on_fake_rank(ranks // 2, ranks, lambda layout=layout: scale.recorded(layout))
            whole = scale.model_flops(scale.SEED, causal=False, training=False)
            assert 1.0 <= found["flops"] * ranks / whole < 1.01, (name, ranks)


def test_limits():
    """E. Localises: a limit of the benchmark that cannot be missed."""
    rows = [{"case": "x", "way": "batch", "ranks": 16, "flops_over_share": 1.0}]
    held = {"make_ms": 1.0, "model_python_bytes": 100, "call_ms": 1.0}
    rows += [{"case": "y", "way": "overhead", "ranks": ranks, **held} for ranks in (64, 1024)]
    assert scale.problems(rows) == []
    rows[0]["flops_over_share"] = 1.2
    rows[2] |= {"call_ms": 2.0, "model_python_bytes": 200}
    assert len(scale.problems(rows)) == 3
