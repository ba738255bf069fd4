"""A jax.profiler trace of a few steps; TensorBoard with xprof opens the folder."""

import os

import jax
from etils import epath


class StepProfiler:
    """Traces steps start .. start+steps-1 of this process's devices into `directory`; start None: does nothing."""

    def __init__(self, directory: epath.Path, start: int | None, steps: int):
        self._directory, self._start, self._steps = directory, start, steps
        self._tracing = False

    def starts_at(self, step: int) -> bool:
        return step == self._start

    def start(self) -> None:
        """Call before the first traced step is dispatched, when the device has finished the step before."""
        self._directory.mkdir(parents=True, exist_ok=True)
        jax.profiler.start_trace(os.fspath(self._directory))
        self._tracing = True

    def step_done(self, step: int) -> bool:
        """Ends the trace after its last step; True then."""
        if self._tracing and step >= self._start + self._steps - 1:
            self.close()
            return True
        return False

    def close(self) -> None:
        """Ends a trace that the run's end cut short."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
