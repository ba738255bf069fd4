"""One plan, assembled out of the rooms, as `run/assemble.py` does a training run; and the search for a better one."""

import concurrent.futures
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from phijax import config as configs
from phijax.checkpoint.host_memory import SYNCHRONOUS_LIMIT_GB, bytes_held_by_save, bytes_on_host
from phijax.config import Config
from phijax.distribution import install_hint
from phijax.errors import UserError
from phijax.model import params
from phijax.parallel.hardware import COMPILER_PROFILES, NO_PROFILE, CompilerConfig
from phijax.parallel.mesh import make_mesh
from phijax.planning import analytic, compiled, cpu_process, search, topology
from phijax.planning.assumptions import chip_of
from phijax.planning.compiled import Compiled, DoesNotFit
from phijax.planning.found import Found
from phijax.planning.run_plan import HostMemory, RunPlan
from phijax.planning.search import Candidate, Ranked, Work
from phijax.planning.step_plan import plan_step
from phijax.run import recipe as recipes
from phijax.run import start
from phijax.storage import signals
from phijax.training.program import BatchShape, Recipe, abstract_state


@dataclasses.dataclass(frozen=True)
class How:
    """compiling: where the compiler is installed. options: the compiler's, by name. say: is told what takes time."""

    compiling: bool
    options: Mapping[str, str]
    say: Callable[[str], None]

    def can_compile(self) -> bool:
        if self.compiling and not topology.has_compiler():
            self.say(f"The TPU compiler is not here ({install_hint('tpu')}): figures are from shapes.")
            return False
        return self.compiling


def make_plan(config: Config, slice_name: str, how: How, *, price: float | None) -> tuple[RunPlan, Recipe]:
    """Compiles each distinct step of the config's phases, or estimates it from shapes.

    Args:
      slice_name: such as "v5p:4x4x8". price: of a chip and hour.
    Raises: UserError for a config that this slice cannot run.
    """
    where = analytic.make_slice(slice_name, config.mesh)
    recipe = recipes.make_recipe(config, dict(where.sizes), "tpu", where.chip.name)
    mesh = None
    if how.can_compile():
        mesh = make_mesh(config.mesh, topology.tpu_devices(slice_name, config.mesh.slices))
    answers, steps = {}, []  # phases of one shape share a program
    for phase, (name, shape) in zip(config.data.phases, recipes.shapes_by_phase(config).items(), strict=True):
        if mesh is not None and shape not in answers:
            how.say(f"compiling {shape} for {slice_name}: a minute or two ...")
            answers[shape] = compiled.compile_step(recipe, mesh, slice_name, shape, options=how.options)
        steps.append(plan_step(name, phase.steps, recipe, where, shape, answers.get(shape)))
    backend = recipe.backend
    plan = RunPlan(
        topology=slice_name,
        slices=config.mesh.slices,
        sizes=where.sizes,
        description=f"{params.count(recipe.model):,} parameters, attention {backend.attention}, remat {backend.remat}",
        steps=tuple(steps),
        host_memory=host_memory(recipe, where, mesh),
        asynchronous=config.checkpoint.asynchronous,
        price=price,
        warnings=tuple(params.check_mesh(recipe.model, where.sizes)),
    )
    return plan, recipe


def host_memory(recipe: Recipe, where: analytic.Slice, mesh) -> HostMemory:
    """What lies, and what a save holds, on the first host; without the compiler's devices upper bounds from shapes."""
    chip = where.chip
    if mesh is None:
        chips = min(chip.chips_per_host, math.prod(where.sizes.values()))
        of_chips = int(chips * analytic.state_bytes(recipe, where.sizes))
        # A save holds each piece once, however many chips have it.
        held = min(of_chips, int(analytic.state_bytes(recipe, dict.fromkeys(where.sizes, 1))))
        moments = of_chips * 2 // 3 if recipe.optimizer.moments_on_host else 0
        return HostMemory(held, min(held, SYNCHRONOUS_LIMIT_GB * 10**9), chip.host_bytes, moments)
    state = abstract_state(recipe, mesh)
    held = (bytes_held_by_save(state, asynchronous=asynchronous) for asynchronous in (True, False))
    return HostMemory(*held, chip.host_bytes, bytes_on_host(state))


def process_memory(config: Config, recipe: Recipe, sizes: Mapping[str, int], devices: int) -> dict[str, int]:
    """Part -> bytes of a training process at its worst, on a CPU, where it has the memory of its `devices` itself."""
    shapes = [*recipes.shapes_by_phase(config).values()]
    shapes += [recipes.evaluation_shape(config)] if config.evaluation.sets else []
    return cpu_process.memory(recipe, sizes, shapes, devices=devices, asynchronous=config.checkpoint.asynchronous)


