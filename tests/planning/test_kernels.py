"""The share of the square that attention computes, counted block by block."""

import numpy as np
import pytest

from phijax.parallel.dealing import order
from phijax.planning.kernels import seen_share


def counted(keys: int, block: int, window: int | None, chips: int = 1) -> np.ndarray:
    """For each chip's queries: blocks with any key that is seen, over all blocks."""
    dealt = order(keys, chips) if chips > 1 else np.arange(keys)
    q, k = dealt[:, None], np.arange(keys)[None]
    seen = (k <= q) & (k > q - (window or keys))
    blocks = seen.reshape(keys // block, block, keys // block, block).any(axis=(1, 3))
    return blocks.reshape(chips, -1).mean(axis=1)


@pytest.mark.parametrize("window", [None, 64, 100, 257])
@pytest.mark.parametrize(("keys", "block"), [(512, 64), (512, 128), (512, 512)])
def test_seen_share(keys, block, window):
    assert seen_share(keys, block, window=window) == pytest.approx(counted(keys, block, window)[0])


@pytest.mark.parametrize("window", [None, 300])
def test_every_chips_dealt_rows_see_as_much(window):
    chips = counted(2048, 64, window, chips=8)
    assert chips.mean() == pytest.approx(seen_share(2048, 64, window=window))
    if window is None:
        assert len(set(chips)) == 1
