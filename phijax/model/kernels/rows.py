"""Rows of a batch one after another, so that the bits of each do not depend on the others."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def each_row(f: Callable, count: jax.Array | None) -> Callable:
    """`f`, arrays (B, ...) -> array or tuple of arrays (B, ...): all rows at once, or each as a batch of one.

    On CPU even a sum along a row can depend on the row's place in the batch, as vectors may lie across rows.

    The loop's length is an argument of the program and the arrays have two rows or more: of arrays with one row, or of
    a loop that is known to turn once, XLA makes other code, with other bits.

    Args:
      count: how many rows are computed, the others stay zero; None: all at once.
    """
    if count is None:
        return f

    def rows(*arrays: jax.Array):
        assert arrays[0].shape[0] > 1

        def one(i):
            return f(*(jax.lax.dynamic_slice_in_dim(a, i, 1) for a in arrays))

        def put(i, out):
            return jax.tree.map(lambda whole, row: jax.lax.dynamic_update_slice_in_dim(whole, row, i, 0), out, one(i))

        shapes = jax.eval_shape(one, jnp.int32(0))
        zeros = jax.tree.map(lambda a: jnp.zeros((arrays[0].shape[0], *a.shape[1:]), a.dtype), shapes)
        return jax.lax.fori_loop(0, count, put, zeros)

    return rows
