"""The share of the square that attention computes, counted block by block."""

import numpy as np
import pytest

from phijax.planning.kernels import seen_share


def counted(queries: int, keys: int, block: int, window: int | None) -> float:
    """Blocks with any key that a query sees, over all blocks; the queries are the last rows."""
    q, k = np.arange(keys - queries, keys)[:, None], np.arange(keys)[None]
    seen = (k <= q) & (k > q - (window or keys))
    blocks = seen.reshape(queries // block, block, keys // block, block).any(axis=(1, 3))
    return blocks.mean()


@pytest.mark.parametrize("window", [None, 64, 100, 257])
@pytest.mark.parametrize(
    ("queries", "keys", "block"), [(512, 512, 64), (512, 512, 128), (128, 512, 64), (512, 512, 512)]
)
def test_seen_share(queries, keys, block, window):
    assert seen_share(queries, keys, block, window=window) == pytest.approx(counted(queries, keys, block, window))


def test_dealt_rows_see_half():
    assert seen_share(128, 1024, 64, balanced=True) == 0.5
    assert seen_share(128, 1024, 64) > 0.9  # the busiest chip
