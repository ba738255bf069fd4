"""Decisions that all processes take alike. A look at the disk by each would hang the run where two looks differ."""

import json
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from phijax.errors import UserError

T = TypeVar("T")


def from_process_zero(act: Callable[[], T]) -> T:
    """Runs `act` on process 0 and returns its result on every process; collective.

    Args:
      act: its result must be what JSON can carry.
    Raises: on every process, the UserError that `act` raised, or for another exception a RuntimeError that quotes
      it (process 0 raises the exception itself).
    """
    if jax.process_count() == 1:
        return act()
    outcome, own_error = {}, None
    if jax.process_index() == 0:
        try:
            outcome = {"result": act()}
        except UserError as error:
            outcome = {"user_error": str(error)}
        except Exception as error:
            own_error = error
            outcome = {"failure": f"{type(error).__name__}: {error}"}
    outcome = json.loads(_broadcast(json.dumps(outcome).encode()))
    if own_error is not None:
        raise own_error
    if "user_error" in outcome:
        raise UserError(outcome["user_error"])
    if "failure" in outcome:
        raise RuntimeError(f"process 0: {outcome['failure']}")
    return outcome["result"]


def any_process(flag: bool) -> bool:
    """True on every process if `flag` is true on one of them; collective."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array([flag], np.int32))))


def _broadcast(message: bytes) -> bytes:
    """What process 0 passes, on every process."""
    length = int(multihost_utils.broadcast_one_to_all(np.array([len(message)], np.int32))[0])
    buffer = np.zeros(length, np.uint8)
    if jax.process_index() == 0:
        buffer[:] = np.frombuffer(message, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(buffer)).astype(np.uint8).tobytes()
