"""The TPU kernel of weights in few bits: its numbers against float64, its program as the TPU compiler makes it."""

import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phijax.model.kernels import integers_tpu
from phijax.model.kernels.integers_tpu import from_quantized
from phijax.model.quantized import Quantized
from phijax.parallel import hlo
from phijax.parallel.mesh import MeshConfig, make_mesh
from phijax.planning.topology import tpu_devices

# Sums of some hundred products in float32, of which interpret mode keeps every bit but the order.
CLOSE = {"rtol": 0, "atol": 2e-5}
VERBS = {"project": -1, "project_back": -2}  # the axis of (rows, D) that is summed over

SLACK = 2**20  # bytes: lone lines of scales are filled up to a tile

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: the TPU compiler cannot be asked"
)


def random_weight(shape, group: int | None, axis: int, seed: int = 0, dtype=jnp.int4) -> Quantized:
    """Scales of both signs, one of them subnormal in float16. group: None: the whole axis."""
    rng = np.random.default_rng(seed)
    values = (
        rng.integers(-8, 8, shape).astype(np.int8) if dtype == jnp.int4 else rng.integers(-127, 128, shape, np.int8)
    )
    groups = list(shape)
    groups[axis] //= group or shape[axis]
    scales = (rng.standard_normal(groups) * 0.02).astype(np.float16)
    scales.flat[0] = np.float16(2e-6)
    assert scales.flat[0] != 0
    return Quantized(jnp.asarray(values).astype(dtype), jnp.asarray(scales))


def exact(w: Quantized) -> np.ndarray:
    """(..., rows, D) float64."""
    values, scales = np.asarray(w.values.astype(jnp.int8), np.float64), np.asarray(w.scales, np.float64)
    for axis in (-1, -2):
        scales = np.repeat(scales, values.shape[axis] // scales.shape[axis], axis)
    return values * scales


def random_x(count: int, width: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count, width), np.float32)


def product(x: np.ndarray, matrix: np.ndarray, verb: str) -> np.ndarray:
    return x.astype(np.float64) @ (matrix.T if verb == "project" else matrix)


# Rows that are no multiple of 8 and more than the kernel takes at once; two, four and one group in a register's width;
# outputs of several blocks.
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(("count", "shape", "group"), [(1, (256, 384), 128), (11, (384, 256), 64), (7, (640, 128), 32)])
def test_the_product_is_the_float64_one(verb, count, shape, group):
    if verb == "project_back":
        shape = shape[::-1]
    w = random_weight(shape, group, VERBS[verb])
    assert integers_tpu.fits(w)
    x = random_x(count, shape[VERBS[verb]])
    fast = from_quantized(w, interpret=True)
    assert fast.group == group and fast.shape == shape
    np.testing.assert_allclose(getattr(fast, verb)(jnp.asarray(x)), product(x, exact(w), verb), **CLOSE)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("dtype", [jnp.int4, jnp.int8])
def test_a_scale_for_each_channel(verb, dtype):
    w = random_weight((256, 640), None, VERBS[verb], dtype=dtype)
    assert integers_tpu.fits(w)
    x = random_x(9, w.shape[VERBS[verb]])
    got = getattr(from_quantized(w, interpret=True), verb)(jnp.asarray(x))
    # Eight bits are 16 times as large as four.
    np.testing.assert_allclose(got, product(x, exact(w), verb), rtol=0, atol=2e-5 if dtype == jnp.int4 else 4e-4)


@pytest.mark.parametrize("verb", VERBS)
def test_many_rows_read_the_weights_again(verb, monkeypatch):
    monkeypatch.setattr(integers_tpu, "MOST_ROWS", 16)
    w = random_weight((256, 256), 64, VERBS[verb])
    x = random_x(2 * 20, 256).reshape(2, 20, 256)
    got = getattr(from_quantized(w, interpret=True), verb)(jnp.asarray(x))
    np.testing.assert_allclose(got, product(x, exact(w), verb), **CLOSE)


@pytest.mark.parametrize("verb", VERBS)
def test_bfloat16_is_summed_in_float32(verb):
    """The integers are exact in bfloat16 and scales come behind the product: only x and the result are rounded."""
    w = random_weight((256, 256), 128, VERBS[verb])
    x = jnp.asarray(random_x(8, 256)).astype(jnp.bfloat16)
    fast = from_quantized(w, interpret=True)
    expected = product(np.asarray(x.astype(jnp.float32)), exact(w), verb)
    np.testing.assert_allclose(getattr(fast, verb)(x, jnp.float32), expected, **CLOSE)
    assert getattr(fast, verb)(x).dtype == jnp.bfloat16


