"""Changes of low rank trained over a frozen base: on meshes, what one device makes of the merged weights."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import moved
from jax.sharding import Mesh
from references.quantized import quantized_params
from small_training import LENGTH, QUICK, ROWS, SMALL, host_batch, mesh_of, on_mesh

from phijax.data.batch import TEXT_KEYS, abstract_batch, batch_sharding
from phijax.model import adapters, params
from phijax.model.backend import CHOICES, Backend
from phijax.model.config import ModelConfig
from phijax.model.cross_entropy import LossConfig, cross_entropy
from phijax.parallel import sharding
from phijax.parallel.mesh import MeshConfig, make_mesh
from phijax.planning.assumptions import chip_of
from phijax.planning.estimator import estimate
from phijax.planning.topology import has_compiler, torus_of, tpu_devices
from phijax.quantization import policy
from phijax.training.objectives import Objective, next_token
from phijax.training.state import TrainState
from phijax.training.step import accumulate

ONE, FSDP, TENSOR, REPLICAS = (1, 1, 1, 1), (1, 4, 1, 1), (1, 2, 1, 2), (2, 2, 1, 1)
SHAPE = (1, ROWS, LENGTH)
KINDS, RANK, SCALE = ("qkv", "o", "gate_up", "down"), 2, 1.5
LEAVES = adapters.leaves(SMALL, KINDS, RANK)
CPU = Backend(scan_layers=False, flat_tokens=True)


def start(seed: int = 0) -> tuple[dict, dict]:
    """Base and factors on the host. No factor is zero: gradients flow to both."""
    rng = np.random.default_rng(seed)

    def values(leaves):
        drawn = {path: rng.standard_normal(leaf.shape, np.float32) for path, leaf in leaves.items()}
        return params.nested({p: 1 + 0.2 * v if p.endswith("scale") else 0.2 * v for p, v in drawn.items()})

    return values(params.leaves(SMALL)), values(LEAVES)


def with_logits(backend: Backend) -> Objective:
    """The loss of next tokens, of which the logits of one micro-batch are a sum too."""

    def function(params_, frozen, batch, key):
        del frozen, key
        decoder = params.module(SMALL, params_)
        x = decoder.hidden(batch["tokens"], batch["positions"], batch["segment_ids"], backend, length=LENGTH)
        total, _ = cross_entropy(
            x, decoder.head_rows(), batch["targets"], batch["weights"], vocab_size=SMALL.vocab_size, loss=LossConfig()
        )
        return total, {"tokens": jnp.sum(batch["weights"])}, {"logits": decoder.logits(x)}

    return Objective(TEXT_KEYS, {"logits": "tokens"}, function)


def of_factors(objective: Objective) -> Objective:
    """The same loss of the factors alone, over a frozen base."""

    def function(factors, base, batch, key):
        return objective.function(adapters.attached(base, factors, SCALE), {}, batch, key)

    return dataclasses.replace(objective, function=function)


def gradients_of(objective: Objective, options: dict | None = QUICK):
    """(trained, frozen, batch) -> gradients, loss sum, counts and sums; called under a mesh."""

    def program(trained, frozen, batch):
        zero = jnp.zeros((), jnp.int32)
        return accumulate(objective, TrainState(zero, trained, frozen, None, zero, zero), batch, jax.random.key(0))

    return jax.jit(program, compiler_options=options)


def placed(leaves: dict[str, params.Leaf], values: dict, mesh: Mesh) -> dict:
    at = {path: sharding.sharding(mesh, leaf.axes) for path, leaf in leaves.items()}
    return jax.device_put(values, params.nested(at))


@functools.cache
def compiled(shape: tuple[int, ...], backend: Backend, adapted: bool):
    """The program on a mesh, and the start values and batch there; of the base all is trained."""
    mesh, (base, factors) = mesh_of(*shape), start()
    base, batch = placed(params.leaves(SMALL), base, mesh), on_mesh(host_batch(SHAPE), mesh)
    objective = with_logits(backend)
    arguments = (placed(LEAVES, factors, mesh), base, batch) if adapted else (base, {}, batch)
    with jax.set_mesh(mesh):
        program = gradients_of(of_factors(objective) if adapted else objective).lower(*arguments).compile()
    return program, arguments


def merged_on_one_device(base: dict, factors: dict) -> tuple[np.ndarray, dict]:
    """Logits of the merged weights, and the factors' gradients from those of the merged weights, in float64."""
    flat, merged, out = params.flat(factors), params.flat(base), {}
    paths = {path.rpartition("/")[0] for path in flat}
    for path in paths:
        merged[path] = merged[path] + SCALE * flat[f"{path}/b"] @ flat[f"{path}/a"]
    program, (_, _, batch) = compiled(ONE, Backend(), False)
    gradients, *_, sums = program(params.nested(merged), {}, batch)
    dense = params.flat(gradients)
    for path in paths:
        d, a, b = (np.asarray(x, np.float64) for x in (dense[path], flat[f"{path}/a"], flat[f"{path}/b"]))
        out[f"{path}/a"] = SCALE * np.einsum("lod,lor->lrd", d, b)
        out[f"{path}/b"] = SCALE * np.einsum("lod,lrd->lor", d, a)
    return np.asarray(sums["logits"]), out


