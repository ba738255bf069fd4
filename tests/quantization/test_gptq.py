"""GPTQ against its definition written column by column in float64, and against rounding alone."""

import jax.numpy as jnp
import numpy as np
import pytest

from phijax.quantization import gptq
from phijax.quantization.policy import SCHEMES, Scheme
from phijax.quantization.rounding import round_to_nearest

OUTPUTS, INPUTS = 48, 256


def problem(seed: int = 0):
    """A matrix (outputs, inputs) and inputs that go together, some channels large."""
    random = np.random.default_rng(seed)
    mix = random.standard_normal((INPUTS, INPUTS)) * np.exp(random.standard_normal(INPUTS))
    x = random.standard_normal((900, 40)) @ random.standard_normal((40, INPUTS)) + 0.05 * (
        random.standard_normal((900, INPUTS)) @ mix
    )
    return random.standard_normal((OUTPUTS, INPUTS)).astype(np.float32), x.astype(np.float32)


def output_error(w, x, rounded, axis) -> float:
    scales = np.asarray(rounded.scales, np.float64)
    scales = np.repeat(scales, rounded.values.shape[axis] // scales.shape[axis], axis)
    wide = np.asarray(rounded.values, np.float64) * scales
    change = (wide if axis == -1 else wide.T) - w
    return float(np.sum((x.astype(np.float64) @ change.T) ** 2))


@pytest.mark.parametrize("name", ["int4", "int4_g128", "int4_g32", "int8"])
@pytest.mark.parametrize("axis", [-1, -2])
def test_outputs_move_less_than_by_rounding_alone(name, axis):
    w, x = problem()
    stored = w if axis == -1 else w.T
    ours = gptq.quantize(gptq.factor_of(jnp.asarray(x.T @ x)), stored, SCHEMES[name], axis)
    plain = round_to_nearest(stored, SCHEMES[name], axis)
    assert ours.values.shape == plain.values.shape and ours.scales.shape == plain.scales.shape
    assert ours.scales.dtype == plain.scales.dtype and ours.values.dtype == plain.values.dtype
    assert output_error(w, x, ours, axis) < 0.6 * output_error(w, x, plain, axis)


@pytest.mark.parametrize("group", [None, 32])
def test_column_by_column_it_is_the_definition(group):
    """Without blocks: after each column, H^-1 loses it by elimination, as the paper's eq. 2 and 3 say."""
    w, x = problem(1)
    w = w[:4]
    hessian = (x.T @ x).astype(np.float32)
    scheme = Scheme(4, group)
    ours = gptq.quantize(gptq.factor_of(jnp.asarray(hessian)), w, scheme, -1)
    scales = np.repeat(np.asarray(ours.scales, np.float64), group or INPUTS, 1)
    damped = hessian.astype(np.float64) + gptq.DAMPING * np.mean(np.diag(hessian)) * np.eye(INPUTS)
    inverse, left = np.linalg.inv(damped), w.astype(np.float64)
    expected = np.zeros((4, INPUTS))
    for j in np.argsort(-np.diag(hessian)):  # with the scales that it found
        expected[:, j] = np.clip(np.round(left[:, j] / scales[:, j]), -8, 7)
        error = (left[:, j] - expected[:, j] * scales[:, j]) / inverse[j, j]
        left -= error[:, None] * inverse[j]
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    # One float32 rounding near a half changes an integer, and then those behind it in the row: most rows have none.
    assert np.mean(np.asarray(ours.values) == expected) > 0.9


def test_without_correlation_it_is_rounding():
    w, _ = problem()
    for name in ("int4", "int4_g64"):
        ours = gptq.quantize(gptq.factor_of(jnp.asarray(np.eye(INPUTS, dtype=np.float32))), w, SCHEMES[name], -1)
        plain = round_to_nearest(w, SCHEMES[name], -1)
        np.testing.assert_array_equal(np.asarray(ours.values), np.asarray(plain.values))
        np.testing.assert_array_equal(np.asarray(ours.scales), np.asarray(plain.scales))


@pytest.mark.parametrize("inputs", [48, 208])
def test_numbers_of_inputs_that_blocks_do_not_divide(inputs):
    w, x = problem()
    w, x = w[:, :inputs], x[:, :inputs]
    ours = gptq.quantize(gptq.factor_of(jnp.asarray(x.T @ x)), w, SCHEMES["int4"], -1)
    assert output_error(w, x, ours, -1) < 0.8 * output_error(w, x, round_to_nearest(w, SCHEMES["int4"], -1), -1)
    assert np.all(np.any(np.asarray(ours.values) != 0, axis=0))


def test_inputs_that_never_occur():
    w, x = problem()
    x[:, 10:60] = 0
    ours = gptq.quantize(gptq.factor_of(jnp.asarray(x.T @ x)), w, SCHEMES["int4_g32"], -1)
    assert np.all(np.isfinite(np.asarray(ours.scales)))
    assert output_error(w, x, ours, -1) < output_error(w, x, round_to_nearest(w, SCHEMES["int4_g32"], -1), -1)


def test_the_factor():
    _, x = problem()
    hessian = x.T @ x
    factor = gptq.factor_of(jnp.asarray(hessian))
    order, upper = np.asarray(factor.order), np.asarray(factor.upper, np.float64)
    assert np.all(np.diff(np.diag(hessian)[order]) <= 0)
    damped = hessian.astype(np.float64)
    damped += gptq.DAMPING * np.mean(np.diag(damped)) * np.eye(INPUTS)
    # float32 factors of a matrix whose condition is some 1e4.
    np.testing.assert_allclose(upper.T @ upper @ damped[order][:, order], np.eye(INPUTS), atol=2e-2)
    assert np.array_equal(upper, np.triu(upper))


def test_a_factor_is_made_once_for_matrices_with_the_same_inputs(monkeypatch):
    made = []
    monkeypatch.setattr(gptq, "factor_of", lambda hessian: made.append(hessian) or hessian)
    hessians = {"q": np.eye(3), "k": np.eye(3), "embedding": None}
    hessians["v"] = hessians["k"]
    roundings = gptq.Roundings(lambda path, layer: hessians[path])
    found = {path: roundings(path, 0) for path in ("q", "embedding", "k", "v")}
    assert found["embedding"] is None and len(made) == 2
    assert found["v"].args[0] is found["k"].args[0] is hessians["k"] and found["q"].args[0] is hessians["q"]
