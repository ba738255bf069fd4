"""What a user decides about checkpoints of a run."""

import dataclasses
from typing import Literal

from phijax.errors import UserError


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Section `checkpoint`. Raises UserError when a value makes no sense."""

    every_steps: int = 1000  # between two saves; one more at the end, and on a stop
    keep_last: int = 3  # newest steps kept; an older one goes only after a newer one is safely written
    keep_every: int | None = None  # steps divisible by this are kept for ever
    keep_best: str | None = None  # held-out set (or metric of one): the step with its lowest value so far is kept too
    restore_step: int | None = None  # go back to this step, once: later ones are set aside
    asynchronous: bool = True  # write while training goes on; needs host memory for a copy of this host's state
    timeout_seconds: float = 1200.0  # for one save, all processes together
    on_save_failure: Literal["stop", "continue"] = "stop"  # when a save fails or takes too long
    break_lock: bool = False  # take over a directory whose last writer, on another host, is known to be dead

    def __post_init__(self):
        _at_least_one("every_steps", self.every_steps)
        _at_least_one("keep_last", self.keep_last)
        if self.keep_every is not None:
            _at_least_one("keep_every", self.keep_every)
        if self.restore_step is not None:
            _at_least_one("restore_step", self.restore_step)
        if self.keep_best == "":
            raise UserError("checkpoint.keep_best='' names no held-out set. None keeps none.")
        if not self.timeout_seconds > 0:
            raise UserError(f"checkpoint.timeout_seconds={self.timeout_seconds} must be above 0.")
        if self.on_save_failure not in ("stop", "continue"):
            raise UserError(f"checkpoint.on_save_failure={self.on_save_failure!r} must be 'stop' or 'continue'.")

    @property
    def most_kept(self) -> int:
        """Steps on the disk at once, without those of keep_every: the oldest goes after the newest is written."""
        return max(self.keep_last, 2) + 1 + (self.keep_best is not None)


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise UserError(f"checkpoint.{name}={value} must be 1 or more.")
