"""Whole runs, `python -m phijax.main`, in child processes: started, killed, read."""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from quick_compilation import QUICK

from phijax.checkpoint import reading
from phijax.report.writers import read_metrics

ROOT = pathlib.Path(__file__).parents[2]
LIMIT = 300  # seconds: what takes longer hangs
EVERY = 4  # steps between checkpoints of the experiment below
STEPS = 24

EXPERIMENT = '''"""A decoder of one layer, two phases of different length."""

import phijax.config


def get_config():
    c = phijax.config.defaults()
    sizes = dict(vocab_size=300, num_layers=1, model_dim=32, num_heads=16, num_kv_heads=8, head_dim=4, ffn_dim=64)
    for name, value in sizes.items():
        c.model[name] = value
    both = [dict(path="SHARDS/a", weight=2), dict(path="SHARDS/b", weight=1)]
    c.data.phases = [
        dict(steps=14, sequence_length=64, global_batch_size=8, mixture=both),
        dict(steps=10, sequence_length=96, global_batch_size=8, mixture=[dict(path="SHARDS/b", weight=1)]),
    ]
    c.optimizer.learning_rate = 1e-2
    c.optimizer.warmup_steps = 2
    c.checkpoint.every_steps = EVERY
    c.checkpoint.keep_last = 100
    c.logging.every_steps = 1
    c.logging.tensorboard = c.logging.plot = False
    c.evaluation.every_steps = 8
    c.evaluation.max_rows = 8
    c.evaluation.sets = [dict(name="b", path="SHARDS/b")]
    c.processes.heartbeat_timeout = 10
    return c
'''


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended; output is stdout and stderr together."""

    code: int
    output: str

    def refused(self, *texts: str) -> None:
        """Asserts the user's error: exit code 2, one message that holds `texts`, no traceback."""
        self.failed(2, *texts)
        assert "error: " in self.output, self.output

    def failed(self, code: int, *texts: str, others_speak: bool = False) -> None:
        """Asserts an end with `code` and one message that holds `texts`, no traceback.

        Args:
          others_speak: what libraries log from their threads before that message does not count.
        """
        assert self.code == code, self.output
        said = self.output.rpartition("\nerror: ")[2] if others_speak else self.output
        assert "Traceback" not in said, self.output
        for text in texts:
            assert text in said, f"no {text!r} in:\n{self.output}"


class Process:
    """A running phijax.main."""

    def __init__(self, popen: subprocess.Popen, log: pathlib.Path):
        self._popen, self._log = popen, log
        self.pid = popen.pid

    def end(self) -> Ended:
        code = self._popen.wait(LIMIT)
        return Ended(code, self.said())

    def said(self) -> str:
        """Its output so far."""
        return self._log.read_text(errors="replace")

    def wait_for(self, what: Callable[[], object], name: str) -> None:
        """Until `what` is true, looked at every millisecond; fails when the process ends before."""
        deadline = time.monotonic() + LIMIT
        while not what():
            assert self._popen.poll() is None, f"ended before {name}:\n{self.end().output}"
            assert time.monotonic() < deadline, f"never {name}"
            time.sleep(0.001)

    def signal(self, number: int) -> None:
        self._popen.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, which must find it alive."""
        assert self._popen.poll() is None, f"ended before it was killed:\n{self.end().output}"
        self.signal(signal.SIGKILL)
        assert self._popen.wait(LIMIT) == -signal.SIGKILL


class Runs:
    """An experiment and its shards, and what their runs share: where they are started, what is compiled."""

    def __init__(self, folder: pathlib.Path, shards: pathlib.Path):
        self.folder, self.shards = folder, shards
        self.experiment = folder / "experiment.py"
        self.experiment.write_text(EXPERIMENT.replace("SHARDS", str(shards)).replace("EVERY", str(EVERY)))
        (folder / "compiled").mkdir()
        self._count = itertools.count()

    @contextlib.contextmanager
    def started(
        self,
        workdir: pathlib.Path | None,
        *arguments: str,
        devices: int = 1,
        config: pathlib.Path | None = None,
        program: Sequence[str] = ("-m", "phijax.main"),
        **popen,
    ) -> Iterator[Process]:
        """phijax.main --config=... --workdir=WORKDIR ARGUMENTS on `devices` virtual devices; killed at the end.

        Args: program: another, which takes the same.
        """
        if workdir is not None:
            self.share_compiled(workdir)
            arguments = (f"--workdir={workdir}", *arguments)
        log = self.folder / f"output-{next(self._count)}.txt"
        command = [sys.executable, *program, f"--config={config or self.experiment}", *arguments]
        with open(log, "wb") as file:
            child = subprocess.Popen(
                command, cwd=ROOT, env=environment(devices), stdout=file, stderr=subprocess.STDOUT, **popen
            )
        try:
            yield Process(child, log)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()

    def run(self, workdir: pathlib.Path | None, *arguments: str, **how) -> Ended:
        """Starts one and waits for its end."""
        with self.started(workdir, *arguments, **how) as process:
            return process.end()

    def run_all(self, commands: Sequence[tuple[pathlib.Path, Sequence[str], int]]) -> list[Ended]:
        """Runs (workdir, arguments, devices) each, two at a time: most of a refusal is one core's importing."""
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda c: self.run(c[0], *c[1], devices=c[2]), commands))

    def share_compiled(self, workdir: pathlib.Path) -> None:
        # A life of two seconds would otherwise compile for ten.
        with contextlib.suppress(OSError):  # what cannot be made is the run's to complain of; what is there has it
            workdir.mkdir()
            (workdir / "compile_cache").symlink_to(self.folder / "compiled")

    def copy(self, workdir: pathlib.Path, target: pathlib.Path, step: int) -> pathlib.Path:
        """The run in `workdir` as if it had been killed soon after it had saved `step`."""
        shutil.copytree(workdir, target, symlinks=True)
        for saved in saved_steps(target):
            if saved > step:
                shutil.rmtree(target / "checkpoints" / str(saved))
        metrics = (target / "metrics.jsonl").read_text().splitlines(keepends=True)
        kept = [line for line in metrics if json.loads(line)["step"] < step + 2]
        (target / "metrics.jsonl").write_text("".join(kept) + '{"step": ')  # and in the middle of a line
        return target


