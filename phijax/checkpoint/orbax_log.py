"""What Orbax logs of a save that fails: a traceback for each of its threads, and then it raises the same to us."""

import logging


def without_tracebacks() -> None:
    """From here on a failed save is one message, that of who catches the error; everything else is logged as before."""
    logging.getLogger("absl").addFilter(_raised_to_us_too)  # the same filter twice is one


def _raised_to_us_too(record: logging.LogRecord) -> bool:
    return not (record.exc_info and "/orbax/checkpoint/" in record.pathname)
