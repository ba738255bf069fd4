"""What a training run carries from step to step."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from phijax.training.optimizer import Optimizer


@flax.struct.dataclass
class TrainState:
    """step: () int32, the step to do next. skipped: () int32, steps so far whose update was not finite.

    params: trained, nested dict. frozen: not trained (the base under LoRA, the DPO reference). opt_state: Optax's.
    skipped_in_a_row: () int32, so that the host can stop a run that no longer learns, also after a restart.
    """

    step: jax.Array
    params: Any
    frozen: Any
    opt_state: optax.OptState
    skipped: jax.Array
    skipped_in_a_row: jax.Array


def new_state(params: Any, optimizer: Optimizer, frozen: Any = None) -> TrainState:
    """Step 0. Under jit with sharded `params` the moments take their shardings."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, frozen if frozen is not None else {}, optimizer.init(params), zero, zero)


def select(ok: jax.Array, new: TrainState, old: TrainState) -> TrainState:
    """`new` where ok () bool, else `old`, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)


def place(abstract: TrainState, param_shardings: Any, replicated: jax.sharding.Sharding) -> TrainState:
    """`abstract` (ShapeDtypeStructs) with a sharding at each leaf: a moment lies where its parameter lies.

    A leaf belongs to a parameter when the dictionary keys on its path spell the parameter's path.
    """

    def keys(path) -> tuple[str, ...]:
        return tuple(k.key for k in path if isinstance(k, jax.tree_util.DictKey))

    known = {keys(path): s for path, s in jax.tree_util.tree_flatten_with_path(param_shardings)[0]}

    def placed(path, leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=known.get(keys(path), replicated))

    return jax.tree_util.tree_map_with_path(placed, abstract)
