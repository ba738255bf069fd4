"""The plan's memory: what lives from step to step exactly, activations against what jax itself keeps."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from phijax.errors import UserError
from phijax.model import params
from phijax.model.backend import CHOICES, Backend
from phijax.model.config import ModelConfig
from phijax.model.cross_entropy import LossConfig
from phijax.model.decoder import REMAT_POLICIES
from phijax.model.presets import PRESETS
from phijax.parallel.sharding import MESH_AXES
from phijax.planning import summary
from phijax.training.optimizer import OptimizerConfig
from phijax.training.program import Recipe, initial_state

# No two of its sizes are equal or multiples of each other's products, so that none can stand for another.
SMALL = ModelConfig(
    vocab_size=300,
    model_dim=64,
    num_layers=3,
    num_heads=8,
    num_kv_heads=2,
    head_dim=12,
    ffn_dim=176,
    max_position=512,
)
GPT2 = dataclasses.replace(
    SMALL, tied_head=True, positions="learned", norm="layer", bias=True, activation="gelu_tanh", gated=False
)


def recipe(model=SMALL, **backend) -> Recipe:
    return Recipe(model, Backend(**backend), OptimizerConfig(), LossConfig(), total_steps=10, seed=0)


def sizes_of(data, fsdp, context, tensor):
    return dict(zip(MESH_AXES, (data, fsdp, context, tensor), strict=True))


@pytest.mark.parametrize("shape", [(8, 1, 1, 1), (1, 8, 1, 1), (1, 2, 2, 2), (4, 1, 1, 2)])
def test_parameters_and_moments_are_the_bytes_on_every_device(shape):
    mesh = Mesh(np.array(jax.devices()).reshape(shape), MESH_AXES)
    state = initial_state(recipe(), mesh)
    planned = summary.memory(recipe(), sizes_of(*shape), (1, 8, 32))
    assert bytes_per_device(state.params) == {device: planned["parameters (float32)"] for device in mesh.devices.flat}
    moments, counts = [], []
    for leaf in jax.tree.leaves(state.opt_state):
        (moments if leaf.ndim else counts).append(leaf)
    assert bytes_per_device(moments) == {d: planned["optimizer moments (float32)"] for d in mesh.devices.flat}
    assert len(counts) == 1  # Adam's step count, 4 bytes


def test_moments_on_the_host_take_nothing_of_a_device():
    there = dataclasses.replace(recipe(), optimizer=OptimizerConfig(moments="host"))
    here, gone = (summary.memory(r, sizes_of(1, 8, 1, 1), (1, 8, 32)) for r in (recipe(), there))
    (line,) = set(gone) - set(here)
    assert gone[line] == 0 and f"{here['optimizer moments (float32)'] / 2**30:.3f} GiB on the host" in line
    assert sum(here.values()) - sum(gone.values()) == here["optimizer moments (float32)"]


def bytes_per_device(tree) -> dict:
    held = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return held


def test_gradients_are_held_twice_while_micro_batches_are_summed():
    sizes = sizes_of(1, 1, 1, 1)
    one, four = (summary.memory(recipe(), sizes, (a, 8 // a, 32)) for a in (1, 4))
    assert one["gradients (float32)"] == one["parameters (float32)"]
    assert four["gradients (float32)"] == 2 * one["gradients (float32)"]
    assert 4 * four["saved activations (estimate)"] == one["saved activations (estimate)"]


CASES = [
    *((policy, "dense", True, dtype) for policy in REMAT_POLICIES for dtype in ("float32", "bfloat16")),
    ("query+gate", "dense", True, "float32"),
    ("save_all", "blocked", False, "bfloat16"),
    ("none", "blocked", True, "bfloat16"),
    ("none", "blocked", False, "float32"),
    ("none", "dense", False, "bfloat16"),
]


OTHERS = [
    (dataclasses.replace(SMALL, activation="gelu_tanh"), ("none", "dense", True, "bfloat16")),
    (dataclasses.replace(SMALL, gated=False), ("none", "blocked", False, "float32")),
    *((GPT2, case) for case in (CASES[1], CASES[2], CASES[-2])),
]


@pytest.mark.parametrize(("model", "case"), [*((SMALL, case) for case in CASES), *OTHERS])
def test_saved_activations_are_what_autodiff_keeps(model, case):
    """To the byte: all arrays with a row and a token dimension that the backward pass of `hidden` is handed."""
    rows, length, (remat, attention, scan, dtype) = 3, 256, case
    r = recipe(model, attention=attention, scan_layers=scan, remat=remat, compute_dtype=dtype)
    kept = residuals(r, rows, length)
    assert summary.saved_per_token(r, 1, length) * rows * length == sum(a.size * a.dtype.itemsize for a in kept)


def residuals(r: Recipe, rows: int, length: int) -> list:
    """The arrays, apart from weights and arguments, that jax.vjp's backward function closes over."""

    def backward(parameters, tokens, positions, segment_ids):
        def hidden(parameters):
            decoder = params.module(r.model, parameters)
            return decoder.hidden(tokens, positions, segment_ids, r.backend, length=length)

        return jax.vjp(hidden, parameters)[1]

    ids = jax.ShapeDtypeStruct((rows, length), np.int32)
    program = jax.make_jaxpr(backward)(params.abstract(r.model), ids, ids, ids).jaxpr
    arguments = {id(v) for v in program.invars}
    distinct = {id(v): v.aval for v in program.outvars if id(v) not in arguments}
    return [aval for aval in distinct.values() if rows in aval.shape and length in aval.shape]


