"""What a person sees of a run: a live line on a terminal, plain lines in a log, behind one interface."""

from collections.abc import Mapping
from typing import Protocol, TextIO

from phijax.report.plot import HELD_OUT_LOSS


class Progress(Protocol):
    def step(self, step: int) -> None:
        """`step` is done."""

    def line(self, values: Mapping, seconds_left: float | None) -> None:
        """The metrics of a logged step, as they stand in metrics.jsonl."""

    def say(self, text: str) -> None:
        """Something that stays on the screen: a checkpoint, a warning."""

    def close(self) -> None: ...


def open_progress(stream: TextIO, first_step: int, total_steps: int) -> Progress:
    """The live line when `stream` is a terminal that can move its cursor, plain lines otherwise."""
    from rich.console import Console

    console = Console(file=stream, highlight=False)
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveProgress(console, first_step, total_steps)
    return PlainProgress(stream, total_steps)


GOODPUT = (
    "goodput: the part of the time since the run's first start that was spent in steps that last; starts, compiling, "
    "evaluating and saving are not in it, so it is low at first"
)


class PlainProgress:
    """A line a logged step; every one is flushed, since logs are read while they grow."""

    def __init__(self, stream: TextIO, total_steps: int):
        self._stream, self._total = stream, total_steps
        self._explained = False

    def step(self, step: int) -> None:
        pass

    def line(self, values: Mapping, seconds_left: float | None) -> None:
        self.say(describe_all(values, self._total, seconds_left))
        if values.get("goodput") and not self._explained:
            self._explained = True
            self.say(GOODPUT)

    def say(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.flush()


class LiveProgress:
    """One line that is redrawn, with a bar; logged steps and what is said stay above it.

    On a narrow terminal the line's end is cut, where the losses are: they stand above it too.
    """

    def __init__(self, console, first_step: int, total_steps: int):
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        self._console, self._total = console, total_steps
        self._bar = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
            console=console,
            expand=True,
        )
        start = "compiling the first step"
        self._task = self._bar.add_task("", total=total_steps, completed=first_step, left="", text=start)
        self._explained = False
        self._bar.start()

    def step(self, step: int) -> None:
        self._bar.update(self._task, completed=step + 1)

    def line(self, values: Mapping, seconds_left: float | None) -> None:
        left = "" if seconds_left is None else f"{duration(seconds_left)} left"
        self._bar.update(self._task, left=left, text="  ".join(describe(values) + describe_time(values, None)))
        self.say(describe_all(values, self._total, None))
        if values.get("goodput") and not self._explained:
            self._explained = True
            self.say(GOODPUT)

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        self._bar.stop()


def describe_all(values: Mapping, total: int, seconds_left: float | None) -> str:
    """A logged step as one line."""
    parts = [f"step {values['step']}/{total}", *describe(values), *describe_time(values, seconds_left)]
    return "  ".join(parts + describe_held_out(values))


def describe(values: Mapping) -> list[str]:
    """Loss first, then what the optimizer does."""
    parts = []
    for key, form in (("loss", "loss {:.4f}"), ("learning_rate", "lr {:.2e}"), ("grad_norm", "grad {:.2f}")):
        if values.get(key) is not None:
            parts.append(form.format(values[key]))
    if values.get("skipped_steps"):
        parts.append(f"SKIPPED {values['skipped_steps']:.0f}")
    return parts


def describe_time(values: Mapping, seconds_left: float | None) -> list[str]:
    parts = []
    if values.get("tokens_per_second") is not None:
        parts.append(f"{_thousands(values['tokens_per_second'])} tokens/s")
    if values.get("mfu") is not None:
        parts.append(f"MFU {values['mfu']:.1%}")
    if values.get("goodput"):  # before the first step that has a time there is none
        parts.append(f"goodput {values['goodput']:.0%}")
    if seconds_left is not None:
        parts.append(f"{duration(seconds_left)} left")
    return parts


def describe_held_out(values: Mapping) -> list[str]:
    names = [key.removeprefix(HELD_OUT_LOSS) for key in values if key.startswith(HELD_OUT_LOSS)]
    return [f"held-out {name} {values[HELD_OUT_LOSS + name]:.4f}" for name in names]


def duration(seconds: float) -> str:
    """45 s, 12:30 min, 3:05 h, 2 d 4 h."""
    seconds = round(seconds)
    if seconds < 100:
        return f"{seconds} s"
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if hours < 1:
        return f"{minutes}:{seconds % 60:02d} min"
    return f"{hours}:{minutes % 60:02d} h" if days < 1 else f"{days} d {hours % 24} h"


def _thousands(value: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}" if value < 999.5 * limit else f"{value / limit:.0f}{unit}"
    return f"{value:.0f}"
