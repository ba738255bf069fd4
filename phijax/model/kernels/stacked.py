"""Attention over a cache that is one stack of all layers, as TPUs read it: prefill, decoding, and both cut by heads."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, PartitionSpec

from phijax.model.kernels.decode import finished, joined, nothing
from phijax.model.kernels.decode_tpu import BLOCK, StackedCache, attend_and_write
from phijax.model.kernels.int8_lines import to_int8
from phijax.model.mask import Mask, causal_window


def stacked_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: StackedCache,
    layer: jax.Array,
    positions: jax.Array,
    *,
    mask: Mask,
    mesh: Mesh | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, StackedCache]:
    """softmax(q k^T) v over a layer's places up to each query's; the new keys and values are written too.

    Args:
      q: (B, N, T, H), scaled, k, v: (B, K, T, H) of the cache's rows; of more rows than it has, the surplus gets zeros.
      layer: () int32; positions: (B, T) int32, rising by one.
      mesh: over whose axis `tensor` heads are cut; None: one chip.
      interpret: the kernel's body on any backend, for tests.
    Returns: (B, N, T, H) in q.dtype, and the cache.
    """
    surplus = q.shape[0] - cache.k.shape[1]
    q, k, v, positions = (a[: cache.k.shape[1]] for a in (q, k, v, positions))
    if q.shape[2] > 1:
        out, cache = _many(q, k, v, cache, layer, positions, mask)
    else:
        one = functools.partial(attend_and_write, mask=mask, interpret=interpret)
        if mesh is not None:
            one = _by_heads(one, mesh, cache)
        out, cache = one(q[:, :, 0], k[:, :, 0], v[:, :, 0], cache, layer, positions[:, 0])
        out = out[:, :, None]
    return jnp.pad(out, [(0, surplus), (0, 0), (0, 0), (0, 0)]), cache


def _by_heads(one, mesh: Mesh, cache: StackedCache):
    """`one` where each chip of `tensor` has its heads."""
    heads, whole = PartitionSpec(None, "tensor"), PartitionSpec()
    lines, scales = PartitionSpec(None, None, None, "tensor"), PartitionSpec(None, None, "tensor")
    specs = StackedCache(lines, lines) if cache.k_scales is None else StackedCache(lines, lines, scales, scales)
    return jax.shard_map(
        one,
        mesh=mesh,
        in_specs=(heads, heads, heads, specs, whole, whole),
        out_specs=(heads, specs),
        check_vma=False,
    )


def _many(q, k, v, cache: StackedCache, layer, positions, mask: Mask):
    """A chunk of each row's prompt: written, then seen block by block, up to the last that any query sees."""
    rows, heads, _, width = q.shape
    kv_heads = k.shape[1]
    for row in range(rows):
        cache = _with_chunk(cache, k[row], v[row], layer, row, positions[row, 0])
    grouped = q.reshape(rows, kv_heads, -1, width)
    places = jnp.tile(positions, heads // kv_heads)

    k_lines, v_lines = (_of_layer(a, layer, q.dtype) for a in (cache.k, cache.v))

    def lines(array: jax.Array, start: jax.Array) -> jax.Array:
        block = _as_it_lies(jax.lax.dynamic_slice_in_dim(array, start, BLOCK, axis=1))
        return block.reshape(rows, BLOCK, kv_heads, width).swapaxes(1, 2)

    def scales(array: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(array, (layer, 0, 0, start), (1, rows, kv_heads, BLOCK))[0][..., None]

    def visit(number, part):
        start = number * BLOCK
        piece = lines(k_lines, start), lines(v_lines, start)
        if cache.k_scales is not None:
            piece += scales(cache.k_scales, start), scales(cache.v_scales, start)
        return joined(part, grouped, piece, places - start, mask)

    window = causal_window(mask, "cached")
    first = jnp.int32(0) if window is None else jnp.maximum(jnp.min(positions) - window + 1, 0) // BLOCK
    part = jax.lax.fori_loop(first, jnp.max(positions) // BLOCK + 1, visit, nothing(grouped))
    return finished(part, q), cache


def _of_layer(array: jax.Array, layer: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """(R, S, K H) in dtype, integers too: a copy of one layer. Of eight bits read by blocks the compiler would make a
    copy of the whole cache, in other tiles."""
    return _as_it_lies(jax.lax.dynamic_index_in_dim(_as_it_lies(array), layer, keepdims=False).astype(dtype))


def _as_it_lies(array: jax.Array) -> jax.Array:
    """Its last axis innermost, as the kernel reads the cache: left to itself the compiler turns all of the cache over
    for products that read one block of it."""
    return with_layout_constraint(array, Layout(major_to_minor=tuple(range(array.ndim))))


def _with_chunk(cache: StackedCache, k: jax.Array, v: jax.Array, layer, row: int, start) -> StackedCache:
    """k, v (K, T, H) at places start and on of one row."""

    def put(lines: jax.Array, new: jax.Array) -> jax.Array:
        new = new.swapaxes(0, 1).reshape(1, 1, new.shape[1], -1).astype(lines.dtype)
        place = start
        if lines.dtype == jnp.int8:
            # Into places that are no multiple of 32, a tile of eight bits, the compiler writes in a copy of the cache.
            # So the row's whole layer is written; without the barrier the two updates become one again.
            of_row = jax.lax.dynamic_slice(lines, (layer, row, 0, 0), (1, 1, *lines.shape[2:]))
            new = jax.lax.optimization_barrier(jax.lax.dynamic_update_slice(of_row, new, (0, 0, start, 0)))
            place = 0
        return _as_it_lies(jax.lax.dynamic_update_slice(lines, _as_it_lies(new), (layer, row, place, 0)))

    if cache.k_scales is None:
        return StackedCache(put(cache.k, k), put(cache.v, v))
    (k, k_scales), (v, v_scales) = to_int8(k), to_int8(v)
    scales = (
        jax.lax.dynamic_update_slice(old, new[None, None], (layer, row, 0, start))
        for old, new in ((cache.k_scales, k_scales), (cache.v_scales, v_scales))
    )
    return StackedCache(put(cache.k, k), put(cache.v, v), *scales)
