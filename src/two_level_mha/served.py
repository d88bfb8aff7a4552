"""Which attention kernel serves which call on a machine, asked of the table that calls are served by."""

from typing import Any

from two_level_mha import _C

L = 1024
# Sizes and options of a call beyond those of its column; what is not named is as many heads, rows and keys as in a
# plain call, which is to say none, B = 1, H = K = 8, L = S = 1024 and d_v = d_qk.
CALLS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": 0},
    "causal, offset": {"causal": L, "S": 2 * L},
    "before the first key": {"causal": -3},
    "window": {"causal": 0, "window": 256},
    "window, offset": {"causal": L, "S": 2 * L, "window": 256},
    "key_stride": {"causal": 0, "key_stride": 2, "S": L // 2},
    "one row (decode)": {"L": 1, "causal": L - 1},
    "bool mask": {"mask": "bool", "mask_rows": True},
    "padding": {"mask": "bool"},
    "additive mask": {"mask": "additive", "mask_rows": True},
    "trained mask": {"mask": "additive", "mask_rows": True, "grad_mask": True},
    "softcap": {"softcap": True},
    "dropout": {"dropout": True},
    "grouped heads": {"K": 2},
    "d_v < d_qk": {"d_v": 16},
    "logsumexp's gradient": {"grad_logsumexp": True},
}
COLUMNS = {
    "half d<=128": ("bfloat16", 128),
    "half d<=256": ("bfloat16", 256),
    "half d>256": ("bfloat16", 512),
    "float32": ("float32", 128),
    "float64": ("float64", 128),
}
SIZES = ("B", "H", "K", "L", "S", "d_qk", "d_v")
GRADIENTS = ("grad_logsumexp", "grad_mask")


def request_of(dtype: str, **given: Any) -> _C.Request:
    """A `_C.Request` of any of its sizes and options; sizes default to those that CALLS is about."""
    width = given.get("d_qk", 128)
    sizes = {"B": 1, "H": 8, "K": 8, "L": L, "S": L, "d_qk": width, "d_v": width}
    sizes |= {name: given.pop(name) for name in SIZES if name in given}
    request = _C.Request(dtype=dtype, **given)
    for name, size in sizes.items():
        setattr(request, name, size)
    return request


def served(machine: _C.Machine) -> dict[str, dict[str, tuple[str, str]]]:
    """Call -> column -> the kernels of its forward and of its backward, by name."""

    def kernels(call: dict[str, Any], dtype: str, width: int) -> tuple[str, str]:
        forward = {name: value for name, value in call.items() if name not in GRADIENTS}
        requests = (
            request_of(dtype, d_qk=width, **forward),
            request_of(dtype, d_qk=width, backward=True, **call),
        )
        first, second = (_C.serving(request, machine)[0] for request in requests)
        return first, second

    return {name: {title: kernels(call, *column) for title, column in COLUMNS.items()} for name, call in CALLS.items()}


def table_of(machine: _C.Machine) -> dict[str, str]:
    """`served` as rows of one line each, under a heading: forward / backward, or the one that does both."""

    def cell(both: tuple[str, str]) -> str:
        first, second = (name.removeprefix("aten_") for name in both)
        return first if first == second else f"{first} / {second}"

    rows = {name: {title: cell(both) for title, both in row.items()} for name, row in served(machine).items()}
    width = {title: max(len(title), *(len(row[title]) for row in rows.values())) for title in COLUMNS}
    lines = {name: "  ".join(f"{text:{width[title]}}" for title, text in row.items()) for name, row in rows.items()}
    return {"": "  ".join(f"{title:{width[title]}}" for title in COLUMNS)} | lines
