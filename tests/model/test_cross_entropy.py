"""Cross entropy in chunks, on any mesh, against torch's in float64: values and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from phijax.model import cross_entropy as module
from phijax.model.cross_entropy import LossConfig, cross_entropy, token_logprobs
from phijax.parallel import hlo
from phijax.parallel.mesh import MeshConfig, make_mesh
from phijax.parallel.sharding import sharding

BATCH, LENGTH, DIM, VOCAB, PADDED = 4, 26, 12, 53, 64
# 104 tokens: 9 chunks of 12 and a surplus of 4 on one device, 3 of 9 and 1 where a chip holds 26 of them.
CHUNK, DEFAULT_CHUNK = 12, module.CHUNK
QUICK = {"xla_backend_optimization_level": 0}  # most of these tests is compilation of what runs once
LOSSES = {
    "plain": LossConfig(),
    "z_loss": LossConfig(z_loss=0.05),
    "label_smoothing": LossConfig(label_smoothing=0.2),
    "both": LossConfig(z_loss=0.05, label_smoothing=0.2),
}
# data, fsdp, context, tensor
MESHES = [(1, 1, 1, 8), (2, 2, 2, 1), (1, 2, 2, 2), (2, 1, 2, 2)]


@dataclasses.dataclass(frozen=True)
class Case:
    x: np.ndarray
    head: np.ndarray
    targets: np.ndarray
    weights: np.ndarray

    def on(self, mesh) -> tuple[jax.Array, ...]:
        tokens = ("act_batch", "act_time")
        axes = ((*tokens, "act_embed"), ("vocab", "embed"), tokens, tokens)
        arrays = (self.x, self.head, self.targets, self.weights)
        return tuple(jax.device_put(a, sharding(mesh, names)) for a, names in zip(arrays, axes, strict=True))


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", CHUNK)


@pytest.fixture(scope="module")
def case() -> Case:
    rng = np.random.default_rng(0)
    weights = rng.uniform(0.2, 2.0, (BATCH, LENGTH)).astype(np.float32)
    weights[rng.random((BATCH, LENGTH)) < 0.3] = 0.0
    # The padded rows are not zero: were they not masked, they would have a share of the probability.
    return Case(
        x=rng.standard_normal((BATCH, LENGTH, DIM), np.float32),
        head=rng.standard_normal((PADDED, DIM), np.float32),
        targets=rng.integers(0, VOCAB, (BATCH, LENGTH), dtype=np.int32),
        weights=weights,
    )


def reference(case: Case, loss: LossConfig) -> tuple[float, float, np.ndarray, np.ndarray]:
    """torch in float64: loss sum, nll sum, and the first one's gradients to x and head."""
    x, head = (torch.tensor(np.asarray(a, np.float64), requires_grad=True) for a in (case.x, case.head))
    logits = (x @ head[:VOCAB].T).reshape(-1, VOCAB)
    targets = torch.tensor(case.targets, dtype=torch.int64).reshape(-1)
    weights = torch.tensor(case.weights, dtype=torch.float64).reshape(-1)

    def summed(smoothing):
        values = torch.nn.functional.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
        return (values * weights).sum()

    total = summed(loss.label_smoothing) + loss.z_loss * (torch.logsumexp(logits, -1) ** 2 * weights).sum()
    total.backward()
    return total.item(), summed(0.0).item(), x.grad.numpy(), head.grad.numpy()


