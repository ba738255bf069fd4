"""GPTQ: input channels are rounded one after another, and what each loses is made up for by those that follow.

Frantar et al. 2022, arXiv:2210.17323. H = X^T X is the Hessian of a matrix's inputs, U the upper Cholesky factor of its
inverse: the error of column j, divided by U_jj, is taken from the later columns in proportion to row j of U. Columns
whose inputs are largest go first, while many are left to make up for them ("act-order" in the authors' code): 0.16 nats
instead of 0.25 on SmolLM2-135M in int4_g64. Groups stay runs of neighbouring columns, their scales searched before the
first is rounded, so that files stay ordinary.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from phijax.quantization.policy import Scheme
from phijax.quantization.rounding import Quantize, Rounded, round_to_nearest

DAMPING = 0.01  # of the mean diagonal, added to it: inputs that hardly occur would else take any value
BLOCK = 128  # columns whose corrections reach each other at once and all later columns together


class Factor(NamedTuple):
    """Of the inputs of one or more matrices, (inputs,) each and (inputs, inputs).

    order: the columns as they are rounded; importance: mean squares, damped; upper: U, in that order.
    """

    order: jax.Array
    importance: jax.Array
    upper: jax.Array


class Roundings:
    """How the matrices of a model are rounded, asked for one after another; a factor serves all with the same inputs.

    Args: hessians: of a leaf's path and layer, (inputs, inputs) float32; None: the matrix is rounded to nearest.
    """

    def __init__(self, hessians: Callable[[str, int], jax.Array | None]):
        self._hessians, self._last = hessians, (None, None)

    def __call__(self, path: str, layer: int) -> Quantize | None:
        hessian = self._hessians(path, layer)
        if hessian is None:
            return None
        if hessian is not self._last[0]:
            self._last = (None, None)  # U of 8192 inputs is 268 MB: the old one goes before the new one comes
            self._last = (hessian, factor_of(hessian))
        return functools.partial(quantize, self._last[1])


def quantize(factor: Factor, weight: jax.Array, scheme: Scheme, axis: int) -> Rounded:
    """One matrix (rows, D), any float, in groups along `axis` (-1 or -2), its inputs.

    Returns: as round_to_nearest; the squared error is that of the weights, which this method lets grow.
    """
    w = jnp.asarray(weight, jnp.float32)
    turned = w if axis == -1 else w.T
    inputs = turned.shape[1]
    scales = round_to_nearest(turned, scheme, -1, importance=factor.importance).scales
    values = _columns(turned, scales, factor, scheme.bits, math.gcd(BLOCK, inputs))
    wide = values * jnp.repeat(scales.astype(jnp.float32), scheme.group or inputs, axis=1)
    squared = (jnp.sum(jnp.square(wide - turned)), jnp.sum(jnp.square(turned)))
    values = values.astype(jnp.int8)
    return Rounded(values, scales, squared) if axis == -1 else Rounded(values.T, scales.T, squared)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _columns(w: jax.Array, scales: jax.Array, factor: Factor, bits: int, block: int) -> jax.Array:
    """(outputs, inputs), scales (outputs, groups) -> integers in float32, (outputs, inputs)."""
    outputs, inputs = w.shape
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    order, upper = factor.order, factor.upper
    number = jnp.arange(inputs)
    groups = order // (inputs // scales.shape[1])  # of each column, as they are rounded

    def step(start, carry):
        """A block of columns: one after another within it, then its corrections of all later ones in one product."""
        w, values = carry
        at = start * block
        wide = jnp.take(scales, jax.lax.dynamic_slice_in_dim(groups, at, block), axis=1).astype(jnp.float32)
        here = jax.lax.dynamic_slice_in_dim(w, at, block, 1)
        within = jax.lax.dynamic_slice(upper, (at, at), (block, block))

        def column(j, carry):
            here, q, errors = carry
            old, scale = (jax.lax.dynamic_slice_in_dim(array, j, 1, 1) for array in (here, wide))
            new = jnp.where(scale == 0, 0.0, jnp.clip(jnp.round(old / jnp.where(scale == 0, 1.0, scale)), low, high))
            error = (old - new * scale) / within[j, j]
            later = jnp.where(jnp.arange(block) > j, within[j], 0.0)
            q = jax.lax.dynamic_update_slice_in_dim(q, new, j, 1)
            errors = jax.lax.dynamic_update_slice_in_dim(errors, error, j, 1)
            return here - error * later, q, errors

        zeros = jnp.zeros((outputs, block), jnp.float32)
        _, q, errors = jax.lax.fori_loop(0, block, column, (here, zeros, zeros))
        rows = jax.lax.dynamic_slice_in_dim(upper, at, block, 0)
        w = w - errors @ jnp.where(number >= at + block, rows, 0.0)
        return w, jax.lax.dynamic_update_slice_in_dim(values, q, at, 1)

    ordered = jnp.take(w, order, axis=1)
    _, values = jax.lax.fori_loop(0, inputs // block, step, (ordered, jnp.zeros_like(w)))
    return jnp.take(values, jnp.argsort(order), axis=1)


def factor_of(hessian: jax.Array) -> Factor:
    """hessian: (inputs, inputs) float32, X^T X in any multiple."""
    squares = jnp.diagonal(hessian)
    order = jnp.argsort(-squares)
    return Factor(order, squares + DAMPING * jnp.mean(squares), upper_factor(hessian[order][:, order]))


@jax.jit
def upper_factor(hessian: jax.Array) -> jax.Array:
    """U with U^T U = (H + damping)^-1, upper triangular. hessian: (inputs, inputs) float32, X^T X in any multiple."""
    mean = jnp.mean(jnp.diagonal(hessian))
    damped = hessian + (DAMPING * mean + 1e-30) * jnp.eye(len(hessian), dtype=jnp.float32)
    # From the factor of the reversed H: with J the reversal, J H J = C C^T gives H^-1 = (J C^-1 J)^T (J C^-1 J).
    reversed_factor = jnp.linalg.cholesky(damped[::-1, ::-1])
    inverse = jax.scipy.linalg.solve_triangular(reversed_factor, jnp.eye(len(hessian)), lower=True)
    return inverse[::-1, ::-1]
