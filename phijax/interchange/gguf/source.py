"""Weights of a GGUF file under our names: slices of the mapped file, dequantised as they are read."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from phijax.errors import UserError
from phijax.interchange.gguf import names as gguf_names
from phijax.interchange.gguf.file import GgufFile, Stored, gguf_library
from phijax.interchange.weight_source import NOT_QUANTIZED, Index, model_shapes
from phijax.model.config import ModelConfig

# Kinds that are read, and the dtype that they are read in: quantised ones as the float32 that they stand for.
_PLAIN = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
QUANTISED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
_AT_ONCE = 1 << 22  # values dequantised in one piece: its intermediate arrays take some ten times as much


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where one leaf lies: in one tensor, or in one for each layer, from row `first` of it on."""

    row: gguf_names.Row
    stored: tuple[Stored, ...]
    first: int


class GgufSource:
    """A WeightSource over one file."""

    schemes = NOT_QUANTIZED

    def __init__(self, file: GgufFile, architecture: str, c: ModelConfig):
        """Raises: UserError for a tensor that is missing, surplus, of another shape or of a kind that is not read."""
        self._file, self._c, self._shapes = file, c, model_shapes(c)
        wanted = gguf_names.tensors(architecture, c)
        _check(file, wanted)
        self._places: dict[str, _Place] = {}
        for tensor in wanted:
            first = 0
            for path, rows in zip(tensor.row.leaves, tensor.rows, strict=True):
                before = self._places[path].stored if path in self._places else ()
                self._places[path] = _Place(tensor.row, (*before, file.tensors[tensor.name]), first)
                first += rows

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def dtype(self, path: str) -> np.dtype:
        kinds = {_PLAIN.get(stored.kind.name, _PLAIN["F32"]) for stored in self._places[path].stored}
        return kinds.pop() if len(kinds) == 1 else _PLAIN["F32"]  # float32 holds every value of the narrower two

    def kinds(self) -> set[str]:
        """How the matrices are stored, by ggml's names."""
        return {s.kind.name for place in self._places.values() for s in place.stored if len(s.shape) == 2}

    def read(self, path: str, index: Index) -> np.ndarray:
        place, shape = self._places[path], self._shapes[path]
        spans = [range(n)[part] for n, part in zip(shape, index, strict=True)]
        stacked = "{layer}" in place.row.name
        layers = [place.stored[i] for i in spans[0]] if stacked else place.stored
        inner = spans[1:] if stacked else spans
        out = np.empty((len(layers), *map(len, inner)), self.dtype(path))
        for layer, stored in zip(out, layers, strict=True):
            self._fill(layer, path, place, stored, inner)
        return out if stacked else out[0]

    def _fill(self, out: np.ndarray, path: str, place: _Place, stored: Stored, spans: Sequence[range]) -> None:
        """One layer's slice. out: (rows, columns), or (D,) for a norm."""
        if len(spans) == 1:
            out[:] = self._values(stored, slice(0, 1), spans[0])[0]
            return
        target, (rows, columns) = (out.T, spans[::-1]) if place.row.transposed else (out, spans)
        where = None
        if place.row.interleaved:
            heads = gguf_names.heads_of(path, self._c)
            where = gguf_names.place_in_file(heads, self._c.head_dim)[rows.start : rows.stop]
        step = max(1, _AT_ONCE // max(1, len(columns)))
        for start in range(0, len(rows), step):
            part = slice(start, min(start + step, len(rows)))
            lines = slice(place.first + rows.start + part.start, place.first + rows.start + part.stop)
            target[part] = self._values(stored, lines if where is None else where[part], columns)

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


def _check(file: GgufFile, wanted: Sequence[gguf_names.Tensor]) -> None:
    expected = {tensor.name: tensor.shape for tensor in wanted}
    lists = {gguf_names.LONG_FACTORS, gguf_names.SHORT_FACTORS}
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
