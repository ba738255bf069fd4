"""One verdict of all processes on the files of a run, come to in the background."""

import dataclasses
import hashlib
import json
import threading
import time
from collections.abc import Sequence

import jax
from etils import epath

from phijax.data import verification
from phijax.data.verification import Checked, FileCheck, ShardFile, gigabytes
from phijax.errors import RunFailure, StoppedUnsaved, UserError
from phijax.parallel import processes

_REMEMBER_EVERY = 30.0
_ASK_EVERY = 1.0  # the other processes
_LIMIT = 30 * 86400.0  # for meeting the others, who may have much to read; who dies is noticed by its heartbeat
_DONE, _WRONG, _UNREAD, _STOPPED, _CUT = "done", "wrong", "unread", "stopped", "cut short"
_ERRORS = {_WRONG: UserError, _UNREAD: RunFailure, _STOPPED: StoppedUnsaved}  # in the order of what is said first


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The same on every process. `problem` is None when all files are what their manifests say."""

    line: str
    problem: type[Exception] | None = None
    step: int = -1  # with a problem: the newest that a process has begun; all end after it


class DataCheck:
    """Reads this process's share of the files, and comes to one verdict with the others.

    Processes that see the same files, by their identities, divide them; one with a disk of its own reads all of its.
    """

    def __init__(self, files: Sequence[ShardFile], workdir: epath.Path):
        self.files = tuple(files)
        self.verdict: Verdict | None = None
        self.crash: BaseException | None = None
        self._folder = workdir / verification.FOLDER
        self._reading: FileCheck | None = None
        self._began = -1  # the newest step
        self._told = False  # the others count on it that no later one has begun
        self._lock = threading.Lock()
        self._giving_up = threading.Event()
        self._leaving = threading.Event()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="data check", daemon=True)
        self._thread.start()

    def __enter__(self) -> "DataCheck":
        return self

    def __exit__(self, *_) -> None:
        """Ends what still goes on, without a word to the others: whoever leaves before the verdict has said why."""
        self._leaving.set()
        self._ended.wait(1)  # not for ever: it may wait for the others

    def wait(self, seconds: float) -> bool:
        """Whether there is a verdict, within `seconds`. Raises what the check itself failed with."""
        ended = self._ended.wait(seconds)
        if self.crash is not None:
            raise self.crash
        return ended

    def begin(self, step: int) -> bool:
        """Notes that `step` begins; False for the instant in which the others are told how far this process is."""
        with self._lock:
            if self._told and not self._ended.is_set():
                return False
            self._began = step
            return True

    def give_up(self) -> None:
        """Ends the check on all processes, undecided. What was read is remembered."""
        self._giving_up.set()

    def progress(self) -> tuple[int, int] | None:
        """Bytes that were read and files that are done, of this process's share; None when all are."""
        if self._reading is None:
            return 0, 0
        return None if self._reading.wait(0) else (self._reading.read_bytes, len(self._reading.checked))

    @property
    def read_bytes(self) -> int:
        return 0 if self._reading is None else self._reading.read_bytes

    def _run(self) -> None:
        try:
            self.verdict = self._agree(self._check())
        except BaseException as error:
            self.crash = error
        finally:
            self._ended.set()

    def _check(self) -> dict:
        """What this process has to say to the others: how its share ended, with figures and a message."""
        started = time.monotonic()
        seen = verification.identities(self.files)
        # Without inodes: gcsfuse numbers them anew in each mount. Copies on other disks differ in their change times.
        view = json.dumps([(path, identity[:3]) for path, identity in sorted(seen.items())])
        view = hashlib.sha256(view.encode()).hexdigest()
        known = {entry for entry in verification.recall(self._folder) if seen.get(entry.path) == entry.identity}
        peers = [i for i, other in enumerate(processes.exchange("data view", view, _LIMIT)) if other == view]
        share = self.files[peers.index(jax.process_index()) :: len(peers)]
        paths = {file.path for file in share}
        known = {entry for entry in known if entry.path in paths}
        self._reading = reading = FileCheck(share, known)
        try:
            ended, told = self._watch(reading, known)
        finally:
            reading.stop()
        return {
            "end": ended,
            "text": told,
            "files": len(reading.checked),
            "known": reading.known_again,
            "bytes": reading.read_bytes,
            "seconds": time.monotonic() - started,
        }

    def _watch(self, reading: FileCheck, known: set[Checked]) -> tuple[str, str]:
        """Until the share is read, or there is no point in reading on. -> how it ended, and a message."""
        asked = remembered = time.monotonic()
        ended = ""
        while not ended:
            if reading.wait(0.2):
                ended = _DONE if reading.complete else _UNREAD
            elif self._giving_up.is_set():
                ended = _STOPPED
            elif self._leaving.is_set():
                raise RuntimeError("the run has left")  # to nobody
            elif time.monotonic() - asked > _ASK_EVERY:
                asked = time.monotonic()
                if any(json.loads(text)["end"] != _DONE for text in processes.announced("data check").values()):
                    ended = _CUT
            if ended or time.monotonic() - remembered > _REMEMBER_EVERY:
                remembered = time.monotonic()
                warning = self._remember(known | set(reading.checked))
        if reading.problem is not None:
            return _WRONG if isinstance(reading.problem, UserError) else _UNREAD, str(reading.problem)
        return ended, warning

    def _remember(self, checked: set[Checked]) -> str:
        """-> what hindered it, which costs only that the files are read again."""
        if not checked:
            return ""
        try:
            verification.remember(self._folder, jax.process_index(), checked)
        except Exception as error:  # buckets' clients have errors of their own
            return f"; this cannot be remembered in {self._folder} ({error}) and is done again at the next start"
        return ""

    def _agree(self, mine: dict) -> Verdict:
        said = [json.loads(text) for text in processes.exchange("data check", json.dumps(mine), _LIMIT)]
        for end, problem in _ERRORS.items():
            for index, one in enumerate(said):
                if one["end"] == end:
                    where = f" (process {index} has read it)" if len(said) > 1 and end != _STOPPED else ""
                    return Verdict(one["text"] + where, problem, self._newest_step_of_all())
        files, known, read = (sum(one[name] for one in said) for name in ("files", "known", "bytes"))
        parts = [f"{files - known} read whole ({gigabytes(read)} in {max(one['seconds'] for one in said):.1f} s)"]
        parts += [f"{known} as when last read whole (sizes, times, inodes, first and last 64 KiB)"] if known else []
        each = "" if files == len(self.files) else " (those of each disk counted)"
        warning = next((one["text"] for one in said if one["text"]), "")
        return Verdict(f"data: all {files} shards are what their manifests say{each}: {', '.join(parts)}{warning}")

    def _newest_step_of_all(self) -> int:
        with self._lock:
            self._told, mine = True, self._began
        return max(int(text) for text in processes.exchange("data check at step", str(mine), _LIMIT))
