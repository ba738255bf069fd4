"""The two stages from text to token shards: parts of the input -> tokens with a place for each; then shard by shard.

Every document has its shard and its place there by a hash of (seed, file, index): a shuffle of any amount of text that
depends on nothing else, and holds no more in memory than the tokens of one shard.
"""

import dataclasses
import hashlib
import os
import pathlib
import struct
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np

from phijax.curation.documents import BrokenFile, Document, Part, read_part
from phijax.curation.dropped import Found, OfPart
from phijax.data.shards import ShardWriter, token_dtype
from phijax.text.open import open_tokenizer
from phijax.text.tokenizer import TextTokenizer

# Where a document's tokens lie in the file of its unit, and where they go.
_PLACE = np.dtype([("order", "<u8"), ("draw", "<u8"), ("validation", "?"), ("length", "<u8"), ("start", "<u8")])


@dataclasses.dataclass(frozen=True)
class Stage:
    """What both stages must agree on. Shards are numbered through: training first, then validation.

    Units do not depend on the number of shards, which may go with the size of the input: a file more is a unit more.
    """

    seed: int
    block: int
    num_train_shards: int
    num_validation_shards: int
    validation_fraction: float
    text_field: str
    tokenizer: str  # folder
    skip_broken: bool = False  # leave out files that cannot be read, and go on


def tokenize_unit(parts: Sequence[Part], stage: Stage, output: pathlib.Path) -> dict[str, Any]:
    """Writes the tokens of all documents of `parts`, then their places. Returns what `dropped.merged` adds up.

    Raises BrokenFile for a file that cannot be read, OSError for a disk that cannot be written.
    """
    tokenizer = open_tokenizer(stage.tokenizer)
    found = Found()
    places: list[tuple[int, int, bool, int, int]] = []
    temporary = output.with_name(f"{output.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            for part in parts:
                before, begin = len(places), file.tell()
                try:
                    found.add(part, _write_part(part, stage, tokenizer, file, places))
                except BrokenFile as error:
                    if not stage.skip_broken:
                        raise
                    found.skipped[part.file.name] = error.why
                    del places[before:]  # a file is in it as a whole or not at all
                    file.seek(begin)
                    file.truncate()
            _write_places(file, places)
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
    return found.to_json()


def _write_part(part: Part, stage: Stage, tokenizer: TextTokenizer, file: BinaryIO, places: list) -> OfPart:
    """Writes tokens, and adds to `places` where they lie and go."""
    dtype = token_dtype(tokenizer.vocab_size)
    start = file.tell() // dtype.itemsize
    found = OfPart()
    for document in read_part(part, stage.text_field, found.saw_line):
        if document.text is None:
            found.drop(document)
            continue
        ids = np.array([*tokenizer.encode(document.text), tokenizer.end_of_text], dtype)
        held_out = is_validation(document.text, stage.validation_fraction)
        found.keep("validation" if held_out else "train", len(ids), int(np.count_nonzero(ids == tokenizer.unknown)))
        places.append((*_draws(part, document, stage.seed), held_out, len(ids), start))
        start += len(ids)
        file.write(ids.tobytes())
    return found


def assemble_shard(shard: int, units: Sequence[pathlib.Path], stage: Stage, output: pathlib.Path) -> dict[str, Any]:
    """Writes one shard out of what all units hold for it. Returns its entry for the manifest. Raises UserError."""
    dtype = token_dtype(open_tokenizer(stage.tokenizer).vocab_size)
    orders, documents = [], []
    for unit in units:
        for place, ids in _documents_of_shard(unit, shard, stage, dtype):
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


def _draws(part: Part, document: Document, seed: int) -> tuple[int, int]:
    """Two numbers: the document's place among others, and what decides its shard, whatever the number of shards."""
    identity = f"{seed}\0{part.file.name}\0{document.index}".encode("utf-8", "surrogateescape")
    return struct.unpack("<QQ", hashlib.blake2b(identity, digest_size=16).digest())


def _shards(places: np.ndarray, stage: Stage) -> np.ndarray:
    """The shard of each place."""
    validation = stage.num_train_shards + places["draw"] % np.uint64(max(stage.num_validation_shards, 1))
    return np.where(places["validation"], validation, places["draw"] % np.uint64(stage.num_train_shards))


def _write_places(file: BinaryIO, places: list[tuple[int, int, bool, int, int]]) -> None:
    """Behind the tokens: the places, then how many they are."""
    file.write(np.array(places, _PLACE).tobytes())
    file.write(struct.pack("<Q", len(places)))
    file.flush()
    os.fsync(file.fileno())


def _documents_of_shard(
    unit: pathlib.Path, shard: int, stage: Stage, dtype: np.dtype
) -> Iterator[tuple[np.void, np.ndarray]]:
    with open(unit, "rb") as file:
        file.seek(-8, os.SEEK_END)
        (count,) = struct.unpack("<Q", file.read(8))
        file.seek(-8 - count * _PLACE.itemsize, os.SEEK_END)
        places = np.frombuffer(file.read(count * _PLACE.itemsize), _PLACE)
        for place in places[_shards(places, stage) == shard]:
            file.seek(int(place["start"]) * dtype.itemsize)
            yield place, np.frombuffer(file.read(int(place["length"]) * dtype.itemsize), dtype)
