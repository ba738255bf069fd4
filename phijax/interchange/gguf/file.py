"""The bytes of a GGUF file: its header, checked before anything is believed, and where each tensor lies.

Format: ggml's docs/gguf.md, version 2 and 3, little-endian. The `gguf` package reads such files too, but believes
every count in them; here a count is compared with what the file can hold before it is used.
"""

import dataclasses
import itertools
import math
import mmap
import os
import re
import struct
from types import ModuleType
from typing import Any

import numpy as np
from etils import epath

from phijax.distribution import install_hint
from phijax.errors import UserError
from phijax.storage.durable import is_local
from phijax.storage.regular_files import size_of

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_FIXED = 24  # bytes of magic, version and the two counts

# Far above what published models have (a vocabulary of 262,144, as many merges, 1,000 tensors); enough to refuse a
# hostile file within a second.
_MOST_HEADER = 1 << 26  # bytes
_MOST_ENTRIES = 1 << 16  # keys, and tensors
_MOST_STRINGS = 1 << 20
_LONGEST_KEY = 1 << 16  # bytes, the format's own limit
_LONGEST_NAME = 64  # bytes of a tensor's name, ggml's limit
_MOST_DIMENSIONS = 4
_MOST_ALIGNMENT = 1 << 16
_NAME = re.compile(r"[A-Za-z0-9_]+([.\-][A-Za-z0-9_]+)*")


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor as it lies in the file, rows of blocks.

    shape: slowest dimension first, as numpy has it (GGUF counts from the fastest).
    offset, size: bytes, from the start of the file.
    """

    name: str
    kind: Any  # gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    size: int

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns) with all but the fastest dimension as rows."""
        return math.prod(self.shape[:-1]), self.shape[-1]


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """A GGUF file whose header held. metadata: key -> int, float, bool, str, list of str or numpy array."""

    path: epath.Path
    metadata: dict[str, Any]
    tensors: dict[str, Stored]
    data: np.ndarray  # (size of the file,) uint8, mapped, never copied as a whole


