"""The manifest of a saved step, written last: a step without a manifest that matches its files does not exist.

Orbax's format has no checksum over its chunks: a flipped byte restores as wrong weights without a word. The manifest
holds the size and CRC-32 of every file, and its own.
"""

import json
import os
import re
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import jax
from etils import epath

from phijax.errors import UserError
from phijax.storage import atomic, durable, strict_json
from phijax.storage.regular_files import is_regular
from phijax.storage.strict_json import Fields, shown

MANIFEST_FILE = "manifest.json"
STATE_FOLDER = "state"  # what Orbax writes, inside a step's folder
FORMAT = 2  # the newest that is read; written is 1 wherever its readers would not be misled
READ_BYTES = 8 * 2**20
LONGEST = 1 << 26  # bytes of a manifest: 500,000 files
LARGEST = 1 << 62  # of a step, a size
DIFFERENCES_SHOWN = 8

Leaves = dict[str, Any]  # path of a leaf, as "params/blocks/gate" -> leaf


class DamagedManifest(Exception):
    """The manifest cannot be read as one; the message says why."""


def flatten(tree: Any) -> Leaves:
    """Leaves of any pytree by path, "a/b/0". Raises TypeError when two leaves share a path or one has none."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not name or name in leaves:
            raise TypeError(f"a checkpoint needs one path for every array; {name!r} is empty or stands twice")
        leaves[name] = leaf
    return leaves


def describe_leaves(leaves: Leaves) -> list[dict]:
    """Path, shape and dtype of every leaf, for the manifest."""
    return [
        {"path": path, "shape": [int(size) for size in leaf.shape], "dtype": str(leaf.dtype)}
        for path, leaf in leaves.items()
    ]


def write(folder: epath.Path, *, step: int, leaves: list[dict], identity: dict, extra: dict, version: int) -> dict:
    """Digests what lies under `folder` / state, makes it durable, then writes the manifest. Returns the manifest.

    Args: version: the oldest format whose readers understand `identity`, 1 to FORMAT.
    """
    files = _digest_files(folder, durable.files_below(folder / STATE_FOLDER), sync=True)
    durable.sync_tree(folder)
    durable.sync_directory(folder.parent)
    content = {
        "format": version,
        "kind": "phijax run state",
        "step": step,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "identity": identity,
        "extra": extra,
        "leaves": leaves,
        "files": files,
    }
    atomic.write_text(folder / MANIFEST_FILE, json.dumps({**content, "crc32": _own_digest(content)}, indent=1))
    return content


def read(folder: epath.Path) -> dict:
    """The manifest of a step's folder. Raises DamagedManifest."""
    try:
        content = dict(strict_json.read(folder / MANIFEST_FILE, LONGEST, not_finite=True, half_characters=True).values)
    except UserError as error:
        raise DamagedManifest(f"{MANIFEST_FILE} cannot be read: {error}") from error
    if content.pop("crc32", None) != _own_digest(content):
        raise DamagedManifest(f"{MANIFEST_FILE} does not match its own digest")
    found = content.get("format")
    if type(found) is not int or not 1 <= found <= FORMAT:
        raise UserError(
            f"{folder / MANIFEST_FILE} has format {shown(found)}; this version of phijax reads 1 to {FORMAT}. "
            "A newer one wrote it: take that."
        )
    try:
        _check(Fields(content, MANIFEST_FILE))
    except UserError as error:
        raise DamagedManifest(str(error)) from error
    return content


def _check(content: Fields) -> None:
    """What reading relies on; a manifest may come from anybody. Raises: UserError."""
    content.integer("step", most=LARGEST)
    content.text("written")
    content.object("identity")
    extra = content.object("extra")
    extra.boolean("good", None), extra.integer("restore_step", None, most=LARGEST)
    scores = extra.object("scores", Fields({}, MANIFEST_FILE))
    if wrong := [name for name, score in scores.values.items() if type(score) not in (int, float)]:  # NaN is a score
        raise scores.refusal(wrong[0], "a number")
    for leaf in content.objects("leaves"):
        leaf.text("path")
        if len(leaf.integers("shape", most=LARGEST)) > 8:
            raise leaf.refusal("shape", "of at most 8 dimensions")
        if not re.fullmatch("[a-z0-9_]{1,32}", leaf.text("dtype")):
            raise leaf.refusal("dtype", "the name of one")
    for file in content.objects("files"):
        file.integer("bytes", most=LARGEST), file.text("crc32")
        # A path that leads out of the folder would have any file of the reader's read.
        if not re.fullmatch(r"(?!.*(^|/)\.\.?(/|$))[^/].*", file.text("path")):
            raise file.refusal("path", f"a path below {STATE_FOLDER}/")


