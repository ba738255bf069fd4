"""The train step of several micro-batches, compiled by the TPU compiler on this machine. Nothing runs."""

import importlib.util

import pytest
from collectives import over_axis

from phijax.model.backend import CHOICES
from phijax.model.config import ModelConfig
from phijax.model.cross_entropy import LossConfig
from phijax.parallel.mesh import MeshConfig, make_mesh
from phijax.planning.topology import tpu_devices
from phijax.training.optimizer import OptimizerConfig
from phijax.training.program import Recipe, lower_train_step

MODEL = ModelConfig(
    vocab_size=4096,
    model_dim=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=64,
    ffn_dim=512,
    max_position=4096,
)

pytestmark = [
    pytest.mark.slow,  # the TPU compiler takes 20 s a mesh
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: the TPU compiler cannot be asked"
    ),
]


@pytest.mark.parametrize("shape", [(2, 2, 1, 1), (1, 4, 1, 1), (2, 1, 2, 1)], ids=str)
def test_micro_batches_compile_and_cross_data_once(shape):
    """Without the barrier between micro-batches the compiler fails with an internal error on (1, 4, 1, 1)."""
    recipe = Recipe(MODEL, CHOICES["tpu"], OptimizerConfig(), LossConfig(), total_steps=10_000, seed=0)
    mesh = make_mesh(MeshConfig(*shape), tpu_devices("v5e:2x2"))
    text = lower_train_step(recipe, mesh, (4, shape[0] * shape[1], 512)).compile().as_text()
    found = over_axis(text, shape, axis=0)
    assert [line for line, in_loop in found if in_loop] == []
    assert bool(found) == (shape[0] > 1)