def test_saving_less_recomputes_more():
    kept = [summary.saved_per_token(recipe(attention="splash", remat=p), 1, 256) for p in REMAT_POLICIES]
    again = [summary.recomputed_per_token(recipe(attention="splash", remat=p), 1, 256) for p in REMAT_POLICIES]
    assert kept == sorted(kept, reverse=True)
    assert again[0] == 0 and again[1:] == sorted(again[1:])


def test_tensor_and_context_cut_activations():
    r = recipe()
    whole = summary.memory(r, sizes_of(1, 1, 1, 1), (1, 8, 256))["saved activations (estimate)"]
    cut = summary.memory(r, sizes_of(1, 1, 2, 1), (1, 8, 256))["saved activations (estimate)"]
    assert 2 * cut == whole
    assert whole / 2 < summary.memory(r, sizes_of(1, 1, 1, 2), (1, 8, 256))["saved activations (estimate)"] < whole


def medium(batch_rows: int, micro_batches: int) -> tuple[Recipe, dict[str, int], tuple[int, int, int]]:
    model = dataclasses.replace(PRESETS["phi3_medium"], sliding_window=None)
    r = dataclasses.replace(recipe(model), backend=CHOICES["tpu"])
    return r, sizes_of(2, 64, 1, 1), (micro_batches, batch_rows // micro_batches, 4096)


def test_mediums_plan_on_128_chips():
    r, sizes, shape = medium(1024, 4)
    lines = summary.describe(r, sizes, {"phase 0": shape})
    assert lines[0].startswith(
        "model: 13,960,238,080 parameters, 40 layers of 5120, 40 heads of 128 (10 kv), ffn 17920"
    )
    leaves = params.shapes(r.model)
    assert [line.split()[0] for line in lines[1 : len(leaves) + 1]] == list(leaves)
    # By hand: rows of q, k, v, o and of gate, up, down, and of embedding and head, over 64 chips; norms on each.
    projections = 40 * (5120 + 1280 + 1280 + 5120 + 3 * 17920) * 5120
    elements = (projections + 2 * 32768 * 5120) // 64 + 81 * 5120
    assert elements == 218_649_600
    printed = {line.rsplit(None, 2)[0].strip(): line.rsplit(None, 2)[1] for line in lines if line.endswith("GiB")}
    assert printed["parameters (float32)"] == f"{4 * elements / 2**30:.3f}" == "0.815"
    assert printed["optimizer moments (float32)"] == f"{8 * elements / 2**30:.3f}" == "1.629"
    assert printed["gradients (float32)"] == "1.629"  # the sum over 4 micro-batches, and one's own
    assert math.isclose(float(printed["sum"]), sum(float(v) for k, v in printed.items() if k != "sum"), abs_tol=0.01)
    assert "phase 0: 4 micro-batches x 256 rows x 4096 tokens = 4,194,304 tokens and 3.683e+17 FLOP a step" in lines
    assert not any(line.startswith("warning") for line in lines)


def test_the_sum_is_close_to_what_the_tpu_compiler_takes():
    # libtpu 0.0.42 for v5p:4x4x8, a step of this layout that saves all, 2 sequences a chip: 55.80 GiB. It pads and
    # keeps workspace that shapes do not show, hence 5 %.
    r, sizes, shape = medium(256, 1)
    assert sum(summary.memory(r, sizes, shape).values()) / 2**30 == pytest.approx(55.8, rel=0.05)


def test_a_ragged_mesh_is_warned_of_and_an_impossible_one_refused():
    r, _, shape = medium(1024, 4)
    lines = summary.describe(r, sizes_of(1, 128, 1, 1), {"phase 0": shape})
    (warning,) = [line for line in lines if line.startswith("warning: ")]
    assert "140 rows of blocks/mlp/" in warning and "fsdp=64" in warning
    with pytest.raises(UserError, match=r"mesh.tensor=4 cannot be used with model.num_kv_heads=10"):
        summary.describe(r, sizes_of(1, 32, 1, 4), {"phase 0": shape})
