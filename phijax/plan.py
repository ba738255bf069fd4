"""Plans a run on TPUs that are not rented yet: python -m phijax.plan --config=FILE --topology=v5p:4x4x8

Compiles the very train step for that slice on this machine (.venv/bin/pip install -e '.[tpu]' in the checkout brings
the compiler; a minute or two, 1 to 2 GB) and says whether it fits, how long it takes and what it costs. Without the
compiler, or with --analytic, the figures are from shapes alone and say so. Exit codes: 0 it fits, 3 it does not, 2 the
user's error, 75 a search was interrupted (its table so far is printed).
"""

import functools
import json
import math
import os
import sys

from absl import flags

from phijax import command
from phijax.errors import EXIT_DONE, EXIT_RESTART, UserError

EXIT_DOES_NOT_FIT = 3  # planned, and the answer is no

FLAGS = flags.FlagValues()
command.define_path("config", "Experiment file; --config.KEY=VALUE changes one key of it.", FLAGS)
flags.DEFINE_string("topology", None, "TPU slice, such as v5e:16x16, v5p:4x4x8, v6e:16x16.", flag_values=FLAGS)
flags.DEFINE_float("price_per_chip_hour", None, "To tell the cost, in any currency.", flag_values=FLAGS)
flags.DEFINE_boolean("analytic", False, "Compile nothing; figures from shapes, in a second.", flag_values=FLAGS)
flags.DEFINE_boolean("json", False, "Print one JSON object instead of text.", flag_values=FLAGS)
flags.DEFINE_multi_string(
    "compiler_option", [], "NAME=VALUE for the TPU compiler; may be given often. No part of the run's config.",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_boolean(
    "search", False, "Look for the best mesh, remat policy, micro-batches and place of Adam's moments.",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_integer("compile_top", 6, "How many of the search's best are compiled.", flag_values=FLAGS)
command.define_path("plot", "PNG: memory and step time as stacked bars, and the roofline.", FLAGS)


def main(arguments: list[str], overrides: list[tuple[str, str]]) -> int:
    from phijax import config as configs
    from phijax import planner

    if arguments:
        raise UserError(f"{arguments[0]!r} is not a flag. --help lists them.")
    if not FLAGS.config or not FLAGS.topology:
        raise UserError("What, and where? --config=experiments/mini.py --topology=v5e:16x16, say.")
    check_price(FLAGS.price_per_chip_hour)
    check_plot(FLAGS.plot)
    if FLAGS.search and (FLAGS.plot or FLAGS.price_per_chip_hour is not None):
        raise UserError(
            "--plot and --price_per_chip_hour are of one plan, not of a search. Search without them, then plan with "
            "them and the winner's overrides."
        )
    config = configs.load(FLAGS.config, overrides)
    say = functools.partial(print, file=sys.stderr, flush=True)
    how = planner.How(not FLAGS.analytic, compiler_options(FLAGS.compiler_option), say)
    if FLAGS.search:
        found = planner.find(config, FLAGS.topology, how, top=FLAGS.compile_top)
        tell(found)
        return EXIT_RESTART if found.interrupted else EXIT_DONE if found.winner else EXIT_DOES_NOT_FIT
    plan, recipe = planner.make_plan(config, FLAGS.topology, how, price=FLAGS.price_per_chip_hour)
    tell(plan)
    if FLAGS.plot:
        from phijax.planning.plot import plot_plan

        plot_plan(plan, recipe, FLAGS.plot)
    return EXIT_DONE if plan.fits else EXIT_DOES_NOT_FIT


def check_price(price: float | None) -> None:
    """Raises: UserError for what is no price."""
    if price is not None and not 0 <= price < math.inf:
        raise UserError(f"--price_per_chip_hour={price:g} is no price: give 0 or more, as 1.2.")


def check_plot(path: str | None) -> None:
    """Before the minutes that a plan takes. Raises: UserError for a place where no file can be written."""
    from phijax.storage import durable

    if not path or not durable.is_local(path):
        return
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path) or not os.path.isdir(folder):
        what = "is a folder" if os.path.isdir(path) else f"cannot be written: there is no folder {folder}"
        raise UserError(f"--plot={path} {what}. Name a file, as plan.png, in a folder that is there.")
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise UserError(f"--plot={path} may not be written. Name a file elsewhere.")


def compiler_options(given: list[str]) -> dict[str, str]:
    """["xla_a=true"] -> {"xla_a": "true"}. Raises: UserError."""
    pairs = [text.partition("=") for text in given]
    for text, (name, sign, _) in zip(given, pairs, strict=True):
        if not name or not sign:
            raise UserError(f"--compiler_option={text}: NAME=VALUE is meant, as in xla_tpu_some_option=true.")
    return {name: value for name, _, value in pairs}


def tell(answer) -> None:
    print(json.dumps(answer.to_dict(), indent=2) if FLAGS.json else "\n".join(answer.lines()))


def entry() -> None:
    """Where the command starts, under either name."""
    command.run_with_overrides(main, FLAGS)


if __name__ == "__main__":
    entry()