def verify(folder: epath.Path, *, by_step: bool = True) -> list[str]:
    """What is wrong with a saved step: one line per file, empty if all is as it was written. Reads every byte.

    Args:
      by_step: the folder is one of a run's and must be named by its step; a copy elsewhere may have any name.
    """
    try:
        content = read(folder)
    except DamagedManifest as error:
        return [str(error)]
    problems = (
        [] if not by_step or folder.name == str(content["step"]) else [f"{MANIFEST_FILE} is of step {content['step']}"]
    )
    readable = []
    for entry in content["files"]:
        path = folder / entry["path"]
        if not path.exists():
            problems.append(f"{entry['path']} is missing")
        elif not is_regular(path):
            problems.append(f"{entry['path']} is no regular file")
        elif (size := path.stat().length) != entry["bytes"]:
            problems.append(f"{entry['path']} has {size:,} bytes instead of {entry['bytes']:,}")
        else:
            readable.append(entry)
    if problems:
        return problems  # digests of gigabytes would add nothing
    try:
        found = _digest_files(folder, [folder / entry["path"] for entry in readable], sync=False)
    except OSError as error:
        return [f"cannot be read: {error}"]
    return [
        f"{expected['path']} has changed since it was written (CRC-32 {entry['crc32']}, written as {expected['crc32']})"
        for expected, entry in zip(readable, found, strict=True)
        if entry["crc32"] != expected["crc32"]
    ]


def damage(folder: epath.Path, problems: list[str]) -> str:
    """What `verify` found, in one line."""
    return f"{folder} is damaged: " + "; ".join(problems)


def called_good(content: dict) -> bool | None:
    """What a manifest says of its step's last update (good.py); None where it says nothing, as older ones do."""
    extra = content.get("extra")
    return extra["good"] is True if isinstance(extra, dict) and "good" in extra else None


def differences(stored: list[dict], wanted: list[dict], *, partial: bool = False) -> list[str]:
    """What keeps a checkpoint with `stored` leaves from becoming `wanted`, one line per leaf.

    Args:
      partial: the checkpoint may hold more than is wanted.
    """
    have = {leaf["path"]: leaf for leaf in stored}
    want = {leaf["path"]: leaf for leaf in wanted}
    lines = [f"{path}: not in the checkpoint" for path in want if path not in have]
    for path, leaf in have.items():
        if path not in want:
            lines += [] if partial else [f"{path}: only in the checkpoint"]
        elif leaf != want[path]:
            lines.append(f"{path}: {_kind(leaf)} in the checkpoint, {_kind(want[path])} wanted")
    return lines


def refuse_differences(folder: epath.Path, lines: list[str], total: int) -> None:
    """Raises UserError naming the first of `lines`, if there are any."""
    if not lines:
        return
    shown = "".join(f"\n  {line}" for line in lines[:DIFFERENCES_SHOWN])
    more = f"\n  and {len(lines) - DIFFERENCES_SHOWN} more" if len(lines) > DIFFERENCES_SHOWN else ""
    raise UserError(
        f"{folder} is the checkpoint of another model: {len(lines)} differences, of {total} arrays.{shown}{more}\n"
        "Nothing is cast or reshaped silently: use the config it was saved with, or another --workdir."
    )


def _kind(leaf: dict) -> str:
    return f"{leaf['dtype']} ({', '.join(map(str, leaf['shape']))})"


def _own_digest(content: dict) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def _digest_files(folder: epath.Path, paths: Iterable[epath.Path], *, sync: bool) -> list[dict]:
    # zlib releases the interpreter lock, so threads digest in parallel, about 4 GB/s on each core.
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda path: _digest_file(folder, path, sync), paths))


def _digest_file(folder: epath.Path, path: epath.Path, sync: bool) -> dict:
    digest, size = 0, 0
    with path.open("rb") as file:
        if sync and durable.is_local(path):
            # Orbax syncs its array data, not its metadata; a read-only descriptor syncs just as well.
            os.fsync(file.fileno())
        while chunk := file.read(READ_BYTES):
            digest = zlib.crc32(chunk, digest)
            size += len(chunk)
    relative = str(path)[len(str(folder)) + 1 :]
    return {"path": relative, "bytes": size, "crc32": f"{digest:08x}"}