def assert_close(gradients: dict, expected: dict) -> None:
    """float32 through two layers, other orders of summation: 1e-6 of the largest, measured; a factor left out: 1e-1."""
    gradients = params.flat(gradients)
    assert gradients.keys() == expected.keys() == LEAVES.keys()
    for path, gradient in gradients.items():
        bound = 1e-5 * np.abs(expected[path]).max()
        np.testing.assert_allclose(gradient, expected[path], rtol=0, atol=bound, err_msg=path)


def name_of(value: tuple | Backend) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else "scanned" if value.scan_layers else "unrolled"


ON_MESHES = [(ONE, CPU), (TENSOR, CPU), (FSDP, Backend()), (REPLICAS, Backend())]


@pytest.mark.parametrize(
    ("shape", "backend"),
    [(TENSOR, Backend()), *(pytest.param(*m, marks=pytest.mark.slow) for m in ON_MESHES)],
    ids=name_of,
)
def test_logits_and_gradients_are_those_of_the_merged_weights(shape, backend):
    logits, expected = merged_on_one_device(*start())
    program, arguments = compiled(shape, backend, True)
    gradients, *_, sums = program(*arguments)
    np.testing.assert_allclose(sums["logits"], logits, rtol=0, atol=1e-5 * np.abs(logits).max())
    assert_close(gradients, expected)
    for path, gradient in params.flat(gradients).items():
        at = sharding.sharding(mesh_of(*shape), LEAVES[path].axes)
        assert gradient.sharding.is_equivalent_to(at, gradient.ndim), path


MESHES = [TENSOR, pytest.param(FSDP, marks=pytest.mark.slow), pytest.param(REPLICAS, marks=pytest.mark.slow)]


@pytest.mark.parametrize("shape", MESHES, ids=name_of)
def test_at_their_start_the_logits_are_the_base_s_bit_for_bit(shape):
    program, (_, base, batch) = compiled(shape, Backend(), True)
    first = placed(LEAVES, jax.jit(lambda: params.started(SMALL, LEAVES, 0))(), mesh_of(*shape))
    *_, sums = program(first, base, batch)
    plain, arguments = compiled(shape, Backend(), False)
    *_, expected = plain(*arguments)
    np.testing.assert_array_equal(sums["logits"], expected["logits"])


