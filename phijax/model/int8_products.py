"""Products of a feed-forward layer in int8 while it trains: v5e and v6e multiply int8 at twice bfloat16's rate.

Activations have a scale for each token, weights one for each of their rows: neither crosses chips, since rows are
what is cut. Weights are rounded where they lie, so that half of bfloat16's bytes are gathered. Rounding counts as the
identity in the backward pass (Bengio et al. 2013, arXiv:1308.3432, section 4), whose products are in the activations'
dtype, as in SwitchBack (Wortsman et al. 2023, arXiv:2304.13013, section 2.2).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from phijax.model import weights
from phijax.model.low_rank import LowRank
from phijax.parallel import sharding

LARGEST = 127  # symmetric: -128 stays unused


def project(x: jax.Array, w: nnx.Param) -> jax.Array:
    """(..., D) by the rows of w (rows, D) -> (..., rows), as `weights.project` but rounded."""
    return _project(x, w[...], tuple(w.axes))


def project_back(h: jax.Array, w: nnx.Param) -> jax.Array:
    """(..., rows) by w (rows, D) -> (..., D), as `weights.project_back` but rounded."""
    return _project_back(h, w[...], tuple(w.axes))


def contract(x: jax.Array, w: nnx.Param) -> jax.Array:
    """As `weights.contract` but rounded; of a LowRank its base is, its factors are not. What is in few bits already is
    contracted as it is.
    """
    value = w.get_value()
    if isinstance(value, LowRank):
        leaves = value.leaves(w)
        by = {"base": contract, "a": weights.contract, "b": weights.contract}
        return value.contract(x, lambda x, name: by[name](x, leaves[name]), back=w.summed == "rows")
    if isinstance(value, weights.WeightFormat):
        return weights.contract(x, w)
    return project_back(x, w) if w.summed == "rows" else project(x, w)


def rounded(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(..., D) -> int8 (..., D) and the scale of each row (..., 1) float32: x is about their product."""
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-1, keepdims=True) / LARGEST
    # Of a row of zeros the scale is zero: divided by one, its integers are zero too.
    return jnp.round(wide / jnp.where(scale > 0, scale, 1)).astype(jnp.int8), scale


def _gathered(matrix: jax.Array, axes: Sequence[str]) -> tuple[jax.Array, jax.Array]:
    """The stored weight (rows, D) -> its integers (rows, D) and scales (rows,), rounded on its shard, then gathered."""
    # Without the barrier XLA may gather the rounded numbers in their old dtype and make integers of them after.
    values, scales = jax.lax.optimization_barrier(rounded(matrix))
    return sharding.constrain(values, axes, gathered=True), sharding.constrain(scales[:, 0], axes[:1], gathered=True)


def _integer_product(x: jax.Array, values: jax.Array, contracted: int) -> jax.Array:
    """x (..., C) rounded by token times int8 values, summed over axis `contracted` of them: (..., other), float32."""
    x, scale = rounded(x)
    out = jax.lax.dot_general(x, values, (((x.ndim - 1,), (contracted,)), ((), ())), preferred_element_type=jnp.int32)
    return out.astype(jnp.float32) * scale


def _scattered(left: jax.Array, right: jax.Array, matrix: jax.Array, axes: Sequence[str]) -> jax.Array:
    """(..., rows), (..., D) -> the weight's gradient, summed over all places and cut as the weight is."""
    places = tuple(range(left.ndim - 1))
    gradient = jax.lax.dot_general(left, right, ((places, places), ((), ())))
    return sharding.constrain(gradient, axes).astype(matrix.dtype)


def _make(contracted: int):
    """The product that sums over D (contracted = 1) or over rows (0), with its own gradients."""

    def forward(x, matrix, axes):
        values, scales = _gathered(matrix, axes)
        if contracted == 1:
            out = _integer_product(x, values, 1) * scales
        else:
            # Rows are summed over, so their scales go to the activations before these are rounded.
            out = _integer_product(x.astype(jnp.float32) * scales, values, 0)
        return out.astype(x.dtype), (x, values, scales, jnp.zeros((), matrix.dtype))

    def backward(axes, saved, cotangent):
        x, values, scales, stored = saved
        integers, dtype = values.astype(x.dtype), x.dtype
        scaled = (cotangent * scales).astype(dtype) if contracted == 1 else cotangent
        dx = jax.lax.dot_general(scaled, integers, (((scaled.ndim - 1,), (1 - contracted,)), ((), ())))
        if contracted == 1:
            return dx, _scattered(cotangent, x, stored, axes)
        return (dx * scales).astype(dtype), _scattered(x, cotangent, stored, axes)

    product = jax.custom_vjp(lambda x, matrix, axes: forward(x, matrix, axes)[0], nondiff_argnums=(2,))
    product.defvjp(forward, backward)
    return product


_project, _project_back = _make(1), _make(0)
