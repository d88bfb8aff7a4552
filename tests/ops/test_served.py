"""Which kernel serves which call on GPUs: the whole product of what calls may ask, against rules of this file's own."""

import itertools
from functools import cache
from pathlib import Path

import pytest

from two_level_mha import _C
from two_level_mha.commands import H100_CUDNN
from two_level_mha.served import CALLS, COLUMNS, request_of, served, table_of

NAMES = [row["name"] for row in _C.kernels()]
ROOT = Path(__file__).resolve().parents[2]
DTYPES = ["bfloat16", "float32", "float64"]
WIDTHS = [(64, 64), (128, 200), (256, 256), (264, 40)]  # d_qk, d_v
LENGTHS = [(1, 256), (128, 128), (128, 256), (256, 128)]  # L, S
CAUSAL = [None, -256, -1, 0, 64, 128]
WINDOWS = [None, 16, 100000]
STRIDES = [1, 2]
SCORES = [{}, {"softcap": True}, {"dropout": True}]
MASKS = [{}, {"mask": "bool", "mask_rows": True}, {"mask": "bool"}, {"mask": "additive", "mask_rows": True}]
BACKWARD = {"backward": True}
GRADIENTS = [{}, BACKWARD, BACKWARD | {"grad_logsumexp": True}, BACKWARD | {"grad_mask": True}]


@cache
def keys_of(row: int, S: int, causal: int | None, window: int | None, key_stride: int) -> tuple[int, int]:
    """First and end of the keys that a row sees, each asked for by itself."""
    last = 0 if causal is None else row + causal
    seen = [
        s
        for s in range(S)
        if causal is None or (s * key_stride <= last and (window is None or s * key_stride > last - window))
    ]
    return (seen[0], seen[-1] + 1) if seen else (0, 0)


@cache
def sees(L: int, S: int, causal: int | None, window: int | None, key_stride: int) -> str:
    """What a call's rows see: nothing, one range, a square of keys, some other form, or past the last key."""
    ranges = [keys_of(row, S, causal, window, key_stride) for row in range(L)]
    if set(ranges) == {(0, 0)}:
        return "nothing"
    if len(set(ranges)) == 1:
        return "one range"
    hides = any(begin > 0 for begin, _ in ranges)
    if window is not None and hides and (L - 1 + causal) // key_stride >= S:
        return "past the last key"
    return "square" if causal == 0 and key_stride == 1 and not hides else "other"


def by_rules(dtype, d_qk, d_v, L, S, visible, options, arch, offset_windows) -> str:
    """The kernel that has to serve a call on a GPU of sm_80 or newer."""
    form = sees(L, S, *visible)
    if dtype == "float64" or form == "nothing" or options.keys() & {"softcap", "dropout", "grad_mask"}:
        return "chunked"
    if form == "past the last key":
        return "chunked"
    width = -(-max(d_qk, d_v) // 8) * 8
    if dtype != "float32" and width <= 256 and not options.keys() & {"mask", "grad_logsumexp"}:
        most = {90: 256, 100: 128}.get(arch, 0)
        return "aten_cudnn" if form in ("square", "one range") and L > 1 and width <= most else "aten_flash"
    causal, window, _ = visible
    wrong = form == "other" and window is not None and window < L and causal > 0 and not offset_windows
    return "chunked" if wrong and "backward" in options else "aten_efficient"


@pytest.mark.parametrize("offset_windows", [True, False], ids=["torch 2.15", "torch 2.11"])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_call_is_served_by_the_rules(arch, offset_windows):
    """Localises: a call that no kernel serves, or another than the rules give: chunked, where one of ATen's could."""
    machine = _C.Machine(cuda=True, arch=arch, cudnn=H100_CUDNN, offset_windows=offset_windows)
    heads = itertools.cycle([8, 2])
    seen = set()
    product = itertools.product(DTYPES, WIDTHS, LENGTHS, CAUSAL, WINDOWS, STRIDES, SCORES, MASKS, GRADIENTS)
    for dtype, (d_qk, d_v), (L, S), causal, window, key_stride, score, mask, gradients in product:
        if (window and causal is None) or (key_stride > 1 and "dropout" in score):  # the operator refuses these
            continue
        if "grad_mask" in gradients and mask.get("mask") != "additive":
            continue
        options = score | mask | gradients
        if L == 1:
            options = {name: value for name, value in options.items() if name != "mask_rows"}
        visible = (causal, window, key_stride)
        request = request_of(
            dtype, K=next(heads), L=L, S=S, d_qk=d_qk, d_v=d_v, causal=causal, window=window, key_stride=key_stride,
            **options,
        )  # fmt: skip
        chosen, others = _C.serving(request, machine)
        expected = by_rules(dtype, d_qk, d_v, L, S, visible, options, arch, offset_windows)
        assert chosen == expected, (dtype, d_qk, d_v, L, S, visible, options)
        assert not any(others[name].startswith("comes after") for name in NAMES[: NAMES.index(chosen)]), others
        seen.add(chosen)
    assert seen == {"aten_flash", "aten_efficient", "chunked"} | ({"aten_cudnn"} if arch >= 90 else set())


def test_what_info_and_the_docs_say():
    """Localises: docs/kernels.md behind the rules; a call or a column that the table of `info` leaves out."""
    machine = _C.Machine(cuda=True, arch=90, cudnn=H100_CUDNN)
    rows = served(machine)
    assert list(rows) == list(CALLS) and all(list(row) == list(COLUMNS) for row in rows.values())
    page = (ROOT / "docs" / "kernels.md").read_text()
    for name, line in table_of(machine).items():
        assert f"{name:{max(map(len, CALLS))}}  {line}".rstrip() in page, name
