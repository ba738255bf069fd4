"""Attention of one new token a row over a cache of keys and values, for TPU; it writes the token's own too.

The cache is one stack of all layers, (L, R, S, K H): a place is one line, the keys of all heads side by side, so that
no head of 96 is padded to 128. It is never sliced: the kernel is told the layer, reads those blocks of places that a
row sees, and puts the new line back where the cache lies.

All heads are one product. A query is spread over the K H lanes, zero outside of its key head, so that a block of places
times all queries is the scores of all heads. The matrix unit takes no longer for it than for one head's query alone:
loading the keys is what takes its time. Likewise values; of each query's line the lanes of its own head are kept.

In eight bits a key's scale goes onto its scores, a value's onto its weight in the softmax: the products are of the
integers as they lie.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.lax import div, rem  # of places, never negative; of // Mosaic makes more, and asks which TPU it is

from phijax.model.kernels.dense import MASKED
from phijax.model.kernels.int8_lines import to_int8
from phijax.model.mask import Mask, causal_window

BLOCK = 256  # places that are read at once
HEAD_TILE = 16  # heads are padded to a multiple: bfloat16 packs so many lines in a register
LINES = {1: 32, 2: 16, 4: 8}  # of a tile in memory, by bytes of a number: what is written back for one new line


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StackedCache:
    """Keys and values of all layers.

    k, v: (L, R, S, K H), floats or int8; S is a multiple of BLOCK.
    k_scales, v_scales: (L, R, K, S) bfloat16, one for each row, head and place; None where k and v are floats.
    """

    k: jax.Array
    v: jax.Array
    k_scales: jax.Array | None = None
    v_scales: jax.Array | None = None


def empty(layers: int, rows: int, kv_heads: int, length: int, head_dim: int, dtype: jnp.dtype) -> StackedCache:
    """All zero, of `length` places or, in whole blocks, a few more."""
    length = -(-length // BLOCK) * BLOCK
    k, v = (jnp.zeros((layers, rows, length, kv_heads * head_dim), dtype) for _ in range(2))
    if k.dtype != jnp.int8:
        return StackedCache(k, v)
    return StackedCache(k, v, *(jnp.zeros((layers, rows, kv_heads, length), jnp.bfloat16) for _ in range(2)))


def attend_and_write(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: StackedCache,
    layer: jax.Array,
    positions: jax.Array,
    *,
    mask: Mask,
    interpret: bool = False,
) -> tuple[jax.Array, StackedCache]:
    """softmax(q k^T) v over the places of a layer before the new tokens', and over the new tokens.

    Args:
      q: (R, N, H), scaled; k, v: (R, K, H), the new token of each row.
      layer: () int32; positions: (R,) int32, the new tokens' places.
      interpret: the kernel's body on any backend, for tests.
    Returns: (R, N, H) in q.dtype, and the cache with the tokens written: in place where it is donated.
    """
    window = causal_window(mask, "cached")
    rows, heads, width = q.shape
    kv_heads = k.shape[1]
    group, lanes = heads // kv_heads, kv_heads * width
    # Of a kv head's queries the first of each head come first, then the second: each set lies as the keys do.
    q = q.reshape(rows, kv_heads, group, width).swapaxes(1, 2).reshape(rows, group, lanes)
    arrays = jax.tree.leaves(cache)
    specs = _Specs(cache, kv_heads, lanes, window)
    spread = group * -(-kv_heads // HEAD_TILE) * HEAD_TILE
    new = _lines(k, v, cache)
    out, *arrays = pl.pallas_call(
        functools.partial(_kernel, kv_heads=kv_heads, width=width, window=window),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(rows, cache.k.shape[2] // BLOCK),
            in_specs=[specs.queries(group), *specs.new(), *specs.read()],
            out_specs=[specs.queries(group), *specs.written()],
            scratch_shapes=[
                pltpu.VMEM((spread, lanes), q.dtype),
                pltpu.VMEM((spread, 1), jnp.float32),
                pltpu.VMEM((spread, 1), jnp.float32),
                pltpu.VMEM((spread, lanes), jnp.float32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (q, *arrays)],
        # Counted with the layer, the places and the queries before.
        input_output_aliases={3 + len(new) + i: 1 + i for i in range(len(arrays))},
        interpret=interpret,
        name="decode_cache",
    )(layer.reshape(1), positions, q, *new, *arrays)
    out = out.reshape(rows, group, kv_heads, width).swapaxes(1, 2).reshape(rows, heads, width)
    return out, StackedCache(*arrays)


def _lines(k: jax.Array, v: jax.Array, cache: StackedCache) -> tuple[jax.Array, ...]:
    """New keys and values as the cache holds them: (R, 1, K H) each and, of int8, scales (R, K, 1)."""
    rows = k.shape[0]
    if cache.k_scales is None:
        return tuple(a.astype(cache.k.dtype).reshape(rows, 1, -1) for a in (k, v))
    (k, k_scales), (v, v_scales) = to_int8(k), to_int8(v)
    return k.reshape(rows, 1, -1), v.reshape(rows, 1, -1), k_scales[..., None], v_scales[..., None]


class _Specs:
    """Which part of each array a step of the grid (row, number of a block) has; the order is that of `_kernel`."""

    def __init__(self, cache: StackedCache, kv_heads: int, lanes: int, window: int | None):
        self.heads, self.lanes, self.window = kv_heads, lanes, window
        self.int8 = cache.k_scales is not None
        self.lines = LINES[cache.k.dtype.itemsize]

    def queries(self, group: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, group, self.lanes), lambda row, j, layer, places: (row, 0, 0))

    def new(self) -> list[pl.BlockSpec]:
        scale = pl.BlockSpec((1, self.heads, 1), lambda row, j, layer, places: (row, 0, 0))
        return [self.queries(1)] * 2 + [scale] * (2 * self.int8)

    def read(self) -> list[pl.BlockSpec]:
        def at(row, j, layer, places):
            first, last = _blocks(places[row], self.window)
            return layer[0], row, jnp.minimum(first + j, last)

        lines = pl.BlockSpec((1, 1, BLOCK, self.lanes), lambda *a: (*at(*a), 0))
        scales = pl.BlockSpec((1, 1, self.heads, BLOCK), lambda *a: (*at(*a)[:2], 0, at(*a)[2]))
        return [lines] * 2 + [scales] * (2 * self.int8)

    def written(self) -> list[pl.BlockSpec]:
        def line_at(row, j, layer, places):
            return layer[0], row, div(places[row], self.lines), 0

        def scale_at(row, j, layer, places):
            return layer[0], row, 0, div(places[row], BLOCK)

        lines = pl.BlockSpec((1, 1, self.lines, self.lanes), line_at)
        return [lines] * 2 + [pl.BlockSpec((1, 1, self.heads, BLOCK), scale_at)] * (2 * self.int8)


def _blocks(place: jax.Array, window: int | None) -> tuple[jax.Array, jax.Array]:
    """The first and the last block of places that a token at `place` sees; the last holds its own."""
    first = jnp.int32(0) if window is None else div(jnp.maximum(place - window + 1, 0), BLOCK)
    return first, div(place, BLOCK)


def _kernel(layer, places, q, *refs, kv_heads: int, width: int, window: int | None):
    """One row's queries over one block; the softmax runs on from block to block, from the new token itself on."""
    del layer  # the blocks were chosen by it
    *refs, spread, highest, total, weighted = refs
    count = (len(refs) - 1) // 3
    new, read, out, written = refs[:count], refs[count : 2 * count], refs[2 * count], refs[2 * count + 1 :]
    group, heads = q.shape[1], spread.shape[0] // q.shape[1]
    row, number = pl.program_id(0), pl.program_id(1)
    place = places[row]
    first, last = _blocks(place, window)
    head = jax.lax.broadcasted_iota(jnp.int32, (heads, spread.shape[1]), 0)
    lane = jax.lax.broadcasted_iota(jnp.int32, (heads, spread.shape[1]), 1)
    own = (lane >= head * width) & (lane < (head + 1) * width)  # the lanes of a head's numbers

    def of_queries(scales):
        """Scales of kv heads (K, n), in any float -> of spread queries, (group heads, n) float32."""
        scales = scales.astype(jnp.float32)
        if heads > kv_heads:
            scales = jnp.concatenate([scales, jnp.zeros((heads - kv_heads, scales.shape[1]), jnp.float32)], axis=0)
        return jnp.concatenate([scales] * group, axis=0)

    @pl.when(number == 0)
    def _begin():
        for i in range(group):
            spread[i * heads : (i + 1) * heads] = jnp.where(own, q[0, i : i + 1].astype(jnp.float32), 0).astype(
                spread.dtype
            )
        key, value = (a[0].astype(jnp.float32) for a in new[:2])
        score = jnp.sum(spread[...].astype(jnp.float32) * key, axis=-1, keepdims=True)
        weight = jnp.ones_like(score)
        if count == 4:
            score, weight = score * of_queries(new[2][0]), of_queries(new[3][0])
        highest[...], total[...], weighted[...] = score, jnp.ones_like(score), weight * value

    @pl.when(first + number <= last)
    def _visit():
        start = (first + number) * BLOCK
        keys, values = (a[0, 0].astype(q.dtype) for a in read[:2])
        scores = _product(spread[...], keys, 1)
        if count == 4:
            scores *= of_queries(read[2][0, 0])
        position = start + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        seen = position < place
        if window is not None:
            seen &= position > place - window
        scores = jnp.where(seen, scores, MASKED)
        top = jnp.maximum(highest[...], jnp.max(scores, axis=-1, keepdims=True))
        weights = jnp.where(seen, jnp.exp(scores - top), 0.0)
        fading = jnp.exp(highest[...] - top)
        highest[...] = top
        total[...] = total[...] * fading + jnp.sum(weights, axis=-1, keepdims=True)
        if count == 4:
            weights *= of_queries(read[3][0, 0])
        weighted[...] = weighted[...] * fading + _product(weights.astype(q.dtype), values, 0)

    @pl.when(number == pl.num_programs(1) - 1)
    def _end():
        for i in range(group):
            of_heads = weighted[i * heads : (i + 1) * heads] / total[i * heads : (i + 1) * heads]
            out[0, i : i + 1] = jnp.sum(jnp.where(own, of_heads, 0.0), axis=0, keepdims=True).astype(out.dtype)
        # The block that was read last holds the new token's place.
        for line, old, target in zip(new[:2], read[:2], written[:2], strict=True):
            lines = target.shape[2]
            tile = old[0, 0, pl.ds(pl.multiple_of(rem(place, BLOCK) - rem(place, lines), lines), lines)]
            here = jax.lax.broadcasted_iota(jnp.int32, tile.shape, 0) == rem(place, lines)
            target[0, 0] = _chosen(here, line[0], tile)
        for scale, old, target in zip(new[2:], read[2:], written[2:], strict=True):
            here = jax.lax.broadcasted_iota(jnp.int32, old.shape[2:], 1) == rem(place, BLOCK)
            target[0, 0] = _chosen(here, scale[0], old[0, 0])


def _chosen(here: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """`new` where it is `here`, in 32 bits, which the vector unit has."""
    wide = jnp.int32 if old.dtype == jnp.int8 else jnp.float32
    return jnp.where(here, new.astype(wide), old.astype(wide)).astype(old.dtype)


def _product(x: jax.Array, y: jax.Array, axis: int) -> jax.Array:
    return jax.lax.dot_general(
        x,
        y,
        (((1,), (axis,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
