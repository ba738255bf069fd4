"""Rows dealt over chips: where every block goes, and back."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from phijax.parallel import dealing
from phijax.parallel.mesh import MeshConfig, make_mesh


def test_each_chip_has_an_early_and_a_late_block():
    assert dealing.order(8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    for chips in (2, 4, 8):
        # Keys that a causal query sees: its place and one more. Every chip's sum is the same.
        seen = (dealing.order(160 * chips, chips) + 1).reshape(chips, -1).sum(axis=1)
        assert len(set(seen.tolist())) == 1


@pytest.mark.parametrize("chips", [1, 2, 4, 8])
def test_how_far_a_block_lies_behind_its_place(chips):
    length = 48 * chips
    places = np.arange(length)
    np.testing.assert_array_equal(places + dealing.behind(places, length, chips), dealing.order(length, chips))


@pytest.mark.parametrize("shape", [(1, 1, 2, 1), (2, 1, 4, 1), (1, 1, 8, 1), (1, 2, 1, 2)], ids=str)
def test_dealt_and_back(shape):
    chips, length = shape[2], 32
    x = np.arange(4 * length * 3).reshape(4, length, 3)
    devices = jax.devices()[: int(np.prod(shape))]
    with jax.set_mesh(make_mesh(MeshConfig(*shape), devices)):
        placed = jax.device_put(x, PartitionSpec(("data", "fsdp"), "context"))
        dealt = jax.jit(lambda x: dealing.deal(x, 1))(placed)
        back = jax.jit(lambda x: dealing.undeal(x, 1))(dealt)
    np.testing.assert_array_equal(dealt, x[:, dealing.order(length, chips)] if chips > 1 else x)
    np.testing.assert_array_equal(back, x)
