"""A small file that is there whole or not at all, at any instant and after a power cut: the one way to write such."""

import contextlib
import json
import os
from collections.abc import Iterator

from etils import epath

from phijax.storage import durable


@contextlib.contextmanager
def replaced(path: epath.PathLike) -> Iterator[epath.Path]:
    """Gives a temporary name beside a local `path`; what the block wrote there is made durable and becomes `path`.

    After an exception nothing is left of it, and what was at `path` is as it was. Raises: OSError.
    """
    path = epath.Path(path)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"  # processes that write the same file share no name
    try:
        yield temporary
        with open(os.fspath(temporary), "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        durable.sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: epath.PathLike, data: bytes) -> None:
    """The file's whole content. An object of a bucket is whole at once. Raises: OSError."""
    path = epath.Path(path)
    if not durable.is_local(path):
        path.write_bytes(data)
        return
    with replaced(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: epath.PathLike, text: str) -> None:
    """The same in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: epath.PathLike, content: dict) -> None:
    """The same of an object, for people to read."""
    write_text(path, json.dumps(content, indent=2) + "\n")
