"""Micro-batches on replicas: their gradients cross `data` once a step, after accumulation."""

import re

import jax
import numpy as np
import pytest
from collectives import over_axis
from jax.sharding import PartitionSpec
from small_training import LENGTH, ROWS, SMALL, compiled, losses, mesh_of, recipe

from phijax.model import params
from phijax.model.kernels.dense import dense_attention
from phijax.model.kernels.splash import splash_attention
from phijax.model.mask import Mask
from phijax.parallel import dealing

ONE = (1, 1, 1, 1)
ACCUMULATED = (4, ROWS // 2, LENGTH)  # 16 rows in all
REPLICAS = (2, 2, 1, 1)


def test_micro_batches_on_replicas():
    """Four micro-batches on two replicas of two: the steps of one device that takes all rows at once."""
    expected, _ = losses(recipe(), mesh_of(*ONE), (1, 2 * ROWS, LENGTH), steps=4)
    got, state = losses(recipe(), mesh_of(*REPLICAS), ACCUMULATED, steps=4)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert state.skipped == 0


def test_gradients_cross_data_once_after_accumulation():
    """Between slices `data` is a slow network: once a step, not once a micro-batch and layer."""
    text = compiled(recipe(), mesh_of(*REPLICAS), ACCUMULATED).as_text()
    found = over_axis(text, REPLICAS, axis=0)
    assert [line for line, in_loop in found if in_loop] == []
    # All leaves' gradients, cut over fsdp as they lie, cross there.
    crossing = sum(
        int(np.prod([int(n) for n in dimensions.split(",") if n] or [1]))
        for line, _ in found
        for dimensions in re.findall(r"f32\[([\d,]*)\]", line.split(" all-reduce(")[0])
    )
    norms = sum(np.prod(s) for p, s in params.shapes(SMALL).items() if p.endswith("scale"))
    matrices = sum(np.prod(s) for p, s in params.shapes(SMALL).items() if not p.endswith("scale"))
    # Some scalars (sums, the norm's squares) beside them.
    assert 0 <= crossing - (norms + matrices // REPLICAS[1]) < 64


def test_the_reader_of_collectives_sees_those_in_loops():
    """One micro-batch sums each layer's gradients over `data` where they are made: in the loop over layers."""
    shape = (8, 1, 1, 1)
    found = over_axis(compiled(recipe(), mesh_of(*shape), (1, ROWS, LENGTH)).as_text(), shape, axis=0)
    assert any(in_loop for _, in_loop in found)


@pytest.mark.parametrize("shape", [(2, 2, 1, 2), (2, 1, 2, 1)], ids=str)
def test_splash_attention_where_data_is_cut_already(shape):
    """The kernel makes a shard_map of its own inside that of accumulation. Its body runs here, interpreted."""
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 4, 2, 512, 8), np.float32)
    segment_ids = np.repeat(np.arange(4, dtype=np.int32), 128)[None].repeat(4, axis=0)

    def inside(q, k, v, segment_ids):
        q, k, v = (dealing.deal(a, 2) for a in (q, k, v))
        out = splash_attention(q, k, v, dealing.deal(segment_ids, 1), mask=Mask(), interpret=True)
        return dealing.undeal(out, 2)

    rows = PartitionSpec("data")
    with jax.set_mesh(mesh_of(*shape)):
        cut = jax.shard_map(inside, in_specs=rows, out_specs=rows, axis_names={"data"}, check_vma=False)
        got = jax.jit(cut)(q, k, v, segment_ids)
    # float32 softmax over at most 128 keys, in blocks.
    np.testing.assert_allclose(got, dense_attention(q, k, v, segment_ids, mask=Mask()), atol=2e-6)
