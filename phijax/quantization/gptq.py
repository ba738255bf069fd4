"""GPTQ: input channels are rounded one after another, and what each loses is made up for by those that follow.

Frantar et al. 2022, arXiv:2210.17323. H = X^T X is the Hessian of a matrix's inputs, U the upper Cholesky factor of its
inverse: the error of column j, divided by U_jj, is taken from the later columns in proportion to row j of U.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from phijax.quantization.policy import Scheme
from phijax.quantization.rounding import Rounded, round_to_nearest

DAMPING = 0.01  # of the mean diagonal, added to it: inputs that hardly occur would else take any value
BLOCK = (
    128  # columns (or what divides a group) whose corrections reach each other at once and all later columns together
)

Factor = Callable[[str, int], jax.Array | None]  # of a leaf's path and layer: U, or None where no H is known


class Factors:
    """U of the Hessians that are asked for one after another; made once for matrices that share their inputs."""

    def __init__(self, hessians: Callable[[str, int], jax.Array | None]):
        self._hessians, self._last = hessians, (None, None)

    def __call__(self, path: str, layer: int) -> jax.Array | None:
        hessian = self._hessians(path, layer)
        if hessian is not None and hessian is not self._last[0]:
            self._last = (None, None)  # U of 8192 inputs is 268 MB: the old one goes before the new one comes
            self._last = (hessian, upper_factor(hessian))
        return None if hessian is None else self._last[1]


def quantize(weight: jax.Array, factor: jax.Array, scheme: Scheme, axis: int) -> Rounded:
    """One matrix (rows, D), any float, in groups along `axis` (-1 or -2), its inputs.

    A group's scales are searched when its first column is reached, on what the corrections have made of it; a
    channel's before the first.

    Args: factor: U of its inputs, (inputs, inputs) float32, see `upper_factor`.
    Returns: as round_to_nearest; the squared error is that of the weights, which this method lets grow.
    """
    w = jnp.asarray(weight, jnp.float32)
    turned = w if axis == -1 else w.T
    group = scheme.group or turned.shape[1]
    values, scales = _columns(turned, factor, scheme.bits, group, math.gcd(BLOCK, group))
    wide = values * jnp.repeat(scales.astype(jnp.float32), group, axis=1)
    squared = (jnp.sum(jnp.square(wide - turned)), jnp.sum(jnp.square(turned)))
    values = values.astype(jnp.int8)
    return Rounded(values, scales, squared) if axis == -1 else Rounded(values.T, scales.T, squared)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _columns(w: jax.Array, upper: jax.Array, bits: int, group: int, block: int) -> tuple[jax.Array, jax.Array]:
    """(outputs, inputs) -> integers in float32 of that shape, scales (outputs, groups) float16."""
    outputs, inputs = w.shape
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    whole = Scheme(bits, None)
    number = jnp.arange(inputs)

    def step(start, carry):
        """A block of columns: one after another within it, then its corrections of all later ones in one product."""
        w, values, scales = carry
        at = start * block
        first = at // group * group
        members = jax.lax.dynamic_slice_in_dim(w, first, group, 1)
        found = round_to_nearest(members, whole, -1).scales
        stored = jax.lax.dynamic_slice_in_dim(scales, at // group, 1, 1)
        scale = jnp.where(at == first, found, stored)
        wide = scale.astype(jnp.float32)
        here = jax.lax.dynamic_slice_in_dim(w, at, block, 1)
        factor = jax.lax.dynamic_slice(upper, (at, at), (block, block))

        def column(j, carry):
            here, q, errors = carry
            old = jax.lax.dynamic_slice_in_dim(here, j, 1, 1)
            new = jnp.where(wide == 0, 0.0, jnp.clip(jnp.round(old / jnp.where(wide == 0, 1.0, wide)), low, high))
            error = (old - new * wide) / factor[j, j]
            later = jnp.where(jnp.arange(block) > j, factor[j], 0.0)
            q = jax.lax.dynamic_update_slice_in_dim(q, new, j, 1)
            errors = jax.lax.dynamic_update_slice_in_dim(errors, error, j, 1)
            return here - error * later, q, errors

        zeros = jnp.zeros((outputs, block), jnp.float32)
        _, q, errors = jax.lax.fori_loop(0, block, column, (here, zeros, zeros))
        rows = jax.lax.dynamic_slice_in_dim(upper, at, block, 0)
        w = w - errors @ jnp.where(number >= at + block, rows, 0.0)
        values = jax.lax.dynamic_update_slice_in_dim(values, q, at, 1)
        return w, values, jax.lax.dynamic_update_slice_in_dim(scales, scale, at // group, 1)

    scales = jnp.zeros((outputs, inputs // group), jnp.float16)
    _, values, scales = jax.lax.fori_loop(0, inputs // block, step, (w, jnp.zeros_like(w), scales))
    return values, scales


@jax.jit
def upper_factor(hessian: jax.Array) -> jax.Array:
    """U with U^T U = (H + damping)^-1, upper triangular. hessian: (inputs, inputs) float32, X^T X in any multiple."""
    mean = jnp.mean(jnp.diagonal(hessian))
    damped = hessian + (DAMPING * mean + 1e-30) * jnp.eye(len(hessian), dtype=jnp.float32)
    # From the factor of the reversed H: with J the reversal, J H J = C C^T gives H^-1 = (J C^-1 J)^T (J C^-1 J).
    reversed_factor = jnp.linalg.cholesky(damped[::-1, ::-1])
    inverse = jax.scipy.linalg.solve_triangular(reversed_factor, jnp.eye(len(hessian)), lower=True)
    return inverse[::-1, ::-1]
