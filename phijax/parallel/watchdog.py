"""A loop that has stopped moving is said, then ended."""

import contextlib
import faulthandler
import sys
import threading
import time
from collections.abc import Callable, Iterator

from phijax.errors import EXIT_CRASH
from phijax.parallel import processes


class Watchdog:
    """Notices a loop that has stopped moving: heartbeats do not, since they come from another thread.

    No `beat` for `seconds`: a line with step and process, and the stacks of all threads. Still none after as long
    again: exit code 1, at once. Counts from the first beat, and not while it pauses: a program may compile for long. 0
    is off.
    """

    def __init__(self, seconds: float, write: Callable[[str], None] | None = None):
        self._seconds = seconds
        self._write = write or processes.to_stderr
        self._beat: tuple[int, float] | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="phijax-watchdog", daemon=True)
        if seconds > 0:
            self._thread.start()

    def beat(self, step: int) -> None:
        """The loop has come to `step`; call it also around long work between steps."""
        self._beat = (step, time.monotonic())

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Nothing is counted inside; behind it silence counts anew, where it counted before."""
        before, self._beat = self._beat, None
        try:
            yield
        finally:
            if before is not None:
                self.beat(before[0])

    def close(self) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        warned_at = None
        while not self._closed.wait(self._seconds / 10):
            beat = self._beat
            if beat is None:
                continue
            step, at = beat
            silence = time.monotonic() - at
            if silence > 2 * self._seconds:
                self._write(f"{processes.who()}no progress after step {step} for {silence:.0f} s: leaving")
                processes.leave_now(EXIT_CRASH)
            if silence > self._seconds and warned_at != beat:
                warned_at = beat
                self._write(
                    f"{processes.who()}no progress after step {step} for {silence:.0f} s; all stacks follow, "
                    f"the process ends in {self._seconds:.0f} s unless it moves"
                )
                faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
