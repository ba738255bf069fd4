"""Trains on data that are being checked, up to a deadline, and keeps nothing of it before they have passed.

The files are read in the background (checking.py). Until all are what their manifests say no checkpoint is written: a
save that is due waits. No step is begun past the deadline. When one is another, all processes end alike at one step.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from phijax.data import verification
from phijax.data.checking import DataCheck
from phijax.data.verification import gigabytes
from phijax.errors import RunFailure, StoppedUnsaved, UserError

STEPS_PART = 100  # one step in so many of the run, counted from this start, may be trained before the check is done
SECONDS = 600.0  # and none after so long
PATIENCE = 5.0  # a run that is asked to stop waits so long for the check, to save
_NEXT = {
    UserError: "mend that, then start the same command again.",
    RunFailure: "start the same command again.",
    StoppedUnsaved: "the same command can be started again, and reads on.",
}


class Gate:
    """What the loop passes before it begins a step, and before it saves."""

    def __init__(
        self,
        check: DataCheck,
        first_step: int,
        total_steps: int,
        asked_to_stop: Callable[[], bool],
        beat: Callable[[int], None],
        pause: Callable[[], AbstractContextManager],
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        """
        Args:
          asked_to_stop: whether a wait should end soon. beat: the watchdog's, called while the check goes on.
          pause: in which no step's time runs. say: takes lines for people.
        """
        self._check, self._asked, self._beat, self._pause, self._say = check, asked_to_stop, beat, pause, say
        self._clock = clock
        self._first = first_step
        self._last_free = first_step + total_steps // STEPS_PART - 1
        self._until = clock() + SECONDS
        self._passed = False
        if not check.files:
            say(verification.SIZES)
            self._passed = True
        elif not check.wait(0):
            size = gigabytes(sum(file.bytes for file in check.files))
            say(
                f"data: {len(check.files)} shards ({size}) are being compared with their manifests; nothing is saved "
                f"before that is done, nor a step from {self._last_free + 1} on begun, nor any after {SECONDS:.0f} s"
            )

    def before_step(self, step: int) -> None:
        """Waits where `step` is past the deadline. Raises as `_judge`, once all processes have come as far."""
        if self._passed:
            return
        if step > self._last_free or self._clock() > self._until:
            self._wait(step)
        while not self._check.begin(step):
            self._check.wait(0.1)
        if self._check.wait(0) and step > self._check.verdict.step:
            self._judge()

    def before_save(self, step: int) -> None:
        """Waits for the verdict, after `step`. Raises as `_judge`."""
        if not self._passed:
            self._wait(step)
            self._judge()

    def _judge(self) -> None:
        """Raises: UserError naming a shard that is another; RunFailure: one that cannot be read; StoppedUnsaved."""
        verdict = self._check.verdict
        if verdict.problem is None:
            self._passed = True
            self._say(verdict.line)
            return
        text = verdict.line
        if verdict.problem is StoppedUnsaved:
            text = f"stopped before the data were checked, {gigabytes(self._check.read_bytes)} of them read by now"
        lost = f"What was trained since step {self._first} is not saved"
        lost = lost if verdict.step >= self._first else "Nothing was trained"
        raise verdict.problem(f"{text.removesuffix('.')}.\n{lost}; {_NEXT[verdict.problem]}")

    def _wait(self, step: int) -> None:
        if self._check.wait(0):
            return
        with self._pause():
            asked, said, before = None, self._clock() + 1, (-1, -1)
            while not self._check.wait(0.2):
                now = self._clock()
                progress = self._check.progress()
                if step > self._first and (progress is None or progress != before):  # before the first none is late
                    before = progress
                    self._beat(step)
                if now > said:
                    said = now + 60
                    self._say(
                        f"step {step}: waiting for the check of the data, {gigabytes(self._check.read_bytes)} read here"
                    )
                if self._asked():
                    asked = asked or now
                    if now - asked > PATIENCE:
                        self._check.give_up()
