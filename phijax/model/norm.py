"""The norms of the residual stream."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from phijax.model.config import ModelConfig, Norm
from phijax.model.weights import ONES, ZEROS, weight

RowSum = Callable[[jax.Array], jax.Array]  # adds up the last axis in an order of its own


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, (..., D) -> (..., D). Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4.

    Computed in float32, cast back before the factor, as the published phi-3 weights expect.
    """

    def __init__(self, model_dim: int, eps: float, feeds: str | None = None):
        """feeds: as `weights.weight` takes it."""
        self.scale = weight((model_dim,), ("embed",), ONES, feeds=feeds)
        self.eps = eps

    def __call__(self, x: jax.Array, row_sum: RowSum | None = None) -> jax.Array:
        """row_sum: None: as the compiler likes."""
        wide = x.astype(jnp.float32)
        inverse = _inverse(_mean(jnp.square(wide), row_sum), self.eps)
        return self.scale[...].astype(x.dtype) * (wide * inverse).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean(x)) / deviation(x) * scale + bias, (..., D) -> (..., D). Ba et al. 2016, arXiv:1607.06450, eq. 4.

    Computed in float32 and cast back at the end, as the published GPT-2 weights expect.
    """

    def __init__(self, model_dim: int, eps: float, feeds: str | None = None):
        """feeds: as `weights.weight` takes it."""
        self.scale = weight((model_dim,), ("embed",), ONES, feeds=feeds)
        self.bias = weight((model_dim,), ("embed",), ZEROS, feeds=feeds)
        self.eps = eps

    def __call__(self, x: jax.Array, row_sum: RowSum | None = None) -> jax.Array:
        """row_sum: None: as the compiler likes."""
        wide = x.astype(jnp.float32)
        centred = wide - _mean(wide, row_sum)[..., None]
        inverse = _inverse(_mean(jnp.square(centred), row_sum), self.eps)
        return (centred * inverse * self.scale[...] + self.bias[...]).astype(x.dtype)


NORMS: dict[Norm, type[nnx.Module]] = {"rms": RMSNorm, "layer": LayerNorm}


def make_norm(c: ModelConfig, *, feeds: str | None) -> nnx.Module:
    return NORMS[c.norm](c.model_dim, c.norm_eps, feeds)


def _mean(x: jax.Array, row_sum: RowSum | None) -> jax.Array:
    return jnp.mean(x, axis=-1) if row_sum is None else row_sum(x) / x.shape[-1]


def _inverse(mean: jax.Array, eps: float) -> jax.Array:
    """1 / sqrt(mean + eps) of (...) -> (..., 1)."""
    return jax.lax.rsqrt(mean[..., None] + eps)
