"""A weight with a change of low rank: base + scale * b a, of which b a is never made. Hu et al. 2021, arXiv:2106.09685.

a and b are named by where they lie, not by what is multiplied first: b has the base's rows and is cut over the mesh as
they are, a has its columns. So `project` takes a first, and `project_back` b: those are the matrices A of the paper.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Product = Callable[[jax.Array, str], jax.Array]  # an input, and by which of the fields it is contracted


def factor_axes(axes: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Logical axes of a and b for those of the base, (..., rows, D)."""
    *stacked, rows, columns = axes
    return {"a": (*stacked, "rank", columns), "b": (*stacked, rows, "rank")}


def factor_shapes(shape: Sequence[int], rank: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a and b for that of the base, (..., rows, D)."""
    *stacked, rows, columns = shape
    return {"a": (*stacked, rank, columns), "b": (*stacked, rows, rank)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """A leaf of the parameters, or a stack of them with L in front; a `weights.WeightFormat`.

    base: (..., rows, D), an array or a format.
    a: (..., r, D) and b: (..., rows, r), any float.
    scale: alpha / r, or what else the change is multiplied with.
    """

    base: Any
    a: jax.Array
    b: jax.Array
    scale: float = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def contract(self, x: jax.Array, product: Product, *, back: bool = False) -> jax.Array:
        """x by the weight, put together from products with the three: the one home of the formula.

        The scale goes onto what has r columns.
        """
        first, second = ("b", "a") if back else ("a", "b")
        return product(x, "base") + product(self.scale * product(x, first), second)

    def leaves(self, w: nnx.Param) -> dict[str, nnx.Param]:
        """base, a and b as leaves of their own, with the facts that they have from w, the leaf whose value this is."""
        axes = factor_axes(w.axes)
        factors = {name: w.replace(getattr(self, name), axes=axes[name]) for name in axes}
        return {"base": w.replace(self.base), **factors}

    def project(self, x: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
        """(..., D) -> (..., rows), summed in float32; in `dtype`, else as x."""
        return self.contract(x, lambda x, name: _project(x, getattr(self, name), dtype))

    def project_back(self, h: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
        """(..., rows) -> (..., D), summed in float32; in `dtype`, else as h."""
        return self.contract(h, lambda h, name: _project_back(h, getattr(self, name), dtype), back=True)

    def lookup(self, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Rows of an embedding: (...) int32 -> (..., D)."""
        wide = jnp.float32
        rows = jnp.take(self.base, tokens, axis=0) if _is_array(self.base) else self.base.lookup(tokens, wide)
        change = _project_back(jnp.take(self.b, tokens, axis=0).astype(wide), self.a, wide)
        return (rows.astype(wide) + self.scale * change).astype(dtype)

    def merged(self) -> jax.Array:
        """base + scale * b a as one array (..., rows, D), float32 on every backend."""
        base = self.base.astype(jnp.float32) if _is_array(self.base) else self.base.dequantize()
        a, b = self.a.astype(jnp.float32), self.b.astype(jnp.float32)
        return base + self.scale * jnp.matmul(b, a, precision=jax.lax.Precision.HIGHEST)

    def dequantize(self, dtype: jnp.dtype = jnp.float32) -> jax.Array:
        """(..., rows, D)."""
        return self.merged().astype(dtype)


def _is_array(matrix: Any) -> bool:
    return not hasattr(matrix, "dequantize")


def _project(x: jax.Array, matrix: Any, dtype: jnp.dtype | None) -> jax.Array:
    """By a matrix [rows, D] that is whole here, in whatever format."""
    return _dot(x, matrix, 1, dtype) if _is_array(matrix) else matrix.project(x, dtype)


def _project_back(h: jax.Array, matrix: Any, dtype: jnp.dtype | None) -> jax.Array:
    return _dot(h, matrix, 0, dtype) if _is_array(matrix) else matrix.project_back(h, dtype)


def _dot(x: jax.Array, matrix: jax.Array, axis: int, dtype: jnp.dtype | None) -> jax.Array:
    contracted = (((x.ndim - 1,), (axis,)), ((), ()))
    out = jax.lax.dot_general(x, matrix.astype(x.dtype), contracted, preferred_element_type=jnp.float32)
    return out.astype(dtype or x.dtype)
