"""A cache in pieces against one array in float64 NumPy: writing, attention, and pieces that nobody has reached."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phijax.inference import programs
from phijax.model.kernels.decode import cached_attention, write
from phijax.model.kernels.rows import row_sum
from phijax.model.mask import Mask

LENGTHS = (8, 8, 16, 32)
ROWS, KV_HEADS, GROUP, HEAD = 3, 2, 2, 12


def pieces_of(whole: np.ndarray) -> list[np.ndarray]:
    """(R, K, S, H) cut along S."""
    return np.split(whole, list(itertools.accumulate(LENGTHS))[:-1], axis=2)


def random_cache(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    shape = (ROWS, KV_HEADS, sum(LENGTHS), HEAD)
    return rng.standard_normal(shape, np.float32), rng.standard_normal(shape, np.float32)


def reference(q: np.ndarray, k: np.ndarray, v: np.ndarray, positions: np.ndarray, window: int | None) -> np.ndarray:
    q, k, v = (a.astype(np.float64) for a in (q, k, v))
    k, v = np.repeat(k, GROUP, axis=1), np.repeat(v, GROUP, axis=1)
    scores = np.einsum("rnth,rnsh->rnts", q, k) / np.sqrt(HEAD)
    distance = positions[:, None, :, None] - np.arange(k.shape[2])
    seen = (distance >= 0) & (distance < (window or k.shape[2]))
    weights = np.where(seen, np.exp(scores), 0)
    return np.einsum("rnts,rnsh->rnth", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("window", [None, 5, 20])
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("sums", [None, row_sum])
def test_attention_over_pieces_is_attention_over_one_array(window, tokens, sums):
    rng = np.random.default_rng(0)
    k, v = random_cache(rng)
    attend = jax.jit(lambda q, cache, at: cached_attention(q, cache, at, mask=Mask(window=window), row_sum=sums))
    for starts in ((0, 7, 3), (8, 40, 15), (60, 31, 2), (5, 5, 5)):
        positions = np.array(starts)[:, None] + np.arange(tokens, dtype=np.int32)
        q = rng.standard_normal((ROWS, KV_HEADS * GROUP, tokens, HEAD), np.float32)
        got = attend(q * HEAD**-0.5, tuple(zip(pieces_of(k), pieces_of(v), strict=True)), positions)
        np.testing.assert_allclose(got, reference(q, k, v, positions, window), rtol=0, atol=2e-6)


def test_pieces_that_no_row_has_reached_are_not_read():
    """Their place holds NaN, which any read of it would spread."""
    rng = np.random.default_rng(0)
    k, v = random_cache(rng)
    cache = list(zip(pieces_of(k), pieces_of(v), strict=True))
    cache[2:] = [tuple(np.full_like(a, np.nan) for a in piece) for piece in cache[2:]]
    q = rng.standard_normal((ROWS, KV_HEADS * GROUP, 1, HEAD), np.float32)
    positions = np.array([[3], [15], [0]], np.int32)
    got = jax.jit(lambda *a: cached_attention(*a, mask=Mask()))(q * HEAD**-0.5, tuple(cache), positions)
    np.testing.assert_allclose(got, reference(q, k, v, positions, None), rtol=0, atol=2e-6)


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("tokens", [1, 4])
def test_new_places_are_written_and_no_others(cut, tokens):
    rng = np.random.default_rng(0)
    k, v = random_cache(rng)
    put = jax.jit(lambda cache, *new: write(cache, *new, cut_by_time=cut))
    for starts in ((0, 8, 60), (4, 12, 16), (28, 32, 20)):
        shape = (ROWS + 1, KV_HEADS, tokens, HEAD)  # a surplus row, which is not written
        new_k, new_v = rng.standard_normal(shape, np.float32), rng.standard_normal(shape, np.float32)
        got = put(tuple(zip(pieces_of(k), pieces_of(v), strict=True)), new_k, new_v, jnp.array([*starts, 0]))
        for whole, new, number in ((k.copy(), new_k, 0), (v.copy(), new_v, 1)):
            for row, start in enumerate(starts):
                whole[row, :, start : start + tokens] = new[row]
            np.testing.assert_array_equal(np.concatenate([piece[number] for piece in got], axis=2), whole)


def test_a_cache_has_room_wastes_little_and_no_chunk_lies_across_its_pieces():
    for length in [*range(1, 3000, 7), 4096, 4097, 131072]:
        for unit in (256, 768):
            lengths = programs.piece_lengths(length, unit)
            ends = list(itertools.accumulate(lengths))
            assert ends[-1] >= length and all(end < length for end in ends[:-1])
            assert all(size in (unit, end - size) or size == 16 * unit for size, end in zip(lengths, ends, strict=True))
            assert all(size % unit == 0 for size in lengths)
    for length in range(1, 1500):
        for start, _, bucket in programs.chunks(length):
            assert start // programs.CHUNKS[-1] == (start + bucket - 1) // programs.CHUNKS[-1]


@pytest.mark.parametrize("size", [1, 2, 7, 40, 64, 300])
def test_row_sums_are_sums_in_one_order(size):
    x = np.random.default_rng(0).standard_normal((5, size)).astype(np.float32)
    got = jax.jit(row_sum)(x)
    np.testing.assert_allclose(got, x.astype(np.float64).sum(-1), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(got[2:3], jax.jit(row_sum)(x[2:3]))
