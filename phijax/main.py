"""Trains: python -m phijax.main --config=experiments/tiny.py --workdir=DIR [--config.KEY=VALUE ...]

A run that was stopped or killed goes on when the same command is started again. Exit codes: 0 done, 1 crash, 2 the
user's error, 75 stopped on request (start it again).
"""

import json
import math
import sys

from absl import flags

from phijax import command
from phijax.errors import EXIT_CRASH, EXIT_DONE, EXIT_RESTART, EXIT_USER_ERROR, RunFailure, UserError

FLAGS = flags.FlagValues()
command.define_path("config", "Experiment file; --config.KEY=VALUE changes one key of it.", FLAGS)
command.define_path("workdir", "Folder (local or gs://) of the run: checkpoints, metrics.", FLAGS)
flags.DEFINE_boolean("print_config", False, "Print the resolved config as JSON and stop.", flag_values=FLAGS)
flags.DEFINE_boolean(
    "dry_run", False, "Print the plan, check the shards, read one batch, train nothing.", flag_values=FLAGS
)
flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, where JAX cannot find it.", flag_values=FLAGS)
flags.DEFINE_integer("process_count", None, "Processes of the run, where JAX cannot find it.", flag_values=FLAGS)
flags.DEFINE_integer("process_id", None, "Number of this process, where JAX cannot find it.", flag_values=FLAGS)


def main(arguments: list[str], overrides: list[tuple[str, str]]) -> int:
    from phijax import config as configs

    if FLAGS.print_config or FLAGS.dry_run:  # these meet no other process
        config = checked_config(arguments, overrides)
        if FLAGS.print_config:
            print(json.dumps(configs.to_dict(config), indent=2))
            return EXIT_DONE
        return dry_run(config)
    from phijax.parallel import failure

    with failure.told_to_all(FLAGS.coordinator_address, FLAGS.process_count, FLAGS.process_id):
        config = checked_config(arguments, overrides)
        if not FLAGS.workdir:
            raise UserError("Where to? --workdir=DIR keeps checkpoints and metrics, and is where a run goes on.")
    return train(config)


def checked_config(arguments: list[str], overrides: list[tuple[str, str]]):
    """The config that the command line gives. Raises: UserError."""
    from phijax import config as configs

    if arguments:
        raise UserError(f"{arguments[0]!r} is not a flag. --help lists them.")
    if not FLAGS.config:
        raise UserError("Which experiment? --config=experiments/tiny.py, say. --help lists all flags.")
    return configs.load(FLAGS.config, overrides)


def train(config) -> int:
    from phijax.parallel import hardware, processes
    from phijax.storage import signals

    hardware.run_in_turn()

    def run() -> int:
        from etils import epath

        from phijax.checkpoint import lock
        from phijax.run import assemble
        from phijax.training import compile_cache

        workdir = epath.Path(FLAGS.workdir)
        world = processes.start(config.processes, FLAGS.coordinator_address, FLAGS.process_count, FLAGS.process_id)

        def abandon() -> None:
            compile_cache.abandon(workdir)
            lock.abandon(workdir)

        # Several processes have JAX's own handler from here on: they stop together at the loop's first step.
        with signals.tidied(abandon) if world.count == 1 else signals.interrupt_as_sigterm():
            outcome = assemble.train(config, workdir)
        processes.finish(config.processes.shutdown_timeout)
        return EXIT_RESTART if outcome.stopped else EXIT_DONE

    processes.guard(run)


def dry_run(config) -> int:
    """The plan for the config's own mesh, whatever devices are here."""
    import jax
    from etils import epath

    from phijax import planner
    from phijax.checkpoint import reading
    from phijax.checkpoint.steps import CHECKPOINTS_FOLDER
    from phijax.data import verification
    from phijax.data.shards import files_of
    from phijax.parallel.hardware import a_chip_with, generation
    from phijax.parallel.mesh import mesh_shape
    from phijax.parallel.sharding import MESH_AXES
    from phijax.planning import summary
    from phijax.run import recipe as recipes
    from phijax.run import start

    asked = [getattr(config.mesh, name) for name in MESH_AXES]
    here = jax.device_count() if -1 in asked or math.prod(asked) == jax.device_count() else 0
    sizes = mesh_shape(config.mesh, here or math.prod(asked))
    # A mesh that is not here is planned as the pod it is for.
    platform = jax.default_backend() if here else "tpu"
    chip = generation(jax.devices()[0].device_kind) if here else a_chip_with(config.compiler)
    workdir = epath.Path(FLAGS.workdir) if FLAGS.workdir else None
    recipe = recipes.make_recipe(config, sizes, platform, chip, start.resolve(config, workdir))
    shapes = recipes.shapes_by_phase(config)
    process = None
    if platform == "cpu":
        process = planner.process_memory(config, recipe, sizes, jax.local_device_count())
    print("\n".join(summary.describe(recipe, sizes, shapes, process)))
    try:
        rows = recipes.open_rows(config, recipe.model)
        sets = recipes.open_evaluation(config, recipe, rows, sizes)
        files = files_of([*rows.shards.values(), *(held_out.shards for held_out in sets)])
        checked = verification.look(files, FLAGS.workdir, seconds=60) if config.data.verify else verification.SIZES
    except (UserError, RunFailure) as error:
        print(f"error: data: {error}", file=sys.stderr)
        return EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_CRASH
    lines = [*(f"data: {text}" for text in rows.summary()), *(f"warning: {text}" for text in rows.warnings()), checked]
    print("\n".join(lines))
    if config.init_from and not (workdir and reading.newest_identity(workdir / CHECKPOINTS_FOLDER)):
        for line in start.open_start(config, recipe.model, next(iter(rows.shards.values())), verify=False).lines:
            print(line)
    read = [row.get("weights") for row in recipes.rows_of_step_0(config, recipe, rows)]
    said = f"read step 0: {len(read)} rows" if read else "rows are made of the weights of their step: none was read"
    if read and all(weights is not None for weights in read):
        said += f", {sum(float(weights.sum()) for weights in read):,.0f} tokens to predict"
    print(f"{said}. Nothing was trained.")
    return EXIT_DONE


def entry() -> None:
    """Where the command starts, under either name."""
    command.run_with_overrides(main, FLAGS)


if __name__ == "__main__":
    entry()
