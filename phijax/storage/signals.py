"""SIGTERM and Ctrl-C where there is nothing to save: the process ends at once, with exit code 75.

No KeyboardInterrupt: raised while jax is imported, or in its callback of the garbage collector, it is swallowed or
crashes the process (jax 0.10.2). And no handler of Python's alone: it would wait for as long as the main thread
compiles. A thread hears of the signal through `signal.set_wakeup_fd`, whatever the main thread is doing.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

from phijax.errors import EXIT_RESTART

SIGNALS = (signal.SIGTERM, signal.SIGINT)
TIDY_SECONDS = 5.0  # tidying up that hangs is left at that


class _Leaving:
    """Handles both signals. What it tidies up lies in it: the handler that is in force is the only state."""

    def __init__(self):
        self.tidies: list[Callable[[], None]] = []
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        threading.Thread(target=self._wait, name="phijax-leaving", daemon=True).start()

    def __call__(self, number: int, frame) -> None:
        """The main thread does nothing more: the other one is tidying up what this one was writing."""
        with contextlib.suppress(OSError):
            os.write(self._write, bytes([number]))  # once more, in case a library has taken the wakeup
        time.sleep(TIDY_SECONDS)
        os._exit(EXIT_RESTART)

    def close(self) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._write)

    def _wait(self) -> None:
        while number := os.read(self._read, 1):
            # Another handler may be in force by now, as the training loop's, which saves first.
            if _in_force(number[0]) is self:
                self._leave(signal.Signals(number[0]).name)
        os.close(self._read)

    def _leave(self, name: str) -> None:
        for tidy in reversed(self.tidies):
            with contextlib.suppress(Exception):
                tidy()
        with contextlib.suppress(OSError):
            os.write(2, f"{name}: stopped; the same command can be started again\n".encode())
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        for worker in multiprocessing.active_children():
            worker.kill()
        os._exit(EXIT_RESTART)


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Inside, both signals end the process with code 75, in whatever it is. Inside of itself, and off the main thread,
    it changes nothing."""
    if threading.current_thread() is not threading.main_thread() or _in_force(signal.SIGTERM):
        yield
        return
    leaving = _Leaving()
    try:
        with _handled_by(leaving):
            yield
    finally:
        leaving.close()


@contextlib.contextmanager
def tidied(tidy: Callable[[], None]) -> Iterator[None]:
    """`tidy` is called if a signal ends the process inside, by another thread while the main thread stands still."""
    leaving = _in_force(signal.SIGTERM)
    if leaving is None:
        yield
        return
    leaving.tidies.append(tidy)
    try:
        yield
    finally:
        leaving.tidies.remove(tidy)


@contextlib.contextmanager
def as_keyboard_interrupt() -> Iterator[None]:
    """Inside, both signals raise KeyboardInterrupt: for waits that have something to show. Off the main thread nothing
    is changed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with _handled_by(signal.default_int_handler):
        yield


@contextlib.contextmanager
def interrupt_as_sigterm() -> Iterator[None]:
    """Ctrl-C is SIGTERM inside, once; again it ends the process. For runs of several processes, whose SIGTERM is JAX's:
    they stop together."""

    def pass_on(number: int, frame) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)

    with _handled_by(pass_on, (signal.SIGINT,)):
        yield


@contextlib.contextmanager
def _handled_by(handler, numbers=SIGNALS) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            if previous is not None:  # else it is not Python's to put back
                signal.signal(number, previous)


def _in_force(number: int) -> _Leaving | None:
    handler = signal.getsignal(number)
    return handler if isinstance(handler, _Leaving) else None


def _forget() -> None:
    """In a forked child, whose signals would end its parent through the pipe that both have."""
    if _in_force(signal.SIGTERM):
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)


os.register_at_fork(after_in_child=_forget)
