"""The lint of csrc: includes run down, names stand once. And the tables that name every file."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def lint(csrc: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "check_csrc.py"), str(csrc)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_csrc_follows_its_rules():
    """Localises: an include from a lower folder of csrc to a higher one, or of torch where there is to be none; two
    types of one name, whose code the linker merges.
    """
    done = lint(ROOT / "csrc")
    assert done.returncode == 0, done.stdout


def test_the_lint_sees_them(tmp_path):
    """Localises: a lint that cannot fail."""
    for name, text in {
        "pass/pass.h": "",
        "comm/exchange.cpp": '#include "../pass/pass.h"\n#include <ATen/ATen.h>\n',
        "plan/grid.h": "#include <ATen/ATen.h>\n",
        "ops.cpp": '#include "pass/pass.h"\nnamespace {\nstruct Grid {};\n}  // namespace\n',
        "base/grid.h": "struct Grid;\nstruct Grid {\n};\ninline int area(int a,\n                int b) {}\n",
        "plan/area.h": "struct Grid final : Base {};\ninline int area(int a) {}\n",
        "comm/area.cpp": "inline int area(int a, int b) {}\n",
    }.items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    done = lint(tmp_path)
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        "comm/exchange.cpp includes ../pass/pass.h: pass/ stands above comm/",
        "plan/grid.h includes ATen/ATen.h: no torch there",
        "Grid is defined in base/grid.h and in plan/area.h",
        "area(int a, int b) is defined in base/grid.h and in comm/area.cpp",
    ]


def test_contributing_names_every_file():
    """Localises: a file or folder that a newcomer finds in no table of CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    modules = [file.name for file in (ROOT / "src" / "two_level_mha").glob("*.py") if file.name != "__init__.py"]
    folders = [f"{path.name}/" for path in (ROOT / "csrc").iterdir() if path.is_dir()]
    assert [name for name in [*modules, *folders] if f"`{name}`" not in text] == []
