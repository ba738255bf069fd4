"""Raw text as people have it: which files there are, the documents in them, and why some cannot be used."""

import codecs
import dataclasses
import gzip
import json
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

from etils import epath

from phijax.curation import walk
from phijax.distribution import install_hint
from phijax.errors import UserError, nearest_name

SUFFIXES = (".txt", ".md", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_READ_BYTES = 1 << 20


class BrokenFile(UserError):
    """A file that cannot be read, or not to its end. `why`: without its path, which is another on another machine."""

    def __init__(self, path: str, why: str, cure: str = "Mend it, or leave it out of --input"):
        super().__init__(f"{path} {why}. {cure}; --on_error=skip leaves out every file that is broken.")
        self.why = why


@dataclasses.dataclass(frozen=True)
class InputFile:
    """A file to read. `name` is relative to the input folder, so that moved data give the same shards."""

    name: str
    path: str
    bytes: int


@dataclasses.dataclass(frozen=True)
class Part:
    """What one process reads at a time: a file, or of a .jsonl file the lines that begin in bytes [start, stop)."""

    file: InputFile
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Document:
    """`text`, or None and why: "empty", "not UTF-8", "malformed JSON", "no text field", "text field is no string"."""

    index: int  # in its file; the first byte of its line in a .jsonl file
    text: str | None
    dropped: str | None = None
    line: int = dataclasses.field(default=0, compare=False)  # or row, from 1 on in its part; 0: it is a whole file


def _raise(name: str, error: BrokenFile) -> None:
    raise error


def find_inputs(
    pattern: str, outside: str, broken: Callable[[str, BrokenFile], None] = _raise
) -> tuple[list[InputFile], list[str]]:
    """The files that a folder (with all below it), a file or a glob means, by name, and the names that are not read.

    What lies in the folder `outside`, where the output goes, is no input. `broken` is told of links that lead nowhere
    and of what is no file, and what it does not raise for is left out.

    Raises UserError when nothing is found, a glob names a file of no kind that is read, or a link leads nowhere.
    """
    if "://" in pattern:
        folder = epath.Path(pattern).is_dir()
        found, left = walk.in_bucket(pattern), []
    else:
        folder = os.path.isdir(pattern)
        found, left = walk.below(pattern, outside) if folder else walk.matching(pattern, outside)
    files = []
    for name, path in sorted(found):
        if _suffix(name):
            try:
                files.append(_input_file(name, path))
            except BrokenFile as error:
                broken(name, error)
    ignored = sorted(name for name, _ in found if not _suffix(name))
    if ignored and not folder:
        raise UserError(f"--input={pattern} means {ignored[0]} too, which is none of {' '.join(SUFFIXES)}.")
    ignored = sorted([*ignored, *left])
    if not files:
        other = f" It has {len(ignored)} others, as {ignored[0]}." if ignored else ""
        raise UserError(f"--input={pattern} means no file of {' '.join(SUFFIXES)}.{other}")
    return files, ignored


def parts_of(files: Iterable[InputFile], part_bytes: int) -> list[Part]:
    """Files in order, .jsonl files cut into pieces of about `part_bytes`; others cannot be entered in the middle."""
    parts = []
    for file in files:
        step = part_bytes if _suffix(file.name) == ".jsonl" else max(file.bytes, 1)
        parts += [Part(file, start, min(start + step, file.bytes)) for start in range(0, max(file.bytes, 1), step)]
    return parts


def read_part(part: Part, text_field: str, saw_line: Callable[[], None] = lambda: None) -> Iterator[Document]:
    """The documents of a part, dropped ones too. `saw_line` is called for each line, of those without a document too.

    Raises BrokenFile for a file that breaks off or is not what it says, UserError where a package is missing.
    """
    suffix = _suffix(part.file.name)
    try:
        if suffix in (".txt", ".md"):
            yield _text_file(part.file)
        elif suffix == ".jsonl":
            yield from _json_lines(_lines_of_range(part), text_field, saw_line)
        elif suffix == ".parquet":
            yield from _parquet(part.file, text_field)
        else:
            yield from _json_lines(_lines(_decompressed(part.file, suffix)), text_field, saw_line)
    except OSError as error:  # a broken .gz file is one too
        raise BrokenFile(part.file.path, f"cannot be read: {error.strerror or error}") from error


def _suffix(name: str) -> str | None:
    return next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), None)


def _input_file(name: str, path: str) -> InputFile:
    try:
        if "://" not in path and not stat.S_ISREG(os.stat(path).st_mode):
            raise BrokenFile(path, "is a pipe, a device or the like, not a file", "Take it out of --input")
        return InputFile(name, path, epath.Path(path).stat().length)
    except FileNotFoundError as error:
        if os.path.islink(path):
            why = f"is a link to {os.readlink(path)}, where nothing is"
            raise BrokenFile(path, why, "Mend the link, or take it out of --input") from error
        raise BrokenFile(path, f"cannot be read: {error.strerror or error}") from error
    except OSError as error:
        raise BrokenFile(path, f"cannot be read: {error.strerror or error}") from error


