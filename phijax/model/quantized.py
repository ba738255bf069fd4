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

    def dequantize(self, dtype: jnp.dtype = jnp.float32) -> jax.Array:
        """(..., rows, D) in dtype. float32 holds every product of an integer and a scale; bfloat16 rounds it."""
        split, spread = [], []
        for size, groups in zip(self.shape, self.scales.shape, strict=True):
            split += [groups, size // groups]
            spread += [groups, 1]
        values = self.values.astype(jnp.float32).reshape(split) * self.scales.astype(jnp.float32).reshape(spread)
        return values.reshape(self.shape).astype(dtype)

    def project(self, x: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
        """(..., D) -> (..., rows), summed in float32; in `dtype`, else as x."""
        return self._product(x, -1, dtype)

    def project_back(self, h: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
        """(..., rows) -> (..., D), summed in float32; in `dtype`, else as h."""
        return self._product(h, -2, dtype)

    def lookup(self, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Rows of an embedding: (...) int32 -> (..., D). Only the rows that are asked for are widened."""
        rows = Quantized(jnp.take(self.values, tokens, axis=0), jnp.take(self.scales, tokens, axis=0))
        return rows.dequantize(dtype)

    def _product(self, x: jax.Array, summed: int, dtype: jnp.dtype | None) -> jax.Array:
        by_channel = self.scales.shape[summed] == 1
        matrix = self.values.astype(x.dtype) if by_channel else self.dequantize(x.dtype)
        contracted = ((x.ndim - 1,), (matrix.ndim + summed,))
        out = jax.lax.dot_general(x, matrix, (contracted, ((), ())), preferred_element_type=jnp.float32)
        if by_channel:
            out = out * self.scales.astype(jnp.float32).reshape(-1)
        return out.astype(dtype or x.dtype)
