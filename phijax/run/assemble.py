"""One run, assembled out of the rooms: checked before device memory is taken, then restored, then trained."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from phijax import config as configs
from phijax.checkpoint import reading
from phijax.checkpoint.agreement import from_process_zero
from phijax.checkpoint.lock import WriterLock
from phijax.checkpoint.run_state import RunCheckpoints
from phijax.checkpoint.sampled import sampled_digest
from phijax.checkpoint.steps import CHECKPOINTS_FOLDER
from phijax.config import Config
from phijax.data import loader
from phijax.data.checking import DataCheck
from phijax.data.gate import Gate
from phijax.data.loader import Loader
from phijax.data.mixture import Phase
from phijax.data.row_source import RowSource
from phijax.data.rows import RowIndex
from phijax.data.shards import files_of
from phijax.evaluation.held_out import HeldOut
from phijax.interchange.load import load_params
from phijax.interchange.native.source import TOKENIZER_FOLDER
from phijax.model import params
from phijax.model.config import ModelConfig, fields_version, model_to_dict
from phijax.model.flops import train_flops_per_token
from phijax.parallel.hardware import generation, give_back_freed_memory, in_kept_memory, peak_flops
from phijax.parallel.mesh import make_mesh
from phijax.parallel.stop_signal import StopSignal
from phijax.parallel.watchdog import Watchdog
from phijax.readiness import agreement, host
from phijax.report import baselines
from phijax.report import report as reports
from phijax.report.again import same_command
from phijax.report.report import Report
from phijax.report.summary import summarise
from phijax.run import resume, start
from phijax.run.recipe import (
    EvaluationSet,
    best_score,
    data_facts,
    declared,
    make_recipe,
    open_evaluation,
    open_rows,
)
from phijax.run.start import Start
from phijax.storage import durable
from phijax.training import compile_cache, loop, program
from phijax.training.compile_cache import CompileCache
from phijax.training.program import BatchShape, Recipe
from phijax.training.state import TrainState


def train(config: Config, workdir: epath.Path) -> loop.Outcome:
    """Trains to the end, or until asked to stop. Collective: every process calls it.

    Raises: UserError before device memory is taken; loop.Diverged, SaveFailed while it runs.
    """
    mesh, recipe, rows, sets = checked(config, workdir)
    say = functools.partial(print, flush=True) if jax.process_index() == 0 else lambda text: None
    for text in [*params.check_mesh(recipe.model, dict(mesh.shape)), *rows.warnings()]:
        say(f"warning: {text}")
    if recipe.options:
        say(f"options of the compiler: {recipe.options}")
    shards = [*rows.shards.values(), *(held_out.shards for held_out in sets)] if config.data.verify else []
    with (
        WriterLock(workdir, break_lock=config.checkpoint.break_lock, log=say) as lock,
        compile_cache.opened(workdir, log=say) as programs,
        DataCheck(files_of(shards), workdir) as check,  # reads while the run is restored and compiled
    ):
        with agreement.alike("workdir", config.processes.initialization_timeout) as facts:
            seen = lock.is_seen(config.processes.initialization_timeout / 2)
            facts.add({"--workdir": "holds the run's lock" if seen else "does not"}, {"--workdir": str(workdir)})
        before = from_process_zero(lambda: reading.newest_identity(workdir / CHECKPOINTS_FOLDER))
        begun = open_start(config, recipe, rows) if config.init_from and before is None else None
        rows = rows.beginning_with(resume.begin_of(rows, before, begun and begun.opened))
        batches = Loader(rows, declared(config, recipe).reads, config.data, mesh)
        identity = {"model": model_to_dict(recipe.model), "data": rows.fingerprint()}
        identity |= start.kept(before, begun)
        policy = dataclasses.replace(config.checkpoint, keep_best=best_score(config, recipe))
        version = fields_version(identity["model"])
        checkpoints = RunCheckpoints(
            workdir / CHECKPOINTS_FOLDER, policy, identity=identity, version=version, lock=lock, log=say
        )
        first_step = checkpoints.latest_verified(recipe.total_steps, lambda: resume.changes(config, workdir) == {}) or 0
        went_back: list[dict] = []
        if first_step:
            resume.check_identity(checkpoints.manifest(first_step)["identity"], identity, first_step)
            checkpoints.go_on_from(first_step, functools.partial(resume.note_going_back, workdir, went_back))
        checkpoints.check_host_memory(program.abstract_state(recipe, mesh))
        state = begin(recipe, mesh, checkpoints, first_step, begun, say)
        if jax.process_index() == 0:  # behind what may still be refused: a run that did not begin has no config
            resume.keep_config(config, workdir, first_step, say)
            next(iter(rows.shards.values())).tokenizer().save(workdir / TOKENIZER_FOLDER)
        with open_report(config, workdir, recipe, rows, sets, first_step, mesh) as report:
            for fields in went_back:
                report.event("went_back", **fields)
            outcome = run_loop(
                config, recipe, mesh, state, batches, sets, checkpoints, report, programs, first_step, check, say
            )
        if outcome.stopped:
            saved = "saved" if outcome.saved else "not saved"
            newest = max(checkpoints.steps(), default=0)
            say(f"stopped after step {outcome.step - 1}, {saved}: the same command goes on from step {newest}")
        if not outcome.stopped and jax.process_index() == 0:
            say(f"done: {outcome.step} steps")
            for line in summarise(workdir / "metrics.jsonl", guessing(recipe.model, sets)):
                say(line)
        return outcome


def checked(config: Config, workdir: epath.Path) -> tuple[Mesh, Recipe, RowSource, list[EvaluationSet]]:
    """What the run is, the same on all processes. Collective. Raises: UserError, before device memory is taken."""
    alike = functools.partial(agreement.alike, seconds=config.processes.initialization_timeout)
    with alike("config") as facts:
        durable.prepare_store(workdir)
        facts.add({f"version of {name}": version for name, version in host.versions().items()})
        facts.add(agreement.of_config(configs.to_dict(config)))
    with alike("data") as facts:
        mesh = make_mesh(config.mesh, jax.devices())
        sizes = dict(mesh.shape)
        device = mesh.devices.flat[0]
        model = start.resolve(config, workdir)
        recipe = make_recipe(config, sizes, device.platform, generation(device.device_kind), model)
        rows = open_rows(config, recipe.model)
        sets = open_evaluation(config, recipe, rows, sizes)
        facts.update(data_facts(rows, sets))
    return mesh, recipe, rows, sets


def open_start(config: Config, recipe: Recipe, rows: RowSource) -> Start:
    """The weights to start from, the same on all processes. Collective. Raises: UserError."""
    with agreement.alike("start weights", config.processes.initialization_timeout) as facts:
        facts.add({"init_from": sampled_digest(config.init_from)}, {"init_from": config.init_from})
    return start.open_start(config, recipe.model, next(iter(rows.shards.values())))


def begin(recipe: Recipe, mesh, checkpoints: RunCheckpoints, first_step: int, begun: Start | None, say) -> TrainState:
    """The state to go on with: restored, or started from the weights of `begun`, or from the seed."""
    if first_step:
        say(f"going on from step {first_step}")
        return checkpoints.restore(first_step, program.abstract_state(recipe, mesh))
    if begun is None:
        return program.initial_state(recipe, mesh)
    for line in begun.lines:
        say(line)
    return program.initial_state(recipe, mesh, load_params(begun.opened, mesh))


def run_loop(
    config, recipe, mesh, state, batches, sets, checkpoints, report, programs, first_step, check, say
) -> loop.Outcome:
    pace = loop.Pace(
        recipe.total_steps,
        config.evaluation.every_steps,
        config.checkpoint.every_steps,
        config.optimizer.max_skipped_steps,
        score_saves=config.checkpoint.keep_best is not None,
    )
    stop, watchdog = StopSignal(), Watchdog(config.processes.watchdog_seconds)
    gate = Gate(check, first_step, recipe.total_steps, stop.asked, watchdog.beat, report.pause, say)
    try:
        return loop.train(
            state,
            batches.starting_at(first_step),
            Programs(recipe, mesh, batches, report, watchdog, programs),
            pace,
            counted=declared(config, recipe).shown["loss"],
            evaluators=[
                make_evaluator(recipe, mesh, one, config.evaluation.max_rows, batches.source.begin, programs)
                for one in sets
            ],
            report=report,
            checkpoints=checkpoints,
            gate=gate,
            stop=stop,
            watchdog=watchdog,
        )
    except loop.Diverged as error:
        if jax.process_index() != 0:
            raise
        raise loop.Diverged(f"{error}\n{way_back(config, *checkpoints.after_divergence(error.last_good))}") from None
    finally:
        watchdog.close()
        stop.close()


def way_back(config: Config, saved: int | None, known: bool) -> str:
    """What to do after a divergence. `saved`: the step to go back to, if there is one; `known`: to be good."""
    change = f"Lower optimizer.learning_rate (it is {config.optimizer.learning_rate:g}), or look at those steps' data"
    if saved is None:
        return f"Nothing was saved before. {change}, and start the same command again."
    several = "\n(That is process 0's; all processes take the last argument.)" if jax.process_count() > 1 else ""
    known_or_not = "is from before" if known else "is the only one, and may be where it began"
    command = same_command("checkpoint.restore_step", saved)
    return f"Saved step {saved} {known_or_not}. {change}, and go on from there:\n  {command}{several}"


class Programs:
    """step -> the compiled train step of its phase, compiled when the phase begins, outside of any step's time."""

    def __init__(self, recipe: Recipe, mesh, batches: Loader, report: Report, watchdog: Watchdog, cache: CompileCache):
        self._recipe, self._mesh, self._batches = recipe, mesh, batches
        self._report, self._watchdog, self._cache = report, watchdog, cache
        self._compiled: dict[BatchShape, Any] = {}

    def __call__(self, step: int):
        shape = self._batches.shape_at(step)
        if shape not in self._compiled:
            with self._report.pause(), self._watchdog.pause():
                lowered = program.lower_train_step(self._recipe, self._mesh, shape)
                compiled = program.compile_with_options(lowered, self._recipe)
                self._compiled[shape] = in_own_memory(compiled, self._mesh, self._cache)
                give_back_freed_memory()
        return self._compiled[shape]


