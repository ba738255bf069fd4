"""A tiny model's recipe, batches and compiled programs that the tests of training share."""

import functools
import math

import jax
import numpy as np
from jax.sharding import Mesh

from phijax.data.batch import TEXT_KEYS, batch_sharding
from phijax.model.backend import Backend
from phijax.model.config import ModelConfig
from phijax.model.cross_entropy import LossConfig
from phijax.parallel.mesh import MeshConfig, make_mesh
from phijax.training.optimizer import OptimizerConfig
from phijax.training.program import BatchShape, Recipe, initial_state, lower_train_step
from phijax.training.state import TrainState

# Most of these tests is compilation: LLVM need not optimise what runs a few times.
QUICK = {"xla_backend_optimization_level": 0}

SMALL = ModelConfig(
    vocab_size=500,  # padded to 1024
    model_dim=32,
    num_layers=2,
    num_heads=8,  # and as many kv heads: tensor=8 divides them
    num_kv_heads=8,
    head_dim=4,
    ffn_dim=64,
    max_position=4096,
)
STEPS = 10
ROWS, LENGTH = 8, 16


@functools.cache
def mesh_of(*shape: int) -> Mesh:
    """data, fsdp, context, tensor over the first of the virtual devices."""
    return make_mesh(MeshConfig(*shape), jax.devices()[: math.prod(shape)])


@functools.cache
def recipe(**backend) -> Recipe:
    # A high rate: a gradient that is wrong on some mesh parts the losses within a few steps.
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=2)
    return Recipe(SMALL, Backend(**backend), optimizer, LossConfig(z_loss=1e-4), total_steps=STEPS, seed=0)


def host_batch(shape: BatchShape, seed: int = 0) -> dict[str, np.ndarray]:
    """Two segments a row; the rows' weights are far from equal."""
    rng = np.random.default_rng(seed)
    a, b, t = shape
    half = np.broadcast_to(np.arange(t) % (t // 2), shape)
    row_weights = rng.uniform(0.1, 4.0, (a * b, 1)) * (rng.random((a * b, t)) < np.linspace(0.1, 1.0, a * b)[:, None])
    arrays = {
        "tokens": rng.integers(0, SMALL.vocab_size, shape),
        "targets": rng.integers(0, SMALL.vocab_size, shape),
        "segment_ids": np.broadcast_to(1 + (np.arange(t) >= t // 2), shape),
        "positions": half,
        "weights": row_weights.reshape(shape),
    }
    return {name: arrays[name].astype(key.dtype) for name, key in TEXT_KEYS.items()}


def on_mesh(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    return jax.device_put(batch, batch_sharding(mesh))


@functools.cache
def compiled(which: Recipe, mesh: Mesh, shape: BatchShape) -> jax.stages.Compiled:
    return lower_train_step(which, mesh, shape).compile(QUICK)


def losses(which: Recipe, mesh: Mesh, shape: BatchShape, steps: int = STEPS) -> tuple[np.ndarray, TrainState]:
    """Losses of `steps` steps from the seed, on rows that do not depend on how `shape` cuts them; the last state."""
    program, state, seen = compiled(which, mesh, shape), initial_state(which, mesh), []
    for step in range(steps):
        rows = host_batch((1, shape[0] * shape[1], shape[2]), seed=step)
        state, metrics = program(state, on_mesh({k: v.reshape(shape) for k, v in rows.items()}, mesh))
        seen.append(float(metrics["loss"]))
    return np.array(seen), state


def host(tree):
    """Copies, leaf by leaf, that survive donation."""
    return jax.tree.map(lambda leaf: np.array(leaf), tree)


def assert_bits_equal(got, expected) -> None:
    """Leaf by leaf, NaN and signed zero included."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(got)[0], jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        assert a.tobytes() == b.tobytes(), path