def _text_file(file: InputFile) -> Document:
    return _document(0, epath.Path(file.path).read_bytes().removeprefix(codecs.BOM_UTF8))


def _document(index: int, text: bytes | str, line: int = 0) -> Document:
    try:
        # A string out of JSON may hold half of a surrogate pair, which is text in no file.
        text = text.decode() if isinstance(text, bytes) else text.encode().decode()
    except UnicodeError:
        return Document(index, None, "not UTF-8", line)
    return Document(index, text, None, line) if text.strip() else Document(index, None, "empty", line)


def _json_lines(
    lines: Iterable[tuple[int, bytes]], text_field: str, saw_line: Callable[[], None]
) -> Iterator[Document]:
    for number, (index, line) in enumerate(lines, start=1):
        saw_line()
        if index == 0:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():  # a line with nothing in it, as at the end of many files, is no document
            yield _json_document(index, line, text_field, number)


def _json_document(index: int, line: bytes, text_field: str, number: int) -> Document:
    try:
        row = json.loads(line.decode())
    except UnicodeError:
        return Document(index, None, "not UTF-8", number)
    except (ValueError, RecursionError):
        return Document(index, None, "malformed JSON", number)
    if not isinstance(row, dict) or text_field not in row or row[text_field] is None:
        return Document(index, None, "no text field", number)
    return _document_of_field(index, row[text_field], number)


def _document_of_field(index: int, value: Any, line: int) -> Document:
    if not isinstance(value, str | bytes):
        return Document(index, None, "text field is no string", line)
    return _document(index, value, line)


def _lines_of_range(part: Part) -> Iterator[tuple[int, bytes]]:
    """Lines whose first byte lies in [start, stop), each with the position of that byte."""
    with epath.Path(part.file.path).open("rb") as file:
        position = part.start
        if part.start > 0:  # the byte before tells whether a line begins here
            file.seek(part.start - 1)
            position += len(file.readline()) - 1
        while position < part.stop and (line := file.readline()):
            yield position, line
            position += len(line)


def _lines(pieces: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    position, rest = 0, []
    for piece in pieces:
        *whole, last = piece.split(b"\n")
        for line in whole:
            line = b"".join([*rest, line])
            rest = []
            yield position, line
            position += len(line) + 1
        rest.append(last)
    if any(rest):
        yield position, b"".join(rest)


def _decompressed(file: InputFile, suffix: str) -> Iterator[bytes]:
    with epath.Path(file.path).open("rb") as raw:
        try:
            yield from _gunzip(raw) if suffix == ".jsonl.gz" else _unzstd(raw, file)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise BrokenFile(file.path, f"is broken ({error})", "Fetch it again, or leave it out of --input") from error


def _gunzip(raw: IO[bytes]) -> Iterator[bytes]:
    with gzip.open(raw) as unzipped:
        while piece := unzipped.read(_READ_BYTES):
            yield piece


def _unzstd(raw: IO[bytes], file: InputFile) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise UserError(f"Reading {file.path} needs zstandard: {install_hint('data')}") from error
    # Not its stream reader, which takes a file that breaks off for one that ends.
    frame = None
    while piece := raw.read(_READ_BYTES):
        while piece:
            frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            try:
                yield frame.decompress(piece)
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from error
            piece = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the file ends in the middle of a frame")


def _parquet(file: InputFile, text_field: str) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"Reading {file.path} needs pyarrow: {install_hint('data')}") from error
    index = 0
    with epath.Path(file.path).open("rb") as raw:
        try:
            with pyarrow.parquet.ParquetFile(raw, page_checksum_verification=True) as table:
                _require_column(file, text_field, table.schema_arrow.names)
                for batch in table.iter_batches(batch_size=256, columns=[text_field]):
                    for value in batch.column(0):
                        yield _parquet_document(index, value)
                        index += 1
        except (pyarrow.ArrowException, OSError) as error:
            why = f"is broken after {index} rows ({error})"
            raise BrokenFile(file.path, why, "Fetch it again, or leave it out of --input") from error


def _require_column(file: InputFile, text_field: str, names: list[str]) -> None:
    if text_field not in names:
        nearest = nearest_name(text_field, names) or (names[0] if names else "")
        why = f"has no column {text_field!r}. It has: {', '.join(names)}"
        raise BrokenFile(file.path, why, f"Try --text_field={nearest}")


def _parquet_document(index: int, value: Any) -> Document:
    try:
        text = value.as_py()
    except UnicodeError:
        return Document(index, None, "not UTF-8", index + 1)
    if text is None:
        return Document(index, None, "no text field", index + 1)
    return _document_of_field(index, text, index + 1)
