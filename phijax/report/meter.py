"""Speed of a run: seconds a step, tokens per second, MFU, from the moments at which steps were seen to be finished."""

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Speed:
    """Of the steps since the last call of `Meter.take`; None where nothing can be said.

    step_seconds: mean over them. tokens_per_second: all devices together. mfu: model FLOPs (recomputation not counted)
    over what the chips could do, as in Chowdhery et al. 2022 (PaLM), appendix B; None when their peak is unknown.
    """

    step_seconds: float | None
    tokens_per_second: float | None
    mfu: float | None


class Meter:
    """Measures the steps of one process life.

    A step lasts from the end of the step before it (or of the pause before it) to its own end: waiting for data is part
    of it, evaluation and saving, which the loop marks as pauses, are not. The first step of a life compiles, so it is
    not measured; `first_step_seconds` keeps it.

    Args:
      tokens_before: step -> tokens of steps 0 .. step-1, a closed form of the phases, so that it survives restarts.
      flops_per_token: step -> model FLOPs per token, forward and backward, at that step's sequence length.
      peak_flops_per_device: FLOP/s; None when unknown.
      clock: seconds, monotonic.
    """

    def __init__(
        self,
        tokens_before: Callable[[int], int],
        flops_per_token: Callable[[int], float],
        peak_flops_per_device: float | None,
        device_count: int,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._tokens_before = tokens_before
        self._flops_per_token = flops_per_token
        self._peak = None if peak_flops_per_device is None else peak_flops_per_device * device_count
        self._clock = clock
        self._mark = clock()
        self._paused_at: float | None = None
        self._steps, self._seconds, self._tokens, self._flops = 0, 0.0, 0, 0.0
        self.useful_seconds = 0.0  # of this life's measured steps, all of them
        self.first_step_seconds: float | None = None

    def step_done(self, step: int) -> None:
        """Call when the results of `step` are on the host."""
        now = self._clock()
        seconds, self._mark = now - self._mark, now
        if self.first_step_seconds is None:
            self.first_step_seconds = seconds
            return
        tokens = self.tokens_after(step) - self._tokens_before(step)
        self._steps += 1
        self._seconds += seconds
        self._tokens += tokens
        self._flops += tokens * self._flops_per_token(step)
        self.useful_seconds += seconds

    def pause(self) -> None:
        """What follows, up to `resume`, belongs to no step."""
        self._paused_at = self._clock()

    def resume(self) -> None:
        # The mark moves by the pause, so that work begun before it keeps its time.
        self._mark += self._clock() - self._paused_at
        self._paused_at = None

    def tokens_after(self, step: int) -> int:
        """Tokens trained on once `step` is done, over all starts of the run."""
        return self._tokens_before(step + 1)

    def take(self) -> Speed:
        """The speed since the last take."""
        steps, seconds, tokens, flops = self._steps, self._seconds, self._tokens, self._flops
        self._steps, self._seconds, self._tokens, self._flops = 0, 0.0, 0, 0.0
        if not steps or seconds <= 0:
            return Speed(None, None, None)
        return Speed(seconds / steps, tokens / seconds, None if self._peak is None else flops / seconds / self._peak)


def host_memory_bytes() -> int:
    """Resident memory of this process now; where only the peak is known (macOS), the peak."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * resource.getpagesize()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