def reference_logprobs(case: Case, cotangent: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """torch in float64: log p(target), and the gradients of its product with `cotangent`."""
    x, head = (torch.tensor(np.asarray(a, np.float64), requires_grad=True) for a in (case.x, case.head))
    log_p = torch.log_softmax(x @ head[:VOCAB].T, -1)
    picked = torch.gather(log_p, -1, torch.tensor(case.targets, dtype=torch.int64)[..., None])[..., 0]
    (picked * torch.tensor(np.asarray(cotangent, np.float64))).sum().backward()
    return picked.detach().numpy(), x.grad.numpy(), head.grad.numpy()


def value_and_gradients(loss: LossConfig):
    """A new function each time, since CHUNK may differ: (x, head, targets, weights) -> (loss, nll), (d_x, d_head)."""

    def sums(x, head, targets, weights):
        return cross_entropy(x, head, targets, weights, vocab_size=VOCAB, loss=loss)

    return jax.jit(jax.value_and_grad(sums, argnums=(0, 1), has_aux=True), compiler_options=QUICK)


def assert_equals_reference(got, expected, *, tolerance: float) -> None:
    """tolerance: relative for the sums, and of the largest entry for gradients."""
    (total, nll), (d_x, d_head) = got
    np.testing.assert_allclose([float(total), float(nll)], expected[:2], rtol=tolerance)
    for ours, theirs in ((d_x, expected[2]), (d_head[:VOCAB], expected[3][:VOCAB])):
        atol = tolerance * np.abs(theirs).max()
        np.testing.assert_allclose(np.asarray(ours, np.float64), theirs, rtol=0, atol=atol)
    # Rows that stand for no token: exactly nothing, or weight decay alone would not keep them at zero.
    np.testing.assert_array_equal(np.asarray(d_head)[VOCAB:], 0.0)


# float32 sums of 64 products and 104 tokens: 2^-24 times the square root of some thousand additions is about 3e-6.
FLOAT32 = 5e-6


@pytest.mark.parametrize("name", LOSSES)
def test_equals_torch_on_one_device(case, name):
    got = value_and_gradients(LOSSES[name])(case.x, case.head, case.targets, case.weights)
    assert_equals_reference(got, reference(case, LOSSES[name]), tolerance=FLOAT32)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_equals_torch_on_a_mesh(case, shape):
    mesh = make_mesh(MeshConfig(*shape), jax.devices()[: np.prod(shape)])
    with jax.set_mesh(mesh):
        got = value_and_gradients(LOSSES["both"])(*case.on(mesh))
    assert got[1][1].sharding.is_equivalent_to(sharding(mesh, ("vocab", "embed")), 2)
    assert_equals_reference(got, reference(case, LOSSES["both"]), tolerance=FLOAT32)


@pytest.mark.parametrize("shape", [None, (1, 2, 2, 2)], ids=str)
def test_bfloat16_compute(case, shape):
    """Against the formula at the rounded inputs: only what is rounded inside remains."""
    rounded = dataclasses.replace(case, x=np.asarray(jnp.asarray(case.x, jnp.bfloat16)))
    as_used = dataclasses.replace(rounded, head=np.asarray(jnp.asarray(case.head, jnp.bfloat16), np.float32))
    expected = reference(as_used, LOSSES["both"])
    if shape is None:
        arrays, got_of = (rounded.x, case.head, case.targets, case.weights), value_and_gradients(LOSSES["both"])
        (total, nll), (d_x, d_head) = got_of(*arrays)
    else:
        mesh = make_mesh(MeshConfig(*shape), jax.devices()[: np.prod(shape)])
        with jax.set_mesh(mesh):
            (total, nll), (d_x, d_head) = value_and_gradients(LOSSES["both"])(*rounded.on(mesh))
    assert (d_x.dtype, d_head.dtype) == (jnp.bfloat16, jnp.float32)
    # Logits are summed in float32, so the sums are as exact as in float32; the gradients of the logits, what they are
    # multiplied with and what crosses chips are rounded to 8 bits: 2^-8 each, three times at the most.
    np.testing.assert_allclose([float(total), float(nll)], expected[:2], rtol=FLOAT32)
    for ours, theirs in ((d_x, expected[2]), (d_head, expected[3])):
        atol = 3 * 2**-8 * np.abs(theirs).max()
        np.testing.assert_allclose(np.asarray(ours, np.float64), theirs, rtol=0, atol=atol)


def test_padded_rows_have_no_probability(case):
    """The sums do not depend on them at all, whatever they hold."""
    program = value_and_gradients(LOSSES["both"])
    other = case.head.copy()
    other[VOCAB:] = 1e4
    before = program(case.x, case.head, case.targets, case.weights)
    after = program(case.x, other, case.targets, case.weights)
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_all_weights_zero(case):
    got = value_and_gradients(LOSSES["both"])(case.x, case.head, case.targets, np.zeros_like(case.weights))
    for leaf in jax.tree.leaves(got):
        np.testing.assert_array_equal(leaf, 0.0)


def test_gradients_scale_with_the_cotangent(case):
    """The gradients are made in the forward pass; what comes from above must still reach them."""

    def tripled(x, head):
        return 3 * cross_entropy(x, head, case.targets, case.weights, vocab_size=VOCAB, loss=LossConfig())[0]

    got = jax.jit(jax.grad(tripled, argnums=(0, 1)), compiler_options=QUICK)(case.x, case.head)
    for ours, theirs in zip(got, reference(case, LossConfig())[2:], strict=True):
        np.testing.assert_allclose(ours, 3 * theirs, rtol=0, atol=3 * FLOAT32 * np.abs(theirs).max())


@pytest.mark.parametrize("shape", [None, (1, 2, 2, 2)], ids=str)
def test_without_gradients_the_sums_are_the_same(case, shape):
    """Evaluation takes another path, which makes no gradients."""

    def sums(*arrays):
        return cross_entropy(*arrays, vocab_size=VOCAB, loss=LOSSES["both"])

    if shape is None:
        arrays = (case.x, case.head, case.targets, case.weights)
        plain, (with_gradients, _) = (
            jax.jit(sums, compiler_options=QUICK)(*arrays),
            value_and_gradients(LOSSES["both"])(*arrays),
        )
    else:
        mesh = make_mesh(MeshConfig(*shape), jax.devices()[: np.prod(shape)])
        with jax.set_mesh(mesh):
            arrays = case.on(mesh)
            plain, (with_gradients, _) = (
                jax.jit(sums, compiler_options=QUICK)(*arrays),
                value_and_gradients(LOSSES["both"])(*arrays),
            )
    # The same operations; fused otherwise, so the order within a sum may differ.
    np.testing.assert_allclose(plain, with_gradients, rtol=1e-6)


@pytest.mark.parametrize("shape", [None, *MESHES], ids=str)
def test_token_logprobs_equal_torch(case, shape):
    cotangent = np.random.default_rng(1).standard_normal((BATCH, LENGTH)).astype(np.float32)

    def product(x, head, targets, cotangent):
        values = token_logprobs(x, head, targets, vocab_size=VOCAB)
        return jnp.sum(values * cotangent), values

    program = jax.jit(jax.value_and_grad(product, argnums=(0, 1), has_aux=True), compiler_options=QUICK)
    with_cotangent = dataclasses.replace(case, weights=cotangent)
    if shape is None:
        (_, values), gradients = program(case.x, case.head, case.targets, cotangent)
    else:
        mesh = make_mesh(MeshConfig(*shape), jax.devices()[: np.prod(shape)])
        with jax.set_mesh(mesh):
            (_, values), gradients = program(*with_cotangent.on(mesh))
    expected, *expected_gradients = reference_logprobs(case, cotangent)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, expected, rtol=0, atol=FLOAT32 * np.abs(expected).max())
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=FLOAT32 * np.abs(theirs).max())
    np.testing.assert_array_equal(np.asarray(gradients[1])[VOCAB:], 0.0)