@pytest.mark.parametrize("shape", MESHES, ids=name_of)
def test_what_is_gathered_is_what_the_base_gathers_and_b(shape):
    """Forward and backward. And no gradient of the base crosses chips, nor is any of its size made."""
    text, plain = (compiled(shape, Backend(), adapted)[0].as_text() for adapted in (True, False))
    _, fsdp, _, tensor = shape
    more = moved(text, "all-gather")
    more.subtract(moved(plain, "all-gather"))
    expected = {}
    for path, leaf in LEAVES.items():
        if path.endswith("/b"):
            layers, rows, rank = leaf.shape
            gathered = ("f32", (rows // tensor, rank))
            expected[gathered] = expected.get(gathered, 0) + layers
    assert {array: count for array, count in more.items() if count} == expected
    scattered = moved(text, "reduce-scatter")
    heads = [leaf for path, leaf in LEAVES.items() if path.endswith("/b") and "ffn" not in leaf.axes]
    assert scattered == {("f32", (heads[0].shape[1] // (tensor * fsdp), RANK)): sum(leaf.shape[0] for leaf in heads)}
    assert moved(plain, "reduce-scatter").total() > scattered.total()  # the head's too


@pytest.mark.slow
def test_micro_batches_on_replicas():
    """Inside of accumulation's shard_map over `data`: the gradients of all rows at once on one device."""
    base, factors = start()
    mesh = mesh_of(*REPLICAS)
    batch = on_mesh({k: v.reshape(2, ROWS // 2, LENGTH) for k, v in host_batch(SHAPE).items()}, mesh)
    plain = next_token(SMALL, Backend(), length=LENGTH, loss=LossConfig())
    with jax.set_mesh(mesh):
        gradients, *_ = gradients_of(of_factors(plain))(
            placed(LEAVES, factors, mesh), placed(params.leaves(SMALL), base, mesh), batch
        )
    assert_close(gradients, merged_on_one_device(base, factors)[1])


def in_few_bits(base: dict, mesh: Mesh) -> tuple[dict, dict]:
    """The base's blocks in four bits (o in eight), cut over the mesh, and what they stand for, on the host."""
    assigned = {p: s for p, s in policy.assign(SMALL, policy.parse("int4_g32,o=int8")).items() if "blocks" in p}
    narrow, cut = quantized_params(params.flat(base), assigned), {}
    for path, leaf in params.leaves(SMALL).items():
        axes = [sharding.even(part.shape, leaf.axes, mesh.shape) for part in jax.tree.leaves(narrow[path])]
        at = jax.tree.unflatten(jax.tree.structure(narrow[path]), [sharding.sharding(mesh, names) for names in axes])
        cut[path] = jax.device_put(narrow[path], at)
    wide = {path: np.asarray(w.dequantize()) if path in assigned else w for path, w in narrow.items()}
    return params.nested(cut), params.nested(wide)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "backend"), [(ONE, CPU), (TENSOR, Backend())], ids=name_of)
def test_over_a_base_in_few_bits(shape, backend):
    """Logits and gradients are those over what the integers stand for, and integers are what crosses chips."""
    mesh, (base, factors) = mesh_of(*shape), start()
    narrow, wide = in_few_bits(base, mesh)
    arguments = placed(LEAVES, factors, mesh), narrow, on_mesh(host_batch(SHAPE), mesh)
    with jax.set_mesh(mesh):
        program = gradients_of(of_factors(with_logits(backend)))
        gradients, *_, sums = program(*arguments)
        text = "" if shape == ONE else program.lower(*arguments).compile().as_text()
    logits, expected = merged_on_one_device(wide, factors)
    np.testing.assert_allclose(sums["logits"], logits, rtol=0, atol=1e-5 * np.abs(logits).max())
    assert_close(gradients, expected)
    if text:
        rows = {leaf.shape[-2] // shape[3] for leaf in LEAVES.values() if "rank" == leaf.axes[-1]}
        gathered = {array for array in moved(text, "all-gather") if array[1][0] in rows}
        # (XLA for CPUs widens four bits before they cross.) Of b's float32 numbers there are RANK columns.
        columns = {(dtype, *size[1:]) for dtype, size in gathered}
        assert columns == {("s8", SMALL.model_dim), ("f16",), ("f32", RANK)}


# Sizes all distinct, for bytes to be told apart.
ON_TPU = ModelConfig(
    vocab_size=4096,
    model_dim=256,
    num_layers=3,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    ffn_dim=768,
    max_position=4096,
)


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="libtpu is not installed: the TPU compiler cannot be asked")
def test_bytes_on_a_tpu():
    """By the TPU compiler, with its own kernels, bfloat16 and recomputation: nothing is moved but by the base and what
    the factors have to."""
    mesh, rank, moved_bytes = make_mesh(MeshConfig(*FSDP), tpu_devices("v5e:2x2")), 8, {}
    leaves = adapters.leaves(ON_TPU, KINDS, rank)
    base = params.abstract(ON_TPU, mesh)
    factors = params.nested(
        {
            path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=sharding.sharding(mesh, leaf.axes))
            for path, leaf in leaves.items()
        }
    )
    batch = abstract_batch(TEXT_KEYS, (1, 4, 512), batch_sharding(mesh))
    plain = next_token(ON_TPU, CHOICES["tpu"], length=512, loss=LossConfig())
    for name, objective, arguments in (
        ("base", plain, (base, {}, batch)),
        ("b", of_factors(plain), (factors, base, batch)),
    ):
        with jax.set_mesh(mesh):
            text = gradients_of(objective, options=None).lower(*arguments).compile().as_text()
        found = estimate(text, chip_of("v5e:2x2"), torus_of("v5e:2x2", mesh.devices.flat)).collectives
        moved_bytes[name] = {kind.split(" over ")[0]: traffic.bytes for kind, traffic in found.items()}
    sizes = {
        name: 2 * sum(math.prod(leaf.shape) for path, leaf in leaves.items() if path.endswith(f"/{name}"))
        for name in "ab"
    }
    # Forward, and once more where the backward pass recomputes; the base's likewise.
    assert moved_bytes["b"]["all-gather"] - moved_bytes["base"]["all-gather"] == 2 * sizes["b"]
    reduced = sum(size for kind, size in moved_bytes["b"].items() if kind != "all-gather")
    assert reduced == sizes["a"] + sizes["b"] + 3 * 4, moved_bytes  # and the three sums
