"""Keys and values in eight bits: integers, and one scale for the H numbers of a head at a place."""

import jax
import jax.numpy as jnp


def to_int8(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(..., H) -> integers of -127 to 127, (..., H) int8, and scales, (...) bfloat16: x = integers * scales, nearly.

    An error is at most half a scale: 1/253 of the largest of the H numbers.
    """
    x = x.astype(jnp.float32)
    # A little more than the largest needs: rounded to bfloat16 the scale must not become less.
    scales = (jnp.max(jnp.abs(x), axis=-1) * ((1 + 2**-8) / 127)).astype(jnp.bfloat16)
    divisor = jnp.where(scales == 0, 1, scales).astype(jnp.float32)
    return jnp.round(x / divisor[..., None]).astype(jnp.int8), scales


def from_int8(integers: jax.Array, scales: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """(..., H) in dtype."""
    return (integers.astype(jnp.float32) * scales.astype(jnp.float32)[..., None]).astype(dtype)