def full_sum(x, head, targets, weights):
    return cross_entropy(x, head, targets, weights, vocab_size=4000, loss=LossConfig(z_loss=1e-4))[0]


def full_logprobs(x, head, targets, weights):
    return jnp.sum(token_logprobs(x, head, targets, vocab_size=4000) * weights)


@pytest.mark.parametrize("function", [full_sum, full_logprobs])
def test_no_full_logits_in_the_program(monkeypatch, function):
    tokens, vocab, chunk = 256, 4096, 64
    monkeypatch.setattr(module, "CHUNK", chunk)
    assert largest_array(function, tokens, vocab) == chunk * vocab
    # One chunk for all: what the text looks like when it does happen.
    monkeypatch.setattr(module, "CHUNK", tokens)
    assert largest_array(function, tokens, vocab) == tokens * vocab


@pytest.mark.parametrize("function", [full_sum, full_logprobs])
def test_a_chunks_logits_have_a_bound_in_bytes(monkeypatch, function):
    """phi-3's vocabulary, whose programs on pods are compared by their text, and phi-4-mini's."""
    monkeypatch.setattr(module, "CHUNK", DEFAULT_CHUNK)
    assert largest_array(function, 4096, 32768) == 2048 * 32768
    assert 2**28 < 4 * largest_array(function, 4096, 200704) <= 2**29


def largest_array(function, tokens: int, vocab: int) -> int:
    """Elements of the largest array in the compiled program of a function's gradients."""
    f32, i32 = jnp.float32, jnp.int32
    shapes = [((2, tokens // 2, 8), f32), ((vocab, 8), f32), ((2, tokens // 2), i32), ((2, tokens // 2), f32)]
    abstract = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    lowered = jax.jit(jax.grad(lambda *a: function(*a), argnums=(0, 1))).lower(*abstract)
    return max(i.elements for i in hlo.instructions(lowered.compile(QUICK).as_text()))
