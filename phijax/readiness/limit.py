"""A time limit for checks that may hang where nothing in Python can interrupt them."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable

from phijax.errors import EXIT_USER_ERROR
from phijax.parallel import processes

LAST_TO_LEAVE_SECONDS = 1.0  # process 0 keeps the others' connection until they have spoken


class TimeLimit:
    """Ends the process with exit code 2 and a verdict when `seconds` have passed; says in which check.

    A thread of its own, since a collective that waits for a peer never comes back to the interpreter.
    """

    def __init__(self, seconds: float, write: Callable[[str], None] | None = None):
        self._seconds = seconds
        self._write = write or (lambda text: print(text, flush=True))
        self.check, self._index, self._count = "start", 0, 1
        self._deadline = time.monotonic() + seconds
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="preflight time limit", daemon=True)
        self._thread.start()

    def doing(self, check: str) -> None:
        """The check that begins now; told to the others as well."""
        self.check = check
        processes.announce(f"preflight at {check}")

    def restart(self, seconds: float, index: int, count: int) -> None:
        """Counts anew, from a moment that is the same for all processes: then all speak before one leaves."""
        self._seconds, self._index, self._count = seconds, index, count
        self._deadline = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds for a wait that ends by itself, before this limit does, and names who is missing."""
        return max(0.5, self._deadline - time.monotonic() - 1.0)

    def close(self) -> None:
        self._closed.set()

    def part(self) -> None:
        """The end after a failure: JAX aborts whoever still looks for an answer when process 0 is gone."""
        with contextlib.suppress(processes.ProcessFailure):
            processes.barrier("preflight parting", self.left)
        self.close()
        if self._index == 0 and self._count > 1:
            time.sleep(max(0.0, min(1.0, self._deadline - time.monotonic())) + LAST_TO_LEAVE_SECONDS)

    def _watch(self) -> None:
        while not self._closed.wait(min(0.2, self._seconds / 10)):
            if time.monotonic() > self._deadline:
                self._end()

    def _end(self) -> None:
        check, late = self.check, ""
        here: dict[int, str] = {}
        # The coordination service may hang as well: asked from a thread that is not waited for.
        asking = threading.Thread(target=lambda: here.update(processes.announced(f"preflight at {check}")), daemon=True)
        asking.start()
        asking.join(0.5)
        missing = [i for i in range(self._count) if i not in here]
        if here and missing:
            late = f" Not come to it: process {', '.join(map(str, missing[:20]))} of {self._count}."
        self._write(
            f"NOT READY: {check} hung: not done after {self._seconds:.0f} s "
            f"(process {self._index} of {self._count} on {os.uname().nodename}).{late}"
        )
        sys.stdout.flush()
        if self._index == 0 and self._count > 1:
            time.sleep(LAST_TO_LEAVE_SECONDS)
        os._exit(EXIT_USER_ERROR)
