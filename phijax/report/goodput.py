"""Goodput: which part of a run's wall time, all its starts and the gaps between them included, made lasting steps.

  goodput = useful seconds / wall seconds
  wall    = now - the first start of the run; time in which no process ran is in it
  useful  = sum, over the lives of the run, of the step time of the steps that still count

A life is one start of the process. A step of a life counts unless a later life began at or before it: then it was done
again, or undone by going back to an older checkpoint. Step time is what `Meter` measures: start-up, compilation (each
life's first step), evaluation, saving and every stall outside a step are not in it.

WORKDIR/events.jsonl holds what is needed and is only ever appended to, one JSON object a line:
  {"event": "start", "time": unix seconds, "step": first step of this life}
  {"event": "progress", "time": ..., "step": steps done, "useful_seconds": step time of this life so far}
  {"event": "saved", "stopped", ...: for people}
Between two progress events the step time is taken as evenly spread. Step time after a killed life's last progress
event is not known and not counted, so goodput errs low, by less than logging.every_steps steps a kill.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Goodput:
    useful_seconds: float
    wall_seconds: float
    starts: int

    @property
    def fraction(self) -> float:
        return self.useful_seconds / self.wall_seconds if self.wall_seconds > 0 else 0.0


def goodput(events: Sequence[dict], now: float) -> Goodput:
    """Goodput of the run whose events.jsonl holds `events`, at unix time `now`."""
    lives: list[tuple[int, list[tuple[int, float]]]] = []  # (first step, [(steps done, useful seconds so far)])
    started = None
    for event in events:
        if event["event"] == "start":
            started = event["time"] if started is None else started
            lives.append((event["step"], [(event["step"], 0.0)]))
        elif event["event"] == "progress" and lives:
            lives[-1][1].append((event["step"], event["useful_seconds"]))
    if started is None:
        return Goodput(0.0, 0.0, 0)
    useful, kept_until = 0.0, None
    for first, points in reversed(lives):
        useful += points[-1][1] if kept_until is None else _useful_until(points, kept_until)
        kept_until = first if kept_until is None else min(kept_until, first)
    return Goodput(useful, now - started, len(lives))


def _useful_until(points: Sequence[tuple[int, float]], step: int) -> float:
    """Useful seconds of a life at the moment when `step` steps were done; `points` rise."""
    before_steps, before_seconds = points[0]
    if step <= before_steps:
        return 0.0
    for steps, seconds in points[1:]:
        if step < steps:
            return before_seconds + (seconds - before_seconds) * (step - before_steps) / (steps - before_steps)
        before_steps, before_seconds = steps, seconds
    return before_seconds
