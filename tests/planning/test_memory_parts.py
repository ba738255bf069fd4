"""Whose bytes they are in our own program: by hand, from the shapes of phi3_mini on 256 chips."""

import dataclasses
import gzip
import pathlib

import pytest

from phijax.model.backend import CHOICES
from phijax.model.cross_entropy import LossConfig
from phijax.model.presets import PRESETS
from phijax.parallel.program_text import parse
from phijax.planning import memory_parts
from phijax.planning.hbm import peak
from phijax.training.optimizer import OptimizerConfig
from phijax.training.program import Recipe

OURS = pathlib.Path(__file__).with_name("mini_v5e_16x16.hlo.gz")
GIB = 2**30
# step; parameters; Adam's count and two moments of each; two counts of skipped steps; the batch.
ARGUMENTS = ["batch", *["parameters"] * 12, *["optimizer"] * 25, "batch", "batch", *["batch"] * 5]


def test_parts_of_our_program():
    model = dataclasses.replace(PRESETS["phi3_mini"], sliding_window=None)
    recipe = Recipe(model, CHOICES["tpu"], OptimizerConfig(), LossConfig(), total_steps=10_000, seed=0)
    with gzip.open(OURS, "rt") as file:
        worst = peak(parse(file.read()))
    sizes = {"data": 2, "fsdp": 128, "context": 1, "tensor": 1}
    parts = memory_parts.by_part(worst, recipe, sizes, (1, 256, 4096), ARGUMENTS)
    assert list(parts) == list(memory_parts.PARTS)
    assert sum(parts.values()) == worst.bytes
    rows = 32 * (4 * 24 + 3 * 64) + 2 * 256  # of each chip: the projections of 32 layers, embedding and head
    parameters = 4 * 3072 * (rows + 2 * 32 + 1)  # and the norms, whole
    assert parts["parameters"] == pytest.approx(parameters, rel=1e-3)  # 3072 numbers of a norm fill their tile
    assert parts["optimizer"] == pytest.approx(2 * parameters, rel=1e-3)
    # bfloat16, 32 layers of 4096 tokens: gate, up, activation; block input and mid; q, k, v and the kernel's output,
    # whose heads of 96 lie in rows of 128; and its row sums in float32.
    numbers = 3 * 8192 + 2 * 3072 + 4 * 32 * 128
    assert parts["saved activations"] == 32 * 4096 * (2 * numbers + 4 * 32)
    assert parts["logits and head"] >= 4 * 32768 * 3072  # the head's gradient, summed over this chip's tokens
    assert parts["workspace"] < 0.6 * GIB
