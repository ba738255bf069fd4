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
from phijax.model.low_rank import LowRank, factor_shapes
from phijax.model.params import Params
from phijax.model.quantized import Quantized
from phijax.quantization.policy import Scheme, summed_axis
from phijax.quantization.rounding import round_to_nearest

_ARRAY = jax.Array | np.ndarray
_ONE = _ARRAY | Quantized | Tiled  # a matrix, or a stack of them


def schemes_of(params: Params) -> dict[str, Scheme]:
    """Leaf path -> the scheme that it is quantised by; the others are floats."""
    found = {path: _scheme(path, leaf) for path, leaf in _flat(params).items()}
    return {path: scheme for path, scheme in found.items() if scheme is not None}


def check(c: ModelConfig, params: Params, schemes: Mapping[str, Scheme]) -> None:
    """Whether `fitted` can make each leaf one of a model with these schemes; nothing is computed.

    Raises: UserError that names the first leaf that is missing, unknown, donated, or of another shape, type or scheme.
    """
    shapes, given = model_params.shapes(c), _flat(params)
    for path in given:
        if path not in shapes:
            nearest = nearest_name(path, shapes)
            raise UserError(f"{path} is no leaf of this model." + (f" Nearest: {nearest}." if nearest else ""))
    for path, shape in shapes.items():
        if path not in given:
            raise UserError(f"{path} is missing from the new parameters; the model's has shape {shape}.")
        _check(path, given[path], shape, schemes.get(path))


def fitted(path: str, leaf: Any, scheme: Scheme | None) -> Any:
    """The leaf as it is to lie: a change of low rank merged, floats rounded to the nearest where they have a scheme."""
    if isinstance(leaf, LowRank):
        leaf = _merged(leaf)
    if scheme is None or _scheme(path, leaf) is not None:
        return leaf
    return _rounded(leaf, scheme, summed_axis(path))


def _flat(params: Params) -> dict[str, Any]:
    if not isinstance(params, Mapping):
        raise UserError(
            f"New parameters must be a nested dict of arrays, as training holds them, not {type(params).__name__}."
        )
    return model_params.flat(params)


def _check(path: str, leaf: Any, shape: tuple[int, ...], scheme: Scheme | None) -> None:
    if any(array.is_deleted() for array in jax.tree.leaves(leaf) if isinstance(array, jax.Array)):
        raise UserError(
            f"{path} was donated: its array is deleted. Take the parameters before the step that donates them."
        )
    if isinstance(leaf, tuple):
        _check_layers(path, leaf, shape, scheme)
    elif isinstance(leaf, LowRank):
        _check_change(path, leaf, shape)
    else:
        _check_one(path, leaf, shape, scheme)


def _check_layers(path: str, leaf: tuple, shape: tuple[int, ...], scheme: Scheme | None) -> None:
    """Of a stack, as `placement.matrix_format` has it: a matrix of few bits a layer."""
    if not path.startswith(f"{model_params.STACKED}/") or len(leaf) != shape[0]:
        raise UserError(f"{path} is a tuple of {len(leaf)} in the new parameters; the model's has shape {shape}.")
    for number, one in enumerate(leaf):
        if not isinstance(one, Quantized | Tiled):
            raise UserError(
                f"{path} has {type(one).__name__} as layer {number} of a tuple in the new parameters; what is not "
                f"quantised comes as one array of shape {shape}."
            )
        _check_one(path, one, shape[1:], scheme, where=f" of layer {number}")


def _check_change(path: str, leaf: LowRank, shape: tuple[int, ...]) -> None:
    """What is merged may have been quantised by any scheme, or be a change of low rank itself."""
    if model_params.any_leaves()[path].kind is None:
        raise UserError(f"{path} is no matrix, but has a change of low rank in the new parameters.")
    if isinstance(leaf.base, LowRank):
        _check_change(path, leaf.base, shape)
    else:
        _check_one(path, leaf.base, shape, _scheme(path, leaf.base))
    rank = (1, *np.shape(leaf.a))[-2]
    for name, due in factor_shapes(shape, rank).items():
        _check_one(path, getattr(leaf, name), due, None, where=f"/{name}")


def _check_one(path: str, leaf: Any, shape: tuple[int, ...], scheme: Scheme | None, where: str = "") -> None:
    """Args: where: which part of the leaf this is, for messages."""
    name = f"{path}{where}"
    if not all(isinstance(part, _ARRAY) for part in jax.tree.leaves(leaf)) or not isinstance(leaf, _ONE):
        raise UserError(f"{name} is no array in the new parameters, but {type(leaf).__name__}.")
    if leaf.shape != shape:
        raise UserError(f"{name} has shape {leaf.shape} in the new parameters; the model's has {shape}.")
    has = _scheme(path, leaf)
    if has is None and not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise UserError(f"{name} has dtype {leaf.dtype} in the new parameters; a float is expected.")
    if has is not None and has != scheme:
        raise UserError(
            f"{name} is quantised by {has} in the new parameters; in the model it is "
            f"{'not quantised' if scheme is None else f'by {scheme}'}. Open a model for these, or give floats."
        )


def _scheme(path: str, leaf: Any) -> Scheme | None:
    one = leaf[0] if isinstance(leaf, tuple) and leaf else leaf
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
