"""A state's update by the optimizer: all at once, or layer by layer where Adam's moments lie in the hosts' memory."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from phijax.model.params import STACKED

Update = Callable[[Any, Any, Any], tuple[Any, Any]]  # gradients, Optax's state, parameters -> changes, new state


def at_once(update: Update, ok: jax.Array, grads: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
    """-> (parameters, Optax's state): the new ones where ok () bool, else the old ones."""
    changes, new_state = update(grads, opt_state, params)
    new = optax.apply_updates(params, changes), new_state
    return jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, (params, opt_state))


def by_layer(update: Update, ok: jax.Array, grads: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
    """As `at_once`, of moments in host memory, which they do not leave but for one layer at a time.

    Fetched whole they would take as much of the device as if they had stayed there, and twice that, since what a
    transfer brings is not written over (16 bytes a parameter, by the TPU compiler). Out of the loop over layers it
    makes slices that are read from, and written into, the hosts' buffers in place.

    Args:
      update: of any branches of the tree (optimizer.make_optimizer).
    """
    rest, new_state = at_once(
        update, ok, _outside(grads), _on_moments(lambda tree: _fetched(_outside(tree)), opt_state), _outside(params)
    )

    def layer(index, carry):
        blocks, state = carry
        take = functools.partial(jax.tree.map, lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False))
        put = functools.partial(jax.tree.map, lambda a, new: jax.lax.dynamic_update_index_in_dim(a, new, index, 0))
        fetched = _on_moments(lambda tree: _fetched(take(tree)), state)
        new, updated = at_once(update, ok, take(_blocks(grads)), fetched, take(blocks))
        return put(blocks, new), _on_moments(lambda tree, new: put(tree, _to_host(new)), state, updated)

    num_layers = jax.tree.leaves(params[STACKED])[0].shape[0]
    carry = _blocks(params), _on_moments(_blocks, opt_state)
    blocks, state = jax.lax.fori_loop(0, num_layers, layer, carry)
    return rest | blocks, _on_moments(lambda tree, blocks: _to_host(tree) | blocks, new_state, state)


def _on_moments(change: Callable[..., Any], opt_state: Any, *others: Any) -> Any:
    """`change` of each tree of moments in Optax's state; counts stay what they are in `opt_state`."""

    def is_tree(node):
        return isinstance(node, dict)

    return jax.tree.map(lambda a, *b: change(a, *b) if is_tree(a) else a, opt_state, *others, is_leaf=is_tree)


def _blocks(tree: dict[str, Any]) -> dict[str, Any]:
    return {STACKED: tree[STACKED]}


def _outside(tree: dict[str, Any]) -> dict[str, Any]:
    return {name: branch for name, branch in tree.items() if name != STACKED}


def _fetched(tree: Any) -> Any:
    return jax.device_put(tree, jax.memory.Space.Device)


def _to_host(tree: Any) -> Any:
    return jax.device_put(tree, jax.memory.Space.Host)
