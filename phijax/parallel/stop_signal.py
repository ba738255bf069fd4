"""SIGTERM and Ctrl-C in a run: all processes save at one agreed step and stop."""

import contextlib
import os
import signal
from collections.abc import Callable

import jax
from jax.experimental import multihost_utils

from phijax.parallel import processes


class StopSignal:
    """SIGTERM or Ctrl-C: every process learns at the same step that the run shall save and stop.

    Under jax.distributed JAX has its own SIGTERM handler and agrees on a step; it must be asked exactly once a step, on
    every process, or the signal is swallowed. Ctrl-C is turned into that SIGTERM. Alone, both set a flag here. A second
    Ctrl-C ends the process at once, which is as safe as SIGKILL: the last checkpoint stays. Main thread only.
    """

    def __init__(self, write: Callable[[str], None] | None = None):
        self._write = write or processes.to_stderr
        self._shared = jax.distributed.is_initialized()
        self._asked = False
        self._last_step: int | None = None
        self._previous = {signal.SIGINT: signal.signal(signal.SIGINT, self._on_signal)}
        if not self._shared:
            self._previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._on_signal)

    def agreed(self, step: int) -> bool:
        """True at the step after which all processes stop. Call it exactly once a step, on every process."""
        if self._last_step is not None and step <= self._last_step:
            raise ValueError(f"StopSignal was asked at step {self._last_step} already, now at {step}: once a step")
        self._last_step = step
        return multihost_utils.reached_preemption_sync_point(step) if self._shared else self._asked

    def asked(self) -> bool:
        """Whether any process was asked to stop, by now: for waits inside of a step, which `agreed` does not see."""
        if self._shared and not self._asked:
            with contextlib.suppress(Exception):  # no such key yet; JAX's own name for it is not public
                self._asked = bool(processes.world()[0].key_value_try_get("RECEIVED_PREEMPTION_NOTICE"))
        return self._asked

    def close(self) -> None:
        """Puts the handlers back that were there before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame) -> None:
        self._asked = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if self._shared:
                os.kill(os.getpid(), signal.SIGTERM)
        # os.write: a print here could run into the print that was interrupted.
        text = (
            f"\n{signal.Signals(number).name}: saving after this step, then stopping; the same command goes on from "
            "there. Ctrl-C now ends at once, unsaved: it then goes on from the last save.\n"
        )
        os.write(2, text.encode())
