"""WORKDIR/compile_cache: programs are loaded as they were written or not at all, and not again after a crash.

JAX's persistent cache believes what it reads: one flipped bit trains on with other losses, or ends every start in
SIGSEGV. So JAX is handed a path of ours (epath.register_path_cls; it reads and writes buckets through epath), and each
file is JAX's entry behind a line with a digest of its name and bytes. The bytes that were digested are the very ones
that JAX gets: there is no time between a sweep and a load, what is not loaded costs nothing, and a write torn by a kill
or a full disk is found as any other damage is. Such an entry is dropped with a warning, and compiled anew.

No digest tells that a whole entry crashes this machine, being another CPU's, say. So a marker stands beside the folder
from the first load until what was loaded has run; found at a start, the folder is set aside.
"""

import contextlib
import hashlib
import os
import shutil
import socket
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

from phijax.checkpoint.agreement import from_process_zero
from phijax.errors import UserError
from phijax.storage import durable

FOLDER = "compile_cache"
SET_ASIDE = "compile_cache.set_aside"  # the newest one alone is kept, so that crashes fill no disk
MARKER = "compile_cache.unproven."  # and the number of the process
LEAST_SECONDS = 0.5  # of compiling that are worth a file
SCHEME = "phijax-digested://"
HEAD = "phijax sha256 "

Program = Callable[..., Any]


@contextlib.contextmanager
def opened(workdir: epath.Path, log: Callable[[str], None]) -> Iterator["CompileCache"]:
    """Gives JAX the programs that earlier starts have compiled. Collective; the workdir's lock must be held.

    A folder that cannot be used is said, and everything compiled.
    """
    usable = from_process_zero(lambda: _made_ready(workdir, log))
    cache = CompileCache(workdir)
    settings = {
        "jax_compilation_cache_dir": _path_for_jax(cache, workdir / FOLDER) if usable else None,
        "jax_persistent_cache_min_compile_time_secs": LEAST_SECONDS,
        "jax_persistent_cache_enable_xla_caches": "none",  # files that XLA writes by itself: nobody digests them
    }
    before = {name: getattr(jax.config, name) for name in settings}
    _configure(settings)
    try:
        yield cache
    except (UserError, OSError, KeyboardInterrupt, SystemExit):
        cache.proven()  # no program ends a run in these
        raise
    finally:
        _configure(before)
    cache.proven()


