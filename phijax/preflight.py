"""Is this machine, or this pod, fit for the run? python -m phijax.preflight --workdir=DIR [--config=FILE]

Start it as training is started, on every worker: it checks that all processes are here, that versions are the same,
that devices sum correctly over all hosts, that the workdir is one for all, clocks, memory, disk, open files and data.
Prints a table and one verdict. Exit codes: 0 ready, 2 not ready, at the latest when --time_limit has passed: a check
that hangs is named.
"""

import dataclasses
import math
import time

from absl import flags

from phijax import command
from phijax.errors import EXIT_DONE, EXIT_USER_ERROR, RunFailure, UserError

FLAGS = flags.FlagValues()
command.define_path("config", "Experiment file: mesh, memory, disk and data are compared.", FLAGS)
command.define_path("workdir", "Folder (local or gs://) of the run; written to and read back.", FLAGS)
flags.DEFINE_integer("time_limit", 180, "Seconds until the verdict, whatever hangs.", flag_values=FLAGS, lower_bound=4)
flags.DEFINE_integer("devices", None, "How many there must be, where no config says it.", flag_values=FLAGS)
flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, where JAX cannot find it.", flag_values=FLAGS)
flags.DEFINE_integer("process_count", None, "Processes of the run, where JAX cannot find it.", flag_values=FLAGS)
flags.DEFINE_integer("process_id", None, "Number of this process, where JAX cannot find it.", flag_values=FLAGS)


def main(arguments: list[str], overrides: list[tuple[str, str]]) -> int:
    from phijax.parallel import failure, processes

    given = (FLAGS.coordinator_address, FLAGS.process_count, FLAGS.process_id)
    with failure.told_to_all(*given, timeout=FLAGS.time_limit / 2):
        config = checked_config(arguments, overrides)
    processes.guard(lambda: run_checks(config))


def checked_config(arguments: list[str], overrides: list[tuple[str, str]]):
    """The config, None where none is given. Raises: UserError."""
    from phijax import config as configs

    if arguments:
        raise UserError(f"{arguments[0]!r} is not a flag. --help lists them.")
    if not FLAGS.workdir:
        raise UserError("Where will the run be? --workdir=DIR is written to and read by every process.")
    if overrides and not FLAGS.config:
        raise UserError("--config.KEY=VALUE changes a key of --config=FILE, which is missing.")
    return configs.load(FLAGS.config, overrides) if FLAGS.config else None


def run_checks(config) -> int:
    """All processes together; the verdict as an exit code."""
    from etils import epath

    from phijax import config as configs
    from phijax.parallel import processes
    from phijax.readiness import check, inspection
    from phijax.readiness.limit import TimeLimit
    from phijax.storage import durable

    started, half = time.monotonic(), FLAGS.time_limit / 2
    limits = config.processes if config else processes.ProcessConfig()
    limits = dataclasses.replace(limits, initialization_timeout=max(1, min(limits.initialization_timeout, int(half))))
    workdir = epath.Path(FLAGS.workdir)
    durable.prepare_store(workdir)
    limit = TimeLimit(FLAGS.time_limit)
    limit.doing("processes")
    try:
        world = processes.start(limits, FLAGS.coordinator_address, FLAGS.process_count, FLAGS.process_id)
        limit.restart(half, world.index, world.count)  # a moment that is the same for all
        plain = configs.to_dict(config) if config else {}
        checks = inspection.inspect(world, limit, workdir, plain, lambda: needs_of(config, workdir), FLAGS.devices)
        if world.index == 0:
            print("\n".join(check.table(checks, time.monotonic() - started)), flush=True)
        processes.finish(limit.left)
    except (RunFailure, UserError) as failure:
        print(f"NOT READY: {limit.check}: {failure}", flush=True)
        limit.part()
        return EXIT_USER_ERROR
    finally:
        limit.close()
    return EXIT_DONE if check.ready(checks) else EXIT_USER_ERROR


def needs_of(config, workdir=None):
    """What the run of this config takes on this process, and whether mesh and data are right here."""
    import jax

    from phijax import planner
    from phijax.parallel.hardware import generation
    from phijax.parallel.mesh import make_mesh
    from phijax.readiness.agreement import Facts
    from phijax.readiness.check import FAIL, OK, Check
    from phijax.readiness.inspection import Needs
    from phijax.run import recipe as recipes
    from phijax.run import start
    from phijax.training.program import abstract_state

    if config is None:
        return Needs()
    needs = Needs(kept=config.checkpoint.most_kept)
    try:
        mesh, device = make_mesh(config.mesh, jax.devices()), jax.devices()[0]
        model = start.resolve(config, workdir)
        recipe = recipes.make_recipe(config, dict(mesh.shape), device.platform, generation(device.device_kind), model)
        state = abstract_state(recipe, mesh)
    except UserError as error:
        return dataclasses.replace(needs, checks=(Check("config", FAIL, str(error)),))
    sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1) or "one device"
    checks = [Check("config", OK, f"mesh {sizes}, attention {recipe.backend.attention}, remat {recipe.backend.remat}")]
    shards, data = 0, Facts()
    try:
        rows = recipes.open_rows(config, recipe.model)
        held_out = recipes.open_evaluation(config, recipe, rows, dict(mesh.shape))
        read = "no row read" if next(recipes.rows_of_step_0(config, recipe, rows), None) is None else "a row read"
        data = recipes.data_facts(rows, held_out)
        shards = sum(len(folder.manifest.shards) for folder in rows.shards.values())
        shards += sum(len(one.shards.manifest.shards) for one in held_out)
        checks.append(Check("data", OK, f"folders: {len(rows.shards) + len(held_out)}, shards: {shards}, {read}"))
    except UserError as error:
        checks.append(Check("data", FAIL, str(error)))
    if device.platform == "cpu":
        memory = planner.process_memory(config, recipe, dict(mesh.shape), jax.local_device_count())
    else:
        memory = host_memory(config, state)
    return dataclasses.replace(
        needs,
        memory=memory,
        state_bytes=sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
        shards=shards,
        checks=tuple(checks),
        data=data,
    )


def host_memory(config, state) -> dict[str, int]:
    """Part -> bytes of this process where devices have memory of their own."""
    from phijax.checkpoint.host_memory import bytes_held_by_save, bytes_on_host

    save = bytes_held_by_save(state, asynchronous=config.checkpoint.asynchronous)
    return {"the optimizer's moments": bytes_on_host(state), "a save": save}


def entry() -> None:
    """Where the command starts, under either name."""
    command.run_with_overrides(main, FLAGS)


if __name__ == "__main__":
    entry()
