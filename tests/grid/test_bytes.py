"""The bytes a rank sends are the table of csrc/plan/traffic.h, exactly, forward and backward, axis by axis (level E).

What was recorded is compared with the table, and with the formulas of the schemes written down here on their own, in
the letters of the README: r = (m - 1) / m of something whole leaves each rank of a slice group.
"""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from harness.device import DEVICE
from harness.layer import ENTER_WEIGHTS, Case, block, decided, grid_arguments, leaves, make, place, random, run
from harness.traffic import recorded, table

import two_level_mha as tlm
from two_level_mha import _C
from two_level_mha.testing import record_collectives

FLAT_SUM_ELEMENTS = 1 << 16
GRIDS = [(1, 1), (2, 1), (1, 2), (2, 2), (2, 4), (4, 2)]
UNEVEN = [(1, 3), (2, 3), (1, 7)]  # slices of 8 columns: 3 3 2, and 2 2 2 2 and three empty ones
SLOW = [GRIDS[-1], UNEVEN[-1]]  # (2, 4) and (2, 3) have more of what is counted
SCHEMES = ("independent", "slices", "sequence", "batch", "heads", "weights")


def ceil_to(size, m):
    return -(-size // m) * m


def padded_rows(case, length, m):
    return ceil_to(length, 2 * m if case.causal is not None else m)


def filled(case, m):
    """Columns of a head as exchanges of slices carry them, the narrower filled up."""
    return ceil_to(case.head_dim, m)


def query_row(case, n, m):
    """Elements of a row of O that a rank sends: of whole heads, or of slices."""
    H = case.heads // n
    return H // m * case.head_dim if case.whole_heads else H * filled(case, m) // m


def deals_batch(case, m):
    return case.scheme == "batch" or case.scheme == "weights" and case.batch % m == 0


def dealt_tokens(case, length, m):
    """Tokens of B x length that one rank of a slice group holds where they are dealt out."""
    if deals_batch(case, m):
        return Fraction(ceil_to(case.batch, m) * length, m)
    return Fraction(case.batch * padded_rows(case, length, m), m)


def exchanged(case, n, m):
    """Elements sent inside the slice group around attention, one direction, without biases."""
    B, L, S, d, D = case.batch, case.length, case.all_keys, filled(case, m), case.embed_dim
    H, K, r = case.heads // n, case.kv_heads // n, Fraction(m - 1, m)
    if case.scheme == "independent" or m == 1:
        return 0
    if case.scheme == "slices":
        return r * B * d * (H * L + K * S)
    if case.scheme == "sequence":
        return r * B * d * (Fraction(2 * H * padded_rows(case, L, m), m) + 2 * K * S)
    if case.scheme == "batch":
        return r * Fraction(ceil_to(B, m), m) * d * (2 * H * L + 2 * K * S)
    if case.scheme == "heads":
        return r * B * d * 2 * K * S / (m if K % m == 0 else 1)
    weights = r * D * d * (H * (1 if case.combine == "concat" else 2) + 2 * K)
    if case.combine == "concat":
        weights += r * d * H * dealt_tokens(case, L, m)
    if not deals_batch(case, m):
        keys = case.keys or case.length
        weights += r * B * case.head_dim * 2 * K * padded_rows(case, keys, m)  # of tokens, whose heads are whole
    return weights


def biases(case, n, m):
    """Elements of biases sent inside the slice group, one direction."""
    if case.scheme != "weights" or m == 1:
        return 0
    H, K = case.heads // n, case.kv_heads // n
    width = (H + 2 * K if case.bias else 0) + (2 * K if case.extra_keys else 0)
    return Fraction(m - 1, m) * filled(case, m) * width


def summed(elements, n, m):
    """Elements sent by a sum over the grid: flat, or in three stages."""
    P = n * m
    if n == 1 or m == 1 or elements < FLAT_SUM_ELEMENTS:
        return Fraction(2 * (P - 1) * elements, P)
    padded = ceil_to(elements, m)
    return Fraction((m - 1) * padded, m) + Fraction(2 * (n - 1) * padded, n * m) + Fraction((m - 1) * padded, m)


def summed_dealt(mine, n, m):
    """Elements sent by a sum over the head axis of a rank's own tokens, then gathered over the slices."""
    return Fraction(2 * (n - 1), n) * mine + (m - 1) * mine


def gathered(local, n, m):
    """Elements sent by the hierarchical all-gather, head axis first."""
    return (n - 1) * local + (m - 1) * n * local


def combined(case, n, m):
    """Elements sent by combine, forward: the sum of y, or the gather of O."""
    if case.combine == "concat":
        return gathered(case.batch * case.length * query_row(case, n, m), n, m)
    if case.scheme == "weights" and m > 1:
        return summed_dealt(dealt_tokens(case, case.length, m) * case.embed_dim, n, m)
    return summed(case.batch * case.length * case.embed_dim, n, m)


def input_gradient(case, n, m):
    """Elements sent by the sum of the inputs' gradients, and of a trained mask's."""
    lengths = [case.length] if case.keys is None else [case.length, case.keys, case.keys]
    if case.scheme == "weights" and m > 1:
        found = summed_dealt(sum(dealt_tokens(case, length, m) for length in lengths) * case.embed_dim, n, m)
    else:
        found = summed(case.batch * sum(lengths) * case.embed_dim, n, m)
    mask = case.heads * case.length * case.all_keys if case.mask == "bias" else 0
    return found + (summed(mask, n, m) if mask else 0)


def call_of(case, n, m, position=0, **more):
    """The call as the C++ table takes it, after `position` tokens whose keys are in a cache."""
    call = _C.Call(
        B=case.batch,
        L=case.length,
        S=position + case.all_keys,
        H=case.heads // n,
        K=case.kv_heads // n,
        d=case.head_dim,
        m=m,
    )
    fields = {
        "n": n,
        "D": case.embed_dim,
        "element_size": case.dtype.itemsize,
        "reduce_size": case.reduce_dtype.itemsize if case.reduce_dtype else 0,
        "causal": case.causal is not None,
        "concat": case.combine == "concat",
        "whole_heads": case.whole_heads,
        "inputs": 1 if case.keys is None else 3,
        "extra_keys": 2 * case.extra_keys,
        "bias": case.bias,
        "bias_kv": case.extra_keys,
        "mask_elements": case.heads * case.length * case.all_keys if case.mask == "bias" else 0,
        "position": position,
        "training": True,
    }
    for name, value in (fields | more).items():
        setattr(call, name, value)
    return call


def rounded(found, expected, n, m):
    """Whether bytes are those expected; where the ranks do not divide them, up to two sums are rounded down."""
    return 0 <= expected - found < (2 if (n, m) in UNEVEN else 1e-9)


def total(axes):
    return sum(size for size, _ in axes.values())


def sent(n, m, cases):
    """What this rank sends in each case, forward and backward."""
    found, at = [], place(n, m)
    for case in cases:
        weights, inputs, mask, weight, seed = make(case)
        leaf = leaves({name: block(name, x, case, at) for name, x in weights.items()}, inputs, mask)
        with record_collectives() as record:
            y = run(case, at, leaf, mask, seed)
            (y * weight).sum().backward()
        found.append((recorded(record, at.groups, n, m), {call.dtype for call in record.calls}))
    return found


BASES = [
    Case(),
    Case(kv_heads=4, length=7, bias=False),
    Case(kv_heads=4, length=9, causal=0, dtype=torch.float32),  # zigzag pads more than plain dealing
    Case(length=5, keys=9, extra_keys=True, mask="bias"),
    Case(batch=4, length=64, embed_dim=256, heads=4, kv_heads=4, dtype=torch.float32),
]


def whole_heads(n, m):
    """Query heads that can be dealt whole."""
    return n * (8 if 8 % m == 0 else 2 * m)


def cases_for(n, m):
    cases = []
    for at, base in enumerate(BASES):
        for scheme in SCHEMES:
            # whole heads: a KV head shared by ranks, or several KV heads a rank
            if scheme == "independent" and base.head_dim % m:
                continue  # refused
            shared = m // 2 if m % 2 == 0 else 1
            whole = {"heads": whole_heads(n, m), "kv_heads": n * (m if at % 2 else shared)} if scheme == "heads" else {}
            cases += [replace(base, scheme=scheme, combine=combine, **whole) for combine in ("reduce", "concat")]
    return cases


@pytest.mark.parametrize(
    "grid", [*GRIDS[:-1], *UNEVEN[:-1], *(pytest.param(grid, marks=pytest.mark.slow) for grid in SLOW)]
)
def test_bytes_are_the_table(pool, grid):
    """E. Localises: an exchange too many, too wide, or of the wrong kind, per scheme, combine and direction."""
    n, m = grid
    cases = cases_for(n, m)
    for rank, per_case in enumerate(pool.run(sent, n * m, n, m, cases, timeout=240)):
        for case, ((forward, backward), _) in zip(cases, per_case, strict=True):
            assert [forward, backward] == table(case.scheme, call_of(case, n, m), m), (rank, case)
            around = exchanged(case, n, m) + biases(case, n, m)
            size = case.dtype.itemsize
            parts = {"forward": (forward, combined), "backward": (backward, input_gradient)}
            for direction, (axes, more) in parts.items():
                expected = size * (around + more(case, n, m))
                assert rounded(total(axes), expected, n, m), (direction, rank, case)


@pytest.mark.parametrize("grid", GRIDS + UNEVEN[:1])
def test_gates(pool, grid):
    """E. Localises: gates that are moved apart from the queries, or are not counted."""
    n, m = grid
    cases = [case for case in cases_for(n, m) if case.scheme != "independent" and case.keys is None]
    cases = [replace(case, gated=True) for case in cases]
    for rank, per_case in enumerate(pool.run(sent, n * m, n, m, cases, timeout=240)):
        for case, (found, _) in zip(cases, per_case, strict=True):
            assert found == table(case.scheme, call_of(case, n, m, gated=True), m), (rank, case)


# collectives around attention and of combine="reduce", "concat", on a grid with both axes
NUMBERS = {
    "independent": (0, 1, 2),
    "slices": (1, 1, 2),
    "sequence": (2, 1, 2),
    "batch": (2, 1, 2),
    "heads": (1, 1, 2),
    "weights": (2, 2, 2),  # the weights of q, k, v, then W_O or for concat O; over the heads, then over the slices
}


def test_numbers_of_collectives(pool):
    """E. Localises: exchanges that should be packed into one and are not."""
    cases = [Case(scheme=scheme, combine=combine) for scheme in SCHEMES for combine in ("reduce", "concat")]
    for per_case in pool.run(sent, 4, 2, 2, cases):
        for case, ((forward, backward), _) in zip(cases, per_case, strict=True):
            around, reduce, concat = NUMBERS[case.scheme]
            counts = [sum(count for _, count in axes.values()) for axes in (forward, backward)]
            combine = concat if case.combine == "concat" else reduce
            assert counts == [around + combine, around + (2 if case.scheme == "weights" else 1)], case


def test_sums_travel_in_reduce_dtype(pool):
    """E. Localises: reduce_dtype: the sums and only the sums go in it."""
    cases = [
        Case(scheme=scheme, dtype=torch.bfloat16, reduce_dtype=torch.float32, bias=False)
        for scheme in ("slices", "heads", "weights")
    ]
    for per_case in pool.run(sent, 4, 2, 2, cases):
        for case, (found, dtypes) in zip(cases, per_case, strict=True):
            assert dtypes == {torch.bfloat16, torch.float32}
            assert found == table(case.scheme, call_of(case, 2, 2), 2), case


WIDTHS = {"kdim": 6, "vdim": 14}


def with_weights(n, m, cases):
    """What a module that returns attention weights sends; kdim and vdim differ from D."""
    found, mesh = [], tlm.init_mesh(DEVICE, (n, m))
    for case, average in cases:
        layer = tlm.TwoLevelMultiheadAttention(
            case.embed_dim, case.heads, batch_first=True, dtype=case.dtype, mesh=mesh, scheme=case.scheme, **WIDTHS
        )
        query = random((case.batch, case.length, case.embed_dim), case.dtype).requires_grad_()
        key, value = (random((case.batch, case.keys, w), case.dtype).requires_grad_() for w in WIDTHS.values())
        for _ in range(2):  # the ranks compare their inputs in the first call
            with record_collectives() as record:
                y, weights = layer(query, key, value, average_attn_weights=average)
                (y.sum() + weights.square().sum()).backward()
        found.append((recorded(record, layer.place.groups, n, m), tuple(weights.shape)))
    return found


@pytest.mark.parametrize("grid", GRIDS[1:])
def test_attention_weights_and_other_widths(pool, grid):
    """E. Localises: the exchanges of need_weights, and kdim, vdim in the rows of weights and dX."""
    n, m = grid
    h, L, S = n * m, 7, 5
    cases = [
        (Case(scheme=scheme, length=L, keys=S, heads=h, kv_heads=h, embed_dim=h * 8, batch=batch), average)
        for scheme in SCHEMES
        for batch in (2, 3)
        for average in (True, False)
    ]
    for per_case in pool.run(with_weights, n * m, n, m, cases, timeout=240):
        for (case, average), (found, shape) in zip(cases, per_case, strict=True):
            call = call_of(
                case,
                n,
                m,
                key_dim=WIDTHS["kdim"],
                value_dim=WIDTHS["vdim"],
                attention_weights=1 if average else 2,
                sealed=True,
            )
            assert found == table(case.scheme, call, m), (case, average)
            heads = h * (m if case.scheme == "independent" else 1)
            assert shape == ((case.batch, L, S) if average else (case.batch, heads, L, S))


def decoded(n, m, cases, shares=()):
    """What one call with keys in a cache sends: forward, then forward and backward with gradients."""
    found, at, ops = [], place(n, m, shares), torch.ops.two_level_mha
    for case, position, cache in cases:
        weights, (x,), _, _, _ = make(case)
        blocks = {name: block(name, w, case, at) for name, w in weights.items()}
        call = decided(case, at, scheme=cache, position=position)
        passes = []
        for training in (False, True):
            leaf = {name: w.clone().requires_grad_(training) for name, w in {**blocks, "x": x}.items()}
            with torch.set_grad_enabled(training), record_collectives() as record:
                weights = (leaf.get(name) for name in ENTER_WEIGHTS)
                q, k, v, *_ = ops.enter(*[leaf["x"]] * 3, *weights, None, None, *call)
                held = position if cache == "batch" else at.turn.before(position)
                old = k.new_zeros(k.shape[0], k.shape[1], held, k.shape[3])
                y = ops.leave(
                    q, torch.cat([old, k], 2), torch.cat([old, v], 2), leaf["out_weight"], leaf.get("out_bias"), None,
                    None, position, None, 0.0, 0.0, None, *call,
                )  # fmt: skip
                if training:
                    y.sum().backward()
            passes.append(recorded(record, at.groups, n, m))
        found.append(passes)
    return found


@pytest.mark.parametrize("grid", GRIDS + UNEVEN)
def test_decode_with_a_cache(pool, grid):
    """E. Localises: the exchanges with a KV cache of both layouts and both storages."""
    n, m = grid
    storages = [{"scheme": scheme, "heads": whole_heads(n, m), "kv_heads": n} for scheme in ("auto", "heads")]
    cases = [
        (Case(**storage, combine=combine, length=length, batch=batch, dtype=dtype), position, cache)
        for storage in storages
        for combine, dtype in (("reduce", torch.float64), ("concat", torch.float32), ("reduce", torch.bfloat16))
        for length, batch, position in ((1, 1, 9), (1, 4, 1009), (5, 3, 2))
        for cache in ("position", "batch")
    ]
    for per_case in pool.run(decoded, n * m, n, m, cases, timeout=240):
        for (case, position, cache), (inference, training) in zip(cases, per_case, strict=True):
            call = call_of(case, n, m, position, training=False)
            forward, backward = table(cache, call, m)
            assert inference == [forward, {}], (case, position, cache)
            call.training = True
            forward, backward = table(cache, call, m)
            assert training == [forward, backward], (case, position, cache)
            # r = (m - 1) / m of q, k, v and o, and each partial o's logsumexp
            B, L, d, r = case.batch, case.length, filled(case, m), Fraction(m - 1, m)
            rows = m * query_row(case, n, m)
            if cache == "position":
                new = -(-(position % m + L) // m)
                moved = r * B * (2 * rows * L + 2 * d * new)
                heads = case.heads // n // (m if case.whole_heads else 1)
                merged = (m - 1) * B * L * heads * max(4, case.dtype.itemsize)
            else:
                moved, merged = r * Fraction(ceil_to(B, m), m) * (2 * rows * L + 2 * d * L), 0
            expected = case.dtype.itemsize * (moved + combined(case, n, m)) + merged
            assert rounded(total(inference[0]), expected, n, m), (case, position, cache)


@pytest.mark.parametrize("n, m, shares", [(1, 3, (2, 1, 1)), (2, 2, (3, 1, 3, 1)), (1, 4, (0, 1, 5, 2))])
def test_decode_with_unequal_shares(pool, n, m, shares):
    """E. Localises: rows of keys that are sent to each rank, as many as the one with the longest run may take."""
    cycle, most = sum(shares) // n, max(shares)
    cases = [
        (Case(combine=combine, length=length, batch=2, heads=2 * n, kv_heads=n, head_dim=12), position, "position")
        for combine in ("reduce", "concat")
        for length, position in ((1, 9), (most, 7), (most + 4, 2))
    ]
    for per_case in pool.run(decoded, n * m, n, m, cases, shares, timeout=240):
        for (case, position, cache), (inference, training) in zip(cases, per_case, strict=True):
            call = call_of(case, n, m, position, cycle=[cycle, most])
            assert training == list(table(cache, call, m)), (case, position)
            L, d, r = case.length, case.head_dim, Fraction(m - 1, m)
            sent = L if L <= most else -(-(position % cycle + L) // cycle) * most
            # q of both heads, o and each partial o's logsumexp, k and v of one head
            moved = r * case.batch * (2 * 2 * d * L + 2 * d * sent) + (m - 1) * case.batch * L * 2
            expected = case.dtype.itemsize * (moved + combined(case, n, m))
            assert rounded(total(inference[0]), expected, n, m), (case, position)


def gathers(n, m, slices_first):
    at = place(n, m)
    x = torch.arange(6.0).reshape(1, 2, 1, 3) + 100 * at.head_group + 10000 * at.slice
    with record_collectives() as record:
        y = torch.ops.two_level_mha.hierarchical_all_gather(x, 1, 3, *grid_arguments(at), slices_first)
    return y, [c.elements for c in record.calls], record.sent()


@pytest.mark.parametrize("slices_first", [False, True])
def test_order_of_the_hierarchical_gather(pool, slices_first):
    """E. Localises: the two stages of the paper's concatenation: where blocks land, and which stage carries what."""
    n, m, local = 2, 4, 6
    block = torch.arange(6.0).reshape(2, 3)
    heads = [torch.cat([block + 100 * i + 10000 * j for j in range(m)], 1) for i in range(n)]
    expected = torch.cat(heads)[None, :, None]
    for y, elements, total in pool.run(gathers, n * m, n, m, slices_first):
        assert torch.equal(y, expected)
        assert elements == ([local, m * local] if slices_first else [local, n * local])
        first, second = (m, n) if slices_first else (n, m)
        assert total == 4 * local * ((first - 1) + (second - 1) * first)
