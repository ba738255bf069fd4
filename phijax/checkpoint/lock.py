"""One writer per directory: a lock file that says who writes. No flock, no rename: neither exists on object stores."""

import dataclasses
import json
import os
import socket
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime

import jax
from etils import epath

from phijax.checkpoint.agreement import from_process_zero
from phijax.errors import UserError
from phijax.storage import atomic, durable, strict_json
from phijax.storage.regular_files import is_regular

LOCK_FILE = "writer.lock"
# Between the creation of a lock file and its content lie microseconds; one still empty after this is a dead run's.
EMPTY_LOCK_SECONDS = 2.0
# Two runs that take over the same stale lock write within milliseconds of each other: look again after this.
SETTLE_SECONDS = 0.2
_MOST = 1 << 62  # clock ticks


@dataclasses.dataclass(frozen=True)
class Owner:
    """Who holds a lock. `boot` and `started` (clock ticks) tell a live process from a later one with its pid."""

    host: str
    pid: int
    time: str
    token: str
    boot: str = ""
    started: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host}, since {self.time}"


class WriterLock:
    """Holds `directory` for this run until `release`; a context manager.

    Process 0 holds it for all processes; `acquire`, `__init__` and `__enter__` are collective, `release` is not.
    After SIGKILL the file stays: on the same host the next run sees that the process is gone and takes over.
    """

    def __init__(self, directory: epath.PathLike, *, break_lock: bool, log: Callable[[str], None]):
        """Raises UserError: another run writes there (named), or the directory cannot be written."""
        self._path = epath.Path(directory) / LOCK_FILE
        self._log = log
        self._owner = _this_process()
        self.held = False
        self._token = from_process_zero(lambda: self._acquire(break_lock) or self._owner.token)
        self.held = True

    def __enter__(self) -> "WriterLock":
        return self

    def __exit__(self, *unused) -> None:
        self.release()

    def confirm(self) -> None:
        """Raises UserError if another run has taken the directory; process 0 only, before it writes."""
        owner = _read(self._path)
        if owner is None:
            self._log(
                f"WARNING: the lock file {self._path} is gone; written again. Do not remove it while a run lives."
            )
            self._write()
        elif owner.token != self._owner.token:
            raise UserError(
                f"{self._path.parent} was taken over by {owner}; this run stops, so that the two do not mix."
            )

    def is_seen(self, seconds: float = 0.0) -> bool:
        """Whether this process finds the lock where it looks: if not, its directory is not the one process 0 writes to.

        Args: seconds: to wait for a file system that shows what another host wrote later than at once.
        """
        deadline = time.monotonic() + seconds
        while (owner := _read(self._path)) is None or owner.token != self._token:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.1)
        return True

    def release(self) -> None:
        """Removes the lock file if it is ours; never waits for another process."""
        if not self.held:
            return
        self.held = False
        if jax.process_index() == 0:
            owner = _read(self._path)
            if owner is not None and owner.token == self._owner.token:
                self._path.unlink(missing_ok=True)

    def _acquire(self, break_lock: bool) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._create():
                return
            owner = _read_when_written(self._path)
            if owner is not None and not break_lock:
                self._refuse_unless_dead(owner)
            self._log(
                f"the lock of {self._path.parent} was left by {owner or 'a run that died while taking it'}; taken over"
                + (" as break_lock asks" if break_lock else "")
            )
            self._write()
        except OSError as error:
            raise UserError(f"{self._path.parent} cannot be written: {error}. Choose another --workdir.") from error
        time.sleep(SETTLE_SECONDS)
        winner = _read(self._path)
        if winner is None or winner.token != self._owner.token:
            raise UserError(f"{self._path.parent} was taken at the same moment by {winner}. Only one run can have it.")

    def _refuse_unless_dead(self, owner: Owner) -> None:
        if owner.host == self._owner.host and not _alive(owner):
            return
        raise UserError(
            f"{self._path.parent} is written by another run: {owner}.\n"
            "Stop that run, or choose another --workdir. If you know that it is dead (its machine is gone), "
            "say --config.checkpoint.break_lock=True."
        )

    def _create(self) -> bool:
        """Creates the lock file; False if there is one already."""
        if durable.is_local(self._path):
            try:
                with open(os.fspath(self._path), "x", encoding="utf-8") as file:
                    file.write(self._text())
            except FileExistsError:
                return False
            return True
        if self._path.exists():
            return False
        self._write()
        # Object stores let the last writer win: whoever still stands after a moment has it.
        time.sleep(SETTLE_SECONDS)
        owner = _read(self._path)
        return owner is not None and owner.token == self._owner.token

    def _write(self) -> None:
        atomic.write_text(self._path, self._text())

    def _text(self) -> str:
        return json.dumps(dataclasses.asdict(self._owner))


def abandon(directory: epath.PathLike) -> None:
    """Removes the lock file if this process is named in it; for who must leave at once, also while taking it."""
    path, mine = epath.Path(directory) / LOCK_FILE, _this_process()
    owner = _read(path)
    if owner is not None and dataclasses.replace(mine, time=owner.time, token=owner.token) == owner:
        path.unlink(missing_ok=True)


def _this_process() -> Owner:
    return Owner(
        host=socket.gethostname(),
        pid=os.getpid(),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        token=uuid.uuid4().hex,
        boot=_boot_id(),
        started=_start_ticks(os.getpid()) or 0,
    )


def _read(path: epath.Path) -> Owner | None:
    """The owner in the lock file; None if there is no file or no owner in it, as in a pipe."""
    try:
        if not is_regular(path):
            return None
        fields = strict_json.parse(path.read_bytes(), str(path))
        texts = {name: fields.text(name) for name in ("host", "time", "token")}
        numbers = {"pid": fields.integer("pid"), "started": fields.integer("started", 0, most=_MOST)}
        return Owner(**texts, **numbers, boot=fields.text("boot", ""))
    except (FileNotFoundError, UserError):
        return None


def _read_when_written(path: epath.Path) -> Owner | None:
    deadline = time.monotonic() + EMPTY_LOCK_SECONDS
    while (owner := _read(path)) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return owner


def _alive(owner: Owner) -> bool:
    """Whether the process that took the lock, on this host, still lives."""
    if owner.boot != _boot_id():
        return False
    started = _start_ticks(owner.pid)
    if started is not None:
        # Containers start again with the same host name and pid 1: the start time tells the two lives apart.
        return started == owner.started
    if os.path.exists("/proc/self/stat"):
        return False
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _start_ticks(pid: int) -> int | None:
    """Start of a process in clock ticks since boot (proc(5), stat, field 22); None if unknown, or a zombie."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()  # the name before ")" may hold spaces
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _boot_id() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        return ""
