"""Library code whose sums over leading parts become additions."""

import jax
import jax.numpy as jnp
import numpy as np

from phijax.model.kernels.sums import sums_as_additions


def program(x, y):
    """Sums that are to change (jitted, converted before; the second axis) and sums that are not."""
    narrow = jax.jit(lambda x: x.astype(jnp.float32).sum(axis=0).astype(x.dtype))(x)
    return {"narrow": narrow, "second": y.sum(axis=1), "last": y.sum(axis=-1), "small": y[0, 0].sum(axis=0), "y": y}


def primitives(jaxpr):
    """(name, parameters) of every equation, inside of jitted functions too."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name, equation.params
        if "jaxpr" in equation.params:
            yield from primitives(equation.params["jaxpr"].jaxpr)


def test_the_numbers_are_those_of_the_function():
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.standard_normal((4, 3, 5, 6)), jnp.bfloat16)
    y = draw.standard_normal((3, 4, 5, 6)).astype(np.float32)
    got, expected = sums_as_additions(program)(x, y), program(x, y)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for name in expected:
        assert got[name].dtype == expected[name].dtype
        # Sums of 3 or 4 numbers near 1, in another order; bfloat16 rounds at the end.
        np.testing.assert_allclose(*(np.asarray(a[name], np.float64) for a in (got, expected)), rtol=1e-2, atol=1e-6)


def test_no_sum_over_leading_parts_is_left():
    shapes = jax.ShapeDtypeStruct((4, 3, 5, 6), jnp.bfloat16), jax.ShapeDtypeStruct((3, 4, 5, 6), jnp.float32)
    before, after = (
        sorted(p["axes"] for name, p in primitives(jax.make_jaxpr(f)(*shapes).jaxpr) if name == "reduce_sum")
        for f in (program, sums_as_additions(program))
    )
    assert before == [(0,), (0,), (1,), (3,)]
    assert after == [(0,), (3,)]  # of a matrix, and over the last axis
