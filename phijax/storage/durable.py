"""Bytes that survive a power cut: fsync on local file systems; object stores commit a whole object at once."""

import os
from typing import Any

from etils import epath

from phijax.distribution import install_hint
from phijax.errors import UserError


def is_local(path: epath.Path) -> bool:
    """False for gs:// and other object stores, where a write is atomic and fsync has no meaning."""
    return "://" not in str(path)


def prepare_store(path: epath.Path) -> None:
    """Before the first look at a run's folder: a bucket's client must be here, and must not answer out of its memory.

    gcsfs keeps a folder's first listing for ever, while TensorStore and other processes write into it.
    Raises: UserError where the client is missing, and for a name as `check_name`.
    """
    check_name(path, orbax=True)
    if is_local(path):
        return
    try:
        import fsspec.config
        import gcsfs  # noqa: F401
    except ImportError as error:
        raise UserError(f"{path}: buckets need their client.  Try {install_hint('gcs')}") from error
    for protocol in ("gs", "gcs"):
        fsspec.config.conf.setdefault(protocol, {})["use_listings_cache"] = False


def absolute(path: epath.PathLike) -> epath.Path:
    """The path as Orbax wants it: it refuses relative ones."""
    path = epath.Path(path)
    # abspath keeps two slashes at the start, which TensorStore refuses.
    return epath.Path("/" + os.path.abspath(os.fspath(path)).lstrip("/")) if is_local(path) else path


def kvstore(folder: epath.Path) -> dict[str, Any]:
    """A folder as TensorStore is told of it: by its parts, since in a URL `%`, `#`, `?` and `|` are not themselves.

    Raises: UserError as `check_name`.
    """
    check_name(folder)
    folder = absolute(folder)
    if is_local(folder):
        return {"driver": "file", "path": f"{folder}/"}
    bucket, _, path = str(folder).removeprefix("gs://").partition("/")
    return {"driver": "gcs", "bucket": bucket, "path": f"{path}/"}


def check_text(path: epath.PathLike) -> None:
    """Raises: UserError for a path that is not UTF-8, as libraries in C++ want it."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{ascii(os.fspath(path))[1:-1]} is no name in UTF-8. Rename it, or choose another.") from error


def check_name(folder: epath.Path, *, orbax: bool = False) -> None:
    """Raises: UserError for a path that TensorStore (and `orbax`, as for a run) would take for another, or refuses."""
    text = str(absolute(folder))
    try:
        text.encode()
        found = _taken_otherwise(text, orbax)
    except UnicodeEncodeError:
        found = "a name that is not UTF-8"
    if found:
        raise UserError(
            f"{ascii(text)[1:-1] if not text.isprintable() else text} has {found} in it, with which the libraries that "
            "read and write weights would take another folder. Rename it, or choose another."
        )


def _taken_otherwise(path: str, orbax: bool) -> str | None:
    if "://" in path:
        if not path.startswith("gs://"):
            return f"{path.split('://')[0]}:// (local folders and gs:// can hold weights)"
        wrong = [c for c in path if (c in "#?" and orbax) or not c.isprintable()]  # Orbax parses it as a URL
        return repr(wrong[0]) if wrong else None
    if "\\" in path:
        return "a backslash"
    if ".__lock/" in f"{path}/":
        return "'.__lock'"
    return "'gs:/'" if orbax and "gs:/" in f"{path}/" else None  # Orbax makes a bucket's of it


def sync_directory(path: epath.Path) -> None:
    """Makes the names in a local directory durable: a rename is not, until its directory is synced."""
    if not is_local(path):
        return
    descriptor = os.open(os.fspath(path), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def files_below(folder: epath.Path) -> list[epath.Path]:
    """Every file under `folder`, sorted by name; epath has no recursive glob."""
    found = []
    for child in sorted(folder.iterdir(), key=str):
        found += files_below(child) if child.is_dir() else [child]
    return found


def bytes_below(folder: epath.Path) -> int:
    """Bytes of all files under `folder`."""
    return sum(file.stat().length for file in files_below(folder))


def sync_tree(folder: epath.Path) -> None:
    """Syncs every directory under `folder` and itself, deepest first. Files are synced by who reads them."""
    for child in folder.iterdir():
        if child.is_dir():
            sync_tree(child)
    sync_directory(folder)