def environment(devices: int) -> dict[str, str]:
    """Of a child: nothing of this process's own JAX."""
    flags = [f"--{name}={str(value).lower()}" for name, value in QUICK.items()]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    return kept | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join([f"--xla_force_host_platform_device_count={devices}", *flags]),
        # Otherwise the folder's path is part of an entry's key, and no workdir could use what another has compiled.
        "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "none",
    }


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def mesh(data: int, fsdp: int, context: int, tensor: int) -> list[str]:
    sizes = dict(data=data, fsdp=fsdp, context=context, tensor=tensor)
    return [f"--config.mesh.{name}={size}" for name, size in sizes.items()]


def metrics(workdir: pathlib.Path) -> dict[int, dict]:
    """Step -> its line; every step must be there once, in order."""
    lines = read_metrics(workdir / "metrics.jsonl")
    steps = [line["step"] for line in lines]
    assert steps == list(range(len(steps))), steps
    return dict(zip(steps, lines, strict=True))


def last_step(workdir: pathlib.Path) -> int:
    """Of metrics.jsonl, also while it is being written; -1 if there is none."""
    path = workdir / "metrics.jsonl"
    lines = read_metrics(path) if path.exists() else []
    return lines[-1]["step"] if lines else -1


def saved_steps(workdir: pathlib.Path) -> list[int]:
    return sorted(int(path.parent.name) for path in workdir.glob("checkpoints/*/manifest.json"))


LEARNED = ("loss", "nll", "grad_norm", "learning_rate", "predicted_tokens", "skipped_steps", "tokens")


def learned(workdir: pathlib.Path) -> dict[int, dict]:
    """What must not depend on how often a run was killed: losses, evaluations, counts; no times."""
    return {
        step: {name: value for name, value in line.items() if name in LEARNED or name.startswith("heldout")}
        for step, line in metrics(workdir).items()
    }


def state(workdir: pathlib.Path, step: int) -> dict[str, bytes]:
    """Path of each array of a saved state -> its bytes."""
    folder = workdir / "checkpoints" / str(step)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {
        leaf["path"]: jax.ShapeDtypeStruct(tuple(leaf["shape"]), leaf["dtype"], sharding=here)
        for leaf in reading.read_manifest(folder)["leaves"]
    }
    return {path: np.asarray(array).tobytes() for path, array in reading.restore_arrays(folder, like).items()}


def flip_byte(folder: pathlib.Path, offset: int | None = None) -> pathlib.Path:
    """Changes one bit of the largest file below `folder`, in its middle unless told; returns which file."""
    path = max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if offset is None else offset] ^= 1
    path.write_bytes(data)
    return path
