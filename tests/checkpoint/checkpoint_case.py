"""What the checkpoint tests share: a state with every kind of leaf, a fresh writer, comparison bit by bit."""

import contextlib
import hashlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from phijax.checkpoint.config import CheckpointConfig
from phijax.checkpoint.lock import WriterLock
from phijax.checkpoint.run_state import RunCheckpoints

IDENTITY = {"model": {"num_layers": 2}, "tokenizer": "abc"}


class Moments(NamedTuple):
    """Stands for an optimizer's state: a named tuple with empty parts."""

    count: jax.Array
    mean: dict
    empty: tuple = ()
    nothing: None = None


def mesh_of(*shape: int) -> Mesh:
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, ("fsdp", "tensor")[: len(shape)])


def rows(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(tuple(mesh.axis_names)))


def state(seed: int, mesh: Mesh, rows_of_weight: int = 16) -> dict:
    """A small state; leaves of many dtypes, sharded by rows or replicated."""
    random = np.random.default_rng(seed)

    def put(dtype, shape, sharding=rows(mesh)):
        return jax.device_put(jnp.asarray(random.normal(size=shape) * 5).astype(dtype), sharding)

    everywhere = NamedSharding(mesh, PartitionSpec())
    return {
        "step": put(jnp.int32, (), everywhere),
        "params": {
            "w": put(jnp.float32, (rows_of_weight, 24)),
            "half": put(jnp.bfloat16, (2, 8, 3), NamedSharding(mesh, PartitionSpec(None, tuple(mesh.axis_names)))),
            "norm": put(jnp.float32, (6,), everywhere),
        },
        "small": [put(jnp.int4, (8, 16)), put(jnp.float8_e4m3fn, (8, 4)), put(jnp.bool_, (5,), everywhere)],
        "opt_state": Moments(put(jnp.uint32, (), everywhere), {"w": put(jnp.float32, (rows_of_weight, 24))}),
    }


def like(tree, mesh: Mesh | None = None):
    """Shapes with shardings for `restore`: those of `tree`, or by rows of another mesh where rows divide."""

    def shape(leaf):
        sharding = leaf.sharding
        if mesh is not None:
            divides = leaf.ndim and leaf.shape[0] % mesh.size == 0
            sharding = rows(mesh) if divides else NamedSharding(mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(shape, tree)


def bits(tree) -> str:
    """A hash over structure, paths, dtypes, shapes and every bit."""
    digest = hashlib.sha256(str(jax.tree.structure(tree)).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def writer(directory, log=None, break_lock=False, **config):
    """A RunCheckpoints on `directory` and the lines it logs."""
    lines = [] if log is None else log
    with WriterLock(directory, break_lock=break_lock, log=lines.append) as lock:
        config = CheckpointConfig(**config)
        checkpoints = RunCheckpoints(directory, config, identity=IDENTITY, version=1, lock=lock, log=lines.append)
        yield checkpoints, lines


def save_steps(directory, seeds: dict[int, int], mesh: Mesh, **config) -> None:
    """Saves state(seed) at each step of {step: seed}."""
    with writer(directory, **config) as (checkpoints, _):
        for step, seed in seeds.items():
            checkpoints.save(step, state(seed, mesh))
        checkpoints.wait()
