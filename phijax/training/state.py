"""What a training run carries from step to step."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from phijax.training.optimizer import Optimizer


@flax.struct.dataclass
class TrainState:
    """step: () int32, the step to do next. skipped: () int32, steps so far that changed nothing: their update was not
    finite, or no token of theirs was predicted.

    params: trained, nested dict. frozen: not trained (the base under LoRA, the DPO reference). opt_state: Optax's.
    skipped_in_a_row: () int32, updates since the last good one that were not finite, so that the host can stop a run
    that no longer learns, also after a restart. A step without a predicted token leaves it as it is.
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


def place(
    abstract: TrainState, param_shardings: Any, replicated: jax.sharding.Sharding, *, moments_on_host: bool = False
) -> TrainState:
    """`abstract` (ShapeDtypeStructs) with a sharding at each leaf: a moment is cut as its parameter is.

    A leaf belongs to a parameter when the dictionary keys on its path spell the parameter's path.

    Args:
      moments_on_host: those of opt_state lie in the memory of the chip's host.
    """

    def keys(path) -> tuple[str, ...]:
        return tuple(k.key for k in path if isinstance(k, jax.tree_util.DictKey))

    known = {keys(path): s for path, s in jax.tree_util.tree_flatten_with_path(param_shardings)[0]}

    def placed(path, leaf):
        sharding = known.get(keys(path), replicated)
        if moments_on_host and path[0].name == "opt_state" and keys(path) in known:
            sharding = sharding.with_memory_kind("pinned_host")
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(placed, abstract)
