"""The weights of any opened checkpoint as arrays on a mesh."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from phijax.interchange.opened import Opened
from phijax.interchange.weight_source import WeightSource, blocks
from phijax.model import params
from phijax.model.quantized import Quantized
from phijax.parallel import sharding
from phijax.quantization.policy import summed_axis


def load_params(
    opened: Opened,
    mesh: Mesh,
    *,
    dtype: Any = jnp.float32,
    keep_quantized: bool = False,
    form: Callable[[Quantized], Any] | None = None,
) -> params.Params:
    """The parameters on `mesh`, the vocabulary padded with rows of zeros.

    Each process reads only what its devices hold. Values are those of the file: float32 holds every bfloat16 and
    float16; a narrower `dtype` rounds to the nearest.

    Args:
      keep_quantized: leaves that a checkpoint of ours stores quantised become `Quantized`, for inference.
      form: with `keep_quantized`, what becomes of each such matrix as soon as it is read; a stack is a tuple of them.
    Raises: UserError for weights that cannot be read.
    """
    shardings = params.flat(params.shardings(opened.model, mesh))
    narrow = opened.weights.schemes if keep_quantized else {}
    return params.nested(
        {
            path: _load_quantized(opened, path, shape, mesh, form)
            if path in narrow
            else _load_leaf(opened.weights, path, shape, shardings[path], np.dtype(dtype))
            for path, shape in params.shapes(opened.model).items()
        }
    )


def _load_leaf(
    source: WeightSource, path: str, shape: tuple[int, ...], layout: jax.sharding.Sharding, dtype: np.dtype
) -> jax.Array:
    read: dict[tuple, np.ndarray] = {}  # devices that hold copies of a piece share one reading of it

    def piece(index: tuple[slice, ...]) -> np.ndarray:
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        if bounds not in read:
            read[bounds] = _read_padded(source, path, bounds, dtype)
        return read[bounds]

    return jax.make_array_from_callback(shape, layout, piece)


def _load_quantized(
    opened: Opened, path: str, shape: tuple[int, ...], mesh: Mesh, form: Callable[[Quantized], Any] | None
) -> Any:
    source, axes = opened.weights, params.axes(opened.model)[path]
    scheme = source.schemes[path]
    kind = jnp.int4 if scheme.bits == 4 else jnp.int8
    groups = scheme.scales_shape(shape, summed_axis(path))
    if form is not None:

        def matrix(*at: slice) -> Any:
            values, scales = ((*at, *(slice(0, n) for n in sizes[-2:])) for sizes in (shape, groups))
            read = (source.read_values(path, values).astype(kind), source.read_scales(path, scales))
            return form(Quantized(*(array.reshape(array.shape[-2:]) for array in read)))

        return tuple(matrix(slice(i, i + 1)) for i in range(shape[0])) if len(shape) == 3 else matrix()
    # An axis whose groups the mesh does not cut evenly has its scales on every chip.
    cut = sharding.even(groups, axes, mesh.shape)
    return Quantized(
        jax.make_array_from_callback(
            shape, sharding.sharding(mesh, axes), lambda index: source.read_values(path, index).astype(kind)
        ),
        jax.make_array_from_callback(
            groups, sharding.sharding(mesh, cut), lambda index: source.read_scales(path, index)
        ),
    )


def _read_padded(source: WeightSource, path: str, bounds: tuple[tuple[int, int], ...], dtype: np.dtype) -> np.ndarray:
    """A piece of a leaf, cast block by block: at no time is it held in two dtypes. Rows past the file's are zero."""
    out = np.zeros(tuple(stop - start for start, stop in bounds), dtype)
    there = [
        (min(start, size), min(stop, size)) for (start, stop), size in zip(bounds, source.shapes()[path], strict=True)
    ]
    held = tuple(stop - start for start, stop in there)
    if 0 in held:
        return out
    for index in blocks(held, source.dtype(path).itemsize):
        at = tuple(slice(start + part.start, start + part.stop) for (start, _), part in zip(there, index, strict=True))
        out[index] = source.read(path, at)
    return out
