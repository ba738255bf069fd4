"""What is believed that should not be: python benchmarks/attack.py SECTION [--count=20] [--seed=0] [--results=FILE]

compile_cache: one bit of one compiled program of a small run is flipped, and the run started. A loss that differs from
the undamaged run's, or a second start that crashes, is a failure.
kills: a small run, a preparation of shards, an export, each killed (SIGKILL) up to eight times, by the clock or at a
change of its files, started again after each, until it ends. Losses, final state, files that are not bit for bit those
of the undisturbed one are a failure, and what is left beside them.
mutations [--changes=5000] [--only=NAME]: each file that phijax reads is changed by chance (mutations.py) and read. What
is neither opened nor refused by one message is a failure. Five to ten minutes on an idle core.
flips: one bit of one file of a checkpoint, of shards, of an export is flipped. Results that differ without a word, or
anything but one message that names the file, are a failure.

Each try depends on the seed and its number alone. With --results each, but of mutations, is a line of that file as soon
as it is known, and what stands there is not tried again. How long it will take is said. Exit code 1 if one failed.
"""

import pathlib
import tempfile
from collections.abc import Callable

from absl import app, flags
from attacks import compile_cache, flips, kills
from attacks.tries import Try, tried

FLAGS = flags.FLAGS
flags.DEFINE_integer("count", 20, "How many to try.", lower_bound=1)
flags.DEFINE_integer("first", 0, "Number of the first.", lower_bound=0)
flags.DEFINE_integer("seed", 0, "Of all that is drawn.")
flags.DEFINE_integer("changes", 5000, "Of each file, in mutations.", lower_bound=1)
flags.DEFINE_string("only", "", "Of mutations: files with this in their name.")
flags.DEFINE_string("results", None, "A .jsonl file to go on with; none: nothing is kept.")

# Section -> what makes everything ready in a folder, and gives back what tries number N with its own random numbers.
SECTIONS: dict[str, Callable[[pathlib.Path], Try]] = {
    "compile_cache": compile_cache.ready,
    "kills": kills.ready,
    "flips": flips.ready,
}


def main(arguments: list[str]) -> None:
    if len(arguments) != 2 or arguments[1] not in (*SECTIONS, "mutations"):
        raise app.UsageError(f"Which section? One of: {', '.join(SECTIONS)}, mutations")
    section = arguments[1]
    if section == "mutations":
        raise SystemExit(1 if mutations() else 0)
    numbers = range(FLAGS.first, FLAGS.first + FLAGS.count)
    with tempfile.TemporaryDirectory() as folder:
        failed = tried(section, SECTIONS[section], pathlib.Path(folder), numbers, FLAGS.seed, FLAGS.results)
    raise SystemExit(1 if failed else 0)


def mutations() -> int:
    """-> how many changes failed."""
    from mutated_files import attack_all

    with tempfile.TemporaryDirectory() as folder:
        changes = dict(first=FLAGS.first, changes=FLAGS.changes)
        return attack_all(pathlib.Path(folder), seed=FLAGS.seed, only=FLAGS.only, **changes)


if __name__ == "__main__":
    app.run(main)