def find(config: Config, slice_name: str, how: How, *, top: int) -> Found:
    """Meshes, remat, micro-batches, place of moments for the config's batch and phases, which stay as they are."""
    phases, slices = config.data.phases, config.mesh.slices
    model = start.resolve(config)

    def work_of(candidate: Candidate, where: analytic.Slice) -> Work:
        changed = apply(config, candidate)
        shapes = recipes.shapes_by_phase(changed).values()
        recipe = recipes.make_recipe(changed, dict(where.sizes), "tpu", where.chip.name, model)
        if not host_memory(recipe, where, None).fits(config.checkpoint.asynchronous):
            raise UserError("Its hosts have not the memory.")
        return Work(recipe, tuple((phase.steps, shape) for phase, shape in zip(phases, shapes, strict=True)))

    chips = math.prod(topology.lengths_of(slice_name)) * slices
    longest = max(phase.sequence_length for phase in phases)
    meshes = list(search.meshes(chips, slices, model, longest))
    batch = math.gcd(*(phase.global_batch_size for phase in phases))
    micro_batches = [n for n in range(1, batch + 1) if batch % n == 0]
    ranked, looked_at = search.rank(slice_name, meshes, micro_batches, work_of)
    compiling = top > 0 and how.can_compile()
    done, interrupted = compile_some(slice_name, how, ranked, top) if compiling else ([], False)
    seen = {one.candidate for one in done}
    best = sorted(done, key=lambda one: (one.refused, one.seconds))
    rest = [one for one in ranked if one.candidate not in seen]
    chip = chip_of(slice_name)
    winner = search.quickest(best if compiling else [one for one in rest if one.peak <= chip.hbm_bytes])
    options = {}
    if winner:
        options = {**dict(winner.work.recipe.compiler_options), **COMPILER_PROFILES[chip.name].get(winner.profile, {})}
    return Found(best, rest, winner, changes(config, winner), options, looked_at, len(ranked), interrupted)


def compile_some(slice_name: str, how: How, ranked: Sequence[Ranked], top: int) -> tuple[list[Ranked], bool]:
    """-> (what was compiled, in that order; whether it was interrupted). Each is told as it is done."""
    profiles = COMPILER_PROFILES[chip_of(slice_name).name]

    def compile_one(one: Ranked, shape: BatchShape) -> Compiled | DoesNotFit:
        how.say(f"compiling {' '.join(f'{k}={v}' for k, v in one.candidate.overrides().items())} {one.profile} {shape}")
        mesh = make_mesh(one.candidate.mesh, topology.tpu_devices(slice_name, one.candidate.mesh.slices))
        options = {**how.options, **profiles.get(one.profile, {})}
        return compiled.compile_step(one.work.recipe, mesh, slice_name, shape, options=options)

    done: list[Ranked] = []
    # In a thread, since the compiler does not look at signals: an interruption would wait for it to end.
    beside = concurrent.futures.ThreadPoolExecutor(1)
    try:
        # Whoever limits a search by `timeout` is to be shown what was found by then, as at the keyboard.
        with signals.as_keyboard_interrupt():
            for one in search.compile_in_turn(
                ranked, top, list(profiles), lambda *given: beside.submit(compile_one, *given).result()
            ):
                done.append(one)
                how.say(f"  {search.row(one)}")
    except KeyboardInterrupt:
        return done, True
    finally:
        beside.shutdown(wait=False)
    return done, False


def apply(config: Config, candidate: Candidate) -> Config:
    """The candidate as a config, without a profile of compiler options: the search adds it (Ranked.profile)."""
    return dataclasses.replace(
        config,
        compiler=CompilerConfig(),
        mesh=candidate.mesh,
        model=dataclasses.replace(config.model, remat=candidate.remat),
        data=dataclasses.replace(config.data, micro_batches=candidate.micro_batches),
        optimizer=dataclasses.replace(config.optimizer, moments=candidate.moments),
    )


def changes(config: Config, winner: Ranked | None) -> list[str]:
    """What the winner says otherwise than the config, as flags.

    Of profiles of compiler options shapes judge fill_memory alone: by them, a winner without it leaves the config's.
    """
    if winner is None:
        return []
    old = configs.to_dict(config)
    flags = []
    for key, value in winner.candidate.overrides().items():
        section, name = key.split(".")
        if str(old[section][name]) != value:
            flags.append(f"--config.{key}={value}")
    profile = winner.profile or NO_PROFILE
    if (winner.answers or winner.profile) and profile != config.compiler.profile:
        flags.append(f"--config.compiler.profile={profile}")
    return flags
