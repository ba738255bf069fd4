"""Commands are killed and started again until they end: what they leave is bit for bit an undisturbed one's."""

import contextlib
import dataclasses
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from attacks import small_run
from attacks.small_run import STEPS, dies_at_change, ended, files_below, fork, killed_after, learned
from attacks.tries import Outcome, Try

MOST_KILLS = 8
_KINDS = ("run",) * 5 + ("prepare", "export hf", "export gguf", "export phijax", "quantize")  # by number


def ready(folder: pathlib.Path) -> Try:
    text = small_run.prepared(folder)
    config = small_run.experiment(folder)
    _undisturbed(small_run.train(config, folder / "unbroken"), folder / "compile.txt")
    again = folder / "again"
    (again).mkdir()
    (again / "compile_cache").symlink_to(folder / "unbroken" / "compile_cache")
    began = time.monotonic()
    _undisturbed(dies_at_change(again, 0, small_run.train(config, again)), folder / "again.txt")
    seconds = time.monotonic() - began
    changes = int((folder / "again.txt").read_text().rpartition("changes: ")[2])
    run = _Run(folder, config, seconds, changes, learned(again), small_run.state(again, STEPS))
    commands: dict[str, _Command] = {}

    def attempt(number: int, chance: random.Random) -> Outcome:
        kind = _KINDS[number % len(_KINDS)]
        place = folder / str(number)
        place.mkdir()
        try:
            if kind == "run":
                return run.attempt(place, chance)
            if kind not in commands:
                commands[kind] = _command(kind, folder, text, again)
            return commands[kind].attempt(place, chance)
        finally:
            shutil.rmtree(place)

    return attempt


def _undisturbed(work: Callable[[], None], log: pathlib.Path) -> None:
    if ended(fork(work, log)):
        raise RuntimeError(log.read_text())


@dataclasses.dataclass
class _Run:
    """seconds: of an undisturbed one whose programs are compiled. changes: of files, in one."""

    folder: pathlib.Path
    config: pathlib.Path
    seconds: float
    changes: int
    expected: dict[int, list[float]]
    state: str

    def attempt(self, place: pathlib.Path, chance: random.Random) -> Outcome:
        workdir, log = place / "run", place / "log.txt"
        wanted, kills, code = chance.randint(1, MOST_KILLS), 0, -signal.SIGKILL
        while kills < wanted and code == -signal.SIGKILL:
            work = self._work(workdir)
            if chance.random() < 0.5:
                code = killed_after(fork(work, log), chance.uniform(0, self.seconds))
            else:
                code = ended(fork(dies_at_change(place, chance.randint(1, self.changes), work), log))
            kills += code == -signal.SIGKILL
        if code == -signal.SIGKILL:
            code = ended(fork(self._work(workdir), log))
        said = log.read_text(errors="replace")[-3000:]
        if code:
            return Outcome("run", f"ended with {code}", True, said, kills)
        if learned(workdir) != self.expected:
            return Outcome("run", "other losses", True, said, kills)
        if (found := small_run.state(workdir, STEPS)) != self.state:
            return Outcome("run", "another final state", True, found, kills)
        return Outcome("run", "losses and final state bit-equal", kills=kills)

    def _work(self, workdir: pathlib.Path) -> Callable[[], None]:
        # A start that loaded programs and died before its first step has set them aside; compiling anew takes long.
        workdir.mkdir(exist_ok=True)
        with contextlib.suppress(FileExistsError):
            (workdir / "compile_cache").symlink_to(self.folder / "unbroken" / "compile_cache")
        return small_run.train(self.config, workdir)


@dataclasses.dataclass
class _Command:
    """Killed with all its children, or alone, and started again. expected: name -> sha256 of its files, or a digest."""

    kind: str
    started: Callable[[pathlib.Path], list[str]]
    seconds: float
    digest: Callable[[pathlib.Path], object]
    expected: object

    def attempt(self, place: pathlib.Path, chance: random.Random) -> Outcome:
        output, log = place / "out" / "it", place / "log.txt"
        output.parent.mkdir()
        wanted, kills, code = chance.randint(1, MOST_KILLS // 2), 0, -signal.SIGKILL
        while kills < wanted and code == -signal.SIGKILL:
            code = _killed(self.started(output), log, chance.uniform(0, self.seconds), alone=chance.random() < 0.5)
            kills += code == -signal.SIGKILL
        if code == -signal.SIGKILL:
            code = _killed(self.started(output), log, None)
        said = log.read_text(errors="replace")[-3000:]
        was_done = code == 2 and "is there already" in said and str(output) in said  # killed after its last change
        if code and not was_done:
            return Outcome(self.kind, f"ended with {code}", True, said, kills)
        left = sorted(path.name for path in output.parent.iterdir() if path != output)
        if left:
            return Outcome(self.kind, "something is left beside it", True, ", ".join(left), kills)
        if (found := self.digest(output)) != self.expected:
            return Outcome(self.kind, "other files", True, f"{found}\n{self.expected}", kills)
        return Outcome(self.kind, "bit-equal, nothing beside it", kills=kills)


def _killed(command: list[str], log: pathlib.Path, after: float | None, *, alone: bool = False) -> int:
    """alone: its children see for themselves that it is gone. -> exit code."""
    with log.open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=small_run.ROOT, stdout=said, stderr=said, start_new_session=True
        )
        try:
            return process.wait(after)
        except subprocess.TimeoutExpired:
            if alone:
                process.kill()
            else:
                os.killpg(process.pid, signal.SIGKILL)
            return process.wait()


def _command(kind: str, folder: pathlib.Path, text: pathlib.Path, workdir: pathlib.Path) -> _Command:
    name, _, format = kind.partition(" ")

    def started(output: pathlib.Path) -> list[str]:
        if name == "prepare":
            options = [f"--input={text}", f"--tokenizer={folder / 'shards'}", "--block=64", "--workers=2"]
        elif name == "quantize":
            options = [f"--checkpoint={workdir}", "--scheme=int4_g32"]
        else:
            options = [f"--checkpoint={workdir}", f"--format={format}"]
        return ["-m", f"phijax.{name}", *options, f"--output={output}"]

    output, log = folder / f"undisturbed {kind}" / "it", folder / "undisturbed.txt"
    output.parent.mkdir()
    began = time.monotonic()
    if _killed(started(output), log, None):
        raise RuntimeError(log.read_text())
    seconds = time.monotonic() - began
    digest = weights_of if kind in ("export phijax", "quantize") else files_below
    return _Command(kind, started, seconds, digest, digest(output))


def weights_of(folder: pathlib.Path) -> object:
    """What a checkpoint holds: its files may lie in another order."""
    from attacks.flips import content

    log = folder.parent / "content.txt"
    try:
        if ended(fork(lambda: print(content(folder), flush=True), log)):
            return log.read_text()[-2000:]
        return log.read_text().splitlines()[-1]
    finally:
        log.unlink()
