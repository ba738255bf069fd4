"""Runs pure stage functions, one unit in and one file and its counts out, over processes; what is done stays done."""

import dataclasses
import json
import multiprocessing
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from phijax.errors import UserError
from phijax.storage import atomic
from phijax.text import tokenizer_trial


@dataclasses.dataclass(frozen=True)
class Task:
    """`function(*arguments)` writes the file `output`, whole or not at all, and returns its counts (JSON)."""

    function: Callable[..., dict[str, Any]]
    arguments: tuple
    output: pathlib.Path
    marker: pathlib.Path  # written after the output; where it stands the task is not run again


def run(tasks: Sequence[Task], workers: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (number of the task, counts) as tasks end, those of an earlier run first.

    Processes are spawned, as a fork of a process with threads can hang, and end when this one does, however it does.
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
    pool = ProcessPoolExecutor(
        min(workers, len(missing)), spawn, initializer=_begin, initargs=(tokenizer_trial.survived(),)
    )
    try:
        futures = {pool.submit(_run, tasks[i]): i for i in missing}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
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
    try:
        done = json.loads(task.marker.read_bytes())
        return done["counts"] if task.output.stat().st_size == done["output_bytes"] else None
    except FileNotFoundError:
        return None


def _begin(survived: tuple[str, ...]) -> None:
    """Args: survived: tokenizers that the parent has tried, so that no worker tries them again."""
    tokenizer_trial.remember(survived)
    _end_with_parent()


def _end_with_parent() -> None:
    """A worker whose parent was killed would otherwise wait for work for ever, with its memory."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too and decides
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
