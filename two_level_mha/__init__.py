"""Exact multi-head attention split over more ranks than it has heads."""

from two_level_mha._load import PACKAGE, load

load()

__version__ = "0.1.0"
cmake_prefix_path = str(PACKAGE / "share" / "cmake")
