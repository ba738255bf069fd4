"""Adam's moments in the hosts' memory, as the TPU compiler lays them out: read and written there, layer by layer."""

import dataclasses
import re

import pytest

from phijax.model.backend import CHOICES
from phijax.model.config import ModelConfig
from phijax.model.cross_entropy import LossConfig
from phijax.parallel.mesh import MeshConfig, make_mesh
from phijax.parallel.program_text import parse
from phijax.planning.hbm import peak
from phijax.planning.topology import has_compiler, tpu_devices
from phijax.training.optimizer import OptimizerConfig
from phijax.training.program import Recipe, lower_train_step

pytestmark = pytest.mark.skipif(not has_compiler(), reason="libtpu is not installed: the TPU compiler cannot be asked")

# Most of its numbers are in the layers, as in a real model.
MODEL = ModelConfig(
    vocab_size=1024, model_dim=512, num_layers=8, num_heads=4, num_kv_heads=4, head_dim=128, ffn_dim=2048,
    max_position=4096,
)  # fmt: skip
CHIPS, LENGTH = 4, 1024
LAYER = 4 * 512 * 512 + 3 * 2048 * 512  # numbers of a layer's matrices


@pytest.fixture(scope="module")
def programs():
    """{"device", "host"} -> the compiled step for four v5e chips."""
    mesh = make_mesh(MeshConfig(fsdp=CHIPS), tpu_devices("v5e:2x2"))
    recipe = Recipe(MODEL, CHOICES["tpu"], OptimizerConfig(), LossConfig(), total_steps=100, seed=0)
    made = {}
    for place in ("device", "host"):
        which = dataclasses.replace(recipe, optimizer=OptimizerConfig(moments=place))
        made[place] = lower_train_step(which, mesh, (1, CHIPS, LENGTH)).compile()
    return made


def test_both_moments_lie_on_the_host_and_are_written_in_place(programs):
    memory, there = (programs[place].memory_analysis() for place in ("host", "device"))
    moments = 2 * 4 * (MODEL.num_layers * LAYER + 2 * 1024 * 512) / CHIPS  # and the norms, whole on every chip
    assert memory.host_argument_size_in_bytes == pytest.approx(moments, rel=0.02)
    assert memory.host_alias_size_in_bytes == memory.host_argument_size_in_bytes == memory.host_output_size_in_bytes
    assert memory.host_temp_size_in_bytes == 0
    assert there.argument_size_in_bytes - memory.argument_size_in_bytes == memory.host_argument_size_in_bytes
    assert there.host_argument_size_in_bytes == 0


def test_a_layer_at_a_time_crosses_and_nothing_whole(programs):
    text = programs["host"].as_text()
    crossing = [
        line for line in text.splitlines() if "S(5)" in line and re.search(r" (copy|dynamic-slice)-start\(", line)
    ]
    stacked = [line for line in crossing if re.search(rf"f32\[{MODEL.num_layers},\d+,\d+\]", line)]
    assert len(stacked) == 2 * 7  # two moments of each projection
    assert all(re.search(r"f32\[1,\d+,\d+\]\{[^}]*\}, u32\[\]", line) for line in stacked)
    assert len(crossing) > len(stacked)  # what is not stacked crosses by itself


def test_the_device_is_freed_of_them(programs):
    """At the worst moment, in the backward pass, neither a moment nor what was fetched of one is there."""
    held = {place: peak(parse(programs[place].as_text())) for place in programs}
    moments = programs["host"].memory_analysis().host_argument_size_in_bytes
    assert held["device"].bytes - held["host"].bytes > 0.9 * moments
