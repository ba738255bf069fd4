"""A CPU process's memory as planned, beside the compiler's own count, and beside what a run takes."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from quick_compilation import QUICK

from phijax.model.backend import CHOICES
from phijax.model.config import ModelConfig
from phijax.model.cross_entropy import LossConfig
from phijax.parallel.sharding import MESH_AXES
from phijax.planning import cpu_process, summary
from phijax.training.optimizer import OptimizerConfig
from phijax.training.program import Recipe, lower_train_step

BENCHMARK = pathlib.Path(__file__).parents[2] / "benchmarks/cpu_memory.py"
SMALL = ModelConfig(
    vocab_size=2048, model_dim=96, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=16, ffn_dim=256, max_position=512
)
ONE = dict.fromkeys(MESH_AXES, 1)


def recipe(model: ModelConfig = SMALL) -> Recipe:
    return Recipe(model, CHOICES["cpu"], OptimizerConfig(), LossConfig(), total_steps=10, seed=0)


def planned(model=SMALL, shape=(1, 4, 256), *, sizes=ONE, devices=1, asynchronous=True) -> dict[str, int]:
    return cpu_process.memory(recipe(model), sizes, [shape], devices=devices, asynchronous=asynchronous)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (SMALL, (1, 4, 128)),
        pytest.param(SMALL, (1, 4, 256), marks=pytest.mark.slow),
        pytest.param(dataclasses.replace(SMALL, num_layers=5), (1, 2, 512), marks=pytest.mark.slow),
        pytest.param(SMALL, (3, 4, 128), marks=pytest.mark.slow),
        pytest.param(dataclasses.replace(SMALL, vocab_size=65536), (1, 4, 128), marks=pytest.mark.slow),
    ],
)
def test_temporary_buffer_of_a_step_is_not_below_the_compilers(model, shape):
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), MESH_AXES)
    compiled = lower_train_step(recipe(model), mesh, shape).compile(compiler_options=QUICK)
    taken = compiled.memory_analysis().temp_size_in_bytes
    assert 0.98 * taken < sum(cpu_process.temporary(recipe(model), ONE, shape).values()) < 1.35 * taken


def test_worst_shape_counts_and_a_synchronous_save_copies_nothing():
    small, large = (1, 1, 128), (1, 8, 256)
    both = cpu_process.memory(recipe(), ONE, [small, large], devices=1, asynchronous=True)
    assert both == planned(shape=large) != planned(shape=small)
    copied = sum(both.values()) - sum(planned(shape=large, asynchronous=False).values())
    assert copied == both[summary.PARAMETERS] + both[cpu_process.MOMENTS]


def test_several_devices_are_one_process():
    halves = planned(sizes={**ONE, "fsdp": 2}, devices=2)
    one = planned()
    for part in (summary.PARAMETERS, cpu_process.MOMENTS):
        assert halves[part] == pytest.approx(one[part], rel=0.01)  # norms lie on both
    assert sum(halves.values()) > sum(one.values())  # two temporary buffers a device: dispatch runs ahead


@pytest.mark.slow
def test_a_run_takes_what_was_planned_and_no_more():
    alone = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # one device, not our eight
    ended = subprocess.run([sys.executable, BENCHMARK, "--shapes=tiny"], capture_output=True, text=True, env=alone)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.splitlines()[-1] == "within the bounds"
