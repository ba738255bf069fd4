"""Weights in few bits: the two contractions against float64, packing, and what other tools read in the same numbers."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from quick_compilation import QUICK
from references.quantized import MODEL
from references.weights import random_params

from phijax.model import params
from phijax.model.backend import Backend
from phijax.model.quantized import Quantized
from phijax.model.weights import gathered, project, project_back, weight
from phijax.quantization import packing
from phijax.quantization.policy import SCHEMES, summed_axis
from phijax.quantization.rounding import round_to_nearest

ROWS, COLUMNS = 384, 256  # every group divides both


def random_weight(scheme, axis: int, seed: int = 0) -> Quantized:
    """Every integer and scales of either sign."""
    random = np.random.default_rng(seed)
    low = -(2 ** (scheme.bits - 1))
    values = random.integers(low, -low, (ROWS, COLUMNS)).astype(np.int8)
    values.reshape(-1)[: 2 * -low] = np.arange(low, -low)
    scales = random.standard_normal(scheme.scales_shape((ROWS, COLUMNS), axis)).astype(np.float16)
    narrow = values.astype(ml_dtypes.int4) if scheme.bits == 4 else values
    return Quantized(jnp.asarray(narrow), jnp.asarray(scales))


def in_float64(w: Quantized) -> np.ndarray:
    """By repetition of each scale: another way than the reshapes of the code."""
    out = np.asarray(w.values).astype(np.float64)
    scales = np.asarray(w.scales, np.float64)
    for axis in range(2):
        scales = np.repeat(scales, out.shape[axis] // scales.shape[axis], axis)
    return out * scales


def leaf(w: Quantized):
    """As a module holds it."""
    declared = weight((ROWS, COLUMNS), ("ffn", "embed"), 1.0)
    declared.set_value(w)
    return declared


CASES = list(itertools.product(SCHEMES, (-1, -2)))


@pytest.mark.parametrize("name, axis", CASES)
def test_dequantized_is_exact(name, axis):
    """float32 holds an integer of 8 bits times a scale of 11 exactly."""
    w = random_weight(SCHEMES[name], axis)
    assert w.values.dtype == (jnp.int4 if SCHEMES[name].bits == 4 else jnp.int8)
    np.testing.assert_array_equal(np.asarray(w.dequantize(), np.float64), in_float64(w))


@pytest.mark.parametrize("name, axis", CASES)
@pytest.mark.parametrize("dtype, error", [("float32", 2e-6), ("bfloat16", 4e-3)])
def test_contractions_against_float64(name, axis, dtype, error):
    """Relative to the sum of magnitudes. float32: summation order. bfloat16: the result is rounded to 8 bits, and so is
    each weight where groups are."""
    w, random = random_weight(SCHEMES[name], axis), np.random.default_rng(1)
    x = jnp.asarray(random.standard_normal((2, 3, (COLUMNS, ROWS)[axis == -2])), dtype)
    verb = project if axis == -1 else project_back
    got = jax.jit(lambda x, w: verb(x, leaf(w)), compiler_options=QUICK)(x, w)
    matrix = in_float64(w) if axis == -1 else in_float64(w).T
    wide = np.asarray(x, np.float64)
    assert got.dtype == x.dtype
    bound = error * (np.abs(wide) @ np.abs(matrix.T)) + (np.abs(wide @ matrix.T) * 2**-8 if dtype == "bfloat16" else 0)
    assert np.all(np.abs(np.asarray(got, np.float64) - wide @ matrix.T) <= bound)


@pytest.mark.parametrize("heads", [1, 4])
def test_heads_are_those_of_arrays(heads):
    """The same rows belong to a head as where the weight is an array."""
    q, o = (random_weight(SCHEMES["int4_g32"], axis) for axis in (-1, -2))
    random = np.random.default_rng(2)
    x = jnp.asarray(random.standard_normal((2, 5, COLUMNS)), jnp.float32)
    h = jnp.asarray(random.standard_normal((2, heads, 5, ROWS // heads)), jnp.float32)
    for verb, argument, w in ((project, x, q), (project_back, h, o)):
        got = verb(argument, leaf(w), heads=heads)
        expected = verb(argument, leaf(w.dequantize()), heads=heads)
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, rtol=0, atol=3e-3)  # of sums near 1000


def test_lookup_gives_rows():
    w = random_weight(SCHEMES["int4_g64"], -1)
    tokens = np.array([[3, 0, 383], [7, 7, 1]], np.int32)
    np.testing.assert_array_equal(w.lookup(tokens, jnp.float32), in_float64(w)[tokens])


def test_packing_and_its_order():
    values = np.random.default_rng(0).integers(-8, 8, (3, 5, 16)).astype(np.int8)
    packed = packing.pack(values)
    assert packed.dtype == np.uint8 and packed.shape == (3, 5, 8)
    np.testing.assert_array_equal(packing.unpack(packed), values)
    np.testing.assert_array_equal(packing.unpack(np.array([[packing.ZERO_BYTE]], np.uint8)), [[0, 0]])
    # compressed-tensors: nibble j of word c is column 8 c + j, lowest bits first, plus 8.
    unsigned = (values + 8).astype(np.uint32).reshape(3, 5, 2, 8)
    words = (unsigned << (4 * np.arange(8, dtype=np.uint32))).sum(-1, dtype=np.uint32)
    np.testing.assert_array_equal(packed.view("<u4"), words)


def test_ggufs_q4_0_holds_groups_of_32_exactly():
    """Our integers and scales in its blocks: its own reader gives our weights bit for bit."""
    gguf = pytest.importorskip("gguf")
    matrix = np.random.default_rng(3).standard_normal((64, 256)).astype(np.float32)
    rounded = round_to_nearest(matrix, SCHEMES["int4_g32"], -1)
    q = (np.asarray(rounded.values) + 8).astype(np.uint8).reshape(64, 8, 2, 16)
    nibbles = q[:, :, 0] | (q[:, :, 1] << 4)  # byte j: weight j low, weight j + 16 high
    scales = np.asarray(rounded.scales)[..., None].view(np.uint8)
    blocks = np.concatenate([scales, nibbles], axis=-1).reshape(64, -1)
    theirs = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_0)
    ours = Quantized(rounded.values, rounded.scales).dequantize()
    np.testing.assert_array_equal(theirs, np.asarray(ours))


def test_ggufs_q8_0_holds_channels_exactly():
    gguf = pytest.importorskip("gguf")
    matrix = np.random.default_rng(4).standard_normal((64, 256)).astype(np.float32)
    rounded = round_to_nearest(matrix, SCHEMES["int8"], -1)
    scales = np.repeat(np.asarray(rounded.scales), 8, axis=1)[..., None].view(np.uint8)
    blocks = np.concatenate([scales, np.asarray(rounded.values).view(np.uint8).reshape(64, 8, 32)], axis=-1)
    theirs = gguf.quants.dequantize(blocks.reshape(64, -1), gguf.GGMLQuantizationType.Q8_0)
    ours = Quantized(rounded.values, rounded.scales).dequantize()
    np.testing.assert_array_equal(theirs, np.asarray(ours))


@pytest.mark.parametrize("scan", [True, False])
def test_the_decoder_takes_them_and_they_stay_quantized_inside_the_scan(scan):
    """Logits equal those of the same weights as arrays; the traced program takes integers into its layers."""
    flat = params.flat(random_params(MODEL))
    narrow, wide = dict(flat), dict(flat)
    for path, value in flat.items():
        if path.endswith("scale"):
            continue
        stack = value if value.ndim == 3 else value[None]
        # 64, 48 and 96 inputs: groups of 32 for what divides, else by channel.
        axis = summed_axis(path)
        scheme = SCHEMES["int4_g32" if value.shape[axis] % 32 == 0 else "int8"]
        rounded = [round_to_nearest(matrix, scheme, axis) for matrix in stack]
        values = jnp.stack([r.values for r in rounded]).reshape(value.shape)
        scales = jnp.stack([r.scales for r in rounded])
        narrow[path] = Quantized(
            values.astype(jnp.int4) if scheme.bits == 4 else values, scales if value.ndim == 3 else scales[0]
        )
        wide[path] = narrow[path].dequantize()
    tokens = np.random.default_rng(5).integers(0, MODEL.vocab_size, (1, 16), dtype=np.int32)
    backend = Backend(scan_layers=scan)

    def logits(weights, tokens, positions, segments):
        model = params.module(MODEL, weights)
        return model.logits(model.hidden(tokens, positions, segments, backend, length=16))

    arguments = (tokens, np.arange(16, dtype=np.int32)[None], np.ones_like(tokens))
    program = jax.jit(logits, compiler_options=QUICK)
    got = program(params.nested(narrow), *arguments)
    np.testing.assert_allclose(got, program(params.nested(wide), *arguments), rtol=0, atol=2e-5)
    if scan:
        (loop,) = [
            e for e in jax.make_jaxpr(logits)(params.nested(narrow), *arguments).eqns if e.primitive.name == "scan"
        ]
        count: dict[str, int] = {}
        for variable in loop.params["jaxpr"].in_avals:
            count[str(variable.dtype)] = count.get(str(variable.dtype), 0) + 1
        # q, k, v, gate, up, down in four bits, o by channel in eight; the two norms alone have float32 weights.
        assert count["int4"] == 6 and count["int8"] == 1 and count["float16"] == 7
        weights = [v for v in loop.params["jaxpr"].in_avals if v.dtype == jnp.float32 and v.shape == (64,)]
        assert len(weights) == 2


def test_arrays_lower_to_the_program_that_they_did():
    """The format's dispatch leaves no trace in a program of arrays: what the verbs do is written out here."""
    w = leaf(jnp.zeros((ROWS, COLUMNS)))
    x, h = jnp.zeros((2, 3, COLUMNS)), jnp.zeros((2, 3, ROWS))

    def lowered(f, *arguments):
        return jax.jit(f).lower(*arguments).as_text()

    def plainly(x, matrix, axis):
        matrix = gathered(matrix[...], ("ffn", "embed"), x.dtype)
        return jax.lax.dot_general(x, matrix, (((2,), (axis,)), ((), ())))

    assert lowered(lambda x, m: project(x, leaf(m)), x, w.get_value()) == lowered(
        lambda x, m: plainly(x, m, 1), x, w.get_value()
    )
    assert lowered(lambda h, m: project_back(h, leaf(m)), h, w.get_value()) == lowered(
        lambda h, m: plainly(h, m, 0), h, w.get_value()
    )
