"""What the loop hands its metrics to. Nothing here makes the device wait for the host."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import jax
import numpy as np
from etils import epath

from phijax.report.config import LoggingConfig, check
from phijax.report.goodput import goodput
from phijax.report.meter import Meter, host_memory_bytes
from phijax.report.plot import plot_losses
from phijax.report.profiler import StepProfiler
from phijax.report.progress import Progress, open_progress
from phijax.report.writers import JsonLines, LineFile, TensorBoard, Wandb, Writer, encode, read_metrics, rewind

Metrics = Mapping[str, float | jax.Array]


def open_report(
    config: LoggingConfig,
    workdir: epath.Path,
    *,
    first_step: int,
    total_steps: int,
    tokens_before: Callable[[int], int],
    flops_per_token: Callable[[int], float],
    peak_flops_per_device: float | None,
    device_count: int,
    means: Mapping[str, str],
    process_index: int = 0,
    baselines: Mapping[str, float] | None = None,
    run_config: Mapping[str, Any] | None = None,
    stream: TextIO | None = None,
) -> "Report":
    """The report of a run that begins at `first_step`, on every process; only process 0 writes and shows anything.

    Args: tokens_before, flops_per_token, peak_flops_per_device, device_count: see Meter. means: see Report.
      baselines: see plot_losses. run_config: what W&B shows as the run's config. stream: the screen, stderr by default.
    Raises UserError for a config that cannot be meant, or when W&B is asked for and not installed.
    """
    check(config, total_steps)
    workdir = epath.Path(workdir)
    meter = Meter(tokens_before, flops_per_token, peak_flops_per_device, device_count)
    if process_index != 0:
        return Report(config, first_step, total_steps, meter, means=means)
    writers: list[Writer] = []
    if config.wandb_project is not None:  # first: it may refuse
        writers.append(Wandb(config.wandb_project, workdir, run_config or {}))
    lines = JsonLines(workdir, first_step)
    writers.insert(0, lines)
    if config.tensorboard:
        writers.append(TensorBoard(workdir, first_step))

    def plot() -> None:
        plot_losses(workdir / "metrics.jsonl", workdir / "loss.png", baselines)

    report = Report(
        config,
        first_step,
        total_steps,
        meter,
        means=means,
        writers=writers,
        events=EventLog(workdir, first_step),
        progress=open_progress(stream or sys.stderr, first_step, total_steps),
        profiler=StepProfiler(workdir / "profile", config.profile_start, config.profile_steps),
        at_close=plot if config.plot else None,
    )
    if lines.superseded:
        report.say(f"{lines.superseded} lines of steps from {first_step} on went to metrics.superseded.jsonl")
    if config.profile_start is not None and config.profile_start < first_step:
        report.say(f"no trace: logging.profile_start={config.profile_start} is before this start's step {first_step}")
    return report


class EventLog:
    """WORKDIR/events.jsonl, over all starts of the run; goodput.py says what is in it."""

    def __init__(self, workdir: epath.Path, first_step: int, clock: Callable[[], float] = time.time):
        path = workdir / "events.jsonl"
        rewind(path, lambda values: "event" in values)  # torn lines, and what is none of ours
        self._clock = clock
        start = {"event": "start", "time": clock(), "step": first_step}
        earlier = (read_metrics(path) if path.exists() else []) + [start]
        now = goodput(earlier, start["time"])
        self._useful_before, self._started = now.useful_seconds, start["time"] - now.wall_seconds
        self._file = LineFile(path)
        self._file.append(encode(start))

    def add(self, event: str, **fields) -> None:
        self._file.append(encode({"event": event, "time": self._clock(), **fields}))

    def goodput(self, useful_seconds: float) -> float | None:
        """Of the run until now, when this life has `useful_seconds` of step time. None at its first instant."""
        wall = self._clock() - self._started
        return (self._useful_before + useful_seconds) / wall if wall > 0 else None

    def sync(self) -> None:
        self._file.sync()

    def close(self) -> None:
        self._file.close()


class Report:
    """Metrics on their way from the device to files and screen, in order, each step once, nothing left behind.

    `add` keeps a step's device values and reads those of the step before, which the device has finished or is about to:
    while the host waits for them the device has the next step queued. A step's line is written when the next step is
    added, at `flush` or at `close`; until then `add` with the same step joins further metrics (evaluations) to it.

    The loop's side:
      with open_report(...) as report:
          ... report.add(step, metrics)
          with report.pause(): values = evaluator(params)       # no step's time
          report.add(step, values)
          report.flush()                                        # before a save: see there
          with report.pause(): checkpoints.save(...)
    """

    def __init__(
        self,
        config: LoggingConfig,
        first_step: int,
        total_steps: int,
        meter: Meter,
        writers: Sequence[Writer] = (),
        events: EventLog | None = None,
        progress: Progress | None = None,
        profiler: StepProfiler | None = None,
        at_close: Callable[[], None] | None = None,
        means: Mapping[str, str] | None = None,
    ):
        """Args: means: metric -> the metric that says of how much it is a mean: of nothing it is not a number."""
        self._config, self._total, self._meter, self._means = config, total_steps, meter, means or {}
        self._writers, self._events, self._progress, self._profiler = writers, events, progress, profiler
        self._at_close = at_close
        self._next_step = first_step
        self._newest: _Step | None = None
        self._step_seconds: float | None = None
        self._closed = False
        if profiler is not None and profiler.starts_at(first_step):
            profiler.start()

    def add(self, step: int, metrics: Metrics) -> tuple[int, dict[str, float]] | None:
        """Takes the metrics of `step`, scalars. Returns the step before and its values when `step` is new, else None.

        Raises ValueError for a step out of order or written already, and for a metric that the step has already.
        """
        if self._newest is not None and step == self._newest.index:
            self._join(self._newest, metrics)
            return None
        if step != self._next_step:
            raise ValueError(f"metrics of step {step} came where those of step {self._next_step} were due")
        previous, self._newest = self._newest, _Step(step, dict(metrics))
        self._next_step += 1
        if previous is not None:
            self._settle(previous)
            self._write(previous)
        if self._profiler is not None and self._profiler.starts_at(step + 1):
            self._settle(self._newest)  # or the trace would begin in the middle of this step
            self._profiler.start()
        return None if previous is None else (previous.index, previous.values)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Around work between steps (evaluation, saving, compiling): it is no step's time.

        Waits for the newest step first, so that its time is not taken for the pause's; what runs in a pause needs that
        step's parameters anyway.
        """
        if self._newest is not None:
            self._settle(self._newest)
        self._meter.pause()
        try:
            yield
        finally:
            self._meter.resume()

    def flush(self) -> None:
        """Writes the newest step's line and makes the files durable.

        Call it before a checkpoint is saved: the steps that the checkpoint holds are never done again, so a line of
        theirs that is not on the disk when the checkpoint is would be missing for ever.
        """
        if self._newest is not None:
            self._settle(self._newest)
            self._write(self._newest)
            if self._events is not None:
                self._progress_event(self._newest.index)
        for file in (*self._writers, *([self._events] if self._events is not None else [])):
            file.sync()

    def say(self, text: str) -> None:
        """A line for people, on process 0."""
        if self._progress is not None:
            self._progress.say(text)

    def event(self, name: str, **fields) -> None:
        """Adds a line to events.jsonl, for example event("saved", step=100)."""
        if self._events is not None:
            self._events.add(name, **fields)

    def close(self) -> None:
        """Writes what is left, ends files, trace and live line, draws the plot. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        with contextlib.ExitStack() as ending:  # each is done even if one before it fails
            if self._at_close is not None:
                ending.callback(self._at_close)
            for file in (self._events, self._progress, self._profiler, *self._writers):
                if file is not None:
                    ending.callback(file.close)
            self.event("stopped", step=self._next_step)
            self.flush()

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except Exception as second:
            # Most often the newest step's values, which died with the device; the first error is the one to see.
            error.add_note(f"while the report was closed: {type(second).__name__}: {second}")

    def _join(self, step: "_Step", metrics: Metrics) -> None:
        if step.written:
            raise ValueError(f"step {step.index} is written already; evaluate before the save and its flush")
        twice = step.values.keys() & metrics.keys()
        if twice:
            raise ValueError(f"step {step.index} has {sorted(twice)} already")
        step.values |= _on_host(metrics, self._means) if step.settled else metrics
        step.evaluated = True

    def _settle(self, step: "_Step") -> None:
        """Waits until the device has finished `step`, and fetches its values."""
        if step.settled:
            return
        step.values = _on_host(step.values, self._means)
        step.settled = True
        self._meter.step_done(step.index)
        if self._profiler is not None and self._profiler.step_done(step.index):
            self.say(f"trace of the steps up to {step.index} is written")
        if self._progress is not None:
            self._progress.step(step.index)

    def _write(self, step: "_Step") -> None:
        due = step.index % self._config.every_steps == 0 or step.index == self._total - 1 or step.evaluated
        if step.written or not (due or self._closed) or not self._writers:
            return
        step.written = True
        speed = self._meter.take()
        ours = dict(
            tokens=self._meter.tokens_after(step.index),
            tokens_per_second=speed.tokens_per_second,
            step_seconds=speed.step_seconds,
            mfu=speed.mfu,
            goodput=self._events.goodput(self._meter.useful_seconds) if self._events is not None else None,
            host_memory_bytes=host_memory_bytes(),
            time=time.time(),
        )
        clash = ours.keys() & step.values.keys()
        if clash:
            raise ValueError(f"{sorted(clash)} are the report's own metrics, step {step.index} brought others")
        line = {"step": step.index, **step.values, **ours}
        for writer in self._writers:
            writer.write(line)
        if self._events is not None:
            self._progress_event(step.index)
        if self._progress is not None:
            self._step_seconds = speed.step_seconds or self._step_seconds
            left = None if self._step_seconds is None else self._step_seconds * (self._total - 1 - step.index)
            self._progress.line(line, left)

    def _progress_event(self, step: int) -> None:
        self._events.add("progress", step=step + 1, useful_seconds=self._meter.useful_seconds)


@dataclass
class _Step:
    """A step whose line is not yet written."""

    index: int
    values: dict[str, Any]  # device scalars; floats and ints once settled
    settled: bool = False
    written: bool = False
    evaluated: bool = False


def _on_host(metrics: Metrics, means: Mapping[str, str]) -> dict[str, float]:
    """One transfer for all. float32 to float64 keeps every bit of the value."""
    values = {name: np.asarray(value).item() for name, value in jax.device_get(dict(metrics)).items()}
    return values | {name: math.nan for name, count in means.items() if name in values and values.get(count) == 0}
