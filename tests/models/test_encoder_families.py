"""Encoders and encoder-decoders whose attention, or what it gives, is of a kind of its own."""

import pytest
from harness.calls import mesh
from harness.encoder_families import build, try_family

import two_level_mha as tlm
from two_level_mha.integrations.gathered import Gathered


@pytest.mark.parametrize(
    "kind, family, attentions",
    [
        ("masked", "squeezebert", 0),  # gives a dict
        ("masked", "flaubert", 2),  # masks of a number for each token
        ("seq2seq", "led", 4),  # gives its cache back
        ("seq2seq", "fsmt", 0),  # is called with (L, B, D)
        ("image-text", "mistral3", 4),  # angles of one sequence for all
        ("image-text", "internvl", 4),  # an output projection that is called otherwise
        ("image-text", "mllama", 1),  # cross-attention without an encoder's cache
    ],
)
def test_family(pool, kind, family, attentions):
    """Localises: what a call gives that is not one tensor first and weights; a batch taken for rows; a cache that cross
    and self-attention share.
    """
    for found in pool.run(try_family, 4, kind, family, (2, 2), timeout=120):
        assert (found["verdict"], found.get("attentions")) == ("right", attentions), found


def gathered_ones() -> tuple[int, list[bool]]:
    """How many attentions are replaced, and whether those that are not run their own code."""
    model = tlm.parallelize(build("seq2seq", "granite_speech"), mesh((2, 2)))
    report = tlm.report(model)
    return report.attentions, [isinstance(model.get_submodule(name), Gathered) for name in report.gathered]


def test_cross_attention_that_is_refused(pool):
    """Localises: cross-attention that the trial refused, put in place all the same."""
    for attentions, own in pool.run(gathered_ones, 4, timeout=120):
        assert attentions == 4 and all(own)
