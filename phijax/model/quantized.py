"""A weight in few bits: small integers and, for each group along the axis that is summed over, one scale.

weight = values * scales, symmetric, no offset. `project` sums over D, so its weights have their groups along D;
`project_back` sums over rows, so o and down have them along rows. Both are the input axis of Hugging Face's [out, in]
matrices, along which the groups of GGUF, compressed-tensors and MLX run: files for them hold the same numbers.
One group over the whole axis is a scale for each output channel.

This is the reference in plain XLA. A group's scale is multiplied into the weights, which XLA fuses into the product on
CPU and GPU; a channel's is multiplied into the result, so that on TPU the product reads the integers as they lie.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A leaf of the parameters, or a stack of them with L in front.

    values: (..., rows, D) int4 or int8.
    scales: float16, (..., rows, D / G) or (..., rows / G, D); 1 in place of a quotient: one group over the axis.
    """

    values: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


def dequantize(w: Quantized, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """(..., rows, D) in dtype. float32 holds every product of an integer and a scale; bfloat16 rounds it."""
    shape, spread, split = w.values.shape, [], []
    for size, groups in zip(shape, w.scales.shape, strict=True):
        split += [groups, size // groups]
        spread += [groups, 1]
    values = w.values.astype(jnp.float32).reshape(split) * w.scales.astype(jnp.float32).reshape(spread)
    return values.reshape(shape).astype(dtype)


def project(x: jax.Array, w: Quantized, dtype: jnp.dtype | None = None) -> jax.Array:
    """(..., D) -> (..., rows), summed in float32; in `dtype`, else as x."""
    return _product(x, w, -1, dtype)


def project_back(h: jax.Array, w: Quantized, dtype: jnp.dtype | None = None) -> jax.Array:
    """(..., rows) -> (..., D), summed in float32; in `dtype`, else as h."""
    return _product(h, w, -2, dtype)


def lookup(w: Quantized, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of an embedding: (...) int32 -> (..., D). Only the rows that are asked for are widened."""
    rows = Quantized(jnp.take(w.values, tokens, axis=0), jnp.take(w.scales, tokens, axis=0))
    return dequantize(rows, dtype)


def _product(x: jax.Array, w: Quantized, summed: int, dtype: jnp.dtype | None) -> jax.Array:
    by_channel = w.scales.shape[summed] == 1
    matrix = w.values.astype(x.dtype) if by_channel else dequantize(w, x.dtype)
    contracted = ((x.ndim - 1,), (matrix.ndim + summed,))
    out = jax.lax.dot_general(x, matrix, (contracted, ((), ())), preferred_element_type=jnp.float32)
    if by_channel:
        out = out * w.scales.astype(jnp.float32).reshape(-1)
    return out.astype(dtype or x.dtype)
