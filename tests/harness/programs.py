"""Programs that tests start as users do."""

import os
from pathlib import Path

import two_level_mha

# where the package that is tested was imported from: src/, or what it is installed in
PACKAGES = Path(two_level_mha.__file__).resolve().parents[1]


def environment(*folders: Path, **variables: str) -> dict[str, str]:
    """This process's, for a program that imports the same package, and what lies in `folders`; without a rank."""
    path = [*map(str, folders), str(PACKAGES), os.environ.get("PYTHONPATH", "")]
    mine = {name: value for name, value in os.environ.items() if name != "RANK"}
    return mine | {"PYTHONPATH": os.pathsep.join(filter(None, path))} | variables
