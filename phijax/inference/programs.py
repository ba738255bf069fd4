"""The model's compiled programs of generation, one of each kind for every shape bucket, shared by all generators."""

import functools

import jax
import jax.numpy as jnp

from phijax.model import cached
from phijax.model.config import ModelConfig
from phijax.model.inference_layout import InferenceLayout
from phijax.model.kernels.decode import Pieces

# Buckets of a chunk of a prompt. A prompt is cut by its own length alone (see `chunks`).
CHUNKS = (16, 64, 256)
LARGEST_PIECE = 16  # of a cache, in units of its smallest


def chunks(length: int) -> list[tuple[int, int, int]]:
    """(start, tokens, bucket) of a prompt's pieces: few buckets, little padding, a function of its length alone."""
    pieces, start = [], 0
    while start < length:
        left = length - start
        bucket = next((size for size in reversed(CHUNKS) if left >= 0.7 * size), CHUNKS[0])
        pieces.append((start, min(left, bucket), bucket))
        start += bucket
    return pieces


def piece_lengths(length: int, unit: int = CHUNKS[-1]) -> tuple[int, ...]:
    """Of the pieces of a cache for `length` places: a unit, then each as long as all before it, to 16 units.

    What a row does not use of its last piece is read in vain: about a third of what it uses, half of it at worst. A
    chunk of a prompt lies within a unit.
    """
    pieces = [unit]
    while sum(pieces) < length:
        pieces.append(min(sum(pieces), LARGEST_PIECE * unit))
    return tuple(pieces)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=(5,))
def prefill(
    c: ModelConfig,
    layout: InferenceLayout,
    attention_factor: float,
    every: bool,
    weights: cached.Weights,
    cache: cached.Cache,
    tokens: jax.Array,
    start: jax.Array,
    count: jax.Array,
    frequencies: jax.Array,
):
    """A chunk of one prompt into a cache of one row.

    Args:
      every: logits of every place, (T, V), instead of the last counted one, (1, V).
      tokens: (T,) int32, of which `count` count; what the others write is overwritten before it is seen.
    Returns: logits float32, cache.
    """
    positions = start + jnp.arange(tokens.shape[0], dtype=jnp.int32)
    x, cache = cached.hidden(
        c, layout, weights, cache, tokens[None], positions[None], frequencies[None], attention_factor
    )
    if every:
        return cached.logits(c, layout, weights, x[0]), cache
    # Equal rows, as many as products want: of one XLA:CPU copied the head first, 8 of 53 ms for 256 tokens.
    last = jnp.tile(jax.lax.dynamic_slice_in_dim(x[0], count - 1, 1), (layout.least_rows, 1))
    return cached.logits(c, layout, weights, last)[:1], cache


@functools.partial(jax.jit, static_argnums=(0,), donate_argnums=(1,))
def insert(layout: InferenceLayout, cache: cached.Cache, prompt: cached.Cache, row: jax.Array) -> cached.Cache:
    """The cache of one prompt becomes row `row` of a batch's; both hold the same positions, the batch's no fewer."""
    at = (row, 0, 0, 0) if layout.unrolled else (0, row, 0, 0, 0)

    if layout.stacked:
        return jax.tree.map(lambda w, o: jax.lax.dynamic_update_slice(w, o, (0, row, 0, 0)), cache, prompt)

    def put(whole: Pieces, one: Pieces) -> Pieces:
        n = len(one)
        return jax.tree.map(lambda w, o: jax.lax.dynamic_update_slice(w, o, at), whole[:n], one) + whole[n:]

    return tuple(map(put, cache, prompt)) if layout.unrolled else put(cache, prompt)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(4,))
def step(
    c: ModelConfig,
    layout: InferenceLayout,
    attention_factor: float,
    weights: cached.Weights,
    cache: cached.Cache,
    tokens: jax.Array,
    positions: jax.Array,
    frequencies: jax.Array,
    count: jax.Array | None,
) -> tuple[jax.Array, cached.Cache]:
    """A token of each row.

    Args:
      tokens, positions: (B,) int32; frequencies: (B, R/2) float32.
      count: rows that count, each with bits of its own; None: no such promise.
    Returns: logits (B, padded V) float32, cache.
    """
    x, cache = cached.hidden(
        c, layout, weights, cache, tokens[:, None], positions[:, None], frequencies, attention_factor, count
    )
    return cached.logits(c, layout, weights, x[:, 0]), cache


@functools.lru_cache(maxsize=64)
def cache_maker(c: ModelConfig, layout: InferenceLayout, rows: int, lengths: tuple[int, ...], sharding):
    """Compiled: () -> an empty cache, made where it lies; `sharding` as `placement.cache_sharding` gives it."""
    return jax.jit(lambda: cached.empty_cache(c, layout, rows, lengths), out_shardings=sharding)


def places(layout: InferenceLayout, cache: cached.Cache) -> int:
    """How many a row of this cache has."""
    if layout.stacked:
        return cache.k.shape[2]
    return sum(piece[0].shape[-2] for piece in (cache[0] if layout.unrolled else cache))
