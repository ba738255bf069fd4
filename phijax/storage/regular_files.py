"""Files that anybody may have put there: a regular file of a bounded size is read, a pipe or a device never is.

A pipe that nobody writes to holds its reader for ever, /dev/zero has no end, and a link may lead to either.
"""

import stat
from typing import BinaryIO

from etils import epath

from phijax.errors import UserError

LONGEST = 16_000_000  # bytes of a file; real ones of ours have some thousand, an index of a large model a million


def size_of(path: epath.PathLike) -> int:
    """Bytes of a file. Raises: UserError for what is missing, or no regular file, as a folder, a pipe or a device."""
    try:
        if is_regular(path):
            return epath.Path(path).stat().length
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    raise UserError(f"{path} is no regular file.")


def is_regular(path: epath.PathLike) -> bool:
    """Whether a file that is there is one of bytes that end. Objects of a bucket are. Raises: OSError."""
    found = epath.Path(path).stat()
    return not found.is_directory and (found.mode is None or stat.S_ISREG(found.mode))


def read_bounded(path: epath.PathLike, longest: int | None = LONGEST) -> bytes:
    """A file of at most `longest` bytes; None: of any size, as our own that grow.

    Raises: UserError as `size_of`, and for one that is larger or not readable.
    """
    if (size := size_of(path)) > (size if longest is None else longest):
        raise UserError(f"{path} has {size:,} bytes; a file of its kind is read up to {longest:,}.")
    try:
        return epath.Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error


def begins_with(path: epath.PathLike, start: bytes) -> bool:
    """Whether the first bytes are `start`. Raises: UserError as `size_of`."""
    size_of(path)
    with epath.Path(path).open("rb") as file:
        return file.read(len(start)) == start


def read_stream(file: BinaryIO, name: str, longest: int = LONGEST) -> bytes:
    """What a file, or a pipe that was meant, gives up to its end. Raises: UserError for more than `longest` bytes."""
    data = file.read(longest + 1)
    if len(data) > longest:
        raise UserError(f"{name} has more than {longest:,} bytes.")
    return data
