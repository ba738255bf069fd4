"""Whether the files of shards are what their manifests say: each read whole once, and known again afterwards.

Sizes are compared whenever shards are opened. A file of equal size with other content, as a copy that was interrupted
leaves it, shows in its sha256 alone.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Sequence

from etils import epath

from phijax.errors import RunFailure, UserError
from phijax.storage import atomic, strict_json
from phijax.storage.strict_json import Fields

FOLDER = "data_checked"  # beside the run
FORMAT = "phijax checked shards"
SIZES = "data: contents are not compared with the manifests, sizes alone are (data.verify=False)"
_PIECE = 1 << 20
_LONGEST = 1 << 26  # bytes of what is remembered
_MOST = 1 << 64  # of an inode, a time in nanoseconds
_EDGE = 1 << 16  # of an ArrayRecord file the last 64 KiB hold its footer
_NICE = 10  # what trains comes first


@dataclasses.dataclass(frozen=True)
class ShardFile:
    """A file as its manifest describes it."""

    path: str
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Checked:
    """A file that was what its manifest says, and by what it is known again without being read."""

    path: str
    sha256: str
    identity: tuple[int, ...]
    edges: str  # sha256 of its first and its last 64 KiB


def identity_of(path: str) -> tuple[int, ...]:
    """Size, times and inode in nanoseconds; of a bucket size and time alone. Whatever writes the file changes it.

    The time of the last change of any kind is in it (ctime), since copies that keep a file's time set the other one.
    """
    if "://" in path:
        found = epath.Path(path).stat()
        return found.length, found.mtime
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def identities(files: Iterable[ShardFile]) -> dict[str, tuple[int, ...]]:
    """Path -> identity of those that are there."""
    found = {}
    for file in files:
        with contextlib.suppress(OSError):  # what is missing is named by `check`
            found[file.path] = identity_of(file.path)
    return found


def sha256_of(path: str, on_piece: Callable[[int], None] = lambda size: None) -> str:
    """Reads the file whole; `on_piece` is told the bytes of each piece and may end the reading by raising."""
    digest = hashlib.sha256()
    with epath.Path(path).open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
            on_piece(len(piece))
    return digest.hexdigest()


def check(
    file: ShardFile, known: Collection[Checked] = (), on_piece: Callable[[int], None] = lambda size: None
) -> Checked:
    """Reads `file` whole, unless it is one of `known` still. Raises UserError when its sha256 is not the manifest's."""
    try:
        identity = identity_of(file.path)
        now = Checked(file.path, file.sha256, identity, _edges(file.path, identity[0]))
        if now in known:
            return now
        found = sha256_of(file.path, on_piece)
        unchanged = identity_of(file.path) == identity
    except (FileNotFoundError, PermissionError) as error:
        raise UserError(f"The shard {file.path} cannot be read: {error}. Copy or prepare the shard again.") from error
    if found != file.sha256:
        raise UserError(
            f"The shard {file.path} is corrupt, or another than its manifest names: its sha256 is not the manifest's "
            f"({found[:12]}, which says {file.sha256[:12]}). Copy or prepare the shard again."
        )
    return now if unchanged else dataclasses.replace(now, identity=())  # () is no file's: it is read again


