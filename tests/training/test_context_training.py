"""Training with the sequence cut over `context`: ten steps are those of one device, documents packed, long factors.

One device computes attention written out in full, in order; under `context` rows are dealt, keys gathered, and the
kernel for TPUs runs interpreted.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from small_training import STEPS, compiled, host, host_batch, mesh_of, on_mesh, recipe

from phijax.model import backend
from phijax.model.config import LongRope
from phijax.model.kernels import splash
from phijax.training.program import initial_state

BLOCK = 128


@pytest.fixture
def interpreted(monkeypatch):
    """Splash in small blocks, on any device; programs compiled so are nobody else's."""
    monkeypatch.setattr(splash, "BLOCK", BLOCK)
    monkeypatch.setattr(splash, "BLOCK_COMPUTE", BLOCK)
    monkeypatch.setitem(backend.ATTENTION, "splash", functools.partial(splash.splash_attention, interpret=True))
    yield
    compiled.cache_clear()


def long_recipe(length: int, window: int | None = None, **choices):
    """Rows longer than the rotation's original length: the long factors, which differ from the short ones."""
    base = recipe(**choices)
    rope = LongRope(original_max_position=length // 4, short_factor=(1.0, 1.5), long_factor=(1.0, 7.0))
    model = dataclasses.replace(
        base.model, num_heads=2, num_kv_heads=1, long_rope=rope, max_position=2 * length, sliding_window=window
    )
    return dataclasses.replace(base, model=model)


def ten_steps(which, mesh, shape) -> tuple[np.ndarray, dict]:
    program, state, losses = compiled(which, mesh, shape), initial_state(which, mesh), []
    for step in range(STEPS):
        rows = host_batch((1, shape[0] * shape[1], shape[2]), seed=step)
        state, metrics = program(state, on_mesh({k: v.reshape(shape) for k, v in rows.items()}, mesh))
        losses.append(float(metrics["loss"]))
    return np.array(losses), host(state.params)


@pytest.mark.parametrize(
    ("shape", "micro_batches", "window"),
    [
        ((1, 1, 2, 1), 1, None),
        pytest.param((2, 1, 4, 1), 2, 300, marks=pytest.mark.slow),
        pytest.param((1, 1, 8, 1), 1, None, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_ten_steps_are_those_of_one_device(interpreted, shape, micro_batches, window):
    length, rows = 2 * BLOCK * shape[2], 2 * shape[0] * micro_batches
    expected, reference = ten_steps(long_recipe(length, window), mesh_of(1, 1, 1, 1), (1, rows, length))
    which = long_recipe(length, window, attention="splash", remat="save_attention")
    got, params = ten_steps(which, mesh_of(*shape), (micro_batches, rows // micro_batches, length))
    assert expected[0] - expected[-1] > 0.05  # it learns
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(reference), strict=True):
        # AdamW's update is of the size of the rate however small a gradient is: noise in one becomes 1e-2 x a part.
        assert np.mean(np.abs(ours - theirs)) < 1e-4
