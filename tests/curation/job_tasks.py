"""Tasks for worker processes, which import them by name: what ends well, in an error, or not at all."""

import ctypes
import os
import signal
import time

from phijax.curation import jobs
from phijax.errors import UserError


def square(number, output):
    output.write_text(str(number**2))
    return {"square": number**2}


def kill_itself(number, output):
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(number, output):
    raise UserError(f"number {number} is bad")


def fill_the_disk(number, output):
    raise OSError(28, "No space left on device")


def sleep_for_ever(number, output):
    (output.parent / f"pid-{os.getpid()}").touch()
    time.sleep(600)


def tasks_of(function, folder, count=3):
    return [jobs.Task(function, (i, folder / f"{i}"), folder / f"{i}", folder / f"{i}.done") for i in range(count)]


def hold_the_interpreter(number, output):
    (output.parent / f"pid-{os.getpid()}").touch()
    ctypes.PyDLL(None).sleep(6)  # with Python's lock: the thread that would see the parent's end cannot run
