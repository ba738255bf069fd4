"""Keys of a GGUF file read as the numbers that they must be."""

import math
from typing import Any

import numpy as np

from phijax.errors import UserError
from phijax.interchange.gguf.file import GgufFile
from phijax.interchange.weight_source import LEAST_OF_A_LAYER

_MOST = 1 << 31  # no size of a model reaches it


class Keys:
    """Those of one architecture, without its name.

    Each way of asking raises UserError, naming the key, for one that is missing or no such number.
    """

    def __init__(self, file: GgufFile, architecture: str):
        self.file, self.architecture = file, architecture
        prefix = f"{architecture}."
        self.values = {key.removeprefix(prefix): v for key, v in file.metadata.items() if key.startswith(prefix)}

    def size(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        value = self._get(key, default)
        if type(value) is not int or not least <= value < _MOST:
            raise UserError(f"{self.said(key, value)} must be a whole number >= {least}.")
        return value

    def decimal(self, key: str, default: float | None = None) -> float:
        """A positive number. The file has it in float32: what comes back is the shortest decimal that rounds to it."""
        value = self._get(key, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise UserError(f"{self.said(key, value)} must be a positive number.")
        return shortest(value)

    def layers(self) -> int:
        """block_count, no more than the tensors can hold."""
        count = self.size("block_count")
        if count * LEAST_OF_A_LAYER > len(self.file.tensors):
            raise UserError(f"{self.said('block_count', count)}, with {len(self.file.tensors)} tensors.")
        return count

    def vocabulary(self) -> int:
        """Rows of the embedding."""
        embedding = self.file.tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise UserError(f"{self.file.path} has no token_embd.weight of two dimensions.")
        if (said := self.size("vocab_size", embedding.shape[0])) != embedding.shape[0]:
            raise UserError(f"{self.said('vocab_size', said)}, but token_embd.weight has {embedding.shape[0]} rows.")
        return embedding.shape[0]

    def said(self, key: str, value: Any) -> str:
        """For messages: which key of which file, and its value."""
        return f"{self.file.path}: {self.architecture}.{key}={shown(value)}"

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key, default)
        if value is None:
            raise UserError(f"{self.file.path} has no {self.architecture}.{key}, so it is not known which model it is.")
        return value


def shortest(value: float) -> float:
    """1e-5 for the float32 9.99999974e-06: what was written, as far as float32 tells."""
    return float(str(np.float32(value)))


def shown(value: Any) -> str:
    text = repr(value.tolist() if isinstance(value, np.ndarray) and value.size < 100 else value)
    return text if len(text) < 80 else text[:77] + "..."
