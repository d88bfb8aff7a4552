"""Encoders and encoder-decoders whose attention, or what it gives, is of a kind of its own."""

import pytest
from harness.encoder_families import try_family


@pytest.mark.parametrize(
    "kind, family, attentions",
    [
        ("masked", "squeezebert", 0),  # gives a dict
        ("masked", "flaubert", 2),  # masks of a number for each token
        ("seq2seq", "led", 4),  # gives its cache back
        ("seq2seq", "fsmt", 0),  # is called with (L, B, D)
    ],
)
def test_family(pool, kind, family, attentions):
    """Localises: what a call gives that is not one tensor first and weights; a batch taken for rows; a cache that cross
    and self-attention share.
    """
    for found in pool.run(try_family, 4, kind, family, (2, 2), timeout=120):
        assert (found["verdict"], found.get("attentions")) == ("right", attentions), found
