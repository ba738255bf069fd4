"""Sums over few leading parts, written as additions: for library code whose own sum the compiler handles badly."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Jaxpr, Literal

MOST_PARTS = 64


def sums_as_additions(function: Callable) -> Callable:
    """`function` with each sum over one of the two leading axes, of at most MOST_PARTS, replaced by additions.

    The same numbers in the order of the parts. How: the traced function is run again, equation by equation, into
    jitted functions, and not into loops or kernels (JAX's documentation: writing custom Jaxpr interpreters).
    """

    @functools.wraps(function)
    def rewritten(*arguments):
        traced, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
        outputs = _evaluate(traced.jaxpr, traced.consts, jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return rewritten


def _evaluate(jaxpr: Jaxpr, consts: list[Any], arguments: list[Any]) -> list[Any]:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))
    narrow = {}  # what a converted value was before: parts are cut out of that, or the whole would be converted first

    def read(atom):
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        given = [read(atom) for atom in equation.invars]
        if _is_leading_sum(equation):
            (axis,), (whole,) = equation.params["axes"], equation.invars
            cut = functools.partial(jax.lax.index_in_dim, narrow.get(whole, values[whole]), axis=axis, keepdims=False)
            parts = [cut(i).astype(whole.aval.dtype) for i in range(whole.aval.shape[axis])]
            outputs = [functools.reduce(operator.add, parts)]
        elif equation.primitive.name in ("jit", "pjit"):
            inner = equation.params["jaxpr"]
            outputs = _evaluate(inner.jaxpr, inner.consts, given)
        else:
            variables = [atom for atom in equation.invars if not isinstance(atom, Literal)]
            alone = jaxpr.replace(constvars=[], invars=variables, outvars=equation.outvars, eqns=[equation])
            # Keeps the names under which profiles show the equation.
            outputs = jax.core.eval_jaxpr(alone, (), *(values[variable] for variable in variables))
        if equation.primitive.name == "convert_element_type":
            narrow[equation.outvars[0]] = given[0]
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _is_leading_sum(equation) -> bool:
    if equation.primitive.name != "reduce_sum":
        return False
    axes, shape = equation.params["axes"], equation.invars[0].aval.shape
    return len(axes) == 1 and axes[0] < 2 and len(shape) > 3 and shape[axes[0]] <= MOST_PARTS
