"""Round to nearest, with the scale of each group searched for the least squared error."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from phijax.quantization.policy import Scheme

# Of the scale that carries a group's largest weight to the lowest integer: at 1 nothing but that weight's sign is
# clipped (as in GGUF's Q4_0); below, the largest are clipped and the others come nearer.
FACTORS = tuple(float(f) for f in np.linspace(1.08, 0.6, 13))


class Rounded(NamedTuple):
    """values: (rows, D) int8; scales: float16, as Quantized has them; squared: summed squares of error and weight."""

    values: jax.Array
    scales: jax.Array
    squared: tuple[jax.Array, jax.Array]


Quantize = Callable[[jax.Array, Scheme, int], Rounded]  # a matrix (rows, D), its scheme, the axis of its inputs


def round_to_nearest(
    weight: jax.Array,
    scheme: Scheme,
    axis: int,
    factors: tuple[float, ...] = FACTORS,
    importance: jax.Array | None = None,
) -> Rounded:
    """One matrix (rows, D), any float, in groups along `axis` (-1 or -2).

    Errors are those of the scale as it is stored, in float16: what that rounding costs is part of the search. A scale
    may be negative: the integers reach from -8 to 7, and the group's largest weight takes the longer side.

    Args: importance: (inputs,), what an input's squared errors count in the search; None: all alike. With mean squares
      of the inputs, the search is for the least change of the outputs, as far as inputs do not go together.
    """
    if importance is None:
        importance = np.ones(weight.shape[axis], np.float32)
    return _rounded(weight, importance, scheme.bits, scheme.group or weight.shape[axis], axis % 2, tuple(factors))


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _rounded(weight, importance, bits: int, group: int, axis: int, factors: tuple[float, ...]) -> Rounded:
    weight = weight.astype(jnp.float32)
    rows, columns = weight.shape
    within = axis + 1  # the axis of a group's members
    shape = (rows, columns // group, group) if axis == 1 else (rows // group, group, columns)
    w = weight.reshape(shape)
    counts = importance.astype(jnp.float32).reshape((1, -1, group) if axis == 1 else (-1, group, 1))
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    largest, smallest = jnp.max(w, within, keepdims=True), jnp.min(w, within, keepdims=True)
    whole = jnp.where(largest > -smallest, largest, smallest) / low

    def integers(scale: jax.Array) -> jax.Array:
        # A scale that float16 rounds to zero: all values are zero.
        return jnp.where(scale == 0, 0.0, jnp.clip(jnp.round(w / jnp.where(scale == 0, 1.0, scale)), low, high))

    def stored(scale: jax.Array) -> jax.Array:
        return scale.astype(jnp.float16).astype(jnp.float32)

    def error(scale: jax.Array) -> jax.Array:
        return jnp.sum(counts * jnp.square(w - integers(scale) * scale), within, keepdims=True)

    def better(best, scale):
        found = error(scale)
        closer = found < best[0]
        return jnp.where(closer, found, best[0]), jnp.where(closer, scale, best[1])

    def attempt(best, factor):
        return better(best, stored(whole * factor)), None

    first = (jnp.full_like(whole, jnp.inf), jnp.zeros_like(whole))
    best, _ = jax.lax.scan(attempt, first, jnp.array(factors, jnp.float32))
    if len(factors) > 1:
        # The scale that fits these integers best, in closed form: sum(w q) / sum(q q).
        q = integers(best[1])
        norm = jnp.sum(counts * q * q, within, keepdims=True)
        fitting = jnp.sum(counts * w * q, within, keepdims=True) / jnp.where(norm > 0, norm, 1.0)
        best = better(best, stored(jnp.where(norm > 0, fitting, 0.0)))
    scale = best[1]
    values = integers(scale)
    return Rounded(
        values.astype(jnp.int8).reshape(rows, columns),
        jnp.squeeze(scale, within).astype(jnp.float16),
        (jnp.sum(jnp.square(w - values * scale)), jnp.sum(jnp.square(w))),
    )