def gguf_library() -> ModuleType:
    """The `gguf` package. Raises: UserError where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise UserError(f"GGUF files need the package gguf: {install_hint('gguf')}") from error
    return gguf


def read_file(path: epath.PathLike) -> GgufFile:
    """Maps the file and reads its header.

    Raises: UserError for a file that is not whole, or whose header says what cannot be.
    """
    path = epath.Path(path)
    if not is_local(path):
        raise UserError(f"{path}: a GGUF file is mapped into memory, so it must lie on a local disk. Copy it first.")
    size = size_of(path)
    if size < _FIXED:
        raise UserError(f"{path} is not a GGUF file: {size} bytes.")
    with open(os.fspath(path), "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    reader = _Header(path, mapped)
    try:
        metadata, tensors = reader.read()
    except UnicodeDecodeError as error:
        raise reader.refusal(f"text at byte {reader.at} is not UTF-8 ({error.reason})") from error
    return GgufFile(path, metadata, tensors, np.frombuffer(mapped, np.uint8))


class _Header:
    """Reads a header from front to back. Every read is checked against the end of the file first."""

    def __init__(self, path: epath.Path, mapped: mmap.mmap):
        self.path, self.mapped, self.at, self.strings = path, mapped, 0, 0
        self.end = min(len(mapped), _MOST_HEADER)
        library = gguf_library()
        self.types, self.kinds, self.sizes = (
            library.GGUFValueType,
            library.GGMLQuantizationType,
            library.GGML_QUANT_SIZES,
        )
        self.scalars = library.GGUFReader.gguf_scalar_to_np

    def refusal(self, what: str) -> UserError:
        return UserError(f"{self.path} cannot be read as GGUF: {what}.\nThe file is damaged, cut off or made up.")

    def read(self) -> tuple[dict[str, Any], dict[str, Stored]]:
        if self.take(4) != MAGIC:
            raise UserError(f"{self.path} is not a GGUF file: it does not begin with {MAGIC.decode()}.")
        version = self.number("<I")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            raise UserError(
                f"{self.path} is GGUF of version {version:#x}; read are {VERSIONS}, little-endian."
                + (" It was written for a big-endian machine." if swapped else "")
            )
        num_tensors, num_keys = self.number("<Q"), self.number("<Q")
        for what, count in (("tensors", num_tensors), ("keys", num_keys)):
            if count > _MOST_ENTRIES:
                raise self.refusal(f"its header counts {count} {what}, more than {_MOST_ENTRIES}")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self.text(_LONGEST_KEY, "a key")
            if not key or not key.isprintable() or key in metadata:
                raise self.refusal(f"the key {key[:80]!r} " + ("is there twice" if key in metadata else "is no name"))
            metadata[key] = self.value(self.number("<I"), key)
        infos = [self.tensor() for _ in range(num_tensors)]
        return metadata, self.placed(infos, metadata.get("general.alignment", 32))

    def take(self, count: int) -> bytes:
        if count > self.end - self.at:
            where = "the end of the file" if self.end == len(self.mapped) else f"{_MOST_HEADER} bytes"
            raise self.refusal(f"at byte {self.at} its header wants {count} bytes more, past {where}")
        self.at += count
        return self.mapped[self.at - count : self.at]

    def number(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self, longest: int, what: str) -> str:
        length = self.number("<Q")
        if length > longest:
            raise self.refusal(f"at byte {self.at} {what} is said to be {length} bytes long")
        return self.take(length).decode()

    def value(self, code: int, key: str) -> Any:
        kind = self.known(self.types, code, f"the value of {key!r}")
        if kind == self.types.STRING:
            return self.text(self.end, f"the value of {key!r}")
        if kind == self.types.ARRAY:
            return self.array(key)
        value = np.frombuffer(self.take(np.dtype(self.scalars[kind]).itemsize), self.scalars[kind])[0]
        return value.item()

    def array(self, key: str) -> Any:
        kind, count = self.known(self.types, self.number("<I"), f"the values of {key!r}"), self.number("<Q")
        if kind == self.types.ARRAY:
            raise self.refusal(f"{key!r} is an array of arrays, which no model has")
        if kind != self.types.STRING:
            scalar = np.dtype(self.scalars[kind])
            return np.frombuffer(self.take(count * scalar.itemsize), scalar)
        self.strings += count
        if self.strings > _MOST_STRINGS or count * 8 > self.end - self.at:
            raise self.refusal(f"{key!r} is said to hold {count} texts")
        return [self.text(self.end, f"a text of {key!r}") for _ in range(count)]

    def tensor(self) -> tuple[str, Any, tuple[int, ...], int]:
        """-> name, type, shape, offset into the data."""
        name = self.text(_LONGEST_NAME, "a tensor's name")
        if not _NAME.fullmatch(name):
            raise self.refusal(f"{name!r} is no name of a tensor")
        dimensions = self.number("<I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise self.refusal(f"tensor {name} has {dimensions} dimensions")
        shape = tuple(self.number("<Q") for _ in range(dimensions))[::-1]
        return name, self.known(self.kinds, self.number("<I"), f"tensor {name}"), shape, self.number("<Q")

    def placed(self, infos: list[tuple[str, Any, tuple[int, ...], int]], alignment: Any) -> dict[str, Stored]:
        """Tensors by name, each wholly inside the file and none over another."""
        if type(alignment) is not int or not 1 <= alignment <= _MOST_ALIGNMENT or alignment & (alignment - 1):
            raise self.refusal(f"general.alignment={alignment!r} is no power of two up to {_MOST_ALIGNMENT}")
        start = -(-self.at // alignment) * alignment
        tensors: dict[str, Stored] = {}
        for name, kind, shape, offset in infos:
            per_block, block_size = self.sizes[kind]
            # Python's integers do not overflow: a product past 2^64 is simply larger than the file.
            size = math.prod(shape) // per_block * block_size
            if name in tensors:
                raise self.refusal(f"tensor {name} is there twice")
            if min(shape) < 1 or shape[-1] % per_block:
                raise self.refusal(f"tensor {name} has shape {shape}, in blocks of {per_block}")
            if offset % alignment:
                raise self.refusal(f"tensor {name} begins at {offset}, no multiple of {alignment}")
            if start + offset + size > len(self.mapped):
                raise self.refusal(
                    f"tensor {name} of shape {shape} ends at byte {start + offset + size}, "
                    f"the file at {len(self.mapped)}"
                )
            tensors[name] = Stored(name, kind, shape, start + offset, size)
        by_place = sorted(tensors.values(), key=lambda t: t.offset)
        for one, other in itertools.pairwise(by_place):
            if one.offset + one.size > other.offset:
                raise self.refusal(f"tensors {one.name} and {other.name} lie over each other")
        return tensors

    def known(self, kinds: Any, code: int, what: str) -> Any:
        try:
            return kinds(code)
        except ValueError as error:
            raise self.refusal(f"{what} has type {code}, which is not known") from error
