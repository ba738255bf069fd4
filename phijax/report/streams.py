"""Standard streams that are closed, or cannot hold every character: no reason to lose what was done."""

import os
import sys


def mend() -> None:
    """Closed streams lead nowhere; what a stream's encoding lacks is written as \\xe9. Again it changes nothing."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # Else the next file that is opened, a checkpoint say, gets the number, and libraries' messages go into it.
            opened = os.open(os.devnull, os.O_RDWR)
            assert opened == number, f"{opened} is the lowest free number, not {number}"
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))
        if hasattr(getattr(sys, name), "reconfigure"):  # a notebook's, or a test's, may lack it
            getattr(sys, name).reconfigure(errors="backslashreplace" if number else "surrogateescape")


def flush() -> OSError | None:
    """Both outputs; one that cannot be written leads nowhere from here on, so that the interpreter's end is quiet."""
    found = None
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            found = error
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return found
