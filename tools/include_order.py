"""Lint of csrc: its folders are floors, and an include runs down or stays on its floor, never up.

    python tools/include_order.py [CSRC]

Prints each include that breaks the rule and exits 1.
"""

import re
import sys
from pathlib import Path

# The ground first. "" is csrc itself: ops.cpp and python.cpp. A folder inside one of these has its own floor.
FLOORS = ("base", "plan", "comm", "head", "attend", "pass", "")
NO_TORCH = ("base/arithmetic.h", "base/host_device.h", "plan")
TORCH = re.compile(r"^(ATen|c10|torch)/")
INCLUDE = re.compile(r'^#include ["<]([^">]+)[">]', re.MULTILINE)


def floor(folder: str) -> int:
    """The number of a folder's floor. Raises ValueError for a folder that has none."""
    while folder not in FLOORS and "/" in folder:
        folder = folder.rpartition("/")[0]
    return FLOORS.index(folder)


def problems(root: Path) -> list[str]:
    """A line for each include that runs up, and for each of torch where there is to be none."""
    found = []
    for file in sorted(path for path in root.rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")):
        name = file.relative_to(root).as_posix()
        for included in INCLUDE.findall(file.read_text()):
            target = (file.parent / included).resolve()
            if target.is_file() and target.is_relative_to(root.resolve()):
                above = target.parent.relative_to(root.resolve()).as_posix().removeprefix(".")
                here = file.parent.relative_to(root).as_posix().removeprefix(".")
                if floor(above) > floor(here):
                    found.append(f"{name} includes {included}: {above or 'csrc'}/ stands above {here}/")
            elif TORCH.match(included) and name.startswith(NO_TORCH):
                found.append(f"{name} includes {included}: no torch there")
    return found


if __name__ == "__main__":
    lines = problems(Path(sys.argv[1] if len(sys.argv) > 1 else "csrc"))
    print("\n".join(lines) or "includes run down")
    sys.exit(bool(lines))
