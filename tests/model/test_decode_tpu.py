"""The TPU's decoding attention over a stack of layers: its numbers against float64, its program as compiled."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phijax.model.kernels import decode_tpu, int8_lines
from phijax.model.kernels.decode_tpu import BLOCK, StackedCache
from phijax.model.kernels.stacked import stacked_attention
from phijax.model.mask import Mask
from phijax.parallel import hlo
from phijax.planning.topology import tpu_devices

LAYERS, LAYER = 3, 1
# The first place, both sides of a block's border, the last place of the cache.
PLACES = (0, 5, BLOCK - 1, BLOCK, 2 * BLOCK - 1)


def random_cache(kv_heads: int, head_dim: int, dtype, seed: int = 0) -> StackedCache:
    rng = np.random.default_rng(seed)
    shape = (LAYERS, len(PLACES), kv_heads, 2 * BLOCK, head_dim)
    k, v = (jnp.asarray(rng.standard_normal(shape, np.float32)) for _ in range(2))

    def lines(a):
        return a.swapaxes(2, 3).reshape(*shape[:2], shape[3], -1)

    if dtype != jnp.int8:
        return StackedCache(lines(k), lines(v))
    (k, k_scales), (v, v_scales) = int8_lines.to_int8(k), int8_lines.to_int8(v)
    return StackedCache(lines(k), lines(v), k_scales, v_scales)


def by_head(lines, scales, kv_heads: int) -> np.ndarray:
    """(..., S, K H) as the cache holds them -> (..., K, S, H) float64, what they stand for."""
    lines = np.asarray(lines, np.float64)
    out = lines.reshape(*lines.shape[:-1], kv_heads, -1).swapaxes(-2, -3)
    return out if scales is None else out * np.asarray(scales, np.float64)[..., None]


def attention(q, k, v, places, window):
    """float64; q (R, N, H), k and v (R, K, S, H), the query of row r at places[r]."""
    out = np.zeros(q.shape)
    for r, n in np.ndindex(q.shape[:2]):
        first = 0 if window is None else max(0, places[r] - window + 1)
        seen = slice(first, places[r] + 1)
        head = n * k.shape[1] // q.shape[1]
        scores = k[r, head, seen] @ q[r, n].astype(np.float64) / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[r, n] = weights @ v[r, head, seen] / weights.sum()
    return out


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 96), (6, 2, 64), (20, 20, 32)])
def test_it_is_the_float64_attention(dtype, window, heads, kv_heads, head_dim):
    """One key too many, a head's lanes off by one or a forgotten scale move the output by 1e-2 or more."""
    rng = np.random.default_rng(3)
    q = rng.standard_normal((len(PLACES), heads, head_dim), np.float32)
    k, v = (rng.standard_normal((len(PLACES), kv_heads, head_dim), np.float32) for _ in range(2))
    before = random_cache(kv_heads, head_dim, dtype)
    out, cache = jax.jit(decode_tpu.attend_and_write, static_argnames=("mask", "interpret"))(
        q * head_dim**-0.5,
        k,
        v,
        before,
        jnp.int32(LAYER),
        jnp.asarray(PLACES, jnp.int32),
        mask=Mask(window=window),
        interpret=True,
    )
    held = [by_head(a, s, kv_heads) for a, s in ((cache.k, cache.k_scales), (cache.v, cache.v_scales))]
    np.testing.assert_allclose(out, attention(q, held[0][LAYER], held[1][LAYER], PLACES, window), rtol=0, atol=2e-5)
    # The new token's line and no other has changed, and it is the token's.
    for name, new in (("k", k), ("v", v)):
        old = by_head(getattr(before, name), getattr(before, f"{name}_scales"), kv_heads)
        now = by_head(getattr(cache, name), getattr(cache, f"{name}_scales"), kv_heads)
        for row, place in enumerate(PLACES):
            error = np.abs(now[LAYER, row, :, place] - new[row]).max(axis=-1)
            assert (error <= (0 if dtype != jnp.int8 else np.abs(new[row]).max(axis=-1) / 250)).all()
            now[LAYER, row, :, place] = old[LAYER, row, :, place]
        np.testing.assert_array_equal(now, old)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
