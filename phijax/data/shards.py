"""Token shards: the folder that `phijax.prepare` writes and training reads, both ways.

A folder holds manifest.json, the tokenizer, and shard-00000-of-0000N.arrayrecord. In a shard the documents, each with
end-of-text behind it, stand one after the other and are cut into records of block + 1 tokens; the last token of a
record is the first of the next, so that every token of a record but its last has its target in the same record.
"""

import contextlib
import hashlib
import os
import pathlib
import struct
import threading
from collections.abc import Iterable, Sequence

import numpy as np
from array_record.python import array_record_module
from etils import epath

from phijax.data import verification
from phijax.data.shard_manifest import DTYPES, Manifest, ShardEntry, read_manifest
from phijax.data.verification import ShardFile
from phijax.errors import UserError
from phijax.storage.durable import check_text
from phijax.storage.regular_files import size_of
from phijax.text.open import open_tokenizer
from phijax.text.tokenizer import TextTokenizer

# magic, version, bytes of a token, zero, number of tokens, number of document starts; then the tokens, then the
# indices of the starts as uint32. Little-endian.
_HEADER = struct.Struct("<4sBBHII")
_MAGIC = b"pjxr"
_VERSION = 1
_TOKEN_TYPES = {2: np.dtype("<u2"), 4: np.dtype("<u4")}


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 while every id fits. Raises UserError for a vocabulary that int32 does not hold."""
    for name, ids in DTYPES.items():
        if vocab_size <= ids:
            return np.dtype(name)
    raise UserError(f"A vocabulary of {vocab_size} ids is more than int32 holds.")


def encode_record(tokens: np.ndarray, starts: np.ndarray) -> bytes:
    """One record's bytes.

    Args:
      tokens: (block + 1,) uint16 or uint32.
      starts: (block + 1,) bool, where a document begins.
    """
    token_type = _TOKEN_TYPES[tokens.dtype.itemsize]
    assert tokens.dtype == token_type and tokens.shape == starts.shape and tokens.ndim == 1, (
        tokens.dtype,
        tokens.shape,
    )
    where = np.flatnonzero(starts).astype("<u4")
    header = _HEADER.pack(_MAGIC, _VERSION, token_type.itemsize, 0, len(tokens), len(where))
    return header + tokens.astype(token_type).tobytes() + where.tobytes()


def decode_record(data: bytes, where: str = "a record") -> tuple[np.ndarray, np.ndarray]:
    """The inverse: tokens (block + 1,) int32 and starts (block + 1,) bool. Raises UserError naming `where`."""
    if len(data) < _HEADER.size:
        raise UserError(f"{where} is corrupt: {len(data)} bytes are too few for its header.")
    magic, version, size, zero, num_tokens, num_starts = _HEADER.unpack_from(data)
    if magic != _MAGIC or version != _VERSION or size not in _TOKEN_TYPES or zero != 0:
        raise UserError(f"{where} is corrupt or of another version: its header is {data[:8]!r}.")
    end_of_tokens = _HEADER.size + num_tokens * size
    if len(data) != end_of_tokens + 4 * num_starts:
        raise UserError(
            f"{where} is corrupt: {num_tokens} tokens and {num_starts} document starts do not take {len(data)} bytes."
        )
    tokens = np.frombuffer(data, _TOKEN_TYPES[size], num_tokens, _HEADER.size)
    indices = np.frombuffer(data, "<u4", num_starts, end_of_tokens)
    if num_starts and (indices[-1] >= num_tokens or np.any(indices[1:] <= indices[:-1])):
        raise UserError(f"{where} is corrupt: its document starts do not rise, or lie outside of it.")
    if size == 4 and num_tokens and tokens.max() >= DTYPES["uint32"]:
        raise UserError(f"{where} is corrupt: it holds the token id {tokens.max()}.")
    starts = np.zeros(num_tokens, np.bool_)
    starts[indices] = True
    return tokens.astype(np.int32), starts


class ShardWriter:
    """Writes one shard file from documents, in order; under another name until `close`, so never half a shard.

    As a context manager it removes what it wrote when the block raises or does not reach `close`.
    """

    def __init__(self, path: str | os.PathLike, block: int, dtype: np.dtype):
        """Raises UserError (as all methods) when the disk is full or may not be written."""
        self._path = pathlib.Path(path)
        self._temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}.tmp")
        self._block = block
        self._dtype = np.dtype(dtype)
        self._waiting: list[np.ndarray] = []  # token arrays that are not in a record yet
        self._waiting_starts: list[np.ndarray] = []
        self._num_waiting = 0
        self._records = self._tokens = self._documents = 0
        # group_size 1: rows are drawn in random order, and a larger group would be decompressed whole for each.
        self._writer = array_record_module.ArrayRecordWriter(str(self._temporary), "group_size:1")
        if not self._writer.ok():
            _or_user_error(self._path, self._writer.close)  # says why

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_) -> None:
        if self._writer.is_open():
            with contextlib.suppress(RuntimeError):  # of a shard that is given up; the block's own error goes on
                self._writer.close()
        self._temporary.unlink(missing_ok=True)

    def add(self, document: np.ndarray) -> None:
        """Appends a document: (n,) ids, its end-of-text included."""
        if document.size == 0:
            raise ValueError("a document has at least its end-of-text")
        starts = np.zeros(len(document), np.bool_)
        starts[0] = True
        self._waiting.append(document.astype(self._dtype, casting="safe", copy=False))
        self._waiting_starts.append(starts)
        self._num_waiting += len(document)
        self._tokens += len(document)
        self._documents += 1
        if self._num_waiting > self._block:
            self._write_records()

    def close(self) -> ShardEntry:
        """Puts the shard in place, on disk. Returns its entry for the manifest."""
        _or_user_error(self._path, self._writer.close)
        stored = self._records * self._block + 1 if self._records else 0
        digest, size = _or_user_error(self._path, _sync_and_digest, self._temporary)
        os.replace(self._temporary, self._path)
        return ShardEntry(
            file=self._path.name,
            records=self._records,
            tokens=self._tokens,
            tail_tokens=self._tokens - stored,
            documents=self._documents,
            bytes=size,
            sha256=digest,
        )

    def _write_records(self) -> None:
        tokens, starts = np.concatenate(self._waiting), np.concatenate(self._waiting_starts)
        position = 0
        while position + self._block < len(tokens):
            record = slice(position, position + self._block + 1)
            data = encode_record(tokens[record], starts[record])
            _or_user_error(self._path, self._writer.write, data)
            self._records += 1
            position += self._block
        self._waiting, self._waiting_starts = [tokens[position:]], [starts[position:]]
        self._num_waiting = len(tokens) - position


class Shards:
    """A folder of shards, open for reading. Safe to share between threads; pickled, it opens its files anew."""

    def __init__(self, folder: str, manifest: Manifest):
        self._folder = folder
        self.manifest = manifest
        self.block = manifest.block
        self.num_records = manifest.num_records
        self.records_per_shard = tuple(shard.records for shard in manifest.shards)
        self.tokenizer_fingerprint = manifest.tokenizer_fingerprint
        self.vocab_size = manifest.vocab_size
        self.digest = manifest.digest
        self._readers: dict[int, array_record_module.ArrayRecordReader] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: str | epath.PathLike) -> "Shards":
        """Reads the manifest and looks for every file that it names, without reading them.

        Raises UserError for a missing or damaged manifest, a missing shard, one of another size, another tokenizer,
          a path that is not UTF-8.
        """
        folder = epath.Path(path)
        check_text(folder)
        manifest = read_manifest(folder)
        for shard in manifest.shards:
            file = folder / shard.file
            if not file.exists():
                raise UserError(f"The shard {file} is missing; {folder}'s manifest names it. Copy or prepare it again.")
            if (size := size_of(file)) != shard.bytes:
                raise UserError(
                    f"The shard {file} has {size} bytes; the manifest says {shard.bytes}. Copy or prepare it again."
                )
        found = open_tokenizer(folder).fingerprint
        if found != manifest.tokenizer_fingerprint:
            raise UserError(
                f"The tokenizer in {folder} is not the one its shards were made with: fingerprint {found[:12]}, "
                f"the manifest says {manifest.tokenizer_fingerprint[:12]}."
            )
        return cls(str(folder), manifest)

    def tokenizer(self) -> TextTokenizer:
        """The one the shards were made with."""
        return open_tokenizer(self._folder)

    def made_with(self, tokenizer: TextTokenizer) -> bool:
        """Whether `tokenizer` gives the ids that the shards' own does, though it may come from another kind of file."""
        return tokenizer.fingerprint == self.tokenizer_fingerprint or self.tokenizer().same_ids(tokenizer)

    def require_tokenizer(self, tokenizer: TextTokenizer, where: str) -> None:
        """Raises UserError unless the shards were made with `tokenizer`; `where` says whose it is."""
        if not self.made_with(tokenizer):
            raise UserError(
                f"The tokenizer of {where} ({tokenizer.vocab_size} ids, {tokenizer.fingerprint[:12]}) is not that of "
                f"the shards in {self._folder} ({self.vocab_size} ids, {self.tokenizer_fingerprint[:12]}).\n"
                "Take the shards' own tokenizer, or prepare the text again with the other."
            )

    def read(self, shard: int, records: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Tokens (block + 1,) int32 and starts (block + 1,) bool of each record, in one batch of reads.

        Raises UserError naming file and record for what is corrupt, or holds ids that the vocabulary does not.
        """
        entry = self.manifest.shards[shard]
        wanted = [int(record) for record in records]
        if wanted and not (0 <= min(wanted) and max(wanted) < entry.records):
            raise IndexError(f"records {min(wanted)}..{max(wanted)} of {entry.file}, which has {entry.records}")
        reader = self._reader(shard)
        try:
            found = reader.read(wanted)
        except RuntimeError:
            found = [self._read_one(reader, entry, record) for record in wanted]
        return [self._decode(entry, record, data) for record, data in zip(wanted, found, strict=True)]

    def files(self) -> list[ShardFile]:
        """Where they lie, absolute, and what the manifest says of them."""
        folder = self._folder if "://" in self._folder else os.path.abspath(self._folder)
        return [ShardFile(f"{folder}/{shard.file}", shard.bytes, shard.sha256) for shard in self.manifest.shards]

    def verify(self) -> None:
        """Reads every file whole. Raises UserError naming the first whose sha256 is not the manifest's."""
        for file in self.files():
            verification.check(file)

    def __reduce__(self):
        return Shards, (self._folder, self.manifest)

    def _reader(self, shard: int) -> array_record_module.ArrayRecordReader:
        with self._lock:
            if shard not in self._readers:
                entry = self.manifest.shards[shard]
                path = f"{self._folder}/{entry.file}"
                # Random access: without these two options each reader keeps threads and 16 MB that it never uses.
                reader = array_record_module.ArrayRecordReader(path, "readahead_buffer_size:0,max_parallelism:0")
                if not reader.ok():
                    raise UserError(f"The shard {path} cannot be read: {_reason(reader)}")
                if reader.num_records() != entry.records:
                    raise UserError(
                        f"The shard {path} holds {reader.num_records()} records; the manifest says {entry.records}."
                    )
                self._readers[shard] = reader
            return self._readers[shard]

    def _read_one(self, reader: array_record_module.ArrayRecordReader, entry: ShardEntry, record: int) -> bytes:
        try:
            return reader.read([record])[0]
        except RuntimeError as error:
            raise UserError(
                f"Record {record} of {self._folder}/{entry.file} is corrupt ({error}). Copy or prepare the shard again."
            ) from error

    def _decode(self, entry: ShardEntry, record: int, data: bytes) -> tuple[np.ndarray, np.ndarray]:
        where = f"Record {record} of {self._folder}/{entry.file}"
        tokens, starts = decode_record(data, where)
        if len(tokens) != self.block + 1:
            raise UserError(f"{where} holds {len(tokens)} tokens; the manifest says {self.block + 1}.")
        if (largest := int(tokens.max())) >= self.vocab_size:
            # On the device such an id would read the last row of the embedding without an error.
            raise UserError(f"{where} holds the token id {largest}; the vocabulary has {self.vocab_size} ids.")
        return tokens, starts


def files_of(folders: Iterable[Shards]) -> list[ShardFile]:
    """Of all folders, each file once."""
    return list({file.path: file for shards in folders for file in shards.files()}.values())


def _sync_and_digest(path: pathlib.Path) -> tuple[str, int]:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest(), file.tell()


def _or_user_error(path: pathlib.Path, call, *arguments):
    """`call(*arguments)`; what ArrayRecord and the system say of a full or forbidden disk becomes a UserError."""
    try:
        return call(*arguments)
    except (RuntimeError, OSError) as error:
        raise UserError(f"The shard {path} could not be written: {error}.") from error


def _reason(reader: array_record_module.ArrayRecordReader) -> str:
    try:
        reader.read_all()
    except RuntimeError as error:
        return f"{error}."
    return "it is no ArrayRecord file, or an unfinished one."
