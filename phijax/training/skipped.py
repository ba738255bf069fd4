"""Steps that changed nothing: of which kind, since when, and when they end the run.

A step is not good when its update was not finite, or when no token of its batch was predicted. The train step has
changed nothing then but its counts (step.py); the loop hands over each step's metrics when it has them, a step late.
"""

from typing import Any, Protocol

from phijax.errors import RunFailure

SAID = 10  # lines of one start; further ones are in events.jsonl alone


class Report(Protocol):
    def say(self, text: str) -> None: ...

    def event(self, name: str, **fields: Any) -> None: ...


class Diverged(RunFailure):
    """Too many updates in a row were not finite. `last_good`: the newest good step of this start, if there was one."""

    def __init__(self, message: str, last_good: int | None = None):
        super().__init__(message)
        self.last_good = last_good


class NothingLearned(RunFailure):
    """Too many steps in a row, or all of the run's, changed nothing, for want of tokens to predict."""


class Skipped:
    """What the metrics of one start's steps say about steps that changed nothing."""

    def __init__(self, first_step: int, in_a_row: int, limit: int, report: Report):
        """Args: in_a_row: the state's own count at `first_step`. limit: in a row, then the run ends."""
        self._first, self._in_a_row, self._limit, self._report = first_step, in_a_row, limit, report
        self._empty_in_a_row = 0
        self._said = 0
        self._last_good: int | None = None

    def see(self, step: int, in_a_row: int, weight: float) -> None:
        """Args: in_a_row, weight: Metrics.skipped_in_a_row and Metrics.weight of `step`; steps come in order.

        Raises: Diverged, NothingLearned.
        """
        if in_a_row > self._in_a_row:
            self._changed_nothing(step, "its loss or gradient is not finite", streak=in_a_row)
        elif weight == 0:
            self._empty_in_a_row += 1
            self._changed_nothing(step, "its batch holds no token to predict", streak=self._empty_in_a_row)
        else:
            self._last_good, self._empty_in_a_row = step, 0
        self._in_a_row = in_a_row
        if in_a_row >= self._limit:
            raise Diverged(
                f"{in_a_row} updates in a row, up to step {step}, had a loss or gradient that is not finite and were "
                f"skipped; {self._good()}.",
                self._last_good,
            )
        if self._empty_in_a_row >= self._limit:
            raise NothingLearned(
                f"{self._empty_in_a_row} steps in a row, up to step {step}, had no token to predict (all weights of "
                f"their batches are 0), so nothing was learned from them; {self._good()}.\nLook at the data of those "
                "steps: are answers cut off by the sequence length, or all of them masked? The saved steps stay."
            )

    def check_end(self, steps: int, skipped: int) -> None:
        """Raises: NothingLearned if none of the run's steps changed a weight, however few they are."""
        if 0 < steps <= skipped:
            raise NothingLearned(
                f"None of the run's {steps} steps changed a weight: their batches had no token to predict, or their "
                "loss or gradient was not finite (predicted_tokens and loss in metrics.jsonl tell which).\nLook at the "
                "data, or lower the learning rate."
            )

    def _good(self) -> str:
        if self._last_good is not None:
            return f"step {self._last_good} was the last good one"
        return f"no step was good{f' since the start at step {self._first}' if self._first else ''}"

    def _changed_nothing(self, step: int, reason: str, streak: int) -> None:
        if streak > 1:  # the beginning is said, the rest is counted in the metrics
            return
        self._report.event("skipped", step=step, reason=reason)
        self._said += 1
        if self._said > SAID + 1:
            return
        last = " (further ones are counted in skipped_steps, and listed in events.jsonl)" if self._said > SAID else ""
        self._report.say(f"WARNING: step {step} changed nothing: {reason}{last}")
