"""Whether other parameters fit a model in memory, and what they are rounded to where its weights are quantised."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phijax.errors import UserError, nearest_name
from phijax.model import params as model_params
from phijax.model.config import ModelConfig
from phijax.model.kernels.cpu_int4 import Tiled
from phijax.model.low_rank import LowRank
from phijax.model.params import Params
from phijax.model.quantized import Quantized
from phijax.quantization.policy import Scheme, summed_axis
from phijax.quantization.rounding import round_to_nearest


def schemes_of(params: Params) -> dict[str, Scheme]:
    """Leaf path -> the scheme that it is quantised by; the others are floats."""
    found = {path: _scheme(path, leaf) for path, leaf in model_params.flat(params).items()}
    return {path: scheme for path, scheme in found.items() if scheme is not None}


def fitted(c: ModelConfig, params: Params, schemes: Mapping[str, Scheme]) -> Params:
    """Parameters with these schemes: changes of low rank are merged, floats rounded to the nearest where one is due.

    Raises: UserError that names the first leaf that is missing, unknown, donated, or of another shape, type or scheme.
    """
    if not isinstance(params, Mapping):
        raise UserError(
            f"New parameters must be a nested dict of arrays, as training holds them, not {type(params).__name__}."
        )
    shapes = model_params.shapes(c)
    given = {path: _merged(w) if isinstance(w, LowRank) else w for path, w in model_params.flat(params).items()}
    for path in given:
        if path not in shapes:
            nearest = nearest_name(path, shapes)
            raise UserError(f"{path} is no leaf of this model." + (f" Nearest: {nearest}." if nearest else ""))
    for path, shape in shapes.items():
        if path not in given:
            raise UserError(f"{path} is missing from the new parameters; the model's has shape {shape}.")
        _check(path, given[path], shape, schemes.get(path))
    return model_params.nested(
        {
            path: _rounded(leaf, schemes[path], summed_axis(path))
            if path in schemes and _scheme(path, leaf) is None
            else leaf
            for path, leaf in given.items()
        }
    )


def _check(path: str, leaf: Any, shape: tuple[int, ...], scheme: Scheme | None) -> None:
    matrices = leaf if isinstance(leaf, tuple) else (leaf,)
    if any(array.is_deleted() for array in jax.tree.leaves(leaf) if isinstance(array, jax.Array)):
        raise UserError(
            f"{path} was donated: its array is deleted. Take the parameters before the step that donates them."
        )
    own = (len(leaf), *matrices[0].shape) if isinstance(leaf, tuple) else tuple(getattr(leaf, "shape", ()))
    if own != shape:
        raise UserError(f"{path} has shape {own} in the new parameters; the model's has {shape}.")
    has = _scheme(path, leaf)
    if has is None and not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise UserError(f"{path} has dtype {leaf.dtype} in the new parameters; a float is expected.")
    if has is not None and has != scheme:
        raise UserError(
            f"{path} is quantised by {has} in the new parameters; in the model it is "
            f"{'not quantised' if scheme is None else f'by {scheme}'}. Open a model for these, or give floats."
        )


def _scheme(path: str, leaf: Any) -> Scheme | None:
    one = leaf[0] if isinstance(leaf, tuple) else leaf
    if isinstance(one, Tiled):
        return Scheme(one.bits, None if one.by_channel else one.group)
    if not isinstance(one, Quantized):
        return None
    axis = summed_axis(path)
    groups, size = one.scales.shape[axis], one.shape[axis]
    return Scheme(4 if one.values.dtype == jnp.int4 else 8, None if groups == 1 else size // groups)


@jax.jit
def _merged(w: LowRank) -> jax.Array:
    return w.merged()


@functools.partial(jax.jit, static_argnums=(1, 2))
def _rounded(leaf: jax.Array | np.ndarray, scheme: Scheme, axis: int) -> Quantized:
    """A matrix (rows, D), or a stack of them, one after another."""

    def of(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
        rounded = round_to_nearest(matrix, scheme, axis)
        return rounded.values, rounded.scales

    values, scales = jax.lax.map(of, leaf) if leaf.ndim == 3 else of(leaf)
    return Quantized(values.astype(jnp.int4 if scheme.bits == 4 else jnp.int8), scales)
