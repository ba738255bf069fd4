"""Weights of projections and the only two verbs that contract them: `project` and `project_back`.

A weight is an array, or in few bits where it is only read: any `WeightFormat`.

Every projection is one leaf [rows, D], D last and whole on every chip: measured on the TPU compiler, a D cut over
256 chips costs 16 % of a step in relayout copies. Rows are cut, `tensor` first, so that tensor parallelism cuts at
heads. While it is used a weight is gathered over `fsdp`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx

from phijax.model.gathering import from_heads, gathered, gathered_integers, into_heads
from phijax.model.low_rank import LowRank
from phijax.model.quantized import Quantized


@runtime_checkable
class WeightFormat(Protocol):
    """A matrix [rows, D] in a form of its own: a registered dataclass of arrays that a Param holds in place of one.

    `quantized.Quantized` is how it is stored; `inference/placement.py` makes of it what a platform computes with.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix that it stands for, or of a stack of them."""

    def project(self, x: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
        """(..., D) -> (..., rows), summed in float32; in `dtype`, else as x."""

    def project_back(self, h: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
        """(..., rows) -> (..., D), summed in float32; in `dtype`, else as h."""

    def lookup(self, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Rows of an embedding: (...) int32 -> (..., D)."""

    def dequantize(self, dtype: jnp.dtype = jnp.float32) -> jax.Array:
        """(..., rows, D)."""


@dataclasses.dataclass(frozen=True)
class Start:
    """Normal numbers of deviation `std`; with none, all are `value`."""

    std: float = 0.0
    value: float = 0.0


ZEROS, ONES = Start(), Start(value=1.0)


def normal(std: float) -> Start:
    return Start(std)


def weight(
    shape: Sequence[int],
    axes: Sequence[str],
    start: Start,
    *,
    kind: str | None = None,
    summed: Literal["d", "rows"] = "d",
    decayed: bool | None = None,
    feeds: str | None = None,
) -> nnx.Param:
    """Declares a float32 leaf and every fact about it that other rooms need: they read it from `params.leaves`.

    The value stays abstract: `params.init` makes it, on whatever mesh, from the leaf's path alone.

    Args:
      kind: of a matrix; those of one kind in a layer share their input, and are quantised alike. None: no matrix.
      summed: the axis of a matrix that a product sums over.
      decayed: whether weight decay applies; None: to matrices.
      feeds: the kind of matrices whose inputs are proportional, channel by channel, to this leaf and the others that
        declare the same: a factor can move from these matrices into them, and the model stays the same function.
    """
    value = jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
    decayed = kind is not None if decayed is None else decayed
    return nnx.Param(value, axes=tuple(axes), start=start, kind=kind, summed=summed, decayed=decayed, feeds=feeds)


def bias_of(rows: int, axis: str, *, feeds: str | None = None) -> nnx.Param:
    """Declares what is added to a product with (rows,) results of logical axis `axis`."""
    return weight((rows,), (axis,), ZEROS, feeds=feeds)


def plus(x: jax.Array, bias: nnx.Param | None, *, heads: int | None = None) -> jax.Array:
    """A product's result and its bias: (..., rows); with `heads`: (B, N, T, H). No bias: x.

    In float32, so that the bias's gradient, a sum over all tokens of a batch, is.
    """
    if bias is None:
        return x
    values = gathered(bias[...], bias.axes, jnp.float32)
    values = values if heads is None else values.reshape(heads, 1, -1)
    return (x.astype(jnp.float32) + values).astype(x.dtype)


def contract(x: jax.Array, w: nnx.Param) -> jax.Array:
    """x by w [rows, D], summed over the axis that the leaf declares: (..., D) -> (..., rows) or back."""
    return project_back(x, w) if w.summed == "rows" else project(x, w)


def project(x: jax.Array, w: nnx.Param, *, heads: int | None = None) -> jax.Array:
    """(..., D) -> (..., rows); with `heads`: (B, T, D) -> (B, N, T, H).

    The split into heads is part of the contraction because a reshape of its result is a copy on TPU when H is not a
    multiple of 128 (mini: 96), while one of the weight's rows is free.
    """
    value = w.get_value()
    if isinstance(value, LowRank):
        return _by_parts(x, w, project, heads)
    if isinstance(value, WeightFormat):
        out = _whole_rows(w).project(x)
        return out if heads is None else out.reshape(*x.shape[:-1], heads, -1).swapaxes(1, 2)
    if heads is not None:
        return into_heads(x, w[...], w.axes, heads)
    return jax.lax.dot_general(x, gathered(w[...], w.axes, x.dtype), (((x.ndim - 1,), (1,)), ((), ())))


def project_back(h: jax.Array, w: nnx.Param, *, heads: int | None = None) -> jax.Array:
    """(..., rows) -> (..., D); with `heads`: (B, N, T, H) -> (B, T, D)."""
    value = w.get_value()
    if isinstance(value, LowRank):
        return _by_parts(h, w, project_back, heads)
    if isinstance(value, WeightFormat):
        h = h if heads is None else h.swapaxes(1, 2).reshape(h.shape[0], h.shape[2], -1)
        return _whole_rows(w).project_back(h)
    if heads is not None:
        return from_heads(h, w[...], w.axes, heads)
    return jax.lax.dot_general(h, gathered(w[...], w.axes, h.dtype), (((h.ndim - 1,), (0,)), ((), ())))


def _by_parts(x: jax.Array, w: nnx.Param, verb: Callable[..., jax.Array], heads: int | None) -> jax.Array:
    """A verb of a LowRank, by the same of the leaves that it is made of; a alone has no rows that could be heads."""
    value = w.get_value()
    leaves, split = value.leaves(w), {"base": heads, "a": None, "b": heads}
    return value.contract(x, lambda x, name: verb(x, leaves[name], heads=split[name]), back=verb is project_back)


def _whole_rows(w: nnx.Param) -> WeightFormat:
    """The format as it is used: of a weight that is cut over the mesh, as `gathered` has it of an array."""
    value = w.get_value()
    return gathered_integers(value, w.axes) if isinstance(value, Quantized) else value


def lookup(w: nnx.Param, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of an embedding that lies whole on this chip: (...) int32 -> (..., D) in dtype."""
    if isinstance(w.get_value(), WeightFormat):
        return w.get_value().lookup(tokens, dtype)
    return jnp.take(w[...], tokens, axis=0).astype(dtype)


def whole(w: nnx.Param) -> jax.Array:
    """The weight as an array (rows, D), whatever its format; for what is neither of the two contractions."""
    value = w.get_value()
    return value.dequantize() if isinstance(value, WeightFormat) else w[...]
