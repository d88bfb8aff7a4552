"""The integers that a call is made of: Python writes them in the order in which C++ reads them."""

import inspect

import pytest
import torch
from harness.layer import Case, decided, place

import two_level_mha as tlm
from two_level_mha import _C, context
from two_level_mha.cache_layer import CacheLayer
from two_level_mha.mesh import Grid, Place
from two_level_mha.profile import Profile

ops = torch.ops.two_level_mha


def named(function, *positional) -> tuple[list[int], dict[str, int]]:
    """What `function` makes of a different number for each of its keyword arguments, and these numbers."""
    names = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    numbers = {name: 100 + at for at, name in enumerate(names)}
    return function(*positional, **numbers), numbers


def test_sizes():
    """E. Localises: two sizes swapped, which many calls would not notice."""
    found, numbers = named(context.size_numbers)
    assert dict(zip(_C.size_fields(), found, strict=True)) == numbers


def test_constants():
    """E. Localises: the same among the constants of a layer, and of how a call runs it."""
    flags = {"bias": True, "out_bias": False, "bias_kv": False, "whole_heads": True, "concat": False, "gated": True}
    sizes = {"num_heads": 11, "num_kv_heads": 12, "head_dim": 13, "embed_dim": 14, "key_dim": 15, "value_dim": 16}
    sizes["out_dim"] = 17
    at = Place(Grid(7, 8), 2, 3)
    others = {"reduce_dtype": torch.float32, "activations": "batch", "overlap": 9}
    layer = context.layer_numbers(at, range(30, 45), **sizes, **flags, **others)
    how = {"causal": True, "element_size": 21, "zero_key": False, "batch_first": True, "in_halves": True}
    numbers, *groups = context.constants(layer, ("a", "b", "c"), scheme="batch", **how).split("\n")
    assert groups == ["a", "b", "c"]
    named = context.constants(layer, ("a", "b", "c"), shares=(2, 1), scheme="batch", **how, name="d").split("\n")
    assert named == [numbers, "a", "b", "c", "d", "2 1"]
    found = dict(zip(_C.constant_fields(), map(int, numbers.split(" ")), strict=True))
    widths = [f"attention{kind}_{width}" for kind in ("", "_single") for width in ("128", "256", "wide")]
    rates = ("flops", "memory", "link", "network", "latency", "node", "equal", "flops_single", *widths, "hidden")
    expected = {"head_groups": 7, "slices": 8, "head_group": 2, "slice": 3, **sizes, **flags, **how}
    expected |= dict(zip(rates, range(30, 45), strict=True))
    expected |= {"scheme": context.SCHEME_NUMBERS["batch"], "reduce_dtype": _C.scalar_type(torch.float32)}
    expected |= {"activations": 2, "overlap": 9}
    assert found == expected
    assert len(Profile.for_device("cpu").numbers) == len(rates)


def test_cache():
    """E. Localises: the same among the numbers of a cache layer."""
    layer = CacheLayer(Place(Grid(1, 4), 0, 3, cache_shares=(1, 3, 2, 4)), "position", max_length=9, window=5)
    layer.recording, layer.batch, layer.length = True, 2, 7
    layer.keep([], [*layer.numbers()[:-5], 2, 7, 4, -1, 1])
    assert dict(zip(_C.cache_fields(), layer.numbers(), strict=True)) == {
        "slices": 4, "slice": 3, "by_position": 1, "window": 5, "max_length": 9, "recording": 1, "cycle": 10,
        "first": 6, "run": 4, "batch": 2, "length": 7, "oldest": 4, "base": -1, "attached": 1,
    }  # fmt: skip


def test_a_call_that_is_none():
    """Localises: numbers that no module gives, but a program may: refused, not read beyond their end."""
    case = Case(heads=2, kv_heads=2, head_dim=4, embed_dim=8, batch=2, length=3, dtype=torch.float32)
    x, weight = torch.ones(2, 3, 8), torch.ones(2, 4, 8)
    text, sizes = decided(case, place(1, 1))
    numbers, *groups = text.split("\n")

    def enter(numbers=numbers, groups=groups, sizes=sizes):
        return ops.enter(x, x, x, *[weight] * 3, *[None] * 5, None, None, "\n".join([numbers, *groups]), sizes)

    q, k, v = enter()
    for wrong, message in (
        ({"numbers": numbers.rpartition(" ")[0]}, "must begin with 41 integers, .* there is no in_halves in"),
        ({"numbers": numbers.replace(" ", " x", 1)}, "there is no slices in"),
        ({"groups": groups[:2]}, "groups must name those of the slice axis"),
        ({"groups": [*groups, "", "1 2"]}, "shares must be 1 integers, none negative, .* got '1 2'"),
        ({"groups": [*groups, "", "x"]}, "shares must be 1 integers"),
        ({"groups": [*groups, "", "2000"]}, "with a sum from 1 to 1024"),
        ({"sizes": [*sizes, 0]}, "sizes must be a list of 5 numbers, got 6"),
        ({"numbers": _with(numbers, "scheme", 99)}, "scheme must be the number of one of auto, "),
        ({"numbers": _with(numbers, "head_groups", 3)}, "must divide"),
    ):
        with pytest.raises(ValueError, match=message):
            enter(**wrong)
    options = (torch.ones(8, 2, 4), None, None, None, None, None, 0.0, 0.0, None, text, sizes)
    with pytest.raises(ValueError, match=r"q must have shape \(2, 2, 3, 4\) in this call, got \[2, 2, 2, 4\]"):
        ops.leave(q[:, :, 1:], k, v, *options)
    with pytest.raises(ValueError, match=r"v must have shape \(2, 2, 3, 4\) in this call, got \[1, 2, 3, 4\]"):
        ops.leave(q, k, v[:1], *options)


def _with(numbers: str, name: str, value: int) -> str:
    found = dict(zip(_C.constant_fields(), numbers.split(" "), strict=True))
    return " ".join((found | {name: str(value)}).values())


def test_arguments_of_the_pass():
    """Localises: an argument list that grows again: what a call decides is a number of it, not an argument."""
    assert tlm.GridError  # the operators are registered
    limits = {"enter": 17, "leave": 17, "leave_with_weights": 18, "leave_with_cache": 18, "attention": 27}
    for name, limit in limits.items():
        assert len(getattr(ops, name).default._schema.arguments) <= limit
