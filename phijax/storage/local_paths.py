"""Three faults of etils' paths, mended for every room and every library: `import phijax` does it first.

Its `stat` asks for the name of a file's owner, and fails where the owner has none, as on mounts, NFS and in containers.
Its `glob` takes `[` and `*` in the folder's own name for a pattern: Orbax, which looks that way for what the processes
wrote, finds nothing and calls the step saved. Text is read and written in the locale's encoding: a tokenizer's file
would give other tokens where that is not UTF-8.
"""

import functools
import glob
import os
import stat
from typing import IO

from etils import epath
from etils.epath import backend, stat_utils


def mend() -> None:
    """Once for a process; again it changes nothing. What another release of etils lacks is left alone."""
    local, paths = type(getattr(backend, "os_backend", None)), type(epath.Path("/"))
    for name, ours in (("stat", _stat), ("open", _open)):
        if hasattr(local, name):
            setattr(local, name, ours)
    if not hasattr(paths.glob, "__wrapped__"):
        paths.glob = _of_that_folder(paths.glob)


def _stat(self, path: epath.PathLike) -> stat_utils.StatResult:
    found = os.stat(path)
    return stat_utils.StatResult(
        is_directory=stat.S_ISDIR(found.st_mode),
        length=found.st_size,
        mtime=int(found.st_mtime),
        owner=None,
        group=None,
        mode=found.st_mode,
    )


def _open(self, path: epath.PathLike, mode: str) -> IO:
    return open(path, mode, encoding=None if "b" in mode else "utf-8")


def _of_that_folder(original):
    @functools.wraps(original)
    def in_folder(self, pattern: str):
        return original(type(self)(glob.escape(os.fspath(self))), pattern)

    return in_folder
