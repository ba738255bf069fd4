"""Steps of a small GPT-2 on a mesh are those of one device."""

import dataclasses

import numpy as np
import pytest
from gpt2_case import GPT2_SMALL
from small_training import losses, mesh_of, recipe

MODEL = dataclasses.replace(
    GPT2_SMALL,
    vocab_size=500,
    model_dim=32,
    num_layers=2,
    num_heads=8,
    num_kv_heads=8,
    head_dim=4,
    ffn_dim=64,
    max_position=16,  # as long as the rows
)


def six(mesh, shape) -> np.ndarray:
    return losses(dataclasses.replace(recipe(), model=MODEL), mesh_of(*mesh), shape, steps=6)[0]


@pytest.mark.slow
def test_steps_over_data_in_micro_batches_are_those_of_one_device():
    """Gradients of biases and of the table of positions cross `data` once, with the others."""
    expected = six((1, 1, 1, 1), (1, 8, 16))
    assert np.ptp(expected) > 0.05
    np.testing.assert_allclose(six((2, 2, 1, 2), (2, 4, 16)), expected, rtol=1e-5)
