"""The cache of one sequence, kept for the next prompt that begins as it does: the next turn of a conversation.

A prompt is computed in chunks by its own length (`programs.chunks`). Only chunks that both prompts have are taken over:
what they left in the cache has the bits that computing them anew would give. An answer's tokens, which were computed
one by one, are computed again as part of the next prompt.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from phijax.inference.programs import chunks
from phijax.model.cached import Cache


class Prefix(NamedTuple):
    """A cache of one row with `length` places; what `ids` left in it, and whatever came behind."""

    ids: Sequence[int]
    frequencies: np.ndarray  # (R/2,) that its keys were rotated by
    cache: Cache
    length: int
    weights: object  # whose keys and values they are: compared by identity


class PrefixCache:
    """Holds one, or none."""

    def __init__(self):
        self._held: Prefix | None = None

    def put(self, prefix: Prefix) -> None:
        self._held = prefix

    def take(self, ids: Sequence[int], frequencies: np.ndarray, weights: object) -> tuple[Prefix | None, int]:
        """What is held, which then nobody holds any more, and how many of `ids` need not be computed; None, 0."""
        held, self._held = self._held, None
        if held is None or held.weights is not weights or not np.array_equal(held.frequencies, frequencies):
            return None, 0
        done = shared(held.ids, ids)
        return (held, done) if done else (None, 0)


def shared(before: Sequence[int], ids: Sequence[int]) -> int:
    """How many tokens at the beginning of both are the same chunks in both; never the last, whose logits are wanted."""
    done = 0
    for old, new in zip(chunks(len(before)), chunks(len(ids))[:-1], strict=False):
        here = slice(new[0], new[0] + new[1])
        if old != new or before[here] != ids[here]:
            break
        done = here.stop
    return done
