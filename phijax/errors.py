"""Errors made for people: what was wrong, where, what to do. Commands turn them into one message and exit code 2."""

import difflib
from collections.abc import Iterable

EXIT_DONE = 0
EXIT_CRASH = 1
EXIT_USER_ERROR = 2
EXIT_RESTART = 75  # stopped on request (EX_TEMPFAIL): start the same command again


class UserError(Exception):
    """Something the user can mend. The message stands alone: no traceback is shown with it."""


class RunFailure(Exception):
    """What ends a run and is neither a bug of ours nor a mistake in its config: exit code 1, no traceback."""


class StoppedUnsaved(Exception):
    """A run was asked to stop where there is nothing that it could save: exit code 75, one message."""


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to `name`, or None when nothing is close enough to be a typing slip."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None
