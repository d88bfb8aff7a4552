"""Peak host memory of load_pretrained, of the cases and by the measure of benchmarks/loading.py."""

import loading as benchmark
import pytest

pytestmark = pytest.mark.cpu_only("it measures the host's memory")


@pytest.mark.slow
@pytest.mark.parametrize("case", benchmark.CASES, ids=[case.name for case in benchmark.CASES])
def test_peak_memory(pool, case, tmp_path):
    """Above 1.15 shares of a model of more than 1 GB, something is read whole, twice, or ahead."""
    assert benchmark.write(case, str(tmp_path)) > 1e9
    for row in pool.run(benchmark.measure, 4, case, str(tmp_path), timeout=300):
        assert row["peak"] <= benchmark.LIMIT * row["share"], row
