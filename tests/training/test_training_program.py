"""The compiled programs on the small model: the same numbers on every mesh, and in place."""

import re

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from small_training import (
    LENGTH,
    QUICK,
    ROWS,
    SMALL,
    assert_bits_equal,
    compiled,
    host,
    host_batch,
    losses,
    mesh_of,
    on_mesh,
    recipe,
)

from phijax.model import params
from phijax.training.program import abstract_state, initial_state, lower_eval_step

ONE = (1, 1, 1, 1)
MESHES = [(8, 1, 1, 1), (1, 8, 1, 1), (1, 2, 2, 2), (1, 1, 1, 8)]
SHAPE = (1, ROWS, LENGTH)


@pytest.fixture(scope="module")
def on_one_device():
    """Losses of ten steps, and the state after them."""
    return losses(recipe(), mesh_of(*ONE), SHAPE)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_ten_steps_on_a_mesh(on_one_device, shape):
    expected, expected_state = on_one_device
    got, state = losses(recipe(), mesh_of(*shape), SHAPE)
    # Only the order of float32 sums differs: the promise of 1e-5. A gradient scaled wrongly moves them by 1e-2.
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert (state.step, state.skipped) == (10, 0)
    np.testing.assert_allclose(
        state.params["final_norm"]["scale"], expected_state.params["final_norm"]["scale"], atol=1e-4
    )


def test_the_losses_say_something(on_one_device):
    """They start at about log of the vocabulary and move: equal losses of a model that learns nothing prove nothing."""
    expected, state = on_one_device
    assert abs(expected[0] - np.log(SMALL.vocab_size)) < 0.5
    assert np.abs(np.diff(expected)).min() > 1e-4
    before = initial_state(recipe(), mesh_of(*ONE)).params
    changed = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(), state.params, before)
    assert min(jax.tree.leaves(changed)) > 1e-3


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_the_start_is_bit_equal_on_a_mesh(shape):
    expected, got = (host(initial_state(recipe(), mesh_of(*m))) for m in (ONE, shape))
    assert_bits_equal(got, expected)
    assert (np.abs(got.params["head"]).max() > 0, got.step, got.skipped) == (True, 0, 0)


def test_the_abstract_state_is_the_real_one():
    mesh = mesh_of(1, 2, 2, 2)
    abstract, state = abstract_state(recipe(), mesh), initial_state(recipe(), mesh)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    for a, leaf in zip(jax.tree.leaves(abstract), jax.tree.leaves(state), strict=True):
        assert (a.shape, a.dtype) == (leaf.shape, leaf.dtype)
        assert leaf.sharding == a.sharding


def test_every_moment_lies_where_its_parameter_lies():
    mesh = mesh_of(1, 2, 2, 2)
    state = abstract_state(recipe(), mesh)
    expected = params.flat(params.shardings(SMALL, mesh))
    assert len({s.spec for s in expected.values()}) > 2  # stacked, not stacked, norms
    for part in (state.params, optax.tree.get(state.opt_state, "mu"), optax.tree.get(state.opt_state, "nu")):
        assert {path: leaf.sharding for path, leaf in params.flat(part).items()} == expected
    everywhere = NamedSharding(mesh, PartitionSpec())
    counts = (state.step, state.skipped, state.skipped_in_a_row, optax.tree.get(state.opt_state, "count"))
    assert {leaf.sharding for leaf in counts} == {everywhere}


def test_a_start_from_given_weights_keeps_them_and_nothing_else():
    mesh = mesh_of(1, 2, 2, 2)
    rng = np.random.default_rng(0)
    weights = {path: rng.standard_normal(shape, np.float32) for path, shape in params.shapes(SMALL).items()}
    given = jax.device_put(params.nested(weights), params.shardings(SMALL, mesh))
    state = initial_state(recipe(), mesh, given)
    assert_bits_equal(params.flat(state.params), weights)
    assert state.step == 0 and all(not np.any(m) for m in jax.tree.leaves(state.opt_state))
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == jax.tree.map(
        lambda leaf: leaf.sharding, abstract_state(recipe(), mesh)
    )
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))  # else they would be there twice


def test_the_state_is_updated_in_place():
    mesh = mesh_of(1, 2, 2, 2)
    program, state = compiled(recipe(), mesh, SHAPE), initial_state(recipe(), mesh)
    before = jax.tree.leaves(state)
    after, metrics = program(state, on_mesh(host_batch(SHAPE), mesh))
    assert all(leaf.is_deleted() for leaf in before)
    assert len(re.findall(r"(?:may|must)-alias", program.as_text().splitlines()[0])) == len(before)
    for leaf, expected in zip(jax.tree.leaves(after), jax.tree.leaves(abstract_state(recipe(), mesh)), strict=True):
        assert leaf.sharding == expected.sharding
    assert set(metrics) == {"learning_rate", "loss", "nll", "weight", "grad_norm", "skipped", "skipped_in_a_row"}
    assert all(value.shape == () and value.is_fully_replicated for value in metrics.values())
    assert metrics["weight"] == pytest.approx(host_batch(SHAPE)["weights"].sum(), rel=1e-6)
    assert metrics["learning_rate"] == pytest.approx(1e-2 / 3)  # warmup of 2 steps
    assert 0 < metrics["nll"] < metrics["loss"]  # z-loss is in the second only


def test_a_nan_step_on_a_mesh_is_skipped_bit_by_bit():
    mesh = mesh_of(1, 2, 2, 2)
    program, batch = compiled(recipe(), mesh, SHAPE), host_batch(SHAPE)
    state, _ = program(initial_state(recipe(), mesh), on_mesh(batch, mesh))
    before = host(state)
    batch["weights"][0, 5, 3] = np.nan
    state, metrics = program(state, on_mesh(batch, mesh))
    assert_bits_equal((state.params, state.opt_state), (before.params, before.opt_state))
    assert (state.step, state.skipped, state.skipped_in_a_row) == (2, 1, 1)
    state, metrics = program(state, on_mesh(host_batch(SHAPE, seed=1), mesh))
    assert (state.step, state.skipped, state.skipped_in_a_row, metrics["skipped"]) == (3, 1, 0, 1)
    assert np.isfinite(metrics["loss"])


def test_unrolled_layers(on_one_device):
    got, _ = losses(recipe(scan_layers=False), mesh_of(*ONE), SHAPE)
    np.testing.assert_allclose(got, on_one_device[0], rtol=1e-5)


def test_bfloat16_compute(on_one_device):
    """On a mesh, so that what is gathered and scattered is bfloat16 too; state and metrics stay float32."""
    got, state = losses(recipe(compute_dtype="bfloat16"), mesh_of(1, 2, 2, 2), SHAPE)
    # 2^-8 a rounding, on losses of about 6 that are means over tokens; what learns nothing parts by 1e-1 in ten steps.
    np.testing.assert_allclose(got, on_one_device[0], rtol=2e-2)
    assert state.skipped == 0
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.opt_state))} == {
        np.dtype("float32"),
        np.dtype("int32"),
    }


def test_evaluation_is_the_training_loss_without_its_extra_terms():
    mesh = mesh_of(1, 2, 2, 2)
    evaluate = lower_eval_step(recipe(), mesh, SHAPE).compile(QUICK)
    state, batch = initial_state(recipe(), mesh), on_mesh(host_batch(SHAPE), mesh)
    nll, weight = evaluate(state.params, state.frozen, batch)
    _, metrics = compiled(recipe(), mesh, SHAPE)(state, batch)
    np.testing.assert_allclose(float(nll) / float(weight), float(metrics["nll"]), rtol=1e-6)
    assert weight == metrics["weight"]
