"""Lint of csrc: its folders are floors, and an include runs down or stays on its floor, never up. A type or inline
function has its name alone, since the linker takes one of two of a name, whichever, and says nothing.

    python tools/check_csrc.py [CSRC]

Prints what breaks a rule, a line each, and exits 1.
"""

import re
import sys
from pathlib import Path

# The ground first. "" is csrc itself: ops.cpp and python.cpp. A folder inside one of these has its own floor.
FLOORS = ("base", "plan", "comm", "head", "attend", "pass", "")
NO_TORCH = ("base/arithmetic.h", "base/host_device.h", "plan")
TORCH = re.compile(r"^(ATen|c10|torch)/")
INCLUDE = re.compile(r'^#include ["<]([^">]+)[">]', re.MULTILINE)
UNNAMED = re.compile(r"^namespace \{$.*?^\}  // namespace$", re.MULTILINE | re.DOTALL)
DEFINED = re.compile(r"^(?:struct|class|enum(?: class)?)(?: alignas\(\w+\))? (\w+)[^;({]*\{", re.MULTILINE)
INLINE = re.compile(r"^(?:inline|constexpr|TLM_HOST_DEVICE) [^;={(]*?(\w+\([^)]*\))", re.MULTILINE)


def sources(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh"))


def floor(folder: str) -> int:
    """The number of a folder's floor. Raises ValueError for a folder that has none."""
    while folder not in FLOORS and "/" in folder:
        folder = folder.rpartition("/")[0]
    return FLOORS.index(folder)


def includes_up(root: Path) -> list[str]:
    """A line for each include that runs up, and for each of torch where there is to be none."""
    found = []
    for file in sources(root):
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


def defined_twice(root: Path) -> list[str]:
    """A line for each type and inline function that two files define, outside of unnamed namespaces."""
    where: dict[str, list[str]] = {}
    for file in sources(root):
        text = UNNAMED.sub("", file.read_text())
        for name in sorted({re.sub(r"\s+", " ", name) for rule in (DEFINED, INLINE) for name in rule.findall(text)}):
            where.setdefault(name, []).append(file.relative_to(root).as_posix())
    return [f"{name} is defined in {' and in '.join(files)}" for name, files in where.items() if len(files) > 1]


if __name__ == "__main__":
    csrc = Path(sys.argv[1] if len(sys.argv) > 1 else "csrc")
    lines = includes_up(csrc) + defined_twice(csrc)
    print("\n".join(lines) or "includes run down, names stand once")
    sys.exit(bool(lines))
