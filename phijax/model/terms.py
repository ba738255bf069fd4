"""What a block is made of, not yet computed: `ops` evaluates these, one by one or several in one call."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx


@dataclasses.dataclass(frozen=True, eq=False)
class Normed:
    """norm(x): (B, T, D) -> (B, T, D)."""

    x: jax.Array
    norm: nnx.Module


@dataclasses.dataclass(frozen=True, eq=False)
class Joined:
    """Heads side by side: (B, N, T, H) as (B, T, N H)."""

    heads: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    """h by a weight [rows, D], summed over the axis that the weight declares, plus a bias: (..., D) -> (..., rows) or
    back."""

    h: Any  # an array or a term
    weight: nnx.Param
    bias: nnx.Param | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Activated:
    """f(gate) * up, or f(up) without a gate: (..., F). Both are products with the same h."""

    f: Callable[[jax.Array], jax.Array]
    up: Product
    gate: Product | None = None


Term = jax.Array | Normed | Joined | Product | Activated
