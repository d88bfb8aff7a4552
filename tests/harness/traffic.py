"""What a call sends by axis: as the table of csrc/plan/traffic.h has it, and as it was recorded."""

from two_level_mha import _C


def by_axis(sent, n, m):
    """{axis: (bytes, collectives)}; a grid with one axis has one group."""
    axes = {}
    for axis, size, count in sent:
        axis = "grid" if 1 in (n, m) else axis
        total_size, total_count = axes.get(axis, (0, 0))
        axes[axis] = (total_size + size, total_count + count)
    return axes


def table(scheme, call, m):
    """What the C++ table says by axis, forward and backward."""
    return [
        by_axis([(r["axis"], r["bytes"] + r["bias_bytes"], r["collectives"]) for r in rows], call.n, m)
        for rows in _C.traffic(scheme, call).values()
    ]


def recorded(record, groups, n, m):
    """What a rank was seen to send by axis, forward and backward."""
    names = dict(zip(groups, ("slice", "head", "grid"), strict=True))
    return [
        by_axis([(names[c.group], c.sent, 1) for c in record.calls if c.backward == backward], n, m)
        for backward in (False, True)
    ]
