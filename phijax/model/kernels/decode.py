"""Attention of new tokens over a cache of keys and values: prefill, decoding, and both cut over chips by time.

Keys are visited in blocks of fixed size, from the first that a query may see to the last, with a running softmax
(Milakov and Gimelshein 2018, arXiv:1805.02867). A masked key adds an exact zero, so the result depends neither on how
long the cache is nor on what other rows are in the batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from phijax.model.kernels.dense import MASKED
from phijax.model.kernels.rows import each_row

BLOCK = 128  # keys


class Partial(NamedTuple):
    """A softmax over some of the keys, to be joined with that over the others."""

    weighted: jax.Array  # (K, M, H) float32: sum of exp(score - highest) v
    highest: jax.Array  # (K, M) float32
    total: jax.Array  # (K, M) float32: sum of exp(score - highest)


def cached_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rows: jax.Array,
    positions: jax.Array,
    *,
    window: int | None,
    count: jax.Array | None,
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v over the keys at positions <= the query's, at most `window` of them.

    Args:
      q: (B, N, T, H); k, v: (R, K, S, H), place s of a row holding position s.
      rows: (B,) int32, the cache's row of each query row.
      positions: (B, T) int32, rising by one.
      count: as `each_row` takes it.
    Returns: (B, N, T, H) in q.dtype.
    """

    def one(q, row, positions):
        return _finish(_partial(q, k, v, row, positions, window, first=jnp.int32(0)), q)

    return each_row(jax.vmap(one), count)(q, rows, positions)


def attention_cut_by_time(
    q: jax.Array, k: jax.Array, v: jax.Array, rows: jax.Array, positions: jax.Array, *, window: int | None, mesh: Mesh
) -> jax.Array:
    """The same function where S is cut over `tensor`: every chip sees its keys, and logsumexps join the parts."""

    def local(q, k, v, rows, positions):
        first = jax.lax.axis_index("tensor") * k.shape[2]

        def one(q, row, positions):
            part = _partial(q, k, v, row, positions, window, first=first)
            highest = jax.lax.pmax(part.highest, "tensor")
            scale = jnp.exp(part.highest - highest)
            joined = Partial(part.weighted * scale[..., None], highest, part.total * scale)
            weighted, total = jax.lax.psum((joined.weighted, joined.total), "tensor")
            return _finish(Partial(weighted, highest, total), q)

        return jax.vmap(one)(q, rows, positions)

    whole, cut = PartitionSpec(), PartitionSpec(None, None, "tensor")
    return jax.shard_map(local, mesh=mesh, in_specs=(whole, cut, cut, whole, whole), out_specs=whole, check_vma=False)(
        q, k, v, rows, positions
    )


def write(cache: jax.Array, new: jax.Array, rows: jax.Array, start: jax.Array, *, count: jax.Array | None) -> jax.Array:
    """Puts `new` (B, K, T, H) at places start (B,) of the cache's rows (B,); in place where the cache is donated."""
    if new.shape[0] == 1 and count is None:
        return jax.lax.dynamic_update_slice(cache, new.astype(cache.dtype), (rows[0], 0, start[0], 0))
    if count is not None:

        def put(i, cache):
            piece = jax.lax.dynamic_slice_in_dim(new, i, 1).astype(cache.dtype)
            return jax.lax.dynamic_update_slice(cache, piece, (rows[i], 0, start[i], 0))

        return jax.lax.fori_loop(0, count, put, cache)
    places = start[:, None] + jnp.arange(new.shape[2])  # (B, T)
    # Indices around the slice come first in the result: (B, T, K, H).
    return cache.at[rows[:, None], :, places].set(new.swapaxes(1, 2).astype(cache.dtype))


def _partial(q, k, v, row, positions, window: int | None, *, first: jax.Array) -> Partial:
    """One row, q (N, T, H), over those of the cache's keys that it sees; place 0 of this cache is position `first`."""
    n, t, h = q.shape
    kv_heads, length = k.shape[1:3]
    block = min(BLOCK, length)
    grouped = (q * h**-0.5).reshape(kv_heads, n // kv_heads * t, h)
    places = jnp.tile(positions, n // kv_heads) - first  # (M,), M = N / K * T
    lowest = jnp.int32(0) if window is None else jnp.maximum(positions[0] - first - window + 1, 0)
    end = jnp.clip((positions[-1] - first) // block + 1, 0, length // block)

    def visit(number, part: Partial) -> Partial:
        start = number * block
        keys, values = (
            jax.lax.dynamic_slice(a, (row, 0, start, 0), (1, kv_heads, block, h))[0].astype(q.dtype) for a in (k, v)
        )
        scores = jnp.einsum("kmh,ksh->kms", grouped, keys, preferred_element_type=jnp.float32)
        distance = places[:, None] - (start + jnp.arange(block))
        seen = distance >= 0
        if window is not None:
            seen &= distance < window
        scores = jnp.where(seen, scores, MASKED)
        highest = jnp.maximum(part.highest, jnp.max(scores, axis=-1))
        weights = jnp.where(seen, jnp.exp(scores - highest[..., None]), 0.0)
        scale = jnp.exp(part.highest - highest)
        new = jnp.einsum("kms,ksh->kmh", weights.astype(q.dtype), values, preferred_element_type=jnp.float32)
        return Partial(part.weighted * scale[..., None] + new, highest, part.total * scale + jnp.sum(weights, axis=-1))

    nothing = Partial(
        jnp.zeros(grouped.shape, jnp.float32),
        jnp.full(grouped.shape[:2], MASKED, jnp.float32),
        jnp.zeros(grouped.shape[:2], jnp.float32),
    )
    return jax.lax.fori_loop(lowest // block, end, visit, nothing)


def _finish(part: Partial, q: jax.Array) -> jax.Array:
    return (part.weighted / part.total[..., None]).astype(q.dtype).reshape(q.shape)
