"""Where metrics go: JSON lines always, TensorBoard by default, W&B when asked. Made on process 0 only.

A number is written as Python's repr of its float64 value, from which the same float32 or float64 comes back bit for
bit. JSON has no NaN: "NaN", "Infinity" and "-Infinity" are written as strings, which Python's float() and
`read_metrics` understand; null means "not known here".
"""

import contextlib
import json
import math
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from etils import epath

from phijax.distribution import install_hint
from phijax.errors import RunFailure, UserError
from phijax.storage import atomic, durable, strict_json
from phijax.storage.regular_files import read_bounded

REMOTE_SECONDS = 60.0
NOT_FINITE = ("NaN", "Infinity", "-Infinity")
HELD_OUT_LOSS = "heldout_loss/"  # + the data set's name: the metric of an evaluation that is drawn and shown
_MOST_STEPS = 1 << 62

Values = Mapping[str, float | int | str | None]


class Writer(Protocol):
    def write(self, values: Values) -> None:
        """Takes the metrics of one step; values["step"] says which."""

    def sync(self) -> None:
        """Makes what was written outlast this process and its machine."""

    def close(self) -> None: ...


def encode(values: Values) -> str:
    """One line of strict JSON, without the newline."""
    return json.dumps({key: _plain(value) for key, value in values.items()}, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value


def _parse(line: bytes, where: str) -> dict:
    """Raises: UserError for what is no line of metrics or events: the fields that are computed with must be numbers."""
    fields = strict_json.parse(line, where, half_characters=True)
    row = dict(fields.values)
    for name in ("loss", *(name for name in row if name.startswith(HELD_OUT_LOSS))):
        if row.get(name) not in NOT_FINITE:
            fields.number(name, None)
    fields.integer("step", None, most=_MOST_STEPS)
    if fields.text("event", None) in ("start", "progress"):
        fields.integer("step", most=_MOST_STEPS), fields.number("time")
    if row.get("event") == "progress":
        fields.number("useful_seconds")
    return row


def read_metrics(path: epath.PathLike) -> list[dict]:
    """The lines of a metrics.jsonl or events.jsonl, in file order, NaN and infinities as floats.

    The last line is left out when it is torn, as SIGKILL leaves it and as a run that is writing shows it.
    Raises: UserError, naming the line, when any other is not a JSON object, or what must be a number in it is none.
    """
    rows = []
    lines = read_bounded(path, None).split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            values = _parse(line, f"{path}, line {number},")
        except UserError:
            if number == len(lines):  # no newline after it
                continue
            raise
        rows.append({k: float(v) if isinstance(v, str) and v in NOT_FINITE else v for k, v in values.items()})
    return rows


def rewind(path: epath.Path, keep: Callable[[dict], bool]) -> int:
    """Takes out of a file of JSON lines what `keep` refuses and what is torn or no line of ours; returns how many.

    They are not lost: NAME.superseded.jsonl gets them, byte for byte, before the file itself is replaced at once.
    """
    if not path.exists():
        return 0
    kept, cut = [], []
    data = read_bounded(path, None)
    for line in data.splitlines():
        try:
            wanted = keep(_parse(line, ""))
        except UserError:
            wanted = False
        (kept if wanted else cut).append(line + b"\n")
    if cut:
        superseded = path.with_suffix(".superseded.jsonl")
        before = superseded.read_bytes() if superseded.exists() else b""
        atomic.write_bytes(superseded, before + b"".join(cut))
    if data != b"".join(kept):  # also when only the last newline was torn off
        atomic.write_bytes(path, b"".join(kept))
    return len(cut)


def _before(step: int | None, first_step: int) -> bool:
    return step is not None and step < first_step


class LineFile:
    """A file that lines are added to. On a disk each line is flushed, so SIGKILL loses none.

    Objects in a bucket cannot be appended to: there the whole file is sent again at `sync` and `close`, and otherwise
    at most every REMOTE_SECONDS.
    """

    def __init__(self, path: epath.Path, clock: Callable[[], float] = time.monotonic):
        self._path, self._clock = path, clock
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a", encoding="utf-8") if durable.is_local(path) else None
        self._sent_at = clock()
        self._unsent = False
        self._text = [path.read_text()] if self._file is None and path.exists() else []

    def append(self, line: str) -> None:
        if self._file is not None:
            with self._failing():
                self._file.write(line + "\n")
                self._file.flush()
            return
        self._text.append(line + "\n")
        self._unsent = True
        if self._clock() - self._sent_at >= REMOTE_SECONDS:
            self.sync()

    def sync(self) -> None:
        if self._file is not None:
            with self._failing():
                os.fsync(self._file.fileno())
        elif self._unsent:
            self._path.write_text("".join(self._text))
            self._sent_at, self._unsent = self._clock(), False

    def close(self) -> None:
        self.sync()
        if self._file is not None:
            self._file.close()

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunFailure(
                f"{self._path} cannot be written: {error}. The saved steps stay: make room, and start it again."
            ) from error


class JsonLines:
    """WORKDIR/metrics.jsonl: one line a logged step, each step once, whatever died before.

    A run that starts at `first_step` does the steps from there on again, so their lines, written by a life that died
    after its last checkpoint, go to metrics.superseded.jsonl, and a torn last line with them; `superseded` counts them.
    """

    def __init__(self, workdir: epath.Path, first_step: int):
        path = workdir / "metrics.jsonl"
        self.superseded = rewind(path, lambda values: _before(values.get("step"), first_step))
        self._file = LineFile(path)

    def write(self, values: Values) -> None:
        self._file.append(encode(values))

    def sync(self) -> None:
        self._file.sync()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """WORKDIR/tensorboard. Steps from `first_step` on that an earlier life wrote are hidden by TensorBoard itself."""

    def __init__(self, workdir: epath.Path, first_step: int):
        from tensorboardX import SummaryWriter  # half a second of protobuf

        directory = os.fspath(workdir / "tensorboard")
        self._writer = SummaryWriter(directory, purge_step=first_step or None, flush_secs=30)

    def write(self, values: Values) -> None:
        for name, value in values.items():
            if name not in ("step", "time") and isinstance(value, int | float):
                self._writer.add_scalar(name, value, global_step=values["step"], walltime=values.get("time"))

    def sync(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A W&B run; a restart goes on in the same one, by the id kept in WORKDIR/wandb_run_id.txt."""

    def __init__(self, project: str, workdir: epath.Path, run_config: Mapping[str, Any]):
        try:
            import wandb
        except ImportError:
            raise UserError(
                f"logging.wandb_project={project!r}, but the package wandb is not installed.  "
                f"Try {install_hint('wandb')}, or --config.logging.wandb_project=None"
            ) from None
        id_path = workdir / "wandb_run_id.txt"
        if not id_path.exists():
            workdir.mkdir(parents=True, exist_ok=True)
            id_path.write_text(uuid.uuid4().hex[:12])
        directory = os.fspath(workdir) if durable.is_local(workdir) else None
        self._run = wandb.init(
            project=project, id=id_path.read_text(), resume="allow", dir=directory, config=dict(run_config)
        )
        # W&B drops what is logged at a step below its newest; with `step` as a metric it keeps steps that are redone.
        self._run.define_metric("*", step_metric="step")

    def write(self, values: Values) -> None:
        self._run.log({name: value for name, value in values.items() if value is not None})

    def sync(self) -> None:
        pass  # its own process sends

    def close(self) -> None:
        failed = sys.exc_info()[0] is not None
        self._run.finish(exit_code=1 if failed else 0)
