"""Writes any checkpoint as a quantised one of ours, matrix by matrix; a killed export goes on where it was."""

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
import tensorstore
from etils import epath

from phijax.checkpoint import manifest
from phijax.checkpoint.array_spec import array_spec
from phijax.checkpoint.lock import WriterLock
from phijax.errors import UserError
from phijax.interchange import tokenizer_files
from phijax.interchange.native import source as native_source
from phijax.interchange.native.source import PARAMS, QUANTIZATION, SCALES, TOKENIZER_FOLDER, VALUES
from phijax.interchange.native.write import LARGEST_CHUNK, write_manifest
from phijax.interchange.opened import Opened
from phijax.interchange.weight_source import Index, blocks, check_finite
from phijax.model import params
from phijax.quantization import packing, policy
from phijax.quantization.policy import Scheme
from phijax.quantization.rounding import Quantize, round_to_nearest
from phijax.storage import durable, signals, staging, strict_json
from phijax.storage.strict_json import Fields

PROGRESS_FILE = "progress.jsonl"  # a line a piece that lies on disk; gone when all do
VOCABULARY_BYTES = 64 << 20  # bytes of float32 of an embedding or a head that are quantised at once

Rounding = Callable[[str, int], Quantize | None]  # of a leaf's path and layer


@dataclasses.dataclass(frozen=True)
class Piece:
    """What is read, quantised and written at once: a matrix of one layer; of a vocabulary, some rows."""

    path: str
    index: Index
    layer: int

    @property
    def key(self) -> str:
        return f"{self.path}[{self.index[0].start}]"


def pieces(opened: Opened, assigned: Mapping[str, Scheme]) -> list[Piece]:
    """All of them, layer by layer; last what lies in no layer, and norms."""
    found = []
    for path, shape in opened.weights.shapes().items():
        if path in assigned:
            rows = _vocabulary_rows(shape[-1]) if len(shape) == 2 else shape[-2]
            indices: Iterator[Index] = blocks(shape, 4, 4 * shape[-1] * rows)
        else:
            indices = blocks(shape, opened.weights.dtype(path).itemsize)
        found += [Piece(path, index, index[0].start if len(shape) == 3 else 0) for index in indices]
    return sorted(found, key=lambda piece: piece.layer if len(piece.index) == 3 else opened.model.num_layers)


def nbytes(opened: Opened, assigned: Mapping[str, Scheme]) -> dict[str, int]:
    """Leaf path -> bytes in the file before compression, the vocabulary not padded."""
    return {
        path: assigned[path].nbytes(shape, policy.summed_axis(path))
        if path in assigned
        else math.prod(shape) * opened.weights.dtype(path).itemsize
        for path, shape in opened.weights.shapes().items()
    }


def write(
    opened: Opened,
    output: epath.Path,
    assigned: Mapping[str, Scheme],
    quantize: Quantize = round_to_nearest,
    *,
    method: str,
    rounding: Rounding = lambda path, layer: None,
    say: Callable[[str], None] = lambda line: None,
    on_piece: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[float]]:
    """The whole folder, or nothing. Of a process that was killed OUTPUT.unfinished is left, and taken up again.

    Args:
      assigned: leaf path -> scheme; other leaves are copied bit for bit.
      quantize: the matrices of which `rounding` says None.
      method: its name, and what else decides the integers, for the manifest.
      rounding: how a matrix is rounded; asked for layer by layer.
      on_piece: called with how many pieces are done, and of how many.
    Returns: leaf path -> relative error |w - q| / |w| of each layer.
    Raises: UserError for an output that is there, a full disk, weights that are NaN, or quantised already.
    """
    refuse_quantized(opened)
    tokenizer_files.check(opened)
    output = durable.absolute(output)
    there = staging.unfinished(output)
    written = durable.bytes_below(there) if there.exists() else 0
    staging.check_output(output, max(0, sum(nbytes(opened, assigned).values()) - written))
    identity = _identity(opened, assigned, method)
    with _named(output):
        there.mkdir(parents=True, exist_ok=True)
        # Before `staged`, which after an exception removes the folder: it may be another process's.
        lock = WriterLock(there, break_lock=False, log=say)
        with signals.tidied(lock.release), staging.staged(output, resumable=True) as folder:
            try:
                done = taken_up(folder, identity, say)
                if (folder / TOKENIZER_FOLDER).exists():  # of the earlier start, perhaps of other files
                    (folder / TOKENIZER_FOLDER).rmtree()
                fingerprint = tokenizer_files.write_native(opened, folder / TOKENIZER_FOLDER, say)
                arrays = _Arrays(folder, opened, assigned)
                squared = _write_pieces(arrays, folder, pieces(opened, assigned), quantize, rounding, done, on_piece)
            finally:
                lock.release()
            errors = {path: [math.sqrt(e / w) if w else 0.0 for e, w in layers] for path, layers in squared.items()}
            _write_manifest(folder, opened, assigned, method, errors, arrays.leaves, fingerprint)
            (folder / PROGRESS_FILE).unlink()
    return errors


