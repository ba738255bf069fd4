"""The train step as the TPU compiler makes it, held to what it was when it was last looked at. Nothing runs.

A small program in the quick suite, the pods' own among the slow ones. A change that is meant is written down here anew:
a failing test prints what it found.
"""

import dataclasses
import importlib.util

import pytest
from tpu_gates import Recorded, check, facts

from phijax.model.backend import CHOICES
from phijax.model.config import ModelConfig
from phijax.parallel.hardware import COMPILER_PROFILES
from phijax.parallel.mesh import MeshConfig, make_mesh
from phijax.planning.topology import tpu_devices
from phijax.training.cross_entropy import LossConfig
from phijax.training.optimizer import OptimizerConfig
from phijax.training.program import Recipe

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: the TPU compiler cannot be asked"
)

# Heads of 96 as mini has them, activations that outweigh the weights, axes that are no multiples of others.
SMALL = ModelConfig(
    vocab_size=2048,
    model_dim=384,
    num_layers=4,
    num_heads=4,
    num_kv_heads=4,
    head_dim=96,
    ffn_dim=1152,
    max_position=4096,
)


def of(model: ModelConfig, topology: str, mesh: MeshConfig, shape, *, remat: str = "save_all", profile: str = ""):
    recipe = Recipe(
        dataclasses.replace(model, sliding_window=None),
        dataclasses.replace(CHOICES["tpu"], remat=remat),
        OptimizerConfig(),
        LossConfig(),
        total_steps=10_000,
        seed=0,
    )
    options = COMPILER_PROFILES[topology.split(":")[0]].get(profile)
    return facts(recipe, make_mesh(mesh, tpu_devices(topology)), topology, shape, options)


def test_two_micro_batches_of_a_small_model():
    """Activations of one micro-batch at a time; gradients scattered in each, across `data` once."""
    found = of(SMALL, "v5e:4x4", MeshConfig(data=2, fsdp=8), (2, 16, 1024))
    check(
        found,
        Recorded(
            peak=0.0975,
            cycles=5_151_889,
            megabytes={
                "all-gather": 67.633,
                "reduce-scatter": 15.729,
                "collective-permute": 23.888,
                "all-reduce": 4.648,
            },
        ),
    )
