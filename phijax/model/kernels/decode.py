"""Attention of new tokens over a cache of keys and values: prefill, decoding, and both cut over chips by time.

A cache is a tuple of pieces, each (k, v) of (R, K, S, H): the first holds positions 0 to S - 1, the next goes on.
Pieces that no row has reached are not read, and the others are read where they lie: of one large array XLA:CPU copies
whatever part a product asks for, which was half of a step with eight rows. In eight bits a piece is (k, v, scales of k,
scales of v), scales (R, K, S, 1): `int8_lines`.

The softmax runs on from piece to piece (Milakov and Gimelshein 2018, arXiv:1805.02867). A masked key adds an exact
zero, so the result depends neither on how many pieces there are nor on what other rows are in the batch.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from phijax.model.kernels.dense import MASKED
from phijax.model.kernels.int8_lines import from_int8, to_int8
from phijax.model.mask import Mask, causal_window

PROMPT_BLOCK = 256  # keys that many queries see at once: scores of a whole long piece would not fit

Pieces = tuple[tuple[jax.Array, ...], ...]


class Partial(NamedTuple):
    """A softmax over some of the keys, to be joined with that over the others; M = N / K * T."""

    weighted: jax.Array  # (R, K, M, H) float32: sum of exp(score - highest) v
    highest: jax.Array  # (R, K, M) float32
    total: jax.Array  # (R, K, M) float32: sum of exp(score - highest)


def cached_attention(
    q: jax.Array,
    cache: Pieces,
    positions: jax.Array,
    *,
    mask: Mask,
    row_sum: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """softmax(q k^T) v over the keys at positions <= the query's, as the mask lets it. The factor is in q already.

    Args:
      q: (B, N, T, H), scaled; of more rows than the cache has, the surplus gets zeros.
      positions: (B, T) int32, rising by one.
      row_sum: adds up the last axis in an order of its own; None: as the compiler likes.
    Returns: (B, N, T, H) in q.dtype.
    """
    rows = cache[0][0].shape[0]
    part = _over_pieces(q[:rows], cache, positions[:rows], mask, row_sum=row_sum)
    return jnp.pad(finished(part, q[:rows]), [(0, q.shape[0] - rows), (0, 0), (0, 0), (0, 0)])


def attention_cut_by_time(q: jax.Array, cache: Pieces, positions: jax.Array, *, mask: Mask, mesh: Mesh) -> jax.Array:
    """The same function where S is cut over `tensor`: every chip sees its keys, and logsumexps join the parts."""
    rows = cache[0][0].shape[0]

    def local(q, cache, positions):
        part = _over_pieces(q, cache, positions, mask, part=jax.lax.axis_index("tensor"), parts=mesh.shape["tensor"])
        highest = jax.lax.pmax(part.highest, "tensor")
        scale = jnp.exp(part.highest - highest)
        weighted, total = jax.lax.psum((part.weighted * scale[..., None], part.total * scale), "tensor")
        return finished(Partial(weighted, highest, total), q)

    whole, cut = PartitionSpec(), PartitionSpec(None, None, "tensor")
    out = jax.shard_map(local, mesh=mesh, in_specs=(whole, cut, whole), out_specs=whole, check_vma=False)(
        q[:rows], cache, positions[:rows]
    )
    return jnp.pad(out, [(0, q.shape[0] - rows), (0, 0), (0, 0), (0, 0)])


def write(cache: Pieces, k: jax.Array, v: jax.Array, start: jax.Array, *, cut_by_time: bool) -> Pieces:
    """Puts k and v (B, K, T, H) at positions start (B,) of the cache's rows; in place where the cache is donated.

    New places lie within one piece, whatever their number. Surplus rows are not written.

    Args: cut_by_time: S is cut over chips.
    """
    first, out = 0, []
    new = (k, v) if len(cache[0]) == 2 else in_eight_bits(k, v)
    for piece in cache:
        place = start - first
        out.append(tuple(_write(a, b, place, cut_by_time) for a, b in zip(piece, new, strict=True)))
        first += piece[0].shape[2]
    return tuple(out)


def _write(piece: jax.Array, new: jax.Array, place: jax.Array, cut: bool) -> jax.Array:
    rows, _, length, _ = piece.shape
    new = new.astype(piece.dtype)

    def put(row, piece):
        at = (row, 0, jnp.clip(place[row], 0, length - new.shape[2]), 0)
        ours = (place[row] >= 0) & (place[row] < length)
        of_row = jax.lax.dynamic_slice_in_dim(new, row, 1)
        old = jax.lax.dynamic_slice(piece, at, of_row.shape)
        return jax.lax.dynamic_update_slice(piece, jnp.where(ours, of_row, old), at)

    if not cut:
        return jax.lax.fori_loop(0, rows, put, piece)
    places = place[:rows, None] + jnp.arange(new.shape[2])  # (R, T)
    places = jnp.where(places < 0, length, places)  # a negative index would count from the end
    # Indices around the slice come first in the result: (R, T, K, H).
    return piece.at[jnp.arange(rows)[:, None], :, places].set(new[:rows].swapaxes(1, 2), mode="drop")


def _over_pieces(
    q: jax.Array,
    cache: Pieces,
    positions: jax.Array,
    mask: Mask,
    *,
    row_sum: Callable | None = None,
    part: jax.Array | int = 0,
    parts: int = 1,
) -> Partial:
    """q (R, N, T, H) over this chip's part of every piece, part number `part` of `parts`."""
    window = causal_window(mask, "cached")
    r, n, t, h = q.shape
    kv_heads = cache[0][0].shape[1]
    grouped = q.reshape(r, kv_heads, n // kv_heads * t, h)
    places = jnp.tile(positions, n // kv_heads)  # (R, M)
    out, start = nothing(grouped), 0
    for piece in cache:
        length = piece[0].shape[2]
        block = length if t == 1 else min(length, PROMPT_BLOCK)
        here = places - (start + part * length)
        end = jnp.clip(jnp.max(here) // block + 1, 0, length // block)
        lowest = jnp.int32(0) if window is None else jnp.clip((jnp.min(here) - window + 1) // block, 0, length // block)

        def visit(number, out: Partial, piece=piece, here=here, block=block) -> Partial:
            seen = tuple(jax.lax.dynamic_slice_in_dim(a, number * block, block, axis=2) for a in piece)
            return joined(out, grouped, seen, here - number * block, mask, row_sum)

        if block < length:
            out = jax.lax.fori_loop(lowest, end, visit, out)
        else:
            out = jax.lax.cond(lowest < end, lambda out, visit=visit: visit(0, out), lambda out: out, out)
        start += length * parts
    return out


def nothing(grouped: jax.Array) -> Partial:
    """Over no keys yet, of queries (R, K, M, H)."""
    shape = grouped.shape
    return Partial(
        jnp.zeros(shape, jnp.float32), jnp.full(shape[:3], MASKED, jnp.float32), jnp.zeros(shape[:3], jnp.float32)
    )


def joined(
    part: Partial,
    grouped: jax.Array,
    piece: tuple[jax.Array, ...],
    places: jax.Array,
    mask: Mask,
    row_sum: Callable | None = None,
) -> Partial:
    """`part` with queries (R, K, M, H) over the keys of a piece; query m stands at place `places` (R, M) of them."""
    dtype = grouped.dtype
    keys, values = _floats(piece, dtype)
    scores = jnp.einsum("rkmh,rksh->rkms", grouped, keys, preferred_element_type=jnp.float32)
    seen = mask.sees(places[:, None, :, None] - jnp.arange(keys.shape[2]))
    scores = jnp.where(seen, scores, MASKED)
    highest = jnp.maximum(part.highest, jnp.max(scores, axis=-1))
    weights = jnp.where(seen, jnp.exp(scores - highest[..., None]), 0.0)
    scale = jnp.exp(part.highest - highest)
    new = jnp.einsum("rkms,rksh->rkmh", weights.astype(dtype), values, preferred_element_type=jnp.float32)
    total = jnp.sum(weights, axis=-1) if row_sum is None else row_sum(weights)
    return Partial(part.weighted * scale[..., None] + new, highest, part.total * scale + total)


def in_eight_bits(k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
    """(B, K, T, H) each -> the four arrays of a piece."""
    (k, k_scales), (v, v_scales) = to_int8(k), to_int8(v)
    return k, v, k_scales[..., None], v_scales[..., None]


def _floats(piece: tuple[jax.Array, ...], dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    if len(piece) == 2:
        return piece[0].astype(dtype), piece[1].astype(dtype)
    k, v, k_scales, v_scales = piece
    return from_int8(k, k_scales[..., 0], dtype), from_int8(v, v_scales[..., 0], dtype)


def finished(part: Partial, q: jax.Array) -> jax.Array:
    """The attention's result, shaped and typed as q."""
    return (part.weighted / part.total[..., None]).astype(q.dtype).reshape(q.shape)
