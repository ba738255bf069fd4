"""What a loss is compared with: guessing without reading."""

import math
from collections.abc import Iterable

import numpy as np


def uniform(vocab_size: int) -> dict[str, float]:
    """Every token equally likely: ln V nats."""
    return {"uniform": math.log(vocab_size)}


def unigram(tokens: Iterable[np.ndarray], vocab_size: int) -> dict[str, float]:
    """Every token as likely as it is frequent: the entropy of the counts, in nats a token.

    Args:
      tokens: arrays of ids, any shape.
    """
    counts = np.zeros(vocab_size, np.int64)
    for part in tokens:
        counts += np.bincount(np.ravel(part), minlength=vocab_size)
    share = counts[counts > 0] / max(counts.sum(), 1)
    return {"unigram": float(-(share * np.log(share)).sum())}
