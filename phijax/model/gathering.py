"""A weight as it is used under the mesh: gathered over `fsdp`, its gradient scattered straight back to its rows."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from phijax.model.quantized import Quantized
from phijax.parallel import sharding


def gathered(matrix: jax.Array, axes: Sequence[str], dtype: jnp.dtype) -> jax.Array:
    """The weight as it is used: cast on its shard, then gathered over `fsdp`: half the bytes of gathering float32.

    Its cotangent is reduce-scattered straight back to the stored layout in `dtype`, then widened; left to itself the
    partitioner may all-reduce it in full.
    """
    stored = matrix.dtype

    @jax.custom_vjp
    def gather(matrix):
        return sharding.constrain(matrix.astype(dtype), axes, gathered=True)

    def backward(_, cotangent):
        return (sharding.constrain(cotangent, axes).astype(stored),)

    gather.defvjp(lambda matrix: (gather(matrix), None), backward)
    return gather(matrix)


def gathered_integers(w: Quantized, axes: Sequence[str]) -> Quantized:
    """As `gathered`, of a weight that is only read: its integers cross `fsdp` as they are stored, and their scales."""

    def gather(part: jax.Array) -> jax.Array:
        return sharding.constrain(part, sharding.even(part.shape, axes, sharding.mesh_sizes()), gathered=True)

    return Quantized(gather(w.values), gather(w.scales))


def into_heads(x: jax.Array, matrix: jax.Array, axes: Sequence[str], heads: int) -> jax.Array:
    """x (B, T, D) by the rows (N H, D) of a stored weight -> (B, N, T, H)."""
    return _contract(x, matrix, tuple(axes), heads, "btd,nhd->bnth", "bnth,nhd->btd", "btd,bnth->nhd")


def from_heads(h: jax.Array, matrix: jax.Array, axes: Sequence[str], heads: int) -> jax.Array:
    """h (B, N, T, H) by the rows (N H, D) of a stored weight -> (B, T, D)."""
    return _contract(h, matrix, tuple(axes), heads, "bnth,nhd->btd", "btd,nhd->bnth", "bnth,btd->nhd")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5, 6))
def _contract(x, matrix, axes, heads, forward, backward, gradient):
    """einsum `forward` of x and the gathered weight; the others are its two cotangents'."""
    return jnp.einsum(forward, x, _cut(matrix, axes, x.dtype, heads))


def _forward(x, matrix, axes, heads, forward, backward, gradient):
    cut = _cut(matrix, axes, x.dtype, heads)
    return jnp.einsum(forward, x, cut), (x, cut, jnp.zeros((), matrix.dtype))


def _backward(axes, heads, forward, backward, gradient, saved, cotangent):
    x, cut, stored = saved
    return jnp.einsum(backward, cotangent, cut), _scattered(x, cotangent, axes, gradient).astype(stored.dtype)


_contract.defvjp(_forward, _backward)


def _cut(matrix: jax.Array, axes: Sequence[str], dtype: jnp.dtype, heads: int) -> jax.Array:
    whole = sharding.constrain(matrix.astype(dtype), axes, gathered=True)
    return whole.reshape(heads, -1, whole.shape[-1])


def _scattered(x: jax.Array, cotangent: jax.Array, axes: Sequence[str], gradient: str) -> jax.Array:
    """The weight's gradient (rows, D), each chip's own rows, by hand: product, reshape, reduce-scatter.

    Left to the partitioner, inside of accumulation's shard_map, the sum is taken before the reshape of heads to rows,
    where rows cannot be told apart by chip: all-reduced whole, for every layer and micro-batch, and cut afterwards.
    """

    def local(x, cotangent):
        partial = jnp.einsum(gradient, x, cotangent)
        partial = partial.reshape(-1, partial.shape[-1])
        if jax.sharding.get_abstract_mesh().empty:
            return partial
        own = jax.lax.psum_scatter(partial, "fsdp", scatter_dimension=0, tiled=True)
        return jax.lax.psum(own, others) if others else own

    if jax.sharding.get_abstract_mesh().empty:
        return local(x, cotangent)
    others = sharding.open_axes(("data", "context"))
    layouts = {3: ("act_batch", "act_time", "act_embed"), 4: ("act_batch", "act_heads", "act_time", None)}
    specs = tuple(sharding.spec(layouts[a.ndim]) for a in (x, cotangent))
    return jax.shard_map(local, in_specs=specs, out_specs=sharding.spec(axes), check_vma=False)(x, cotangent)
