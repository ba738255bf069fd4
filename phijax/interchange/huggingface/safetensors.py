"""Files of tensors in the safetensors format, both ways: headers checked before they are believed, slices read alone.

Format: 8 bytes little-endian length N, N bytes of JSON {name: {dtype, shape, data_offsets}}, then the data.
https://huggingface.co/docs/safetensors. Checked here and not by the safetensors package, which accepts a name twice.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np
from etils import epath

from phijax.errors import UserError
from phijax.storage import atomic, durable, strict_json
from phijax.storage.regular_files import size_of
from phijax.storage.strict_json import Fields, shown

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
# Of peft and of mlx-lm.
ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors"}
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
LONGEST_HEADER = 2_000_000  # bytes: 15,000 tensors; headers of real models have some ten thousand bytes
LONGEST_INDEX = 16_000_000
_MOST = 1 << 62  # of a size or an offset; what a file holds is asked next

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
# Written, not read: integers of the formats for quantised weights.
INTEGERS = {"I32": np.dtype(np.int32), "U32": np.dtype(np.uint32), "I64": np.dtype(np.int64)}
NAMES = {dtype: name for name, dtype in (DTYPES | INTEGERS).items()}
# The last two are indexed, never read: masks that old files carry beside their weights.
READ = DTYPES | {"BOOL": np.dtype(np.bool_), "U8": np.dtype(np.uint8)}


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor lies."""

    file: epath.Path
    offset: int  # bytes from the start of the file
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """A copy of that slice. The file is mapped for as long as this takes, so that its pages count for no longer."""
        if not durable.is_local(self.file):
            return np.ascontiguousarray(self._read_rows(index[0])[(slice(None), *index[1:])])
        mapped = np.memmap(os.fspath(self.file), self.dtype, "r", self.offset, self.shape)
        return np.array(mapped[index], copy=True, order="C")

    def _read_rows(self, rows: slice) -> np.ndarray:
        """Object stores cannot be mapped: whole rows are fetched."""
        start, stop, _ = rows.indices(self.shape[0])
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        with self.file.open("rb") as file:
            file.seek(self.offset + start * row_bytes)
            data = file.read((stop - start) * row_bytes)
        return np.frombuffer(data, self.dtype).reshape(stop - start, *self.shape[1:])


def open_folder(folder: epath.Path) -> dict[str, Stored]:
    """Every tensor of a folder with model.safetensors, or with an index and the files that it names.

    Raises: UserError for files that are missing, cut off, or whose headers do not describe them, and for a folder with
      two sets of weights, of which other readers may take the other.
    """
    names = {file.name for file in folder.iterdir()}
    if adapters := sorted(names & ADAPTER_FILES):
        raise UserError(
            f"{folder} has an adapter in it ({adapters[0]}), which phijax does not apply and other readers do. Merge "
            "it into the weights (merge_and_unload of peft), or move it out of the folder."
        )
    if INDEX_FILE not in names:
        if SINGLE_FILE not in names:
            raise UserError(_no_weights(folder, names))
        _refuse_second_set(folder, names, SINGLE_FILE, {SINGLE_FILE})
        return read_header(folder / SINGLE_FILE)
    index = _weight_map(folder / INDEX_FILE)
    if SINGLE_FILE in names:
        _refuse_second_set(folder, names, INDEX_FILE, set(index.values()))
    found: dict[str, Stored] = {}
    for name in sorted(set(index.values())):
        file = folder / name
        if not file.exists():
            raise UserError(f"{folder / INDEX_FILE} names {name}, which is not there: the download is incomplete.")
        for tensor, stored in read_header(file).items():
            if tensor in found:
                raise UserError(f"{folder}: tensor {shown(tensor)} lies in {found[tensor].file.name} and in {name}.")
            found[tensor] = stored
    for tensor, name in index.items():
        if tensor not in found or found[tensor].file.name != name:
            raise UserError(f"{folder / INDEX_FILE} says that {shown(tensor)} is in {name}; it is not.")
    _refuse_second_set(folder, names, INDEX_FILE, set(index.values()))
    return found


def read_header(path: epath.Path) -> dict[str, Stored]:
    """Tensors of one file. Raises: UserError, in time and memory bounded by LONGEST_HEADER."""
    size = size_of(path)
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= length <= min(size - 8, LONGEST_HEADER):
            raise UserError(
                f"{path} is no whole safetensors file: its header would have {length:,} bytes, the file has {size:,} "
                f"(headers have at most {LONGEST_HEADER:,})."
            )
        text = file.read(length)
    header = Fields(strict_json.parse(text, f"{path}: its header").values, str(path))
    names = [name for name in header.values if name != "__metadata__"]
    found = {name: _entry(path, name, header.object(name), 8 + length, size) for name in names}
    end = 8 + length
    for name, stored in sorted(found.items(), key=lambda item: (item[1].offset, math.prod(item[1].shape))):
        if stored.offset != end:
            raise UserError(f"{path}: the bytes of {shown(name)} overlap others, or leave a gap before them.")
        end += math.prod(stored.shape) * stored.dtype.itemsize
    if end != size:
        raise UserError(f"{path} has {size:,} bytes; its header describes {end:,}.")
    return found


