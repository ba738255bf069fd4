"""Plans a run on TPUs that are not rented yet: python -m phijax.plan --config=FILE --topology=v5p:4x4x8

Compiles the very train step for that slice on this machine (pip install 'phijax[tpu]' brings the compiler; a minute or
two, 3 to 6 GB) and says whether it fits, how long it takes and what it costs. Without the compiler, or with
--analytic, the figures are from shapes alone and say so. Exit codes: 0 it fits, 3 it does not, 2 the user's error.
"""

import dataclasses
import functools
import json
import math
import sys

from absl import flags

from phijax import command
from phijax.errors import EXIT_DONE, EXIT_USER_ERROR, UserError

EXIT_DOES_NOT_FIT = 3  # planned, and the answer is no

FLAGS = flags.FlagValues()
flags.DEFINE_string("config", None, "Experiment file; --config.KEY=VALUE changes one key of it.", flag_values=FLAGS)
flags.DEFINE_string("topology", None, "TPU slice, such as v5e:16x16, v5p:4x4x8, v6e:16x16.", flag_values=FLAGS)
flags.DEFINE_float("price_per_chip_hour", None, "To tell the cost, in any currency.", flag_values=FLAGS)
flags.DEFINE_boolean("analytic", False, "Compile nothing; figures from shapes, in a second.", flag_values=FLAGS)
flags.DEFINE_boolean("json", False, "Print one JSON object instead of text.", flag_values=FLAGS)
flags.DEFINE_boolean("search", False, "Look for the best mesh, remat policy and micro-batches.", flag_values=FLAGS)
flags.DEFINE_integer("compile_top", 6, "How many of the search's best are compiled.", flag_values=FLAGS)
flags.DEFINE_string("plot", None, "PNG: memory and step time as stacked bars, and the roofline.", flag_values=FLAGS)


def main(arguments: list[str], overrides: list[tuple[str, str]]) -> int:
    from phijax import config as configs

    if arguments:
        raise UserError(f"{arguments[0]!r} is not a flag. --help lists them.")
    if not FLAGS.config or not FLAGS.topology:
        raise UserError("What, and where? --config=experiments/mini.py --topology=v5e:16x16, say.")
    config = configs.load(FLAGS.config, overrides)
    say = functools.partial(print, file=sys.stderr, flush=True)
    if FLAGS.search:
        return search_plan(config, FLAGS.topology, compiling=not FLAGS.analytic, say=say)
    plan, recipe = make_plan(config, FLAGS.topology, compiling=not FLAGS.analytic, say=say)
    if FLAGS.plot:
        from phijax.planning.plot import plot_plan

        plot_plan(plan, recipe, FLAGS.plot)
    print(json.dumps(plan.to_dict(), indent=2) if FLAGS.json else "\n".join(plan.lines()))
    return EXIT_DONE if plan.fits else EXIT_DOES_NOT_FIT


def make_plan(config, topology: str, *, compiling: bool, say):
    """-> (RunPlan, Recipe). Raises: UserError for a config that this slice cannot run."""
    from phijax import run
    from phijax.model import params
    from phijax.parallel.mesh import make_mesh
    from phijax.planning import analytic
    from phijax.planning.run_plan import RunPlan
    from phijax.planning.step_plan import plan_step
    from phijax.planning.topology import has_compiler, tpu_devices

    where = analytic.make_slice(topology, config.mesh)
    recipe = run.make_recipe(config, dict(where.sizes), "tpu")
    mesh = None
    if compiling and not has_compiler():
        say("The TPU compiler is not here (pip install 'phijax[tpu]'): the plan is analytic.")
    elif compiling:
        mesh = make_mesh(config.mesh, tpu_devices(topology, config.mesh.slices))
    answers = {}  # phases of one shape share a program
    steps = []
    for phase, (name, shape) in zip(config.data.phases, run.shapes_by_phase(config).items(), strict=True):
        if mesh is not None and shape not in answers:
            from phijax.planning.compiled import compile_step

            say(f"compiling {shape} for {topology}: a minute or two ...")
            answers[shape] = compile_step(recipe, mesh, topology, shape)
        steps.append(plan_step(name, phase.steps, recipe, where, shape, answers.get(shape)))
    backend = recipe.backend
    plan = RunPlan(
        topology=topology,
        slices=config.mesh.slices,
        sizes=where.sizes,
        description=f"{params.count(recipe.model):,} parameters, attention {backend.attention}, remat {backend.remat}",
        steps=tuple(steps),
        host_memory=_host_memory(recipe, where, mesh),
        asynchronous=config.checkpoint.asynchronous,
        price=FLAGS.price_per_chip_hour,
        warnings=tuple(params.check_mesh(recipe.model, where.sizes)),
    )
    return plan, recipe