def in_own_memory(compiled, mesh, cache: CompileCache):
    """A step as it is called; on one CPU device, where it computes within its call, in memory that is kept for it."""
    tried = cache.tried(compiled)
    if mesh.size > 1 or mesh.devices.flat[0].platform != "cpu":
        return tried
    return in_kept_memory(tried, compiled.memory_analysis().temp_size_in_bytes)


def make_evaluator(
    recipe: Recipe, mesh, held_out: EvaluationSet, max_rows: int | None, begin: int | None, cache: CompileCache
) -> HeldOut:
    _, batch_size, length = held_out.shape
    objective = recipe.objective(length)
    compiled = cache.tried(_compiled_eval(recipe, mesh, held_out.shape))
    batches = functools.partial(
        loader.held_out_batches,
        RowIndex(held_out.shards, length, "evaluation", held_out.path, begin=begin),
        objective.reads,
        length=length,
        batch_size=batch_size,
        max_rows=max_rows,
        mesh=mesh,
    )
    return HeldOut(held_out.name, compiled, batches, objective.held_out)


@functools.lru_cache(maxsize=8)
def _compiled_eval(recipe: Recipe, mesh, shape: BatchShape):
    """One program for all sets of a shape."""
    return program.compile_with_options(program.lower_eval_step(recipe, mesh, shape), recipe)


