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
from phijax.model.cross_entropy import LossConfig
from phijax.model.presets import PRESETS
from phijax.parallel.hardware import COMPILER_PROFILES
from phijax.parallel.mesh import MeshConfig, make_mesh
from phijax.planning.topology import tpu_devices
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
            exposed=0.777,
            megabytes={
                "all-gather": 67.633,
                "reduce-scatter": 15.729,
                "collective-permute": 23.888,
                "all-reduce": 4.648,
            },
        ),
    )


MINI, PODS = (
    PRESETS["phi3_mini"],
    {
        "mini, 1 sequence a chip": (
            lambda: of(MINI, "v5e:16x16", MeshConfig(data=2, fsdp=128), (1, 256, 4096)),
            Recorded(
                peak=12.814,
                cycles=1_028_736_886,
                exposed=66.1,
                megabytes={"all-gather": 14898.168, "reduce-scatter": 7650.410, "all-reduce": 61.741},
            ),
        ),
        # Twice the gathers, the same peak: activations of one micro-batch. It was 24.7 GiB when the first one stood
        # before the loop; 76 MB were all-reduced in each layer when the partitioner was left to scatter q, k, v, o.
        "mini, 2 sequences a chip, one after the other": (
            lambda: of(MINI, "v5e:16x16", MeshConfig(data=2, fsdp=128), (2, 256, 4096)),
            Recorded(
                peak=12.960,
                cycles=2_108_250_361,
                exposed=134.1,
                megabytes={"all-gather": 29796.336, "reduce-scatter": 15300.821, "all-reduce": 121.135},
            ),
        ),
        "medium, 2 sequences a chip, SparseCore": (
            lambda: of(
                PRESETS["phi3_medium"], "v5p:4x4x8", MeshConfig(data=2, fsdp=64), (1, 256, 4096), profile="sparse_core"
            ),
            Recorded(
                peak=52.826,
                cycles=3_588_542_529,
                exposed=17.5,
                megabytes={
                    "all-gather": 55197.041,
                    "reduce-scatter": 28143.780,
                    "collective-permute": 206.438,
                    "all-reduce": 442.542,
                },
            ),
        ),
        "mini at 128K, context 8": (
            lambda: of(PRESETS["phi3_mini_128k"], "v5p:4x4x8", MeshConfig(fsdp=16, context=8), (1, 16, 131_072)),
            Recorded(
                peak=63.280,
                cycles=3_001_949_298,
                exposed=821.0,
                megabytes={
                    "all-gather": 117994.684,
                    "reduce-scatter": 59344.159,
                    "collective-permute": 346.030,
                    "all-reduce": 491.133,
                },
            ),
        ),
    },
)


@pytest.mark.slow  # a minute each
@pytest.mark.parametrize("name", PODS)
def test_a_pods_program(name):
    compiled, recorded = PODS[name]
    check(compiled(), recorded)
