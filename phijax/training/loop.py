"""The training loop: step, report, evaluate, save, stop cleanly. It is handed all it talks to."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax

from phijax.errors import RunFailure
from phijax.training.state import TrainState

Program = Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]
Evaluator = Callable[[Any, Any], dict[str, float]]


class Diverged(RunFailure):
    """Too many steps in a row had no finite loss or gradient."""


class Report(Protocol):
    def add(self, step: int, metrics: Mapping[str, Any]) -> tuple[int, dict[str, float]] | None: ...

    def pause(self) -> Any: ...

    def flush(self) -> None: ...

    def event(self, name: str, **fields: Any) -> None: ...


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

    def last(self, step: int) -> bool:
        return step + 1 == self.total_steps

    def evaluation_due(self, step: int) -> bool:
        return self.last(step) or (step + 1) % self.evaluate_every == 0

    def save_due(self, step: int) -> bool:
        return self.last(step) or (step + 1) % self.save_every == 0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How far the run came; `stopped`: on request, before the end. `state` is on the mesh."""

    step: int
    stopped: bool
    state: TrainState


def train(
    state: TrainState,
    batches: Iterable[tuple[int, Any]],
    program_of: Callable[[int], Program],
    pace: Pace,
    *,
    evaluators: Sequence[Evaluator],
    report: Report,
    checkpoints: Checkpoints,
    gate: Gate,
    stop: Stop,
    watchdog: Watchdog,
) -> Outcome:
    """Runs all `batches`, or until it is asked to stop.

    Args:
      batches: (step, batch) in order.
      program_of: step -> the compiled step for its phase; compiles when a phase begins.
    Raises: Diverged after pace.max_skipped updates in a row that were not finite, at the end too. Checkpoints stay.
    """
    outcome = Outcome(int(state.step), False, state)
    del state  # donated step by step: only the newest is alive
    try:
        for step, batch in batches:
            gate.before_step(step)
            watchdog.beat(step)
            program = program_of(step)
            state, metrics = program(outcome.state, batch)  # dispatched, not awaited
            outcome = Outcome(step + 1, False, state)
            _check(report.add(step, _named(metrics)), pace)  # the step before: the device never waits for the host
            if evaluators and pace.evaluation_due(step):
                with report.pause():
                    scores = {k: v for evaluate in evaluators for k, v in evaluate(state.params, state.frozen).items()}
                    watchdog.beat(step)
                report.add(step, scores)
            checkpoints.poll()
            stopping = stop.agreed(step)  # all processes, once per step: a local look could hang a pod or lose the save
            if stopping or pace.save_due(step):
                gate.before_save(step)  # waits until the data are known to be the right ones, or raises
                report.flush()
                with report.pause():
                    checkpoints.save(step + 1, state)
                    watchdog.beat(step)
                report.event("save_started", step=step + 1)
            if stopping and not pace.last(step):
                return dataclasses.replace(outcome, stopped=True)
        last = {"skipped_in_a_row": outcome.state.skipped_in_a_row}  # no step follows in which it would be read
        _check((outcome.step - 1, last), pace)
        return outcome
    finally:
        checkpoints.wait()  # an asynchronous save that is not awaited is lost


def _named(metrics: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {{"skipped": "skipped_steps", "weight": "predicted_tokens"}.get(k, k): v for k, v in metrics.items()}


def _check(previous: tuple[int, Mapping[str, Any]] | None, pace: Pace) -> None:
    if previous is None:
        return
    step, values = previous
    count = int(values["skipped_in_a_row"])
    if count >= pace.max_skipped:
        good = f"step {step - count} was the last good one" if count <= step else "no step was good"
        raise Diverged(
            f"{count} updates in a row, up to step {step}, had a loss or gradient that is not finite and were skipped; "
            f"{good}. Nothing later is worth keeping: lower the learning rate, or look at the data of those steps, and "
            f"start again from a checkpoint before them."
        )
