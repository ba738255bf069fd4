"""Adam's moments in the hosts' memory (optimizer.moments=host): the same steps, and where every array lies."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from small_training import LENGTH, ROWS, SMALL, assert_bits_equal, compiled, host, host_batch, losses, mesh_of, on_mesh
from small_training import recipe as on_device

from phijax.model import params
from phijax.training.program import abstract_state, initial_state

MESHES = [(1, 1, 1, 1), (1, 8, 1, 1), (1, 2, 2, 2), (2, 2, 1, 1)]
SHAPE = (1, ROWS, LENGTH)


def on_host():
    recipe = on_device()
    return dataclasses.replace(recipe, optimizer=dataclasses.replace(recipe.optimizer, moments="host"))


def kinds(tree) -> set[str]:
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)}


def moments(state):
    return optax.tree.get(state.opt_state, "mu"), optax.tree.get(state.opt_state, "nu")


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_ten_steps_are_those_with_moments_on_the_device(shape):
    batch = (2, ROWS // 2, LENGTH) if shape[0] == 2 else SHAPE
    (expected, there), (got, here) = (losses(which, mesh_of(*shape), batch) for which in (on_device(), on_host()))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert optax.tree.get(here.opt_state, "count") == optax.tree.get(there.opt_state, "count") == 10


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_a_step_is_the_one_with_moments_on_the_device(shape):
    """The second of two, from moments that are not zero. Gradients are clipped, and decay is not that of norms."""
    mesh, batch = mesh_of(*shape), SHAPE
    first, _ = compiled(on_device(), mesh, batch)(initial_state(on_device(), mesh), on_mesh(host_batch(batch), mesh))
    after = {}
    for which in (on_device(), on_host()):
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(which, mesh))
        state = jax.device_put(host(first), shardings)
        state, metrics = compiled(which, mesh, batch)(state, on_mesh(host_batch(batch, seed=1), mesh))
        assert metrics["grad_norm"] > on_device().optimizer.clip_norm
        after[which.optimizer.moments] = host((state.params, moments(state)))
    # The same sums in other programs: what is rounded once there may be rounded twice here.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=3e-7 * np.abs(b).max()),
        after["host"],
        after["device"],
    )


def test_only_moments_lie_on_the_host_before_and_after_a_step():
    mesh = mesh_of(1, 2, 2, 2)
    state = initial_state(on_host(), mesh)
    given = jax.device_put(host(state.params), params.shardings(SMALL, mesh))
    started = initial_state(on_host(), mesh, given)
    program = compiled(on_host(), mesh, SHAPE)
    after, _ = program(initial_state(on_host(), mesh), on_mesh(host_batch(SHAPE), mesh))
    for one in (abstract_state(on_host(), mesh), state, started, after):
        assert kinds(moments(one)) == {"pinned_host"}
        rest = (one.params, one.step, one.skipped, optax.tree.get(one.opt_state, "count"))
        assert kinds(rest) == {"device"}


def test_a_nan_step_changes_no_moment():
    mesh = mesh_of(1, 2, 2, 2)
    program, batch = compiled(on_host(), mesh, SHAPE), host_batch(SHAPE)
    state, _ = program(initial_state(on_host(), mesh), on_mesh(batch, mesh))
    before = host(state)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(moments(before)))
    batch["weights"][0, 5, 3] = np.nan
    state, _ = program(state, on_mesh(batch, mesh))
    assert_bits_equal((state.params, state.opt_state), (before.params, before.opt_state))
    assert (state.step, state.skipped) == (2, 1)
