"""Bytes that survive a power cut: fsync on local file systems; object stores commit a whole object at once."""

import json
import os

from etils import epath

from phijax.distribution import install_hint
from phijax.errors import UserError


def is_local(path: epath.Path) -> bool:
    """False for gs:// and other object stores, where a write is atomic and fsync has no meaning."""
    return "://" not in str(path)


def prepare_store(path: epath.Path) -> None:
    """Before the first look at a bucket: its client must be here, and must not answer out of its memory.

    gcsfs keeps a folder's first listing for ever, while TensorStore and other processes write into it.
    Raises: UserError where the client is missing.
    """
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
    return epath.Path(os.path.abspath(os.fspath(path))) if is_local(path) else path


def sync_directory(path: epath.Path) -> None:
    """Makes the names in a local directory durable: a rename is not, until its directory is synced."""
    if not is_local(path):
        return
    descriptor = os.open(os.fspath(path), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: epath.Path, text: str) -> None:
    """Writes a small file so that a reader, at any instant and after a power cut, sees all of it or none."""
    if not is_local(path):
        path.write_text(text)
        return
    temporary = path.parent / f"{path.name}.tmp"
    with open(os.fspath(temporary), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


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


def write_json(path: epath.Path, content: dict) -> None:
    """`write_text` of an object, for people to read."""
    write_text(path, json.dumps(content, indent=2) + "\n")
