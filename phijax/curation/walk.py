"""Which files a folder or a glob means: links are followed, each real folder is read once."""

import fnmatch
import glob
import os
from collections import deque
from collections.abc import Iterator

from etils import epath

Found = list[tuple[str, str]]  # name relative to the input, with / between; path


def below(root: str, outside: str) -> tuple[Found, list[str]]:
    """Files below a folder, and the names of linked folders that are not entered, with / at the end.

    Not entered is a link to what is read anyway, under its own name, or to a folder around `root`: it would give the
    same text twice, or never end. What is hidden, as .git, and the folder `outside` are no input.
    """
    top, away = os.path.realpath(root), os.path.realpath(outside)
    seen, found, left = {away} - {top}, [], []
    folders, links = deque([(root, "", top)]), deque()  # real folders first, whatever the names
    while folders or links:
        folder, prefix, real = (folders or links).popleft()
        if real in seen or (f"{top}/".startswith(f"{real.rstrip('/')}/") and real != top):
            left += [prefix] if real != away else []
            continue
        seen.add(real)
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                name = f"{prefix}{entry.name}"
                if entry.name.startswith("."):
                    continue
                if not os.path.isdir(entry.path):  # entry.is_dir() fails for a link to itself
                    found.append((name, entry.path))
                elif entry.is_symlink():
                    links.append((entry.path, f"{name}/", os.path.realpath(entry.path)))
                else:
                    folders.append((entry.path, f"{name}/", f"{real.rstrip('/')}/{entry.name}"))
    return found, left


def matching(pattern: str, outside: str) -> tuple[Found, list[str]]:
    """Files that a local glob means, and the folders, with / at the end, that it means as well and does not enter."""
    root = _fixed_folder(pattern) or "."
    wanted = pattern[len(_fixed_folder(pattern)) :].lstrip("/").split("/")
    if "**" in wanted:  # glob's own follows links in circles, for ever where there are two
        found, left = below(root, outside) if os.path.isdir(root) else ([], [])
        return [(name, path) for name, path in found if _fits(name.split("/"), wanted)], left
    paths = glob.glob(pattern)
    if not paths and os.path.lexists(pattern):
        paths = [pattern]  # a name with brackets in it
    files = [(os.path.relpath(path, root), path) for path in paths if not os.path.isdir(path)]
    return files, [f"{os.path.relpath(path, root)}/" for path in paths if os.path.isdir(path)]


def _fits(parts: list[str], wanted: list[str]) -> bool:
    if not wanted:
        return not parts
    if wanted[0] == "**":
        return any(_fits(parts[i:], wanted[1:] or ["*"]) for i in range(len(parts)))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], wanted[0]) and _fits(parts[1:], wanted[1:])


def in_bucket(pattern: str) -> Found:
    """Files of a folder of an object store with all below it, or of a glob there."""
    folder = epath.Path(pattern)
    if folder.is_dir():
        return list(_below_in_bucket(folder, ""))
    place = epath.Path(*folder.parts[:3])  # gs://bucket: what is behind it may have wildcards in it
    root = len(os.fspath(epath.Path(_fixed_folder(pattern)))) + 1
    paths = place.glob("/".join(folder.parts[3:])) if len(folder.parts) > 3 else ()
    return [(os.fspath(path)[root:], os.fspath(path)) for path in paths if not path.is_dir()]


def _below_in_bucket(folder: epath.Path, prefix: str) -> Iterator[tuple[str, str]]:
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _below_in_bucket(path, f"{prefix}{path.name}/")
        else:
            yield f"{prefix}{path.name}", os.fspath(path)


def _fixed_folder(pattern: str) -> str:
    """What stands before the first wildcard is where the data happen to lie: no part of their names."""
    return os.path.dirname(pattern[: min((pattern.index(c) for c in "*?[" if c in pattern), default=len(pattern))])