def search_plan(config, topology: str, *, compiling: bool, say) -> int:
    """Prints the table and the winner as overrides; the configured batch and phases stay as they are."""
    from phijax import run
    from phijax.model.config import resolve_model
    from phijax.model.presets import PRESETS
    from phijax.parallel.mesh import make_mesh
    from phijax.planning import search
    from phijax.planning.compiled import compile_step
    from phijax.planning.topology import has_compiler, lengths_of, tpu_devices

    phases = config.data.phases
    slices = config.mesh.slices

    def changed(candidate):
        return dataclasses.replace(
            config,
            mesh=candidate.mesh,
            model=dataclasses.replace(config.model, remat=candidate.remat),
            data=dataclasses.replace(config.data, micro_batches=candidate.micro_batches),
        )

    def work_of(candidate, where):
        new = changed(candidate)
        shapes = run.shapes_by_phase(new).values()
        recipe = run.make_recipe(new, dict(where.sizes), "tpu")
        return search.Work(recipe, tuple((phase.steps, shape) for phase, shape in zip(phases, shapes, strict=True)))

    def compile_one(candidate, recipe, shape):
        say(f"compiling {candidate.overrides()} {shape}: a minute or two ...")
        return compile_step(recipe, make_mesh(candidate.mesh, tpu_devices(topology, slices)), topology, shape)

    chips = math.prod(lengths_of(topology)) * slices
    model = resolve_model(config.model, PRESETS)
    options = list(search.meshes(chips, slices, model, max(phase.sequence_length for phase in phases)))
    batch = math.gcd(*(phase.global_batch_size for phase in phases))
    micro_batches = [n for n in range(1, batch + 1) if batch % n == 0]
    ranked, looked_at = search.rank(topology, options, micro_batches, work_of)
    if not ranked:
        say(f"None of {looked_at} candidates fits {topology}: take more chips, or a shorter sequence.")
        return EXIT_DOES_NOT_FIT
    compiling = compiling and has_compiler() and FLAGS.compile_top > 0
    best = search.compile_best(ranked, FLAGS.compile_top, compile_one) if compiling else []
    winner = next((one for one in best if not one.refused), None if compiling else ranked[0])
    return tell_search(config, best, ranked, winner, looked_at)


def tell_search(config, best, ranked, winner, looked_at: int) -> int:
    from phijax import config as configs
    from phijax.planning import search
    from phijax.planning.assumptions import ANALYTIC_ERROR, COMPILED_ERROR

    seen = {one.candidate for one in best}
    rest = [one for one in ranked if one.candidate not in seen]
    old = configs.to_dict(config)
    paste = [
        f"--config.{key}={value}"
        for key, value in (winner.candidate.overrides() if winner else {}).items()
        if str(old[key.split(".")[0]][key.split(".")[1]]) != value
    ]
    if FLAGS.json:
        rows = [
            {
                **one.candidate.overrides(),
                "run_seconds": one.seconds,
                "hbm_peak_bytes": one.peak,
                "method": "compiled" if one.answers else "analytic",
                "refused": one.refused,
            }
            for one in [*best, *rest]
        ]
        print(json.dumps({"winner": paste, "looked_at": looked_at, "candidates": rows}, indent=2))
    else:
        if best:
            print("\n".join(["compiled, quickest first:", *search.table(best), f"  error: {COMPILED_ERROR}", ""]))
        print(
            "\n".join(["from shapes alone, the best of them:", *search.table(rest[:12]), f"  error: {ANALYTIC_ERROR}"])
        )
        print(
            f"\n{looked_at:,} candidates (meshes x remat policies x micro-batches) were ranked from shapes, "
            f"{len(ranked):,} of them fit; {len(best)} were compiled, the other {looked_at - len(best):,} were not. "
            "Compiler options and offload to the host were not searched."
        )
        print(
            f"winner: {' '.join(paste) or 'the config as it is'}"
            if winner
            else "The compiler refused all it was given."
        )
    return EXIT_DONE if winner else EXIT_DOES_NOT_FIT


def _host_memory(recipe, where, mesh):
    """What a save holds on the first host; without the compiler's devices an upper bound from shapes."""
    from phijax.checkpoint.host_memory import SYNCHRONOUS_LIMIT_GB, bytes_held_by_save
    from phijax.planning import analytic
    from phijax.planning.run_plan import HostMemory
    from phijax.training.program import abstract_state

    chip = where.chip
    if mesh is None:
        held = int(chip.chips_per_host * analytic.state_bytes(recipe, where.sizes))
        return HostMemory(held, min(held, SYNCHRONOUS_LIMIT_GB * 10**9), chip.host_bytes)
    state = abstract_state(recipe, mesh)
    held = (bytes_held_by_save(state, asynchronous=wait) for wait in (True, False))
    return HostMemory(*held, chip.host_bytes)


def entry() -> None:
    """Where the command starts, under either name."""
    from phijax.parallel import hardware

    hardware.prepare_cpu()
    try:
        rest, overrides = command.split_overrides(sys.argv[1:])
        sys.argv = [sys.argv[0], *rest]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    command.run(lambda arguments: main(arguments, overrides), FLAGS)


if __name__ == "__main__":
    entry()