def _entry(path: epath.Path, name: str, entry: Fields, data: int, size: int) -> Stored:
    where = f"{path}: tensor {shown(name)}"
    kind, shape = entry.text("dtype"), entry.integers("shape", most=_MOST)
    offsets = entry.integers("data_offsets", most=_MOST)
    if len(offsets) != 2:
        raise entry.refusal("data_offsets", "two numbers, where its bytes begin and end")
    if len(shape) > 8:
        raise entry.refusal("shape", "of at most 8 dimensions")
    begin, end = offsets
    if kind not in READ:
        raise UserError(
            f"{where} is stored as {shown(kind)}. Weights can be read as {', '.join(DTYPES)}: dequantise first."
        )
    dtype = READ[kind]
    if math.prod(shape) * dtype.itemsize != end - begin or data + end > size:
        raise UserError(
            f"{where}, {kind} {shown(tuple(shape))}, lies in bytes {begin:,} to {end:,} of {size - data:,}: "
            + ("the file is cut off." if data + end > size else "they do not hold it.")
        )
    return Stored(path, data + begin, tuple(shape), dtype)


def _weight_map(path: epath.Path) -> dict[str, str]:
    weight_map = strict_json.read(path, LONGEST_INDEX).object("weight_map")
    index = {tensor: weight_map.text(tensor) for tensor in weight_map.values}
    for name in set(index.values()):
        if (
            name != os.path.basename(name)
            or "\\" in name
            or name in ("", ".", "..")
            or not name.endswith(".safetensors")
        ):
            raise UserError(f"{path} names the file {shown(name)}, which is no safetensors file of this folder.")
    return index


def _refuse_second_set(folder: epath.Path, names: set[str], first: str, belong: set[str]) -> None:
    """`belong`: the files that `first` stands for. Left by an earlier download, or by a tool that wrote beside it."""
    others = sorted(name for name in names - belong if name == SINGLE_FILE or _SHARD.fullmatch(name))
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise UserError(
            f"{folder} has two sets of weights: {first}, and {others[0]}{more}, which is no part of it. Readers differ "
            "in which they take. Move the older set, with its index, out of the folder."
        )


def _no_weights(folder: epath.Path, names: set[str]) -> str:
    def ending(*suffixes: str) -> list[str]:
        return sorted(name for name in names if name.endswith(suffixes))

    if found := ending(".safetensors"):
        return (
            f"{folder} has {found[0]}, but no {INDEX_FILE} that says what is in which file: the download is incomplete."
            f" (Weights in one file are called {SINGLE_FILE}.)"
        )
    if found := ending(".gguf"):
        return f"{folder} has config.json, but its weights are GGUF: give the file, {folder / found[0]}."
    if found := ending(".bin", ".pt", ".pth", ".ckpt"):
        return (
            f"{folder} has its weights in {found[0]}, a pickle: loading one runs whatever code is in it, so phijax "
            "does not.\nConvert it where you trust it: `AutoModelForCausalLM.from_pretrained(FOLDER)"
            ".save_pretrained(NEW)` of transformers writes safetensors."
        )
    other = ending(".h5", ".msgpack", ".npz", ".onnx")
    beside = f" ({other[0]} is of a kind that is not read)" if other else ""
    return f"{folder} has config.json but no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there{beside}."


@dataclasses.dataclass(frozen=True)
class Shape:
    """A tensor to write."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def plan_files(tensors: Sequence[Shape], max_bytes: int) -> dict[str, list[Shape]]:
    """File name -> its tensors, in order, each file at most `max_bytes` of data or one tensor."""
    groups: list[list[Shape]] = [[]]
    for tensor in tensors:
        if groups[-1] and sum(t.nbytes for t in groups[-1]) + tensor.nbytes > max_bytes:
            groups.append([])
        groups[-1].append(tensor)
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)}


def header_bytes(tensors: Sequence[Shape], library: str = "pt") -> bytes:
    """Length and header of a file with these tensors; padded so that the data start at a multiple of 8.

    Args: library: whose tensors they are; transformers refuses a file that does not say, and knows "pt" and "mlx".
    """
    table: dict[str, Any] = {"__metadata__": {"format": library}}
    at = 0
    for tensor in tensors:
        offsets = [at, at := at + tensor.nbytes]
        table[tensor.name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_file(path: epath.Path, tensors: Sequence[Shape], data: Iterable[np.ndarray], library: str = "pt") -> None:
    """A whole file, durable. `data`: the tensors' values in order, in pieces of any size."""
    expected = sum(tensor.nbytes for tensor in tensors)
    with _writing(path) as file:
        file.write(header_bytes(tensors, library))
        written = 0
        for piece in data:
            # A view of bytes: numpy offers no buffer of bfloat16.
            written += file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
    assert written == expected, f"{path}: {written} bytes of {expected}"


def write_index(path: epath.Path, files: Mapping[str, Sequence[Shape]]) -> None:
    """The index of a folder with several files."""
    total = sum(tensor.nbytes for tensors in files.values() for tensor in tensors)
    weight_map = {tensor.name: name for name, tensors in files.items() for tensor in tensors}
    atomic.write_text(path, json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n")


@contextlib.contextmanager
def _writing(path: epath.Path) -> Iterator[BinaryIO]:
    with path.open("wb") as file:
        yield file
        if durable.is_local(path):
            file.flush()
            os.fsync(file.fileno())
