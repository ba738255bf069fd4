"""Weights with scales folded into them as they are read (quantization/awq.py): the same model, to be rounded."""

import functools
import zlib
from collections.abc import Mapping

import numpy as np

from phijax.interchange.weight_source import NOT_QUANTIZED, Index, WeightSource
from phijax.model.config import ModelConfig
from phijax.quantization import awq


class FoldedSource:
    """Leaves that take scales, or their inverses, are float32; the others as they are."""

    schemes = NOT_QUANTIZED

    def __init__(self, source: WeightSource, model: ModelConfig, folds: Mapping[str, np.ndarray]):
        self._source, self._model, self._folds = source, model, folds
        parts = (part for name in sorted(folds) for part in (name.encode(), np.ascontiguousarray(folds[name])))
        self.digest = f"{functools.reduce(lambda crc, part: zlib.crc32(part, crc), parts, 0):08x}"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._source.shapes()

    def dtype(self, path: str) -> np.dtype:
        return np.dtype(np.float32) if awq.is_folded(self._model, path, self._folds) else self._source.dtype(path)

    def read(self, path: str, index: Index) -> np.ndarray:
        values = self._source.read(path, index)
        if not awq.is_folded(self._model, path, self._folds):
            return values
        bounded = tuple(slice(*i.indices(n)[:2]) for i, n in zip(index, self.shapes()[path], strict=True))
        return awq.fold(self._model, path, values.astype(np.float32), bounded, self._folds)
