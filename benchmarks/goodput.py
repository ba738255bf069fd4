"""What kills cost, measured: python benchmarks/goodput.py [--plot=goodput.png]

A job of several processes on this machine's CPU trains a small model; every --kill_every seconds on average one of
them, drawn by chance, gets SIGKILL. The others end by themselves, all are started again, as a babysitter of a pod does.
Three checkpoint intervals, the same kills for each: a quarter of the formula's best, the best, and four times it. Their
lives take turns, so that whatever else the machine does meets all three alike. 25 to 35 minutes with the defaults.
Nothing is simulated: `phijax.main` runs as it would anywhere.
"""

import dataclasses
import itertools
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from absl import app, flags

from phijax.report.checkpoint_interval import best_interval, expected_goodput
from phijax.report.goodput import Goodput, goodput
from phijax.report.writers import read_metrics

FLAGS = flags.FLAGS
flags.DEFINE_integer("processes", 2, "Of the job.")
flags.DEFINE_float("kill_every", 75.0, "Seconds from a start to a kill, on average; half of it to one and a half.")
flags.DEFINE_integer("lives", 6, "Starts for each checkpoint interval; each ends with a kill.")
flags.DEFINE_string("plot", None, "Picture to write.")

ROOT = pathlib.Path(__file__).parents[1]
FOREVER = 1_000_000  # steps
PATIENCE = 120  # seconds for the others to end; then they are killed
EXPERIMENT = """
import phijax.config


def get_config():
    c = phijax.config.defaults()
    c.model.preset = "tiny"
    c.model.vocab_size = 1024
    c.model.num_layers, c.model.model_dim, c.model.ffn_dim = 4, 384, 1536
    c.model.num_heads, c.model.num_kv_heads, c.model.head_dim = 8, 8, 48
    c.data.phases = [
        dict(steps=FOREVER, sequence_length=128, global_batch_size=4, mixture=[dict(path="DATA", weight=1)])
    ]
    c.checkpoint.asynchronous = False  # so that all of a save's cost is in one place, where it can be read
    c.logging.every_steps, c.logging.tensorboard, c.logging.plot = 1, False, False
    c.evaluation.every_steps = FOREVER
    c.processes.heartbeat_timeout = 10
    c.processes.initialization_timeout = 60  # of one that was killed before it was there the others hear by this alone
    return c
"""


@dataclasses.dataclass(frozen=True)
class Measured:
    """Of one checkpoint interval. lost: steps done that a kill threw away; interval: in steps.

    dead_seconds: of a life, before its first step is done and after the kill, until the last process has ended.
    """

    interval: int
    kept: int
    lost: int
    saves: int
    goodput: Goodput
    step_seconds: float
    save_seconds: float
    dead_seconds: float


@dataclasses.dataclass(frozen=True)
class Life:
    """Unix times: processes started, one killed, all ended."""

    began: float
    killed: float
    ended: float


