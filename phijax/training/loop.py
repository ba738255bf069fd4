"""The training loop: step, report, evaluate, save, stop cleanly. It is handed all it talks to."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax

from phijax.training.skipped import Diverged, NothingLearned, Skipped
from phijax.training.state import TrainState

__all__ = ["Diverged", "NothingLearned", "Outcome", "Pace", "train"]

Program = Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]
BatchOf = Callable[[int, TrainState], Any]
Evaluator = Callable[[Any, Any], dict[str, float]]


class Report(Protocol):
    def add(self, step: int, metrics: Mapping[str, Any]) -> tuple[int, dict[str, float]] | None: ...

    def pause(self) -> Any: ...

    def flush(self) -> None: ...

    def event(self, name: str, **fields: Any) -> None: ...

    def say(self, text: str) -> None: ...


class Checkpoints(Protocol):
    def save(self, step: int, tree: Any, extra: dict | None = None) -> None: ...

    def poll(self) -> None: ...

    def wait(self) -> None: ...


class Stop(Protocol):
    def agreed(self, step: int) -> bool: ...


class Gate(Protocol):
    def before_step(self, step: int) -> None: ...

    def before_save(self, step: int) -> None: ...


class Watchdog(Protocol):
    def beat(self, step: int) -> None: ...


@dataclasses.dataclass(frozen=True)
class Pace:
    """When things are due, in steps."""

    total_steps: int
    evaluate_every: int
    save_every: int
    max_skipped: int  # in a row
    score_saves: bool = False  # evaluate before each save, so that every saved step has its own score

    def last(self, step: int) -> bool:
        return step + 1 == self.total_steps

    def evaluation_due(self, step: int) -> bool:
        return self.last(step) or (step + 1) % self.evaluate_every == 0

    def save_due(self, step: int) -> bool:
        return self.last(step) or (step + 1) % self.save_every == 0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How far the run came; `stopped`: on request, before the end. `state` is on the mesh.

    saved: whether `state` is; where it is not, the run goes on from the newest saved step.
    """

    step: int
    stopped: bool
    state: TrainState
    saved: bool = False


def train(
    state: TrainState,
    batch_of: BatchOf,
    program_of: Callable[[int], Program],
    pace: Pace,
    *,
    counted: str,
    evaluators: Sequence[Evaluator],
    report: Report,
    checkpoints: Checkpoints,
    gate: Gate,
    stop: Stop,
    watchdog: Watchdog,
) -> Outcome:
    """Runs from the state's step to the last, or until it is asked to stop.

    Args:
      batch_of: (step, the state that it begins with, not donated yet) -> its batch; asked for step after step.
      program_of: step -> the compiled step for its phase; compiles when a phase begins.
      counted: what the report calls a batch's weight: the tokens that were predicted, say.
    Raises: Diverged, NothingLearned after pace.max_skipped steps in a row that changed nothing, at the end too.
    """
    outcome = Outcome(int(state.step), False, state)
    skipped = Skipped(outcome.step, int(state.skipped_in_a_row), pace.max_skipped, report)
    metrics, owed = None, False
    del state  # donated step by step: only the newest is alive
    try:
        for step in range(outcome.step, pace.total_steps):
            batch = batch_of(step, outcome.state)
            gate.before_step(step)
            program = program_of(step)  # may compile for long, and is no part of the step
            watchdog.beat(step)
            state, metrics = program(outcome.state, batch)  # dispatched, not awaited
            outcome, metrics = Outcome(step + 1, False, state), _named(metrics, counted)
            _see(skipped, report.add(step, metrics), counted)  # the step before: the device never waits for the host
            owed = owed or pace.save_due(step)
            scores = {}
            if evaluators and (pace.evaluation_due(step) or (owed and pace.score_saves and _good(state))):
                with report.pause():
                    scores = {k: v for evaluate in evaluators for k, v in evaluate(state.params, state.frozen).items()}
                    watchdog.beat(step)
                report.add(step, scores)
            checkpoints.poll()
            stopping = stop.agreed(step)  # all processes, once per step: a local look could hang a pod or lose the save
            if stopping or owed:
                gate.before_save(step)  # waits until the data are known to be the right ones, or raises
                said_before = not (stopping or pace.save_due(step))
                saved = _save(state, scores, pace, report, checkpoints, watchdog, quiet=said_before)
                owed, outcome = not saved, dataclasses.replace(outcome, saved=saved)
            if stopping and not pace.last(step):
                return dataclasses.replace(outcome, stopped=True)
        if metrics is not None:  # no step follows in which they would be read
            _see(skipped, (outcome.step - 1, metrics), counted)
        skipped.check_end(outcome.step, int(outcome.state.skipped))
        return outcome
    finally:
        checkpoints.wait()  # an asynchronous save that is not awaited is lost


def _save(state, scores, pace: Pace, report: Report, checkpoints: Checkpoints, watchdog: Watchdog, quiet: bool) -> bool:
    """Saves the state after a good update; after others nothing, since it would push out a step that is good.

    At the end of the run there is no later save: the state is saved, its weights those of the last good update, but
    is not called good. All processes decide alike: the count is a result of the step, the same on each.
    """
    step, in_a_row = int(state.step), int(state.skipped_in_a_row)  # a save copies the state anyway: no wait is added
    if in_a_row and not (pace.last(step - 1) and in_a_row < pace.max_skipped):
        if not quiet:
            report.say(f"WARNING: step {step} is not saved: {_skips(in_a_row)}. Good updates alone are saved.")
        return False
    if in_a_row:
        report.say(f"WARNING: step {step}, the last, is saved but not called good: {_skips(in_a_row)}.")
    report.flush()
    with report.pause():
        finite = {name: score for name, score in scores.items() if math.isfinite(score)}
        checkpoints.save(step, state, {"good": not in_a_row, "scores": finite})
        watchdog.beat(step - 1)
    report.event("save_started", step=step)
    return True


def _good(state: TrainState) -> bool:
    return int(state.skipped_in_a_row) == 0


def _skips(in_a_row: int) -> str:
    return f"the last {in_a_row} updates were not finite" if in_a_row > 1 else "the last update was not finite"


def _named(metrics: Mapping[str, jax.Array], counted: str) -> dict[str, jax.Array]:
    names = {"skipped": "skipped_steps", "weight": counted}
    return {names.get(name, name): value for name, value in metrics.items()}


def _see(skipped: Skipped, previous: tuple[int, Mapping[str, Any]] | None, counted: str) -> None:
    if previous is not None:
        step, values = previous
        skipped.see(step, int(values["skipped_in_a_row"]), float(values[counted]))
