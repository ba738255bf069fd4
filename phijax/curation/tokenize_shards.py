"""The two stages from text to token shards: parts of the input -> tokens with a place for each; then shard by shard.

Every document has its shard and its place there by a hash of (seed, file, index): a shuffle of any amount of text that
depends on nothing else, and holds no more in memory than the tokens of one shard.
"""

import collections
import dataclasses
import hashlib
import os
import pathlib
import struct
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np

from phijax.curation.documents import Document, Part, read_part
from phijax.data.shards import ShardWriter, token_dtype
from phijax.text.open import open_tokenizer

# Where a document's tokens lie in the file of its unit, and where they go.
_PLACE = np.dtype([("order", "<u8"), ("shard", "<u4"), ("length", "<u8"), ("start", "<u8")])


@dataclasses.dataclass(frozen=True)
class Stage:
    """What both stages must agree on. Shards are numbered through: training first, then validation."""

    seed: int
    block: int
    num_train_shards: int
    num_validation_shards: int
    validation_fraction: float
    text_field: str
    tokenizer: str  # folder


def tokenize_unit(parts: Sequence[Part], stage: Stage, output: pathlib.Path) -> dict[str, Any]:
    """Writes the tokens of all documents of `parts`, then their places. Returns how many were kept, dropped and why.

    Raises UserError for a file that cannot be read, OSError for a disk that cannot be written.
    """
    tokenizer = open_tokenizer(stage.tokenizer)
    dtype = token_dtype(tokenizer.vocab_size)
    counts = collections.Counter(read=0, train=0, validation=0, tokens=0, unknown_tokens=0)
    dropped: collections.Counter[str] = collections.Counter()
    places = []
    temporary = output.with_name(f"{output.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            for part, document in _documents(parts, stage.text_field):
                counts["read"] += 1
                if document.text is None:
                    dropped[document.dropped] += 1
                    continue
                ids = np.array([*tokenizer.encode(document.text), tokenizer.end_of_text], dtype)
                split = "validation" if is_validation(document.text, stage.validation_fraction) else "train"
                counts[split] += 1
                counts["unknown_tokens"] += int(np.count_nonzero(ids == tokenizer.unknown))
                order, shard = _place(part, document, split, stage)
                places.append((order, shard, len(ids), counts["tokens"]))
                counts["tokens"] += len(ids)
                file.write(ids.tobytes())
            _write_places(file, places)
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
    return {**counts, "dropped": dict(dropped)}


def assemble_shard(shard: int, units: Sequence[pathlib.Path], stage: Stage, output: pathlib.Path) -> dict[str, Any]:
    """Writes one shard out of what all units hold for it. Returns its entry for the manifest. Raises UserError."""
    dtype = token_dtype(open_tokenizer(stage.tokenizer).vocab_size)
    orders, documents = [], []
    for unit in units:
        for place, ids in _documents_of_shard(unit, shard, dtype):
            orders.append(place["order"])
            documents.append(ids)
    with ShardWriter(output, stage.block, dtype) as writer:
        for i in np.argsort(np.array(orders, np.uint64), kind="stable"):
            writer.add(documents[i])
        return dataclasses.asdict(writer.close())


def is_validation(text: str, fraction: float) -> bool:
    """Decided by the text alone: it stays where it is when files are added, and a copy of it goes the same way."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"validation").digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def _documents(parts: Sequence[Part], text_field: str) -> Iterator[tuple[Part, Document]]:
    for part in parts:
        for document in read_part(part, text_field):
            yield part, document


def _place(part: Part, document: Document, split: str, stage: Stage) -> tuple[int, int]:
    identity = f"{stage.seed}\0{part.file.name}\0{document.index}".encode("utf-8", "surrogateescape")
    order, draw = struct.unpack("<QQ", hashlib.blake2b(identity, digest_size=16).digest())
    if split == "validation":
        return order, stage.num_train_shards + draw % stage.num_validation_shards
    return order, draw % stage.num_train_shards


def _write_places(file: BinaryIO, places: list[tuple[int, int, int, int]]) -> None:
    """Behind the tokens: the places, then how many they are."""
    file.write(np.array(places, _PLACE).tobytes())
    file.write(struct.pack("<Q", len(places)))
    file.flush()
    os.fsync(file.fileno())


def _documents_of_shard(unit: pathlib.Path, shard: int, dtype: np.dtype) -> Iterator[tuple[np.void, np.ndarray]]:
    with open(unit, "rb") as file:
        file.seek(-8, os.SEEK_END)
        (count,) = struct.unpack("<Q", file.read(8))
        file.seek(-8 - count * _PLACE.itemsize, os.SEEK_END)
        places = np.frombuffer(file.read(count * _PLACE.itemsize), _PLACE)
        for place in places[places["shard"] == shard]:
            file.seek(int(place["start"]) * dtype.itemsize)
            yield place, np.frombuffer(file.read(int(place["length"]) * dtype.itemsize), dtype)