class Job:
    """The processes of one run, started and killed together."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.experiment = folder / "experiment.py"
        text = EXPERIMENT.replace("FOREVER", str(FOREVER)).replace("DATA", str(folder / "shards"))
        self.experiment.write_text(text)

    def prepare(self) -> None:
        """Shards of text that every Python carries."""
        text, shards = self.folder / "text", self.folder / "shards"
        _run(sys.executable, str(ROOT / "experiments" / "python_text.py"), f"--output={text}")
        _run(sys.executable, "-m", "phijax.prepare", f"--input={text}", f"--output={shards}",
             "--vocab_size=1024", "--block=128", "--num_shards=2")  # fmt: skip

    def live(self, workdir: pathlib.Path, every: int, until: Callable[[], bool], victim: int) -> Life:
        """One life: started, its `victim`-th process killed when `until` says so, the others awaited."""
        workdir.mkdir(exist_ok=True)
        if not (workdir / "compile_cache").exists():  # a life is too short to be spent compiling
            (self.folder / "compiled").mkdir(exist_ok=True)
            (workdir / "compile_cache").symlink_to(self.folder / "compiled")
        began = time.time()
        children = [self._start(workdir, every, number) for number in range(FLAGS.processes)]
        try:
            while not until():
                time.sleep(0.02)
                if all(child.poll() is None for child in children):
                    continue
                raise RuntimeError("a process ended by itself:\n" + (workdir / "process-0.txt").read_text()[-2000:])
            killed = time.time()
            children[victim].send_signal(signal.SIGKILL)
            _await_all(children, PATIENCE)
        finally:
            for child in children:
                if child.poll() is None:
                    child.kill()
                    child.wait()
        return Life(began, killed, time.time())

    def _start(self, workdir: pathlib.Path, every: int, number: int) -> subprocess.Popen:
        if number == 0:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self._address = f"127.0.0.1:{free.getsockname()[1]}"
        command = [
            *(sys.executable, "-m", "phijax.main", f"--config={self.experiment}", f"--workdir={workdir}"),
            *(f"--coordinator_address={self._address}", f"--process_count={FLAGS.processes}"),
            *(f"--process_id={number}", f"--config.checkpoint.every_steps={every}"),
        ]
        with open(workdir / f"process-{number}.txt", "ab") as log:
            return subprocess.Popen(command, cwd=ROOT, env=_environment(), stdout=log, stderr=subprocess.STDOUT)


def _await_all(children: list[subprocess.Popen], seconds: float) -> None:
    """Says which has not ended by itself."""
    end = time.monotonic() + seconds
    for number, child in enumerate(children):
        try:
            child.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            print(
                f"process {number} was still there {seconds} s after another one's death", file=sys.stderr, flush=True
            )


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    return kept | {
        "JAX_PLATFORMS": "cpu",
        # Otherwise the folder's path is part of an entry's key, and no workdir could use what another has compiled.
        "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "none",
    }


def _run(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")


def measure(workdir: pathlib.Path, interval: int, lives: list[Life]) -> Measured:
    """What the run's own records say. Only steps that a checkpoint holds are kept: the last life was killed too."""
    events = read_metrics(workdir / "events.jsonl")
    kept, done, steps, seconds, dead, saves = _newest(workdir), 0, 0, 0.0, 0.0, []
    for life in lives:
        mine = [event for event in events if life.began <= event["time"] <= life.ended]
        progress = [event for event in mine if event["event"] == "progress"]
        dead += life.ended - life.killed + (progress[0]["time"] if progress else life.killed) - life.began
        if progress:
            done += progress[-1]["step"] - mine[0]["step"]
            steps += progress[-1]["step"] - progress[0]["step"]  # a life's first step is not timed
            seconds += progress[-1]["useful_seconds"]
        for before, event in itertools.pairwise(mine):
            if event["event"] == "save_started":
                saves.append(event["time"] - before["time"])
    again = {"event": "start", "step": kept, "time": lives[-1].ended}
    # Other intervals' lives lie between these: wall time is the lives' own.
    wall = sum(life.ended - life.began for life in lives)
    record = dataclasses.replace(goodput([*events, again], lives[-1].ended), wall_seconds=wall)
    return Measured(
        interval, kept, done - kept, len(saves), record, seconds / max(steps, 1),
        sum(saves) / max(len(saves), 1), dead / len(lives),
    )  # fmt: skip


def run(job: Job, intervals: list[int], kills: list[tuple[float, int]]) -> list[Measured]:
    """A run from nothing for each interval, a life of each in turn; kills: (seconds from the start, process)."""
    workdirs = [job.folder / f"{number}-every-{every}" for number, every in enumerate(intervals)]
    lives: list[list[Life]] = [[] for _ in intervals]
    for seconds, victim in kills:
        for workdir, every, lived in zip(workdirs, intervals, lives, strict=True):
            end = time.monotonic() + seconds
            lived.append(job.live(workdir, every, lambda end=end: time.monotonic() > end, victim))
        print(f"a life of {seconds:.0f} s each; load {os.getloadavg()[1]:.1f}", file=sys.stderr, flush=True)
    return [measure(*one) for one in zip(workdirs, intervals, lives, strict=True)]


