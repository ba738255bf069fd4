"""One long-lived child with limits on time and address space, for what strangers' files may do (`limited_work.py`)."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from typing import Any

from phijax.errors import UserError
from phijax.text import limited_work

_WALL = 30  # seconds beyond four times the processor's: other processes, slow disks, a start
_LARGE = 4 << 20  # bytes: a child that was asked more keeps 15 times as much memory for as long as it lives


class Stopped(Exception):
    """What was asked for went beyond its limits, or ended the child; the message says which, as "it took ..."."""


def ask(work: str, *, seconds: float, size: int, **arguments: Any) -> Any:
    """The answer of a function of `limited_work`, computed in the child of this process.

    Args:
      work: its name.
      seconds, size: what it may take: of processor time, and bytes of memory beyond what the child has anyway.
      arguments: of JSON.
    Raises: Stopped. UserError where no child can be started.
    """
    return _of_process(os.getpid()).ask(work, seconds, size, arguments)


@functools.cache
def _of_process(pid: int) -> "_Child":
    """By process: one that was forked does not share the pipes of the one that it came from."""
    return _Child()


class _Child:
    """Started at the first request, ended with this process; killed, and replaced by the next, when it misbehaves."""

    def __init__(self):
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def ask(self, work: str, seconds: float, size: int, arguments: dict[str, Any]) -> Any:
        request = {"work": work, "arguments": arguments, "seconds": seconds, "bytes": size}
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = _start()
                weakref.finalize(self, _end, self._process, os.getpid())
            process = self._process
            wall = 4 * seconds + _WALL
            clock = _Clock(wall, process)
            try:
                sent = json.dumps(request).encode("ascii") + b"\n"
                answer = _exchange(process, sent)
            except BaseException:  # as from the keyboard: its answer must not be taken for the next one
                _end(process, os.getpid())
                raise
            finally:
                clock.cancel()
            if answer is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5)  # its own code says how it ended
            if answer is None or "failed" in answer or len(sent) > _LARGE:
                _end(process, os.getpid())
        if answer is not None and "answer" in answer:
            return answer["answer"]
        if answer is not None:
            raise Stopped(_failure(answer["failed"], size))
        raise Stopped(f"it took more than {wall:g} s" if clock.late else _death(process, seconds, size))


class _Clock(threading.Timer):
    """Kills the process at its time: what waits for an answer then reads the end of the pipe."""

    def __init__(self, seconds: float, process: subprocess.Popen[bytes]):
        super().__init__(seconds, self._ring)
        self.daemon, self.late, self._process = True, False, process
        self.start()

    def _ring(self) -> None:
        self.late = True
        self._process.kill()


def _start() -> subprocess.Popen[bytes]:
    """Run by its path, so that nothing of phijax or JAX is imported there; what this process can import it can."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    quiet = {"TOKENIZERS_PARALLELISM": "false", "RUST_BACKTRACE": "0", "MALLOC_ARENA_MAX": "1"}
    try:
        return subprocess.Popen(
            [sys.executable or "python3", "-P", os.path.abspath(limited_work.__file__)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **quiet, "PYTHONPATH": path},
        )
    except OSError as error:
        raise UserError(
            f"Templates and tokenizers by others are tried in a process of its own, which cannot be started: {error}"
        ) from error


def _exchange(process: subprocess.Popen[bytes], request: bytes) -> dict[str, Any] | None:
    """The child's answer; None where it died before."""
    try:
        process.stdin.write(request)
        process.stdin.flush()
    except BrokenPipeError:
        return None
    line = process.stdout.readline()
    return json.loads(line) if line.endswith(b"\n") else None


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() != owner:
        return  # a process that was forked from its parent leaves it alone
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(BrokenPipeError):
            pipe.close()


def _failure(what: str, size: int) -> str:
    if what == limited_work.OUT_OF_MEMORY:
        return f"it asked for more than {size >> 20} MB of memory"
    return f"it fails inside the library that reads it ({what[:200]})"


def _death(process: subprocess.Popen[bytes], seconds: float, size: int) -> str:
    code = process.returncode
    if code == -signal.SIGPROF:
        return f"it took more than {seconds:g} s of processor time"
    if code is not None and code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return f"the process that tried it ended by {name}, within {size >> 20} MB of memory"
    return f"the process that tried it ended with code {code}"
