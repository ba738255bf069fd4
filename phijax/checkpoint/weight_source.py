"""Weights of one model as they lie in a file, read slice by slice under our names and in our shapes."""

from typing import Protocol

import numpy as np

from phijax.model import params
from phijax.model.config import ModelConfig

Index = tuple[slice, ...]


class WeightSource(Protocol):
    """Nothing is read before it is asked for. Paths and shapes are those of `model_shapes`."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Leaf path -> shape, the vocabulary not padded."""
        ...

    def dtype(self, path: str) -> np.dtype:
        """As stored, ml_dtypes.bfloat16 included; float32 for weights that are stored quantised."""
        ...

    def read(self, path: str, index: Index) -> np.ndarray:
        """That slice alone, in `dtype(path)`; one slice a dimension, step 1. Raises UserError if it cannot be read."""
        ...


def model_shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Leaf path -> shape in a file: `params.shapes` with V rows where it has the padded vocabulary."""
    axes = params.axes(c)
    return {
        path: tuple(c.vocab_size if name == "vocab" else size for size, name in zip(shape, axes[path], strict=True))
        for path, shape in params.shapes(c).items()
    }


def everything(shape: tuple[int, ...]) -> Index:
    """The index of the whole array."""
    return tuple(slice(0, size) for size in shape)
