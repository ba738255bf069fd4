"""The CPU kernel for weights in few bits, each path that this CPU has: products, norms, gate, attention, rows' bits.

Against float64 NumPy with the activations rounded as the kernel says, and against activations that are not rounded.
"""

import functools
import itertools
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from phijax.model.kernels import cpu_int4, cpu_int4_library
from phijax.model.kernels.cpu_int4 import Norm, Tiled, tiled
from phijax.model.kernels.decode import cached_attention, in_eight_bits, write
from phijax.model.mask import Mask
from phijax.model.quantized import Quantized
from phijax.model.rope import apply_rope
from phijax.model.weights import WeightFormat
from phijax.quantization.policy import SCHEMES

OUTPUTS, INPUTS = 200, 384  # 200: tiles of 32 have a part left over; every group divides 384

library = cpu_int4_library.loaded()
pytestmark = pytest.mark.skipif(library is None, reason="no C++ compiler here: the kernel cannot be built")
CASES = list(itertools.product(SCHEMES, (-1, -2)))
PATHS = [p for i, p in enumerate(cpu_int4_library.PATHS) if library is not None and library.phijax_cpu_int4_has(i)]


@functools.lru_cache(maxsize=64)
def stored(name: str, axis: int = -1, outputs: int = OUTPUTS, inputs: int = INPUTS, seed: int = 0) -> Quantized:
    """Every integer, scales of either sign; (outputs, inputs), turned where it is summed over rows."""
    scheme, random = SCHEMES[name], np.random.default_rng(seed)
    high = 2 ** (scheme.bits - 1)
    shape = (outputs, inputs) if axis == -1 else (inputs, outputs)
    values = random.integers(-high, high, shape).astype(np.int8)
    grid = scheme.scales_shape(shape, axis)
    scales = random.choice([-1, 1], grid) * random.uniform(0.5, 1.5, grid)
    values = values.astype(ml_dtypes.int4) if scheme.bits == 4 else values
    return Quantized(jnp.asarray(values), jnp.asarray((scales / high).astype(np.float16)))


