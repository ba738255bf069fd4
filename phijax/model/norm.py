"""RMSNorm."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from phijax.model.weights import ONES, weight


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, (..., D) -> (..., D). Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4.

    Computed in float32, cast back before the factor, as the published phi-3 weights expect.
    """

    def __init__(self, model_dim: int, eps: float):
        self.scale = weight((model_dim,), ("embed",), ONES)
        self.eps = eps

    def __call__(self, x: jax.Array, row_sum: Callable[[jax.Array], jax.Array] | None = None) -> jax.Array:
        """row_sum: adds up the last axis in an order of its own; None: as the compiler likes."""
        wide = x.astype(jnp.float32)
        squares = jnp.square(wide)
        mean = jnp.mean(squares, axis=-1) if row_sum is None else row_sum(squares) / x.shape[-1]
        inverse = jax.lax.rsqrt(mean[..., None] + self.eps)
        return self.scale[...].astype(x.dtype) * (wide * inverse).astype(x.dtype)
