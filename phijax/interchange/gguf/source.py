"""Weights of a GGUF file under our names: slices of the mapped file, dequantised as they are read."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from phijax.errors import UserError
from phijax.interchange.gguf import long_rope
from phijax.interchange.gguf.families.family import Family
from phijax.interchange.gguf.file import GgufFile, Stored, gguf_library
from phijax.interchange.tensors import Part, Tensor, place_in_file, tensors
from phijax.interchange.weight_source import NOT_QUANTIZED, Index, model_shapes
from phijax.model.config import ModelConfig

# Kinds that are read, and the dtype that they are read in: quantised ones as the float32 that they stand for.
_PLAIN = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
QUANTISED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
_AT_ONCE = 1 << 22  # values dequantised in one piece: its intermediate arrays take some ten times as much


class _Place(NamedTuple):
    """Where one layer of a leaf is."""

    tensor: Tensor
    part: Part
    stored: Stored


class GgufSource:
    """A WeightSource over one file."""

    schemes = NOT_QUANTIZED

    def __init__(self, file: GgufFile, family: Family, c: ModelConfig):
        """Raises: UserError for a tensor that is missing, surplus, of another shape or of a kind that is not read."""
        self._file, self._c, self._shapes = file, c, model_shapes(c)
        wanted = tensors(c, family.rows)
        _check(file, wanted)
        self._places: dict[str, list[_Place]] = {path: [] for path in self._shapes}  # by layer
        for tensor in wanted:
            for part in tensor.parts:
                self._places[part.leaf].append(_Place(tensor, part, file.tensors[tensor.name]))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def dtype(self, path: str) -> np.dtype:
        kinds = {_PLAIN.get(stored.kind.name, _PLAIN["F32"]) for *_, stored in self._places[path]}
        return kinds.pop() if len(kinds) == 1 else _PLAIN["F32"]  # float32 holds every value of the narrower two

    def kinds(self) -> set[str]:
        """How the matrices are stored, by ggml's names."""
        return {p.stored.kind.name for places in self._places.values() for p in places if p.tensor.matrix}

    def read(self, path: str, index: Index) -> np.ndarray:
        places, shape = self._places[path], self._shapes[path]
        stacked = places[0].part.layer is not None
        if stacked:
            places, shape, index = places[index[0]], shape[1:], index[1:]
        inner = [range(n)[part] for n, part in zip(shape, index, strict=True)]
        out = np.empty((len(places), *map(len, inner)), self.dtype(path))
        for layer, place in zip(out, places, strict=True):
            self._fill(layer, place, inner)
        return out if stacked else out[0]

    def _fill(self, out: np.ndarray, place: _Place, spans: Sequence[range]) -> None:
        """One layer's slice. out: (rows, columns) of the leaf, or (D,) where that is no matrix."""
        tensor, part, stored = place
        first = part.start
        if len(spans) == 1:
            columns = range(first + spans[0].start, first + spans[0].stop)
            out[:] = self._values(stored, slice(0, 1), columns)[0]
            return
        target, (rows, columns) = (out.T, spans[::-1]) if tensor.turned(part) else (out, spans)
        where = None
        if tensor.interleaved:
            where = place_in_file(part.rows, self._c.head_dim)[rows.start : rows.stop]
        step = max(1, _AT_ONCE // max(1, len(columns)))
        for start in range(0, len(rows), step):
            some = slice(start, min(start + step, len(rows)))
            lines = slice(first + rows.start + some.start, first + rows.start + some.stop)
            target[some] = self._values(stored, lines if where is None else first + where[some], columns)

    def _values(self, stored: Stored, lines: slice | np.ndarray, columns: range) -> np.ndarray:
        """(lines, columns) of a tensor's matrix. Only the blocks that hold these columns are read."""
        library = gguf_library()
        per_block, block_size = library.GGML_QUANT_SIZES[stored.kind]
        rows, _ = stored.matrix
        raw = self._file.data[stored.offset : stored.offset + stored.size].reshape(rows, -1)
        first, last = columns.start // per_block, -(-columns.stop // per_block)
        raw = raw[lines, first * block_size : last * block_size]
        if stored.kind.name in _PLAIN:
            values = raw.view(_PLAIN[stored.kind.name])
        else:
            values = library.dequantize(np.ascontiguousarray(raw), stored.kind)
            values = values[:, columns.start - first * per_block : columns.stop - first * per_block]
        if not np.isfinite(values).all():
            raise UserError(f"{self._file.path}: {stored.name} holds NaN or infinite weights. The file is not usable.")
        return values


def _check(file: GgufFile, wanted: Sequence[Tensor]) -> None:
    expected = {tensor.name: tensor.shape for tensor in wanted}
    lists = {long_rope.LONG_FACTORS, long_rope.SHORT_FACTORS}
    problems = [f"{name}: missing" for name in expected if name not in file.tensors]
    for name, stored in file.tensors.items():
        if name in lists:
            continue
        if name not in expected:
            problems.append(f"{name} {stored.shape}: not a part of this model, so its outputs would differ")
        elif stored.shape != expected[name]:
            problems.append(f"{name}: has shape {stored.shape}, the header describes {expected[name]}")
        elif stored.kind.name not in (*_PLAIN, *QUANTISED):
            problems.append(f"{name}: stored as {stored.kind.name}; read are {', '.join((*_PLAIN, *QUANTISED))}")
    if problems:
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise UserError(f"{file.path} cannot be opened:\n  " + "\n  ".join(problems[:8]) + more)