def matrix_of(w: Quantized, axis: int = -1) -> np.ndarray:
    """(inputs, outputs) float64, by repetition of each scale."""
    out, scales = np.asarray(w.values).astype(np.float64), np.asarray(w.scales, np.float64)
    for a in range(2):
        scales = np.repeat(scales, out.shape[a] // scales.shape[a], a)
    return (out * scales).T if axis == -1 else out * scales


def rounded(x: np.ndarray, group: int) -> np.ndarray:
    """Rows' groups to int8: the largest magnitude is 127. float32 up to the integers, as the kernel computes them."""
    x = np.asarray(x, np.float32)
    padded = np.pad(x, [(0, 0), (0, -x.shape[-1] % group)]).reshape(len(x), -1, group)
    highest = np.abs(padded).max(-1, keepdims=True)
    integers = np.rint(padded * (np.float32(127) / np.maximum(highest, 1e-30)))
    return (integers.astype(np.float64) * (highest / np.float32(127)))[..., :].reshape(len(x), -1)[:, : x.shape[-1]]


def random_rows(rows: int, width: int = INPUTS, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)


@pytest.mark.parametrize("name, axis", CASES)
@pytest.mark.parametrize("path", PATHS)
def test_products_against_float64(path, name, axis):
    w = stored(name, axis)
    form = tiled(w, path)
    x = random_rows(13)
    verb = form.project if axis == -1 else form.project_back
    got = np.asarray(jax.jit(verb)(jnp.asarray(x)), np.float64)
    matrix = matrix_of(w, axis)
    # Sums of groups in float32: at most 12 of them, each off by 2^-24 of the magnitudes.
    bound = 2e-6 * np.abs(rounded(x, form.group)) @ np.abs(matrix)
    assert np.all(np.abs(got - rounded(x, form.group) @ matrix) <= bound)
    # What rounding the activations costs: steps of 1/127 of a group's largest, about 0.6 % of the deviation.
    exact = x.astype(np.float64) @ matrix
    error = np.sqrt(np.mean((got - exact) ** 2)) / exact.std()
    assert 1e-4 < error < 0.012, error


@pytest.mark.parametrize("path", PATHS)
def test_inputs_that_no_group_divides_and_the_smallest_matrices(path):
    for name, outputs, inputs in (("int8", 1, 2), ("int4", 33, 70), ("int8", 31, 130)):
        w = stored(name, -1, outputs, inputs)
        x = random_rows(3, inputs)
        got = np.asarray(tiled(w, path).project(jnp.asarray(x)), np.float64)
        np.testing.assert_allclose(got, rounded(x, cpu_int4.CHANNEL_GROUP) @ matrix_of(w), rtol=0, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["int4_g32", "int4_g128", "int8"])
def test_a_rows_bits_depend_on_that_row_alone(path, name):
    """Alone, in any batch, at any place of it, and when only some rows count."""
    form = tiled(stored(name), path)
    norm = Norm(jnp.asarray(random_rows(1)[0]), 1e-5)
    product = jax.jit(lambda x, count: cpu_int4.products(x, [form], norm=norm, count=count)[0])
    x = random_rows(64)
    together = np.asarray(product(x, jnp.int32(64)))
    for rows in (1, 2, 3, 5, 6, 7, 12, 13):
        np.testing.assert_array_equal(product(x[:rows], jnp.int32(rows)), together[:rows])
    np.testing.assert_array_equal(product(x[::-1], jnp.int32(64))[::-1], together)
    some = np.asarray(product(x, jnp.int32(9)))
    np.testing.assert_array_equal(some[:9], together[:9])
    assert not some[9:].any()


@pytest.mark.parametrize("path", PATHS)
def test_several_matrices_in_one_call_with_norm_and_residual(path):
    weights = [stored("int4_g64", outputs=n, seed=n) for n in (96, 40, 200)]
    forms = [tiled(w, path) for w in weights]
    x, scale, residual = 3 * random_rows(5), random_rows(1, seed=2)[0], random_rows(5, 200, seed=3)
    norm = Norm(jnp.asarray(scale), 1e-3)
    wide = x.astype(np.float64)
    normed = scale * (wide / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + 1e-3))
    for got, w in zip(cpu_int4.products(jnp.asarray(x), forms, norm=norm), weights, strict=True):
        expected = rounded(normed, 64) @ matrix_of(w)
        # An activation between two integers may go the other way: one step of a few of 384.
        np.testing.assert_allclose(got, expected, rtol=0, atol=0.01 * expected.std())
    (got,) = cpu_int4.products(jnp.asarray(x), [forms[2]], residual=jnp.asarray(residual))
    np.testing.assert_allclose(got, residual + rounded(x, 64) @ matrix_of(weights[2]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("down_name", ["int4_g32", "int8"])
def test_gated_against_float64(path, down_name):
    gate, up = (stored("int4_g32", outputs=256, seed=seed) for seed in (4, 5))
    down = stored(down_name, -2, INPUTS, 256, seed=6)
    x, residual = 0.3 * random_rows(9), random_rows(9, seed=7)
    forms = [tiled(w, path) for w in (gate, up, down)]
    got = np.asarray(cpu_int4.gated(jnp.asarray(x), *forms, residual=jnp.asarray(residual)), np.float64)
    a, b = (rounded(x, 32) @ matrix_of(w) for w in (gate, up))
    hidden = a / (1 + np.exp(-a)) * b
    expected = rounded(hidden, forms[2].group) @ matrix_of(down, -2)
    np.testing.assert_allclose(got - residual, expected, rtol=0, atol=0.005 * expected.std())
    exact = (lambda a, b: a / (1 + np.exp(-a)) * b)(x @ matrix_of(gate), x @ matrix_of(up)) @ matrix_of(down, -2)
    assert np.sqrt(np.mean((got - residual - exact) ** 2)) < 0.03 * exact.std()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("rotary", [24, 20])
@pytest.mark.parametrize("tokens", [1, 45])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_attention_is_that_of_the_xla_path(path, window, rotary, tokens, dtype):
    """Grouped heads, part of a head not rotated, a cache in pieces, a row that does not count; and its cache.

    45 tokens: of a block of queries some are there, and keys end in the middle of a block of theirs.
    """
    random = np.random.default_rng(8)
    heads, kv_heads, h, lengths = 6, 2, 24, (64, 64, 128)
    c = type("Config", (), {"rotary_dim": rotary, "head_dim": h})
    cache = tuple(
        tuple(jnp.asarray(random.standard_normal((4, kv_heads, n, h)), jnp.float32) for _ in range(2)) for n in lengths
    )
    cache = tuple(in_eight_bits(*piece) for piece in cache) if dtype == "int8" else cache
    qkv = [jnp.asarray(random.standard_normal((5, tokens, n * h)), jnp.float32) for n in (heads, kv_heads, kv_heads)]
    # The fifth row has no place in the cache; new places lie within a piece.
    starts = jnp.asarray([0, 63 if tokens == 1 else 19, 64, 200, 5], jnp.int32)
    angles = jnp.asarray(random.uniform(0, 6, (5, tokens, rotary // 2)), jnp.float32)
    rope = tuple(jnp.concatenate([f(angles)] * 2, -1) for f in (jnp.cos, jnp.sin))

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(5, tokens, -1, h).swapaxes(1, 2)

    q, k, v = map(split, qkv)
    q, k = (apply_rope(x, [part[:, None] for part in rope], c, by_matmul=False) for x in (q, k))
    new = write(cache, k, v, starts, cut_by_time=False)
    expected = cached_attention(q * h**-0.5, new, starts[:, None] + jnp.arange(tokens), mask=Mask(window=window))
    expected = expected.swapaxes(1, 2).reshape(5, tokens, -1)
    attend = functools.partial(cpu_int4.attend, mask=Mask(window=window), path=path)
    out, got = attend(*qkv, rope, cache, starts, jnp.int32(5))
    # In eight bits a number between two integers may go the other way: 1/127 of a key's largest, of one in thousands.
    np.testing.assert_allclose(out, expected, rtol=0, atol=3e-6 if dtype == "float32" else 0.02)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(new), strict=True):
        assert ours.dtype == theirs.dtype
        off = np.abs(np.asarray(ours, np.float32) - np.asarray(theirs, np.float32))
        assert (off.max() <= 1e-6) if dtype == "float32" else (off.max() <= 1 and np.mean(off > 0) < 1e-3)
    row = jax.tree.map(lambda a: a[3:4], (*qkv, rope, cache, starts))
    np.testing.assert_array_equal(attend(*row, None)[0][0], out[3])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("window", [None, 50])
def test_a_prompt_against_float64_and_cut_in_two_it_has_the_same_bits(path, window):
    """Past several blocks of keys; scores of some tens, so that the softmax's highest rises on the way."""
    random = np.random.default_rng(9)
    heads, kv_heads, h, tokens = 4, 2, 40, 301
    q, k, v = (
        jnp.asarray(random.standard_normal((1, tokens, n * h)), jnp.float32) for n in (heads, kv_heads, kv_heads)
    )
    q = 8 * q
    rope = (jnp.ones((1, tokens, h)), jnp.zeros((1, tokens, h)))  # turns nothing
    cache = tuple((jnp.full((1, kv_heads, n, h), 1e9), jnp.full((1, kv_heads, n, h), 1e9)) for n in (256, 256))

    def attend(cache, start, end):
        part = [x[:, start:end] for x in (q, k, v)]
        table = [x[:, start:end] for x in rope]
        start = jnp.array([start], jnp.int32)
        return cpu_int4.attend(*part, table, cache, start, None, mask=Mask(window=window), path=path)

    out, _ = attend(cache, 0, tokens)
    wide = [np.asarray(x, np.float64).reshape(tokens, -1, h) for x in (q, k, v)]
    k64, v64 = (np.repeat(x, heads // kv_heads, 1) for x in wide[1:])
    scores = np.einsum("tnh,snh->nts", wide[0], k64) / np.sqrt(h)
    distance = np.arange(tokens)[:, None] - np.arange(tokens)
    scores[:, (distance < 0) | (distance >= (window or tokens))] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("nts,snh->tnh", weights / weights.sum(-1, keepdims=True), v64).reshape(tokens, -1)
    np.testing.assert_allclose(out[0], expected, rtol=0, atol=2e-5)
    for cut in (23, 128, 290):
        first, new = attend(cache, 0, cut)
        second, _ = attend(new, cut, tokens)
        np.testing.assert_array_equal(jnp.concatenate([first, second], 1), out)


@pytest.mark.parametrize("path", PATHS)
def test_a_line_of_eight_bits_is_that_of_int8_lines(path):
    """Ties, signs, zeros and what is not finite: the same integers and scales as XLA writes."""
    h = 8
    lines = np.random.default_rng(10).standard_normal((40, h)).astype(np.float32) * 10.0 ** np.arange(-20, 20)[:, None]
    lines[3] = 0
    lines[5, 2], lines[6, 3] = np.nan, np.inf
    cache = ((jnp.zeros((1, 1, 40, h), jnp.int8),) * 2 + (jnp.zeros((1, 1, 40, 1), jnp.bfloat16),) * 2,)
    v = jnp.asarray(lines)[None]
    rope = (jnp.ones((1, 40, h)), jnp.zeros((1, 40, h)))
    _, ((k, _, scales, _),) = cpu_int4.attend(v, v, v, rope, cache, jnp.array([0]), None, mask=Mask(), path=path)
    expected, _, expected_scales, _ = in_eight_bits(v[None], v[None])
    finite = [i for i in range(40) if i not in (5, 6)]
    np.testing.assert_array_equal(k[0, 0, np.array(finite)], expected[0, 0, np.array(finite)])
    np.testing.assert_array_equal(
        np.asarray(scales, np.float32)[0, 0, finite], np.asarray(expected_scales, np.float32)[0, 0, finite]
    )
    assert np.isnan(np.asarray(scales, np.float32)[0, 0, 5:7]).all()


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_position_outside_of_the_cache_is_refused(tokens):
    cache = ((jnp.zeros((1, 1, 8, 8)),) * 2,)
    arrays, start = [jnp.zeros((1, tokens, 8))] * 3, jnp.array([9 - tokens])
    with pytest.raises(Exception, match="outside of the cache"):
        cpu_int4.attend(*arrays, arrays[:2], cache, start, None, mask=Mask(), path=PATHS[0])


@pytest.mark.parametrize("name, axis", CASES)
def test_the_format_holds_what_it_was_made_from(name, axis):
    w = stored(name, axis)
    form = tiled(w, "generic")
    assert isinstance(form, WeightFormat) and form.shape == w.shape
    expected = matrix_of(w, axis).T if axis == -1 else matrix_of(w, axis)
    np.testing.assert_array_equal(np.asarray(form.dequantize(), np.float64), expected)
    if axis == -1:
        tokens = np.array([[0, 31, 32], [199, 5, 5]], np.int32)
        np.testing.assert_array_equal(np.asarray(form.lookup(tokens, jnp.float32), np.float64), expected[tokens])
    stored_bits = SCHEMES[name].bits * OUTPUTS * INPUTS / 8
    assert form.data.nbytes - form.data.shape[0] * form.scale_bytes == pytest.approx(
        stored_bits * 224 / 200
    )  # whole tiles of outputs


@pytest.mark.parametrize("path", PATHS)
def test_what_is_not_finite_stays_so(path):
    form = tiled(stored("int4_g32"), path)
    x = random_rows(4)
    x[1, 7], x[2, 300], x[3] = np.nan, np.inf, 0
    got = np.asarray(form.project(jnp.asarray(x)))
    assert np.isfinite(got[0]).all() and not np.isfinite(got[1]).any() and not np.isfinite(got[2]).any()
    assert not got[3].any()


def test_many_callers_at_once():
    """The threads serve one call; others work alone, and all get what they get singly."""
    form = tiled(stored("int4_g32"), PATHS[-1])
    product = jax.jit(form.project)
    inputs = [jnp.asarray(random_rows(8, seed=seed)) for seed in range(8)]
    expected = [np.asarray(product(x)) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            for got, wanted in zip(pool.map(product, inputs), expected, strict=True):
                np.testing.assert_array_equal(got, wanted)


def test_weights_that_the_kernel_has_not_stay_as_they_are():
    w = Quantized(jnp.zeros((32, 512), jnp.int8), jnp.ones((32, 2), jnp.float16))  # groups of 256
    assert not cpu_int4.fits(w) and cpu_int4.fits(stored("int4_g128"))
    assert not cpu_int4.alike(tiled(stored("int4_g32"), PATHS[0]), tiled(stored("int4_g64"), PATHS[0]))
    assert isinstance(tiled(stored("int8"), PATHS[0]), Tiled)
