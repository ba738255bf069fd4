"""Memory of training on a CPU, planned and measured: python benchmarks/cpu_memory.py [--shapes=tiny,smollm2]

Each shape is a real run of a few steps with evaluations and asynchronous saves, on text of this machine's Python. The
plan is what --dry_run prints; measured is ru_maxrss, the most that the run's process ever had resident. A plan may not
be below it, nor more than 30 % above. Runs one after another; smollm2 takes several GB and the longest.
"""

import argparse
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from pydoc_data.topics import topics

REPOSITORY = pathlib.Path(__file__).parent.parent
ABOVE = 1.30
STEPS = 6
MODEL_33M = dict(vocab_size=8192, model_dim=512, num_layers=8, num_heads=8, num_kv_heads=8, head_dim=64, ffn_dim=1408)
LARGE_VOCABULARY = dict(
    vocab_size=131072, model_dim=256, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=64, ffn_dim=704
)
SMOLLM2 = dict(
    vocab_size=49152, model_dim=576, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64, ffn_dim=1536,
    tied_head=True,
)  # fmt: skip
SHAPES = {  # name -> (keys of section `model`, rows, micro-batches, tokens a row)
    "tiny": ({}, 8, 1, 256),
    "tiny_accumulated": ({}, 16, 4, 128),
    "33m_256": (MODEL_33M, 4, 1, 256),
    "33m_512": (MODEL_33M, 4, 1, 512),
    "33m_accumulated": (MODEL_33M, 8, 4, 256),
    "large_vocabulary": (LARGE_VOCABULARY, 4, 1, 256),
    "smollm2": (SMOLLM2, 1, 1, 256),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    names = parser.parse_args().shapes.split(",")
    if unknown := [name for name in names if name not in SHAPES]:
        parser.error(f"no shape {', '.join(unknown)}: there are {', '.join(SHAPES)}")
    within = True
    with tempfile.TemporaryDirectory(prefix="cpu-memory-") as folder:
        shards = prepare(pathlib.Path(folder))
        print(f"{'shape':<18} {'planned MiB':>12} {'measured MiB':>13} {'ratio':>6}")
        for name in names:
            planned, measured = plan_and_measure(name, shards, pathlib.Path(folder) / name)
            ratio = planned / measured
            within &= 1 <= ratio <= ABOVE
            print(f"{name:<18} {planned / 2**20:>12.0f} {measured / 2**20:>13.0f} {ratio:>6.2f}", flush=True)
    print("within the bounds" if within else "OUTSIDE A BOUND")
    return 0 if within else 1


def prepare(folder: pathlib.Path) -> pathlib.Path:
    """Shards of Python's own help texts, small tokens that every shape's vocabulary has."""
    text = folder / "text"
    text.mkdir()
    for number, topic in enumerate(topics.values()):
        (text / f"{number}.txt").write_text(topic)
    settings = ("--vocab_size=512", "--block=128", "--validation_fraction=0.1")
    run("prepare", f"--input={text}", f"--output={folder / 'shards'}", *settings)
    return folder / "shards"


def plan_and_measure(name: str, shards: pathlib.Path, workdir: pathlib.Path) -> tuple[int, int]:
    """-> bytes: what the dry run says of the process, and the most that the run had."""
    command = arguments(name, shards, workdir)
    said, _ = run("main", *command, "--dry_run")
    return planned_bytes(said), run("main", *command)[1]


def planned_bytes(said: str) -> int:
    """Out of a dry run's text, of the phase that takes most."""
    found = re.findall(r"memory of this process at its worst +([\d.]+) GiB", said)
    return int(max(map(float, found)) * 2**30)


def arguments(name: str, shards: pathlib.Path, workdir: pathlib.Path) -> list[str]:
    model, rows, micro_batches, length = SHAPES[name]
    keys = {f"model.{key}": value for key, value in model.items()}
    keys |= {
        "model.max_position": 512,
        "data.micro_batches": micro_batches,
        "data.phases[0].steps": STEPS,
        "data.phases[0].sequence_length": length,
        "data.phases[0].global_batch_size": rows,
        "data.phases[0].mixture[0].path": shards / "train",
        "optimizer.warmup_steps": 1,
        "checkpoint.every_steps": STEPS // 3,
        "evaluation.every_steps": STEPS // 3,
        "evaluation.sets[0].path": shards / "validation",
        "evaluation.max_rows": 8,
    }
    overrides = [f"--config.{key}={value}" for key, value in keys.items()]
    return [f"--config={REPOSITORY / 'experiments/tiny.py'}", f"--workdir={workdir}", *overrides]


def run(command: str, *flags: str) -> tuple[str, int]:
    """A command of ours in a process of its own. -> (what it printed, the most bytes that it had resident)."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.fspath(REPOSITORY)}
    with tempfile.TemporaryFile("w+") as output:
        started = subprocess.Popen(
            [sys.executable, "-m", f"phijax.{command}", *flags], stdout=output, stderr=output, env=environment
        )
        _, status, used = os.wait4(started.pid, 0)
        started.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        said = output.read()
    if started.returncode:
        raise SystemExit(f"phijax {command} {' '.join(flags)} ended with {started.returncode}:\n{said}")
    return said, used.ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