def calibrate(job: Job, every: int = 5, saves: int = 8) -> Measured:
    """One life of a few saves, however long it takes to compile."""
    workdir = job.folder / "calibration"
    life = job.live(workdir, every, lambda: _newest(workdir) >= every * (saves - 1), 0)
    return measure(workdir, every, [life])


def _newest(workdir: pathlib.Path) -> int:
    """Step of the newest checkpoint, 0 before the first."""
    return max((int(path.parent.name) for path in workdir.glob("checkpoints/*/manifest.json")), default=0)


def main(_) -> None:
    chance = random.Random(0)
    kills = [
        (FLAGS.kill_every * chance.uniform(0.5, 1.5), chance.randrange(FLAGS.processes)) for _ in range(FLAGS.lives)
    ]
    with tempfile.TemporaryDirectory() as temporary:
        job = Job(pathlib.Path(temporary))
        job.prepare()
        first = calibrate(job)
        best = best_interval(first.save_seconds, FLAGS.kill_every) / first.step_seconds
        print(f"{FLAGS.processes} processes, {FLAGS.lives} lives of {FLAGS.kill_every:g} s on average: a step "
              f"{first.step_seconds:.2f} s, a save {first.save_seconds:.2f} s; the formula's best interval is "
              f"{best:.1f} steps", flush=True)  # fmt: skip
        rows = run(job, [max(1, round(factor * best)) for factor in (0.25, 1, 4)], kills)
        for row in rows:
            print(_line(row), flush=True)
    if not all(row.step_seconds for row in rows):
        raise SystemExit("Not one timed step between two kills: give --kill_every more seconds.")
    if FLAGS.plot:
        _plot(rows, FLAGS.plot)
        print(f"wrote {FLAGS.plot}")


def _expected(row: Measured, seconds: float) -> float:
    """By the formula, with this row's own save and restart times."""
    return expected_goodput(
        seconds,
        save_seconds=row.save_seconds,
        failure_seconds=row.goodput.wall_seconds / FLAGS.lives,
        restart_seconds=row.dead_seconds,
    )


def _line(row: Measured) -> str:
    seconds = row.interval * row.step_seconds
    return (
        f"every {row.interval:4} steps ({seconds:6.1f} s): goodput {row.goodput.fraction:6.1%}, by the formula "
        f"{_expected(row, seconds):6.1%}; {row.kept} steps kept, {row.lost} lost in {row.goodput.starts - 1} lives, "
        f"{row.saves} saves of {row.save_seconds:.2f} s, a step {row.step_seconds:.2f} s; a life takes "
        f"{row.goodput.wall_seconds / FLAGS.lives:.1f} s, {row.dead_seconds:.1f} to its first step and behind the kill"
    )


def _plot(rows: list[Measured], output: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    middle, seconds = rows[1], [row.interval * row.step_seconds for row in rows]
    curve = [seconds[0] / 2 * (4 * seconds[-1] / seconds[0]) ** (i / 100) for i in range(101)]
    axes.semilogx(
        curve, [_expected(middle, x) for x in curve], color="#8c959f", label="formula, costs of the middle one"
    )
    axes.semilogx(
        seconds,
        [_expected(*one) for one in zip(rows, seconds, strict=True)],
        "x",
        color="#57606a",
        label="formula, its own costs",
    )
    axes.semilogx(seconds, [row.goodput.fraction for row in rows], "o", color="#0969da", label="measured")
    axes.set_xticks(seconds, [f"{x:.1f} s\n{row.interval} steps" for x, row in zip(seconds, rows, strict=True)])
    axes.minorticks_off()
    axes.set_xlabel("between two saves")
    axes.set_ylabel("goodput")
    axes.set_ylim(0, 1)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(output)


if __name__ == "__main__":
    app.run(main)
