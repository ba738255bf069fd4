"""RMSNorm."""

import jax
import jax.numpy as jnp
from flax import nnx

from phijax.model.weights import weight


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, (..., D) -> (..., D). Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4.

    Computed in float32, cast back before the factor, as the published phi-3 weights expect.
    """

    def __init__(self, model_dim: int, eps: float):
        self.scale = weight((model_dim,), ("embed",), std=0.0)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return self.scale[...].astype(x.dtype) * (wide * inverse).astype(x.dtype)
