"""A small run that is attacked, and what it has learned; commands in forks of a process that has imported them."""

import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from phijax.report.writers import read_metrics

os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = pathlib.Path(__file__).parents[2]
EVERY, STEPS = 4, 24  # steps between saves, and of all
EXPERIMENT = """
import phijax.config


def get_config():
    c = phijax.config.defaults()
    sizes = dict(vocab_size=512, num_layers=1, model_dim=64, num_heads=4, num_kv_heads=4, head_dim=16, ffn_dim=128)
    c.model.update(sizes)
    c.data.phases = [
        dict(steps=STEPS, sequence_length=64, global_batch_size=8, mixture=[dict(path="DATA", weight=1)])
    ]
    c.optimizer.warmup_steps = 1
    c.logging.every_steps, c.logging.tensorboard, c.logging.plot = 1, False, False
    c.checkpoint.every_steps, c.checkpoint.keep_last = EVERY, 100
    return c
"""
LEARNED = ("loss", "nll", "grad_norm")
_DOCUMENTS = 60  # of Python's documentation: enough for some hundred rows
_CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"}


def prepared(folder: pathlib.Path) -> pathlib.Path:
    """Shards of text that every Python carries, in FOLDER/shards, of FOLDER/text. -> the text."""
    text = folder / "text"
    documents = folder / "all" / "python_text.jsonl"
    _must([str(ROOT / "experiments" / "python_text.py"), f"--output={documents.parent}"])
    text.mkdir()
    lines = documents.read_text().splitlines(keepends=True)
    (text / "text.jsonl").write_text("".join(lines[:_DOCUMENTS]))
    _must(
        ["-m", "phijax.prepare", f"--input={text}", f"--output={folder / 'shards'}", "--vocab_size=512", "--block=64"]
    )
    return text


def _must(command: Sequence[str]) -> None:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)


def experiment(folder: pathlib.Path, steps: int = STEPS, every: int = EVERY) -> pathlib.Path:
    """The experiment on the shards of `prepared`."""
    path = folder / "experiment.py"
    text = EXPERIMENT.replace("DATA", str(folder / "shards")).replace("STEPS", str(steps)).replace("EVERY", str(every))
    path.write_text(text)
    return path


def fork(work: Callable[[], None], log: pathlib.Path) -> int:
    """Does `work` in a fork of this process, which must have no device yet, its output in `log`. -> its process id."""
    child = os.fork()
    if child:
        return child
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        work()
        os._exit(0)
    except SystemExit as end:
        os._exit(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(1)


def ended(child: int) -> int:
    """Its exit code; a signal's is below zero, as subprocess gives it."""
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def killed_after(child: int, seconds: float) -> int:
    """Kills it then, unless it has ended. -> its exit code, -SIGKILL."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return ended(child)


def train(config: pathlib.Path, workdir: pathlib.Path) -> Callable[[], None]:
    """`phijax main`, for `fork`."""
    from phijax import main as command
    from phijax.run import assemble  # noqa: F401  imported once, here

    def work() -> None:
        sys.argv = ["phijax main", f"--config={config}", f"--workdir={workdir}"]
        command.entry()

    return work


def dies_at_change(folder: pathlib.Path, number: int, work: Callable[[], None]) -> Callable[[], None]:
    """`work` of a process that kills itself before the change `number` of files below `folder`, from 1 on; 0: never.

    One that is not killed says at its end how many there were ("changes: 93", in its last line).
    The changes that Python makes; those of libraries in C++ are hit by the clock alone.
    """

    def counted() -> None:
        seen = 0

        def look(event: str, arguments: tuple) -> None:
            nonlocal seen
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if (writes or event in _CHANGES) and str(arguments[0]).startswith(str(folder)):
                seen += 1
                if seen == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(look)
        try:
            work()
        finally:
            print(f"changes: {seen}", flush=True)

    return counted


def learned(workdir: pathlib.Path) -> dict[int, list[float]]:
    """Step -> what a run has learned, bit for bit."""
    path = workdir / "metrics.jsonl"
    lines = read_metrics(path) if path.exists() else []
    return {line["step"]: [line[name] for name in LEARNED] for line in lines}


def state(workdir: pathlib.Path, step: int) -> str:
    """sha256 of every array of a saved step, read in a fork."""

    def work() -> None:
        import jax
        import numpy as np

        from phijax.checkpoint import reading

        folder = workdir / "checkpoints" / str(step)
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        like = {
            leaf["path"]: jax.ShapeDtypeStruct(tuple(leaf["shape"]), leaf["dtype"], sharding=here)
            for leaf in reading.read_manifest(folder)["leaves"]
        }
        arrays = reading.restore_arrays(folder, like)
        digests = {path: hashlib.sha256(np.asarray(array).tobytes()).hexdigest() for path, array in arrays.items()}
        print(json.dumps(digests, sort_keys=True), flush=True)

    log = workdir.with_suffix(".state.txt")
    if ended(fork(work, log)):
        return f"{workdir} cannot be read:\n{log.read_text()[-2000:]}"  # equal to no other
    return log.read_text().splitlines()[-1]


def files_below(folder: pathlib.Path) -> dict[str, str]:
    """Name -> sha256 of each file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
