"""The train step of mini on 256 v5e chips, compiled by the TPU compiler itself on this machine. Nothing runs.

Exact facts only: that it fits, how gathered weights lie, what is gathered in which type, what never exists in full.
"""

import dataclasses
import importlib.util
import math

import pytest

from phijax.model import params
from phijax.model.backend import CHOICES
from phijax.model.cross_entropy import CHUNK, LossConfig
from phijax.model.kernels.splash import BLOCK
from phijax.model.presets import PRESETS
from phijax.parallel import hlo
from phijax.parallel.mesh import MeshConfig, make_mesh
from phijax.planning.topology import tpu_devices
from phijax.training.optimizer import OptimizerConfig
from phijax.training.program import Recipe, lower_train_step

GIB = 2**30
V5E_HBM = 15.75 * GIB
LENGTH = 4096
MIB = 2**20
SMALL = 2 * MIB  # bytes; whatever is gathered above this size is a weight

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: the TPU compiler cannot be asked"
)


@pytest.fixture(scope="module")
def compiled():
    """mini without its window, one sequence a chip, data 2 x fsdp 128: 24 rows of each attention weight a chip."""
    model = dataclasses.replace(PRESETS["phi3_mini"], sliding_window=None)
    recipe = Recipe(model, CHOICES["tpu"], OptimizerConfig(), LossConfig(), total_steps=10_000, seed=0)
    mesh = make_mesh(MeshConfig(data=2, fsdp=128), tpu_devices("v5e:16x16"))
    assert params.check_mesh(model, dict(mesh.shape)) == []
    return model, lower_train_step(recipe, mesh, (1, mesh.size, LENGTH)).compile()


@pytest.fixture(scope="module")
def text(compiled):
    return compiled[1].as_text()


def weight_sizes(model):
    """Elements of each projection of one layer."""
    return {
        math.prod(shape[1:])
        for path, shape in params.shapes(model).items()
        if path.startswith(f"{params.STACKED}/") and len(shape) == 3
    }


def test_it_fits_with_room(compiled):
    peak = compiled[1].memory_analysis().peak_memory_in_bytes
    # 12.8 GiB when this was written; a growth of more than a few percent is a decision, not an accident.
    assert peak < 13.2 * GIB < V5E_HBM


def test_gathered_weights_lie_as_the_matrix_unit_reads_them(compiled, text):
    sizes = weight_sizes(compiled[0])
    gathered = [i for i in hlo.instructions(text) if i.opcode == "all-gather" and i.elements in sizes]
    assert {i.elements for i in gathered} == sizes  # every kind of weight is there
    assert {i.name: i.layout for i in gathered if "T(8,128)" not in i.layout} == {}


def test_no_weight_is_laid_out_anew_in_a_loop(compiled, text):
    assert hlo.relayouts(text, weight_sizes(compiled[0])) == []


def test_gathers_are_bfloat16(text):
    gathered = [i for i in hlo.instructions(text) if i.opcode == "all-gather" and i.bytes > SMALL]
    assert len(gathered) > 10
    assert {i.name: i.dtype for i in gathered if i.dtype != "bf16"} == {}


def test_no_full_logits_exist(compiled, text):
    vocabulary = compiled[0].padded_vocab_size
    full = LENGTH * vocabulary  # of the one sequence a chip holds
    assert [i.name for i in hlo.instructions(text) if i.elements >= full and vocabulary in i.shape] == []
    chunk = CHUNK * vocabulary
    assert any(i.elements == chunk and vocabulary in i.shape for i in hlo.instructions(text))  # the text was read


def test_no_sum_of_the_queries_gradients_stands_alone(compiled, text):
    """The backward kernel leaves one for each block of keys. Summed as a reduction they cost 4 % of the step."""
    model = compiled[0]
    size = model.num_heads * LENGTH * model.head_dim
    assert [i.name for i in hlo.instructions(text) if i.opcode == "reduce" and i.elements == size] == []
    partial = [
        i for i in hlo.instructions(text) if i.elements == size * LENGTH // BLOCK and i.shape[-1] == model.head_dim
    ]
    assert partial  # they are there


def test_weight_gradients_are_scattered_not_summed_in_full(compiled, text):
    """A whole gradient that every chip gets moves twice the bytes and is cut afterwards; the fused form is not."""
    sizes = weight_sizes(compiled[0])
    fused = [i for i in hlo.instructions(text) if i.opcode == "all-reduce" and i.elements in sizes]
    assert len(fused) == 3  # gate, up, down
    assert [i.name for i in fused if "reduce-scatter" not in i.computation] == []
    parts = [i for i in hlo.instructions(text) if i.opcode == "reduce-scatter" and i.elements * 128 in sizes]
    assert len(parts) == 4  # q, k, v, o: by hand, a chip's rows
    assert {i.dtype for i in fused + parts} == {"bf16"}
