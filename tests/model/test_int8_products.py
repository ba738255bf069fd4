"""int8 products of the feed-forward layers: values and gradients against float64 NumPy, and on meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from references.weights import random_params
from small_models import SMALL, assert_leaves_close, pack, program, random_documents, run

from phijax.model import int8_products
from phijax.model import params as parameters
from phijax.model.backend import Backend
from phijax.parallel.mesh import MeshConfig, make_mesh

ROWS, WIDTH, TOKENS = 40, 24, 6
VERBS = {"project": (int8_products.project, WIDTH), "project_back": (int8_products.project_back, ROWS)}


def param(matrix) -> nnx.Param:
    return nnx.Param(jnp.asarray(matrix), axes=("ffn", "embed"))


def case(verb: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, w, and the cotangent of the product."""
    rng = np.random.default_rng(0)
    wide = VERBS[verb][1]
    x = rng.standard_normal((2, TOKENS, wide)).astype(np.float32) * rng.uniform(0.1, 9, (2, TOKENS, 1)).astype(
        np.float32
    )
    x[0, 0] = 0  # a padded place
    w = rng.standard_normal((ROWS, WIDTH)).astype(np.float32) * rng.uniform(0.01, 3, (ROWS, 1)).astype(np.float32)
    return x, w, rng.standard_normal((2, TOKENS, ROWS + WIDTH - wide)).astype(np.float32)


def rounded(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale = np.abs(x).max(-1, keepdims=True) / 127
    return np.rint(np.divide(x, scale, out=np.zeros_like(x), where=scale > 0)), scale


def reference(verb: str, x: np.ndarray, w: np.ndarray, out: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rounded product, and its gradients where rounding counts as the identity."""
    x, w, out = (a.astype(np.float64) for a in (x, w, out))
    integers, scales = rounded(w)
    stands_for = integers * scales
    if verb == "project":
        q, s = rounded(x)
        return q @ integers.T * s * scales[:, 0], out @ stands_for, np.einsum("btr,btd->rd", out, x)
    q, s = rounded(x * scales[:, 0])
    return q @ integers * s, out @ stands_for.T, np.einsum("btr,btd->rd", x, out)


@pytest.mark.parametrize("verb", VERBS)
def test_products_and_gradients_are_the_formulas(verb):
    x, w, cotangent = case(verb)
    product, backward = jax.vjp(lambda x, w: VERBS[verb][0](x, param(w)), jnp.asarray(x), jnp.asarray(w))
    got = (product, *backward(jnp.asarray(cotangent)))
    for value, expected in zip(got, reference(verb, x, w, cotangent), strict=True):
        np.testing.assert_allclose(value, expected, rtol=0, atol=3e-6 * np.abs(expected).max())


@pytest.mark.parametrize("verb", VERBS)
def test_the_error_is_that_of_eight_bits(verb):
    """Normal numbers: both factors lose about 1/127 * max / sqrt(12), half a percent of their deviation each."""
    rng = np.random.default_rng(1)
    x, w = rng.standard_normal((64, VERBS[verb][1])).astype(np.float32), rng.standard_normal((ROWS, WIDTH))
    exact = x.astype(np.float64) @ (w.T if verb == "project" else w)
    got = VERBS[verb][0](jnp.asarray(x), param(w.astype(np.float32)))
    error = np.sqrt(np.mean((np.asarray(got) - exact) ** 2) / np.mean(exact**2))
    assert 0.002 < error < 0.012


def test_the_product_is_of_integers():
    x, w, _ = case("project")
    text = jax.jit(lambda x, w: int8_products.project(x, param(w))).lower(x, w).as_text()
    (line,) = [line for line in text.splitlines() if "dot_general" in line]
    assert line.count("xi8>") == 2 and "xi32>" in line


@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (2, 2, 1, 2)])
def test_a_mesh_gathers_integers_and_agrees_with_one_device(shape):
    """A whole model. Sums in another order now and then round to the next integer: hence 2 % of a leaf's largest."""
    backend = Backend(mlp_products="int8")
    params, rows = random_params(SMALL), pack([random_documents(SMALL, 20, 12, seed=b) for b in range(8)], 32)
    (loss, _), gradients = run(SMALL, backend, params, rows)
    (float_loss, _), float_gradients = run(SMALL, Backend(), params, rows)
    assert 1e-5 < abs(loss / float_loss - 1) < 1e-2
    assert_leaves_close(gradients, float_gradients, relative=0.3)
    mesh = make_mesh(MeshConfig(*shape), jax.devices())
    placed = jax.device_put(params, parameters.shardings(SMALL, mesh))
    with jax.set_mesh(mesh):
        (mesh_loss, _), mesh_gradients = run(SMALL, backend, placed, rows)
        text = program(SMALL, backend, 32).lower(placed, *rows.arrays()).compile().as_text()
    np.testing.assert_allclose(mesh_loss, loss, rtol=1e-4)
    assert_leaves_close(mesh_gradients, gradients, relative=2e-2)
    assert any(" all-gather(" in line and "s8[" in line for line in text.splitlines())