class FileCheck:
    """Checks files in threads that give way to all others. Nothing here waits for them but `wait`."""

    def __init__(self, files: Sequence[ShardFile], known: Collection[Checked], threads: int | None = None):
        """
        Args: threads: by default one for four CPUs, at most four.
        """
        self.files = tuple(files)
        self.problem: UserError | RunFailure | None = None
        self.checked: list[Checked] = []
        self.read_bytes = 0
        self.known_again = 0
        self._known = known
        self._left = iter(self.files)
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        count = threads or min(4, max(1, (os.cpu_count() or 1) // 4))
        self._threads = [threading.Thread(target=self._work, name="data check", daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    @property
    def complete(self) -> bool:
        """Every file is what its manifest says."""
        return len(self.checked) == len(self.files)

    def wait(self, seconds: float) -> bool:
        """Whether it has ended, complete or with a problem, within `seconds`."""
        for thread in self._threads:
            thread.join(seconds / len(self._threads))
        return not any(thread.is_alive() for thread in self._threads)

    def stop(self) -> None:
        """Ends the threads at their next piece."""
        self._stopping.set()

    def _work(self) -> None:
        if sys.platform == "linux":  # elsewhere threads have no priority of their own
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        while True:
            with self._lock:
                file = None if self._stopping.is_set() else next(self._left, None)
            if file is None:
                return
            try:
                found = check(file, self._known, self._on_piece)
            except _Stopped:
                return
            except Exception as error:
                self._stopping.set()
                with self._lock:
                    self.problem = self.problem or _problem(file, error)
                return
            with self._lock:
                self.checked.append(found)
                self.known_again += found in self._known

    def _on_piece(self, size: int) -> None:
        with self._lock:
            self.read_bytes += size
        if self._stopping.is_set():
            raise _Stopped


class _Stopped(Exception):
    pass


def _problem(file: ShardFile, error: Exception) -> UserError | RunFailure:
    if isinstance(error, UserError):
        return error
    return RunFailure(  # a network or a disk, perhaps for a moment: the run can be started again
        f"The shard {file.path} could not be read to compare its sha256: {type(error).__name__}: {error}"
    )


def _edges(path: str, size: int) -> str:
    with epath.Path(path).open("rb") as file:
        digest = hashlib.sha256(file.read(_EDGE))
        if size > _EDGE:
            file.seek(max(_EDGE, size - _EDGE))
            digest.update(file.read(_EDGE))
    return digest.hexdigest()


def look(files: Sequence[ShardFile], workdir: epath.PathLike | None, seconds: float) -> str:
    """Compares as many files as `seconds` allow, without a run. -> what was checked and what was not.

    Args: workdir: of a run that remembers what it has read, or None; nothing is written.
    Raises: UserError naming a shard that is another; RunFailure.
    """
    known = recall(epath.Path(workdir) / FOLDER) if workdir else set()
    reading = FileCheck(files, known)
    ended = reading.wait(seconds)
    reading.stop()
    if reading.problem is not None:
        raise reading.problem
    checked = len(reading.checked)
    parts = [f"{checked - reading.known_again} read whole ({gigabytes(reading.read_bytes)})"]
    parts += [f"{reading.known_again} as when last read whole"] if reading.known_again else []
    if ended:
        return f"data: all {checked} shards are what their manifests say: {', '.join(parts)}"
    return (
        f"data: {checked} of {len(files)} shards are what their manifests say: {', '.join(parts)}; the other "
        f"{len(files) - checked} were not read within {seconds:.0f} s, only their sizes compared. The run reads them "
        "all; python -m phijax.show DIR --verify does so now"
    )


def gigabytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e7 else f"{size / 1e6:,.2f} MB"


# --- remembered beside the run: one small file for each process, since each may see disks of its own


def recall(folder: epath.Path) -> set[Checked]:
    """What the processes of earlier starts have written. What cannot be understood is not believed, but read again."""
    found: set[Checked] = set()
    for path in folder.glob("*.json") if folder.exists() else ():
        with contextlib.suppress(UserError):
            content = strict_json.read(path, _LONGEST, half_characters=True)
            if content.text("format") == FORMAT:
                found |= set(map(_checked, content.objects("files")))
    return found


def _checked(entry: Fields) -> Checked:
    identity = entry.integers("identity", least=-_MOST, most=_MOST)
    return Checked(entry.text("path"), entry.text("sha256"), tuple(identity), entry.text("edges"))


def remember(folder: epath.Path, process: int, checked: Iterable[Checked]) -> None:
    """Writes what `recall` reads, in place of what this process has written before. Raises OSError."""
    files = [dataclasses.asdict(entry) for entry in sorted(checked, key=lambda entry: entry.path)]
    text = json.dumps({"format": FORMAT, "files": files}, indent=1) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write_text(folder / f"{process}.json", text)