class CompileCache:
    """The entries of one workdir as one process sees them. Process 0 alone drops any, and JAX writes there alone."""

    def __init__(self, workdir: epath.Path):
        self._folder = workdir / FOLDER
        self._index = jax.process_index()
        self._marker = workdir / f"{MARKER}{self._index}"
        self._loaded: str | None = None  # the newest
        self._marked = False

    def read(self, name: str) -> bytes | None:
        """What was written under `name`; None if there is nothing, or nothing that may be used, with a warning."""
        path = self._folder / name
        try:
            if _is_no_file(path):  # a pipe would be waited for
                raise ValueError("is no file")
            content = unpack(name, path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            warnings.warn(f"{path} cannot be read: {error}. Its program is compiled anew.", stacklevel=2)
            return None
        except ValueError as reason:
            warnings.warn(f"{path} {reason}. It is dropped, its program compiled anew.", stacklevel=2)
            if self._index == 0:
                _remove(path)
            return None
        self._loaded = name
        return content if self._mark() else None

    def write(self, name: str, content: bytes) -> None:
        """Keeps `content` under `name`. What cannot be kept is a warning: it is compiled again at the next start."""
        path = self._folder / name
        try:
            if durable.is_local(path):
                path.unlink(missing_ok=True)
                with open(os.fspath(path), "xb") as file:
                    file.write(pack(name, content))
            else:
                path.write_bytes(pack(name, content))
        except FileExistsError:
            pass  # another run that shares the folder was first
        except OSError as error:
            _remove(path)
            warnings.warn(f"{path} cannot be written: {error}. The next start compiles it again.", stacklevel=2)

    def tried(self, program: Program) -> Program:
        """`program`, its first call awaited under the marker: it may have been loaded."""
        ran = False

        def call(*arguments):
            nonlocal ran
            if ran:
                return program(*arguments)
            if self._loaded:
                self._mark()
            result = jax.block_until_ready(program(*arguments))
            self.proven()
            ran = True
            return result

        return call

    def proven(self) -> None:
        """Whatever was loaded has run, or never will: takes the marker away."""
        if self._marked:
            self._marked = False
            _remove(self._marker)

    def _mark(self) -> bool:
        """Whether the marker stands; without it a crash would come back at every start."""
        if self._marked:
            return True
        try:
            self._marker.write_text(f"{_this_process()}, has loaded {self._loaded}\n")
        except OSError as error:
            warnings.warn(f"{self._marker} cannot be written: {error}. Compiled programs are not loaded.", stacklevel=3)
            return False
        self._marked = True
        return True


def abandon(workdir: epath.PathLike) -> None:
    """Takes this process's marker away, for who must leave at once; a run of one process."""
    marker = epath.Path(workdir) / f"{MARKER}0"
    with contextlib.suppress(OSError, ValueError):
        if marker.read_text().startswith(f"{_this_process()}, "):
            _remove(marker)


def pack(name: str, content: bytes) -> bytes:
    """-> a file's bytes."""
    return f"{HEAD}{_digest(name, content)}\n".encode() + content


def unpack(name: str, data: bytes) -> bytes:
    """-> `content` of `pack(name, content)`. Raises: ValueError that says what is wrong with the file `name`."""
    head, _, content = data.partition(b"\n")
    if not head.startswith(HEAD.encode()):
        raise ValueError("has no digest of ours (of an earlier release, or cut short)")
    if head != f"{HEAD}{_digest(name, content)}".encode():
        raise ValueError("is not what was written under this name (a kill, a disk)")
    return content


def _digest(name: str, content: bytes) -> str:
    """Of the name too: a whole entry under another's name is another program."""
    digest = hashlib.sha256(name.encode() + b"\0")
    digest.update(content)
    return digest.hexdigest()


def _path_for_jax(cache: CompileCache, folder: epath.Path) -> str:
    """The name of `folder` under which JAX, through epath, finds `cache`."""

    @epath.register_path_cls(SCHEME)
    class Digested:
        """As much of a path as JAX's cache asks of one. It takes any error of this for a program that is not there."""

        def __init__(self, path: epath.PathLike):
            self._path = epath.Path(os.fspath(path).removeprefix(SCHEME))
            self._content: bytes | None = None
            self.name = self._path.name
            self.mkdir, self.stat, self.unlink = self._path.mkdir, self._path.stat, self._path.unlink

        def __fspath__(self) -> str:
            return os.fspath(self._path)

        def __truediv__(self, name: str) -> "Digested":
            return Digested(self._path / name)

        def joinpath(self, *names: str) -> "Digested":
            return Digested(self._path.joinpath(*names))

        def glob(self, pattern: str) -> Iterator["Digested"]:  # where jax_compilation_cache_max_size is set
            return map(Digested, self._path.glob(pattern))

        def exists(self) -> bool:
            self._content = cache.read(self.name)  # kept: to look and to read are one reading
            return self._content is not None

        def read_bytes(self) -> bytes:
            content, self._content = self._content, None
            if content is None and (content := cache.read(self.name)) is None:
                raise FileNotFoundError(os.fspath(self._path))
            return content

        def write_bytes(self, content: bytes) -> None:
            cache.write(self.name, content)

    return f"{SCHEME}{folder}"


def _configure(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # it opens a folder once, and would stay with the one before


def _made_ready(workdir: epath.Path, log: Callable[[str], None]) -> bool:
    """Whether there is a folder to use; process 0 alone. One that crashed a run is out of the way before."""
    folder = workdir / FOLDER
    try:
        markers = [path for path in workdir.iterdir() if path.name.startswith(MARKER)]
        if markers:
            log(
                f"warning: the last start did not live from loading a compiled program to its first step. {folder} "
                f"{_put_away(folder, workdir / SET_ASIDE)}; everything is compiled anew."
            )
        for marker in markers:
            marker.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log(f"warning: {folder} cannot be used: {error}. Every start compiles anew.")
        return False
    return True


def _put_away(folder: epath.Path, aside: epath.Path) -> str:
    """-> what was done. A kill after it leaves the markers, and the next start comes here again."""
    if not durable.is_local(folder):
        folder.rmtree(missing_ok=True)
        return "is deleted (a bucket cannot rename)"
    if not os.path.lexists(folder):
        return "is gone"
    if os.path.islink(aside) or os.path.isfile(aside):
        os.unlink(aside)
    elif os.path.lexists(aside):
        shutil.rmtree(aside)
    os.rename(folder, aside)  # of a link the link, not what others may use
    return f"is set aside as {aside}"


def _is_no_file(path: epath.Path) -> bool:
    return durable.is_local(path) and os.path.lexists(path) and not os.path.isfile(path)


def _remove(path: epath.Path) -> None:
    """As far as it can be: a read-only folder keeps what is never used, and no run ends over it (a bucket's errors)."""
    with contextlib.suppress(Exception):
        path.unlink(missing_ok=True)


def _this_process() -> str:
    return f"process {os.getpid()} on host {socket.gethostname()}"