@contextlib.contextmanager
def _named(output: epath.Path) -> Iterator[None]:
    """A disk that is full or fails is the user's to mend: UserError, after `staged` has removed what was begun."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: TensorStore's
        raise UserError(f"{output} could not be written: {error}") from error


def refuse_quantized(opened: Opened) -> None:
    """Raises: UserError for a checkpoint of ours that is quantised: what it lost is not there to be rounded better."""
    if opened.weights.schemes:
        names = sorted({policy.name_of(scheme) for scheme in opened.weights.schemes.values()})
        raise UserError(f"{opened.path} is quantised already ({', '.join(names)}). Quantise what it was made from.")


class _Arrays:
    """The arrays on disk, made or opened, and their entries in the manifest."""

    def __init__(self, folder: epath.Path, opened: Opened, assigned: Mapping[str, Scheme]):
        self._opened, self._assigned, self._open = opened, assigned, {}
        self._state = folder / manifest.STATE_FOLDER
        # No cache: what is written is not read again.
        self._context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 0}})
        self.leaves: list[dict] = []
        for path, shape in params.shapes(opened.model).items():
            if path in assigned:
                self.leaves += native_source.described(path, shape, assigned[path])
            else:
                dtype = opened.weights.dtype(path).name
                self.leaves.append({"path": PARAMS + path, "shape": list(shape), "dtype": dtype})
        self._described = {leaf["path"]: leaf for leaf in self.leaves}

    def write(self, piece: Piece, quantize: Quantize, rounding: Rounding) -> tuple[float, float] | None:
        """Reads, quantises and writes a piece. -> summed squares of error and weight; None if it is only copied."""
        weight = self._opened.weights.read(piece.path, piece.index)
        check_finite(weight, piece.path)
        if piece.path not in self._assigned:
            self._array(piece.path)[piece.index].write(weight).result()
            return None
        scheme, axis = self._assigned[piece.path], policy.summed_axis(piece.path)
        quantize = rounding(piece.path, piece.layer) or quantize
        rounded = jax.device_get(quantize(weight.reshape(weight.shape[-2:]), scheme, axis))
        values = packing.pack(rounded.values) if scheme.bits == 4 else rounded.values
        for name, array in ((VALUES, values), (SCALES, rounded.scales)):
            # Rows are cut in a vocabulary alone, whose groups run along the other axis.
            at = tuple(
                slice(i.start, i.start + n) for i, n in zip(piece.index[:-1], _stacked(array, piece), strict=True)
            )
            self._array(f"{piece.path}/{name}")[at].write(array.reshape(*_stacked(array, piece), -1)).result()
        error, total = (float(value) for value in rounded.squared)
        if not math.isfinite(error) or error > 0.5 * total:
            raise UserError(f"{piece.path}, layer {piece.layer}: no scale of float16 fits its weights.")
        return error, total

    def _array(self, path: str) -> tensorstore.TensorStore:
        if path not in self._open:
            leaf = self._described[PARAMS + path]
            shape, dtype = tuple(leaf["shape"]), np.dtype(jax.numpy.dtype(leaf["dtype"]))
            rows = min(shape[-2], max(1, LARGEST_CHUNK // (shape[-1] * dtype.itemsize))) if len(shape) > 1 else 1
            if len(shape) == 2 and path.rpartition("/")[0] in self._assigned:
                # What is written at once is whole chunks: a chunk that is written again leaves its old bytes behind.
                rows = min(rows, _vocabulary_rows(self._opened.model.model_dim))
            spec = array_spec(self._state, PARAMS + path)
            spec["metadata"] = {
                "shape": shape,
                "chunks": {1: shape, 2: (rows, shape[-1]), 3: (1, rows, shape[-1])}[len(shape)],
                "dtype": "bfloat16" if dtype.name == "bfloat16" else dtype.str,
                "compressor": {"id": "zstd", "level": 1},
                "dimension_separator": ".",
                # Of the rows that pad the vocabulary.
                "fill_value": packing.ZERO_BYTE if path.endswith(VALUES) and dtype == np.uint8 else 0,
            }
            self._open[path] = tensorstore.open(spec, context=self._context, create=True, open=True).result()
        return self._open[path]


def _vocabulary_rows(model_dim: int) -> int:
    """How many rows of an embedding or a head are quantised at once."""
    return max(1, VOCABULARY_BYTES // (4 * model_dim))


def _stacked(array: np.ndarray, piece: Piece) -> tuple[int, ...]:
    """The leading axes of a matrix in its leaf: with L in front where there is one."""
    return (1, array.shape[0]) if len(piece.index) == 3 else (array.shape[0],)


def _write_pieces(arrays, folder, todo, quantize, rounding, done, on_piece) -> dict[str, list[list[float]]]:
    squared: dict[str, list[list[float]]] = {}
    with (folder / PROGRESS_FILE).open("a") as progress:
        for number, piece in enumerate(todo, start=1):
            if piece.key not in done:
                done[piece.key] = arrays.write(piece, quantize, rounding)
                progress.write(json.dumps({"piece": piece.key, "squared": done[piece.key]}) + "\n")
                progress.flush()
            if done[piece.key] is not None:
                layers = squared.setdefault(piece.path, [])
                layers += [[0.0, 0.0]] * (piece.layer == len(layers))
                layers[-1] = [before + value for before, value in zip(layers[-1], done[piece.key], strict=True)]
            on_piece(number, len(todo))
    return squared


def taken_up(folder: epath.Path, identity: str, say: Callable[[str], None]) -> dict[str, tuple[float, float] | None]:
    """Pieces that an export of the same weights to the same bits has written; what another left is removed."""
    path = folder / PROGRESS_FILE
    lines = path.read_bytes().decode(errors="replace").splitlines() if path.exists() else []
    if lines and lines[0] == identity:
        done = {}
        for line in lines[1:]:
            with contextlib.suppress(UserError):  # cut off by the kill
                found = strict_json.parse(line.encode(), str(path))
                done[found.text("piece")] = _pair(found)
        say(f"goes on in {folder}: {len(done)} pieces are there")
        path.write_text(
            "\n".join([identity, *(json.dumps({"piece": k, "squared": v}) for k, v in done.items())]) + "\n"
        )
        return done
    if (folder / manifest.STATE_FOLDER).exists():
        say(f"warning: {folder} was begun from other weights or with other settings; started anew")
        (folder / manifest.STATE_FOLDER).rmtree()
    path.write_text(identity + "\n")
    return {}


def _pair(found: Fields) -> tuple[float, float] | None:
    """Raises: UserError for what is no two numbers, nor null."""
    squared = found.numbers("squared", None, least=0)
    if squared is not None and len(squared) != 2:
        raise found.refusal("squared", "two numbers")
    return None if squared is None else (squared[0], squared[1])


def errors_of(output: epath.Path, opened: Opened, assigned: Mapping[str, Scheme], method: str) -> dict | None:
    """What `write` returned, if it has written `output` out of the same weights to the same bits; else None."""
    try:
        found = manifest.read(output)["extra"].get(QUANTIZATION, {})
    except manifest.DamagedManifest:
        return None
    return found["errors"] if found.get("made_from") == made_from(opened, assigned, method) else None


def made_from(opened: Opened, assigned: Mapping[str, Scheme], method: str) -> str:
    """A digest of what the user gave: the files that are read, by size and time, the schemes, the method."""
    path = opened.path
    files = durable.files_below(path) if path.is_dir() else [path]
    stats = [(str(file), file.stat().length, file.stat().mtime) for file in files]
    schemes = {leaf: policy.name_of(scheme) for leaf, scheme in assigned.items()}
    return hashlib.sha256(json.dumps([stats, schemes, method]).encode()).hexdigest()


def _identity(opened: Opened, assigned: Mapping[str, Scheme], method: str) -> str:
    """The same with what is folded in: all that decides the bytes."""
    return made_from(opened, assigned, method) + getattr(opened.weights, "digest", "")


def _write_manifest(folder, opened, assigned, method, errors, leaves, fingerprint) -> None:
    schemes = {path: policy.name_of(scheme) for path, scheme in assigned.items()}
    source = made_from(opened, assigned, method)
    quantization = {"method": method, "schemes": schemes, "errors": errors, "made_from": source}
    write_manifest(folder, opened, leaves, fingerprint, {QUANTIZATION: quantization})
