"""Tokens a second of the loader, beside what a step needs: python benchmarks/loader.py

Writes shards of random tokens to a temporary folder, then reads steps as training does: decoded, made into rows,
assembled into arrays on one device. The goal is 10 M tokens a second for a process.
"""

import pathlib
import statistics
import tempfile
import time

from absl import app, flags

from phijax.parallel import hardware

hardware.prepare_cpu()

import jax
import numpy as np

from phijax.data.batch import TEXT_KEYS
from phijax.data.loader import DataConfig, Loader
from phijax.data.mixture import Phase, Source
from phijax.data.rows import ShardRows
from phijax.data.shard_manifest import Manifest
from phijax.data.shards import Shards, ShardWriter
from phijax.parallel.mesh import MeshConfig, make_mesh
from phijax.text.train_tokenizer import train_tokenizer

FLAGS = flags.FLAGS
flags.DEFINE_integer("length", 4096, "Tokens a row.")
flags.DEFINE_integer("batch_size", 64, "Rows a step.")
flags.DEFINE_integer("block", 1024, "Tokens a record.")
flags.DEFINE_integer("tokens", 32_000_000, "In the shards.")
flags.DEFINE_integer("steps", 20, "Timed, after three that warm up.")
flags.DEFINE_integer("threads", 4, "That read.")

# What one host of 4 chips must be fed: mini on v5e at the estimated 0.95 s for one row of 4096 a chip.
NEED = 4 * 4096 / 0.95


def write(folder: pathlib.Path) -> None:
    tokenizer = train_tokenizer(["some words to train a tokenizer on, " * 3], vocab_size=300)
    draw, entries = np.random.default_rng(0), []
    for number in range(4):
        with ShardWriter(
            folder / f"shard-{number:05d}-of-00004.arrayrecord", FLAGS.block, np.dtype("uint16")
        ) as writer:
            for _ in range(FLAGS.tokens // 4 // 800):
                writer.add(np.append(draw.integers(3, 289, 799), tokenizer.end_of_text).astype(np.uint16))
            entries.append(writer.close())
    manifest = Manifest(
        block=FLAGS.block,
        dtype="uint16",
        seed=0,
        split="all",
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        end_of_text=tokenizer.end_of_text,
        shards=tuple(entries),
        inputs=(),
        ignored_files=(),
        documents_read=0,
        documents_kept=0,
        documents_in_other_split=0,
        documents_dropped={},
        unknown_tokens=0,
        settings={},
    )
    tokenizer.save(folder)
    (folder / "manifest.json").write_text(manifest.to_json())


def main(_) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        write(folder)
        phase = Phase(FLAGS.steps + 3, FLAGS.length, FLAGS.batch_size, (Source(str(folder)),))
        rows = ShardRows([phase], {str(folder): Shards.open(folder)}, seed=0, begin=None)
        config = DataConfig((phase,), read_threads=FLAGS.threads, read_ahead=2 * FLAGS.threads)
        loader = Loader(rows, TEXT_KEYS, config, make_mesh(MeshConfig(), jax.devices()[:1]))
        seconds, before = [], time.perf_counter()
        batch_of = loader.starting_at(0)
        for step in range(phase.steps):
            jax.block_until_ready(batch_of(step, None))
            now = time.perf_counter()
            if step >= 3:
                seconds.append(now - before)
            before = now
    tokens = FLAGS.batch_size * FLAGS.length
    speed = tokens * len(seconds) / sum(seconds)
    print(f"{FLAGS.batch_size} rows of {FLAGS.length} a step, records of {FLAGS.block}, {FLAGS.threads} threads")
    print(f"loader: {speed / 1e6:.2f} M tokens/s (median step {statistics.median(seconds) * 1e3:.1f} ms)")
    print(f"a host of 4 v5e chips needs {NEED / 1e6:.3f} M tokens/s for mini: {speed / NEED:,.0f}x what is needed")


if __name__ == "__main__":
    app.run(main)