@pytest.mark.parametrize(
    ("window", "starts"),
    [(None, [0, 5, BLOCK - 8, BLOCK, 2 * BLOCK - 16]), (7, [BLOCK + 3] * 5), (300, [BLOCK - 8] * 5)],
)
def test_a_chunk_of_a_prompt(dtype, window, starts):
    """Sixteen tokens of each row at once, over a block's border and behind it, with two query heads a key head."""
    heads, kv_heads, head_dim, count = 6, 3, 32, 16
    starts = np.array(starts)
    rng = np.random.default_rng(4)
    q = rng.standard_normal((len(starts), heads, count, head_dim), np.float32)
    k, v = (rng.standard_normal((len(starts), kv_heads, count, head_dim), np.float32) for _ in range(2))
    positions = starts[:, None] + np.arange(count)
    before = random_cache(kv_heads, head_dim, dtype)
    out, cache = jax.jit(stacked_attention, static_argnames="mask")(
        q * head_dim**-0.5, k, v, before, jnp.int32(LAYER), jnp.asarray(positions, jnp.int32), mask=Mask(window=window)
    )
    keys, values = (by_head(a, s, kv_heads) for a, s in ((cache.k, cache.k_scales), (cache.v, cache.v_scales)))
    for number in range(count):
        expected = attention(q[:, :, number], keys[LAYER], values[LAYER], positions[:, number], window)
        np.testing.assert_allclose(out[:, :, number], expected, rtol=0, atol=2e-5)
    error = 0 if dtype != jnp.int8 else np.abs(k).max() / 250
    for row, start in enumerate(starts):
        written = keys[LAYER, row, :, start : start + count]
        np.testing.assert_allclose(written, k[row], rtol=0, atol=error)
        keys[LAYER, row, :, start : start + count] = by_head(before.k, before.k_scales, kv_heads)[
            LAYER, row, :, start : start + count
        ]
    np.testing.assert_array_equal(keys, by_head(before.k, before.k_scales, kv_heads))


def test_eight_bits_hold_a_line_to_half_a_scale():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, 96), np.float32) * np.exp(rng.standard_normal((50, 1), np.float32) * 3)
    x[7] = 0
    integers, scales = int8_lines.to_int8(jnp.asarray(x))
    assert integers.dtype == jnp.int8 and scales.dtype == jnp.bfloat16
    back = int8_lines.from_int8(integers, scales, jnp.float32)
    largest = np.abs(x).max(axis=-1, keepdims=True)
    assert (np.abs(back - x) <= largest / 252).all()
    assert np.abs(np.asarray(integers, np.int32)).max() <= 127
    assert (np.asarray(back[7]) == 0).all()


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: the TPU compiler cannot be asked"
)
@pytest.mark.parametrize(("dtype", "most"), [(jnp.bfloat16, 1.0), (jnp.int8, 0.5 * (1 + 2 / 96))])
def test_compiled_for_a_chip_the_cache_is_never_copied(dtype, most):
    """Attention of mini, eight rows, over each layer of a stack in turn."""
    layers, rows, heads, width, length = 4, 8, 32, 96, 512
    alone = jax.sharding.SingleDeviceSharding(tpu_devices("v5e:2x2")[0])

    def abstract(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=alone)

    def run(q, k, v, cache, places):
        def body(carry, layer):
            q, cache = carry
            return decode_tpu.attend_and_write(q, k, v, cache, layer, places, mask=Mask()), None

        return jax.lax.scan(body, (q, cache), jnp.arange(layers))[0]

    token = abstract((rows, heads, width), jnp.bfloat16)
    cache = jax.eval_shape(lambda: decode_tpu.empty(layers, rows, heads, length, width, dtype))
    cache = jax.tree.map(lambda a: abstract(a.shape, a.dtype), cache)
    compiled = jax.jit(run, donate_argnums=3).lower(token, token, token, cache, abstract((rows,), jnp.int32)).compile()
    memory = compiled.memory_analysis()
    plain = 2 * 2 * layers * rows * length * heads * width  # bytes of bfloat16, nothing padded
    tokens = 4 * rows * heads * 128 * 2
    assert memory.argument_size_in_bytes <= plain * most + tokens
    assert memory.temp_size_in_bytes < plain / layers / 8
    assert memory.alias_size_in_bytes >= plain * most * 0.99  # it is written in place
    whole = [i for i in hlo.instructions(compiled.as_text()) if i.elements >= layers * rows * length * heads * width]
    assert {i.opcode for i in whole} == {"parameter", "get-tuple-element"}
