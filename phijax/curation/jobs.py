"""Runs pure stage functions, one unit in and one file and its counts out, over processes; what is done stays done."""

import contextlib
import dataclasses
import fcntl
import json
import multiprocessing
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from typing import Any

from phijax.errors import UserError
from phijax.storage import atomic, strict_json
from phijax.text import tokenizer_trial

LONGEST_MARKER = 1 << 26  # bytes
_LARGEST = 1 << 62  # bytes of an output
SIGNAL_SECONDS = 0.5  # who ends a whole group of processes by signal ends the parent in this time: not a worker's fault


@dataclasses.dataclass(frozen=True)
class Task:
    """`function(*arguments)` writes the file `output`, whole or not at all, and returns its counts (JSON)."""

    function: Callable[..., dict[str, Any]]
    arguments: tuple
    output: pathlib.Path
    marker: pathlib.Path  # written after the output; where it stands the task is not run again


def run(tasks: Sequence[Task], workers: int, held: pathlib.Path | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (number of the task, counts) as tasks end, those of an earlier run first.

    Processes are spawned, as a fork of a process with threads can hang, and end when this one does, however it does.
    Args: held: a file that each of them has a shared lock on while it lives: the next start can wait for those that
      have not noticed yet that this one was killed.
    Raises the first task's error, when those that are running have ended; UserError when a process was killed.
    """
    missing = []
    for i, task in enumerate(tasks):
        counts = _counts_of_earlier_run(task)
        if counts is None:
            missing.append(i)
        else:
            yield i, counts
    if workers == 1 or len(missing) < 2:
        for i in missing:
            yield i, _run(tasks[i])
        return
    spawn = multiprocessing.get_context("spawn")
    _start_tracker()
    pool = ProcessPoolExecutor(
        min(workers, len(missing)), spawn, initializer=_begin, initargs=(held, tokenizer_trial.survived())
    )
    try:
        with _no_interrupts_for_children():
            futures = {pool.submit(_run, tasks[i]): i for i in missing}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        time.sleep(SIGNAL_SECONDS)
        raise UserError(
            "A worker process was killed, perhaps for want of memory. What is done is kept: start the same command "
            f"again, with fewer than --workers={workers} if memory was short."
        ) from error
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _run(task: Task) -> dict[str, Any]:
    try:
        counts = task.function(*task.arguments)
        done = {"output_bytes": task.output.stat().st_size, "counts": counts}
        atomic.write_bytes(task.marker, json.dumps(done).encode())
    except OSError as error:
        raise UserError(f"{task.output} could not be written: {error}. Start again when that is mended.") from error
    return counts


def _counts_of_earlier_run(task: Task) -> dict[str, Any] | None:
    if not (task.marker.exists() and task.output.exists()):
        return None
    try:
        done = strict_json.read(task.marker, LONGEST_MARKER, half_characters=True)
        same = done.integer("output_bytes", most=_LARGEST) == task.output.stat().st_size
        return dict(done.object("counts").values) if same else None
    except UserError:  # damaged: it is done again
        return None


def _start_tracker() -> None:
    """Python's process that removes the semaphores of a pool, before anything needs it: starting it unblocks signals.

    Where this process left at once it has some to remove, and would warn of that on our standard error.
    """
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = ",".join([*filter(None, [before]), "ignore:resource_tracker"])
    try:
        resource_tracker.ensure_running()
    finally:
        del os.environ["PYTHONWARNINGS"]
        os.environ |= {"PYTHONWARNINGS": before} if before is not None else {}


@contextlib.contextmanager
def _no_interrupts_for_children() -> Iterator[None]:
    """The parent hears Ctrl-C too and decides; a process started inside never does, not while it is imported either."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(held: pathlib.Path | None, survived: tuple[str, ...]) -> None:
    """Args: survived: tokenizers that the parent has tried, so that no worker tries them again."""
    tokenizer_trial.remember(survived)
    _end_with_parent(held)


def _end_with_parent(held: pathlib.Path | None) -> None:
    """A worker whose parent was killed would otherwise wait for work for ever, with its memory."""
    parent = multiprocessing.parent_process()
    if held is not None:
        fcntl.flock(os.open(held, os.O_RDWR | os.O_CREAT, 0o666), fcntl.LOCK_SH)  # closed by the process's end alone
        if not parent.is_alive():  # else whoever waits for the lock waits for this process
            os._exit(1)

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
