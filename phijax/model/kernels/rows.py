"""What keeps the bits of a batch's row from its place and from the other rows.

On CPU even a sum along a row can depend on the row's place: XLA chooses by the batch how vectors and threads share it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def row_sum(x: jax.Array) -> jax.Array:
    """(..., D) -> (...): halves added to each other until one is left, an order that the shape of a row alone decides.

    Only additions of whole arrays, which no compiler reorders. D is filled up with zeros to a power of two.
    """
    size = 1 << (x.shape[-1] - 1).bit_length()
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])
    while size > 1:
        size //= 2
        x = x[..., :size] + x[..., size:]
    return x[..., 0]


def kept_apart(arrays, count: jax.Array):
    """`arrays` as they are, computed before what uses them and not as part of it. count: any positive number.

    A product and a sum that are compiled together may round once instead of twice. XLA:CPU drops optimisation barriers
    before it fuses; the arguments of a branch it does compute.
    """
    return jax.lax.cond(count > 0, lambda arrays: arrays, lambda arrays: jax.tree.map(jnp.zeros_like, arrays), arrays)


def each_row(f: Callable, count: jax.Array | None) -> Callable:
    """`f`, arrays (B, ...) -> array or tuple of arrays (B, ...): all rows at once, or each as a batch of one.

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
