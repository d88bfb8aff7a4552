"""What tools/check_cuda.py reads in the assembler's report. Compiling is its own business, in CI."""

import runpy
from pathlib import Path

TOOL = Path(__file__).resolve().parents[2] / "tools" / "check_cuda.py"
REPORT = """\
ptxas info    : Compiling entry function '_Z4packPf' for 'sm_90a'
ptxas info    : Function properties for _Z4packPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 31 registers, used 1 barriers, 64 bytes smem
ptxas info    : Compiling entry function '_Z5mergePf' for 'sm_90a'
ptxas info    : Function properties for _Z5mergePf
    {} bytes stack frame, {} bytes spill stores, 0 bytes spill loads
"""


def test_kernels_in_local_memory_are_named():
    """Localises: a kernel that spills and passes, or a report that is read as that of none."""
    read = runpy.run_path(str(TOOL))["in_local_memory"]
    assert read(REPORT.format(0, 0)) == []
    assert read(REPORT.format(8, 0)) == ["_Z5mergePf: 8 bytes stack frame"]
    assert read(REPORT.format(16, 24)) == ["_Z5mergePf: 16 bytes stack frame, 24 bytes spill stores"]
    assert read("") == ["the report names no kernel"]
