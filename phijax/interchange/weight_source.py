"""Weights of one model as they lie in a file, read slice by slice under our names and in our shapes."""

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Protocol

import jax.numpy as jnp
import numpy as np

from phijax.errors import UserError
from phijax.model import params
from phijax.model.config import ModelConfig
from phijax.quantization.policy import Scheme

Index = tuple[slice, ...]


LEAST_OF_A_LAYER = 4  # tensors: the fewest that any file has for one; layers are counted before they are named
NOT_QUANTIZED: Mapping[str, Scheme] = MappingProxyType({})  # the schemes of a source that stores floats alone


class WeightSource(Protocol):
    """Nothing is read before it is asked for. Paths and shapes are those of `model_shapes`."""

    schemes: Mapping[str, Scheme]  # by leaf path, of the leaves that are stored quantised; else NOT_QUANTIZED

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Leaf path -> shape, the vocabulary not padded."""
        ...

    def dtype(self, path: str) -> np.dtype:
        """As stored, jnp.bfloat16 included; float32 for weights that are stored quantised."""
        ...

    def read(self, path: str, index: Index) -> np.ndarray:
        """That slice alone, in `dtype(path)`; one slice a dimension, step 1. Raises UserError if it cannot be read."""
        ...


class QuantizedSource(WeightSource, Protocol):
    """A source that has schemes gives the integers and scales of those leaves too."""

    def read_values(self, path: str, index: Index) -> np.ndarray:
        """Integers as int8."""
        ...

    def read_scales(self, path: str, index: Index) -> np.ndarray:
        """Scales, float16; `index` counts groups."""
        ...


def model_shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Leaf path -> shape in a file: `params.shapes` with V rows where it has the padded vocabulary."""
    axes = params.axes(c)
    return {
        path: tuple(c.vocab_size if name == "vocab" else size for size, name in zip(shape, axes[path], strict=True))
        for path, shape in params.shapes(c).items()
    }


def blocks(shape: tuple[int, ...], itemsize: int, limit: int = 64 << 20) -> Iterator[Index]:
    """Indices that cut an array into contiguous pieces of at most `limit` bytes, or one row, in the order of memory.

    A stack is cut at its layers even where several would fit: most files hold a layer as one piece.
    """
    if not shape:
        yield ()
    elif len(shape) > 2:
        for i in range(shape[0]):
            for inside in blocks(shape[1:], itemsize, limit):
                yield (slice(i, i + 1), *inside)
    else:
        row = math.prod(shape[1:]) * itemsize
        step = max(1, limit // max(1, row))
        for start in range(0, shape[0], step):
            yield (slice(start, min(start + step, shape[0])), *(slice(0, size) for size in shape[1:]))


# Bits of the exponent, all set in infinities and NaNs alone.
_EXPONENT = {
    np.dtype(np.float32): (np.uint32, 0x7F800000),
    np.dtype(np.float16): (np.uint16, 0x7C00),
    np.dtype(jnp.bfloat16): (np.uint16, 0x7F80),
}


def check_finite(values: np.ndarray, where: str) -> None:
    """Raises: UserError naming `where` if one of the values is NaN or infinite. Looks at bits, some GB a second."""
    integer, exponent = _EXPONENT[values.dtype]
    bits = values.reshape(-1) if values.flags.c_contiguous else values.T.reshape(-1)
    bits = bits.view(integer)
    for start in range(0, bits.size, 1 << 20):  # in pieces that stay in the cache: no second array of that size
        if np.any((bits[start : start + (1 << 20)] & exponent) == exponent):
            narrow = ", or beyond the 65,504 of float16 (take bfloat16)" if values.dtype == np.float16 else ""
            raise UserError(
                f"{where} holds values that are NaN or infinite: the file is damaged, or training diverged{narrow}."
            )