def open_report(
    config: Config, workdir: epath.Path, recipe: Recipe, rows: RowSource, sets, first_step: int, mesh
) -> Report:
    device = mesh.devices.flat[0]
    return reports.open_report(
        config.logging,
        workdir,
        first_step=first_step,
        total_steps=recipe.total_steps,
        tokens_before=functools.partial(tokens_before, rows.phases),
        flops_per_token=lambda step: train_flops_per_token(recipe.model, rows.phase_at(step).sequence_length),
        means=declared(config, recipe).shown,
        peak_flops_per_device=peak_flops(device.device_kind),
        device_count=mesh.size,
        process_index=jax.process_index(),
        baselines=guessing(recipe.model, sets),
        run_config=configs.to_dict(config),
    )


def guessing(model: ModelConfig, sets: list[EvaluationSet]) -> dict[str, float]:
    """Losses of guessing: uniform, and unigram counted over the first rows of the first held-out set."""
    uniform = baselines.uniform(model.vocab_size)
    if not sets:
        return uniform
    rows = RowIndex(sets[0].shards, sets[0].shape[-1], "evaluation", sets[0].path, begin=None)
    counted = (rows.read(i)["targets"] for i in range(min(len(rows), 512)))
    return uniform | baselines.unigram(counted, model.vocab_size)


def tokens_before(phases: Sequence[Phase], step: int) -> int:
    """Tokens of steps 0 .. step - 1."""
    total, start = 0, 0
    for phase in phases:
        done = min(max(step - start, 0), phase.steps)
        total += done * phase.global_batch_size * phase.sequence_length
        start += phase.steps
    return total