@pytest.mark.parametrize("verb", VERBS)
def test_a_layer_of_a_stack(verb):
    w = random_weight((3, 128, 256), 64, VERBS[verb])
    x = random_x(8, w.shape[VERBS[verb]])
    stack = from_quantized(w, interpret=True)
    run = jax.jit(lambda stack, x, number: getattr(stack.of_layer(number), verb)(x))
    for number in range(3):
        got = run(stack, x, number)
        np.testing.assert_allclose(got, product(x, exact(w)[number], verb), **CLOSE)
    assert stack.of_layer(1).shape == (128, 256)
    np.testing.assert_array_equal(stack.of_layer(2).dequantize(), exact(w)[2].astype(np.float32))


def test_lookup_is_that_of_the_stored_weight():
    w = random_weight((256, 128), 32, -1)
    tokens = jnp.asarray([[3, 255], [0, 128]])
    np.testing.assert_array_equal(
        from_quantized(w).lookup(tokens, jnp.float32), exact(w)[np.asarray(tokens)].astype(np.float32)
    )


def test_every_scale_of_float16_is_read_exactly():
    bits = np.arange(2**16, dtype=np.uint16)
    finite = np.isfinite(bits.view(np.float16))
    got = jax.jit(integers_tpu._float32)(bits.view(np.int16).reshape(256, 256)).ravel()
    np.testing.assert_array_equal(np.asarray(got)[finite], bits.view(np.float16).astype(np.float32)[finite])


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(("cut", "group"), [(True, 64), (False, 64), (True, None)])
def test_on_four_chips(verb, cut, group):
    """Each has the kernel over its rows, and what is summed over rows is added up between them; or over all rows."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=4), jax.devices()[:4])
    w = random_weight((3, 512, 256), group, VERBS[verb])
    assert integers_tpu.fits(w, 4)
    x = random_x(8, w.shape[VERBS[verb]])
    stack = from_quantized(w, mesh, cut=cut, interpret=True)
    got = jax.jit(lambda stack, x: getattr(stack.of_layer(2), verb)(x))(stack, x)
    np.testing.assert_allclose(got, product(x, exact(w)[2], verb), **CLOSE)


def test_what_the_kernel_does_not_take():
    assert not integers_tpu.fits(random_weight((96, 256), 64, -1))  # rows that fill no register
    assert not integers_tpu.fits(random_weight((256, 256), 64, -2), 4)  # 64 rows a chip
    assert not integers_tpu.fits(random_weight((768, 256), 256, -2), 2)  # groups that would lie on two chips
    assert integers_tpu.fits(random_weight((768, 256), 256, -2), 3)


@needs_compiler
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(("count", "group"), [(1, 128), (8, None), (32, 32), (256, 64)])
def test_compiled_for_a_chip_no_weight_is_copied(verb, count, group):
    """An MLP matrix of mini, in a stack of four of which a loop's counter says one."""
    shape = (4, 8192, 3072)
    text, memory = compile_in_a_loop(verb, count, shape, group)
    integers, scales = math.prod(shape) // 2, 2 * math.prod(shape) // (group or shape[VERBS[verb]])
    x = 2 * max(count, 8) * shape[VERBS[verb]]
    # Four bits a weight and sixteen a group, with what pads x and the scales to whole tiles.
    assert integers + scales <= memory.argument_size_in_bytes <= integers + 1.4 * scales + 4 * x + SLACK
    assert memory.temp_size_in_bytes < integers / 4 / 3  # a third of one matrix in four bits
    weights = [i for i in hlo.instructions(text) if i.elements >= math.prod(shape[1:])]
    assert {i.dtype for i in weights} == {"s4"}
    assert {i.opcode for i in weights} <= {"parameter", "get-tuple-element"}
    assert "tpu_custom_call" in text


def compile_in_a_loop(verb: str, count: int, shape: tuple[int, ...], group: int | None):
    """The verb over each matrix of a stack in turn, results added up."""
    alone = jax.sharding.SingleDeviceSharding(tpu_devices("v5e:2x2")[0])
    groups = list(shape)
    groups[VERBS[verb]] //= group or shape[VERBS[verb]]
    w = Quantized(abstract(shape, jnp.int4, alone), abstract(groups, jnp.float16, alone))
    fast = jax.tree.map(lambda a: abstract(a.shape, a.dtype, alone), jax.eval_shape(from_quantized, w))
    x = abstract((count, shape[VERBS[verb]]), jnp.bfloat16, alone)

    def run(w, x):
        def body(total, number):
            return total + getattr(w.of_layer(number), verb)(x, jnp.float32), None

        out = (count, shape[-2] if verb == "project" else shape[-1])
        return jax.lax.scan(body, jnp.zeros(out, jnp.float32), jnp.arange(shape[0]))[0]

    compiled = jax.jit(run).lower(fast, x).compile()
    return compiled.as_text(), compiled.memory_analysis()


def abstract(shape, dtype, sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)
