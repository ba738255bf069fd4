"""What is believed that should not be: python benchmarks/attack.py SECTION [--seed=0] [--first=0] ...

compile_cache [--flips=200]: one bit of one compiled program of a small run is flipped, and the run started in a process
of its own. A loss that differs from the undamaged run's, or a second start that crashes, is a failure. Flip I depends
on the seed and I alone: --first=I goes on behind what was tried before. Some two seconds a flip on an idle core.

mutations [--changes=5000] [--only=NAME]: each file that phijax reads is changed by chance (mutations.py) and read. What
is neither opened nor refused by one message is a failure. Five to ten minutes on an idle core.
"""

import collections
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from absl import app, flags

from phijax.report.writers import read_metrics
from phijax.training.compile_cache import FOLDER

FLAGS = flags.FLAGS
flags.DEFINE_integer("flips", 200, "How many to try.", lower_bound=1)
flags.DEFINE_integer("changes", 5000, "Of each file, in mutations.", lower_bound=1)
flags.DEFINE_string("only", "", "Of mutations: files with this in their name.")
flags.DEFINE_integer("first", 0, "Number of the first.", lower_bound=0)
flags.DEFINE_integer("seed", 0, "Of the bits.")

ROOT = pathlib.Path(__file__).parents[1]
EXPERIMENT = """
import phijax.config


def get_config():
    c = phijax.config.defaults()
    sizes = dict(vocab_size=512, num_layers=1, model_dim=64, num_heads=4, num_kv_heads=4, head_dim=16, ffn_dim=128)
    c.model.update(sizes)
    c.data.phases = [
        dict(steps=3, sequence_length=64, global_batch_size=8, mixture=[dict(path="DATA", weight=1)])
    ]
    c.optimizer.warmup_steps = 1
    c.logging.every_steps, c.logging.tensorboard, c.logging.plot = 1, False, False
    return c
"""
LEARNED = ("loss", "nll", "grad_norm")


def main(arguments: list[str]) -> None:
    sections: dict[str, Callable[[pathlib.Path], int]] = {"compile_cache": compile_cache, "mutations": mutations}
    if len(arguments) != 2 or arguments[1] not in sections:
        raise app.UsageError(f"Which section? One of: {', '.join(sections)}")
    with tempfile.TemporaryDirectory() as temporary:
        raise SystemExit(1 if sections[arguments[1]](pathlib.Path(temporary)) else 0)


def mutations(folder: pathlib.Path) -> int:
    """-> how many changes failed."""
    from mutated_files import attack_all

    return attack_all(folder, seed=FLAGS.seed, first=FLAGS.first, changes=FLAGS.changes, only=FLAGS.only)


def compile_cache(folder: pathlib.Path) -> int:
    """-> how many flips failed."""
    experiment = prepare(folder)
    before, *_ = start(experiment, folder / "before")
    expected = learned(folder / "before")
    if before or not expected:
        raise RuntimeError((folder / "before.txt").read_text())
    entries = sorted((folder / "before" / FOLDER).iterdir())
    size = sum(entry.stat().st_size for entry in entries)
    print(f"{len(entries)} programs, {size:,} bytes; seed {FLAGS.seed}", flush=True)
    counts, began = collections.Counter(), time.monotonic()
    for number in range(FLAGS.first, FLAGS.first + FLAGS.flips):
        workdir = folder / str(number)
        where = flipped(folder / "before" / FOLDER, workdir / FOLDER, random.Random(f"{FLAGS.seed} {number}"))
        code, said = start(experiment, workdir)
        counts["first starts that crashed"] += code != 0
        counts["damaged programs dropped, and said"] += "is dropped, its program compiled anew" in said
        if code:
            code, said = start(experiment, workdir)
        same = learned(workdir) == expected
        counts["crashed twice"] += code != 0
        counts["other losses"] += not same
        if code or not same:
            print(f"flip {number}, {where}: exit code {code}, {'the same' if same else 'other'} losses\n{said[-2000:]}")
        shutil.rmtree(workdir)
        done = number - FLAGS.first + 1
        if done % 20 == 0 or done == FLAGS.flips:
            each = (time.monotonic() - began) / done
            print(
                f"{done} flips, {each:.1f} s each: " + ", ".join(f"{n} {what}" for what, n in counts.items()),
                flush=True,
            )
    return counts["crashed twice"] + counts["other losses"]


def flipped(source: pathlib.Path, target: pathlib.Path, chance: random.Random) -> str:
    """Copies a folder with one bit changed, every bit of it as likely. -> which."""
    shutil.copytree(source, target)
    files = sorted(target.iterdir())
    (file,) = chance.choices(files, [path.stat().st_size for path in files])
    data = bytearray(file.read_bytes())
    bit = chance.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)
    return f"bit {bit} of {file.name}"


def start(experiment: pathlib.Path, workdir: pathlib.Path) -> tuple[int, str]:
    """`phijax main` in a fork of this process, which has imported it and has no device yet. -> (exit code, output).

    A signal's code is below zero, as subprocess gives it.
    """
    from phijax import main as command
    from phijax.run import assemble  # noqa: F401  imported once, here

    log = workdir.with_suffix(".txt")
    child = os.fork()
    if child == 0:
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.argv = ["phijax main", f"--config={experiment}", f"--workdir={workdir}"]
            command.entry()
        except SystemExit as end:
            os._exit(end.code or 0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), log.read_text(errors="replace")


def learned(workdir: pathlib.Path) -> dict[int, list[float]]:
    """Step -> what a run has learned, bit for bit."""
    path = workdir / "metrics.jsonl"
    lines = read_metrics(path) if path.exists() else []
    return {line["step"]: [line[name] for name in LEARNED] for line in lines}


def prepare(folder: pathlib.Path) -> pathlib.Path:
    """Shards of text that every Python carries. -> the experiment on them."""
    text, shards = folder / "text", folder / "shards"
    for command in (
        [str(ROOT / "experiments" / "python_text.py"), f"--output={text}"],
        ["-m", "phijax.prepare", f"--input={text}", f"--output={shards}", "--vocab_size=512", "--block=64"],
    ):
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
    experiment = folder / "experiment.py"
    experiment.write_text(EXPERIMENT.replace("DATA", str(shards)))
    return experiment


if __name__ == "__main__":
    app.run(main)
