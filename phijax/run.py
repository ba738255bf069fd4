"""One run, assembled out of the rooms: checked before device memory is taken, then restored, then trained."""

import contextlib
import dataclasses
import functools
import json
import reprlib
import time
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from phijax import config as configs
from phijax.checkpoint import durable, reading
from phijax.checkpoint.agreement import from_process_zero
from phijax.checkpoint.lock import WriterLock
from phijax.checkpoint.open import load_params, open_checkpoint
from phijax.checkpoint.opened import Opened
from phijax.checkpoint.ours import CHECKPOINTS_FOLDER, TOKENIZER_FOLDER
from phijax.checkpoint.run_state import RunCheckpoints
from phijax.checkpoint.sampled import sampled_digest
from phijax.config import Config
from phijax.data import loader, mixture
from phijax.data.batch import batch_shape, check_batch
from phijax.data.checking import DataCheck
from phijax.data.gate import Gate
from phijax.data.loader import Loader
from phijax.data.rows import Plan, RowIndex
from phijax.data.shards import Shards, files_of
from phijax.errors import UserError
from phijax.evaluation.held_out import HeldOut, check_sets
from phijax.model import params
from phijax.model.backend import choose_backend
from phijax.model.config import ModelConfig, resolve_model
from phijax.model.flops import train_flops_per_token
from phijax.model.kernels.splash import check_splash
from phijax.model.presets import PRESETS
from phijax.parallel.hardware import compiler_options, generation, peak_flops
from phijax.parallel.mesh import make_mesh
from phijax.parallel.processes import StopSignal, Watchdog
from phijax.readiness import agreement, host
from phijax.readiness.agreement import Facts
from phijax.report import baselines
from phijax.report import config as logging
from phijax.report import report as reports
from phijax.report.report import Report
from phijax.report.summary import summarise
from phijax.text.tokenizer import TextTokenizer
from phijax.training import compile_cache, loop, program
from phijax.training.compile_cache import CompileCache
from phijax.training.program import BatchShape, Recipe
from phijax.training.state import TrainState

# Longer context is trained from weights of a shorter one: these may differ between start weights and the run.
CHANGED_BY_CONTEXT = ("max_position", "rope_theta", "sliding_window", "long_rope", "requires_long_rope")

MadeWith = Callable[[TextTokenizer], bool]  # whether the data were made with a tokenizer


@dataclasses.dataclass(frozen=True)
class EvaluationSet:
    name: str
    path: str
    shards: Shards
    shape: BatchShape


def make_recipe(config: Config, sizes: dict[str, int], platform: str, chip: str | None) -> Recipe:
    """Checks what can be checked without data.

    Args:
      platform, chip: of the devices that it will run on, "tpu" and "v5p", say (hardware.generation).
    Raises: UserError.
    """
    model = resolve_model(config.model, PRESETS)
    phases = config.data.phases
    mixture.check_phases(phases)
    total = mixture.total_steps(phases)
    config.optimizer.check(total)
    logging.check(config.logging, total)
    backend = choose_backend(config.model, platform, context=sizes["context"])
    for number, phase in enumerate(phases):
        where = f"data.phases[{number}]"
        check_batch(where, phase.global_batch_size, config.data.micro_batches, phase.sequence_length, sizes)
        if phase.sequence_length > model.max_position:
            raise UserError(
                f"{where}.sequence_length={phase.sequence_length} exceeds model.max_position={model.max_position}."
            )
        reason = check_splash(phase.sequence_length, sizes["context"]) if backend.attention == "splash" else None
        if reason:
            raise UserError(f"{where}: {reason}.")
    params.check_mesh(model, sizes)
    check_sets(config.evaluation)
    options = compiler_options(config.compiler, chip, moments_on_host=config.optimizer.moments_on_host)
    return Recipe(model, backend, config.optimizer, config.loss, total, config.seed, options)


def open_plan(config: Config, model: ModelConfig) -> Plan:
    """The rows of the run, their segments beginning with end-of-text; `begin_of` says with what a run's do.

    Raises: UserError for what is missing, damaged, too short, or of another tokenizer.
    """
    sources = loader.open_sources(config.data.phases, vocab_size=model.vocab_size)
    begin = next(iter(sources.values())).manifest.end_of_text
    return Plan(config.data.phases, sources, seed=config.seed, begin=begin)


def open_evaluation(config: Config, model: ModelConfig, plan: Plan, sizes: dict[str, int]) -> list[EvaluationSet]:
    first, sets = config.data.phases[0], []
    length = config.evaluation.sequence_length or first.sequence_length
    rows = config.evaluation.batch_size or first.global_batch_size // config.data.micro_batches
    check_batch("evaluation", rows, 1, length, sizes, size_key="batch_size")
    if length > model.max_position:
        raise UserError(f"evaluation.sequence_length={length} exceeds model.max_position={model.max_position}.")
    tokenizer = next(iter(plan.sources.values())).tokenizer_fingerprint
    for held_out in config.evaluation.sets:
        shards = loader.open_for_model(held_out.path, vocab_size=model.vocab_size)
        if shards.tokenizer_fingerprint != tokenizer:
            raise UserError(f"evaluation.sets: {held_out.path} was made with another tokenizer than the training data.")
        RowIndex(
            shards, length, "evaluation", held_out.path, begin=plan.begin
        )  # refuses a length that these shards cannot give
        sets.append(EvaluationSet(held_out.name, held_out.path, shards, (1, rows, length)))
    return sets


def data_facts(plan: Plan, sets: list[EvaluationSet]) -> Facts:
    """What must be the same on all processes of the data, wherever each has them."""
    return agreement.of_data(loader.fingerprint(plan), [(one.path, one.shards.digest) for one in sets])


def train(config: Config, workdir: epath.Path) -> loop.Outcome:
    """Trains to the end, or until asked to stop. Collective: every process calls it.

    Raises: UserError before device memory is taken; loop.Diverged, SaveFailed while it runs.
    """
    alike = functools.partial(agreement.alike, seconds=config.processes.initialization_timeout)
    with alike("config") as facts:
        durable.prepare_store(workdir)
        facts.add({f"version of {name}": version for name, version in host.versions().items()})
        facts.add(agreement.of_config(configs.to_dict(config)))
    with alike("data") as facts:
        mesh = make_mesh(config.mesh, jax.devices())
        sizes = dict(mesh.shape)
        device = mesh.devices.flat[0]
        recipe = make_recipe(config, sizes, device.platform, generation(device.device_kind))
        plan = open_plan(config, recipe.model)
        sets = open_evaluation(config, recipe.model, plan, sizes)
        facts.update(data_facts(plan, sets))
    say = functools.partial(print, flush=True) if jax.process_index() == 0 else lambda text: None
    for text in params.check_mesh(recipe.model, sizes):
        say(f"warning: {text}")
    if recipe.options:
        say(f"options of the compiler: {recipe.options}")
    shards = [*plan.sources.values(), *(held_out.shards for held_out in sets)] if config.data.verify else []
    with (
        WriterLock(workdir, break_lock=config.checkpoint.break_lock, log=say) as lock,
        compile_cache.opened(workdir, log=say) as programs,
        DataCheck(files_of(shards), workdir) as check,  # reads while the run is restored and compiled
    ):
        with alike("workdir") as facts:
            seen = lock.is_seen(config.processes.initialization_timeout / 2)
            facts.add({"--workdir": "holds the run's lock" if seen else "does not"}, {"--workdir": str(workdir)})
        before = from_process_zero(lambda: reading.newest_identity(workdir / CHECKPOINTS_FOLDER))
        start = open_start(config) if config.init_from and before is None else None
        plan = plan.beginning_with(begin_of(plan, before, start))
        batches = Loader(plan, config.data, mesh)
        identity = {"model": dataclasses.asdict(recipe.model), "data": loader.fingerprint(plan)}
        checkpoints = RunCheckpoints(
            workdir / CHECKPOINTS_FOLDER, config.checkpoint, identity=identity, lock=lock, log=say
        )
        first_step = checkpoints.latest_verified() or 0
        if first_step:
            check_identity(checkpoints.manifest(first_step)["identity"], identity, first_step)
        if jax.process_index() == 0:
            keep_config(config, workdir, first_step, say)
            next(iter(plan.sources.values())).tokenizer().save(workdir / TOKENIZER_FOLDER)
        checkpoints.check_host_memory(program.abstract_state(recipe, mesh))
        made_with = next(iter(plan.sources.values())).made_with
        state = begin(config, recipe, mesh, checkpoints, first_step, start, made_with, say)
        with open_report(config, workdir, recipe, plan, sets, first_step, mesh) as report:
            outcome = run_loop(
                config, recipe, mesh, state, batches, sets, checkpoints, report, programs, first_step, check, say
            )
        if not outcome.stopped and jax.process_index() == 0:
            say(f"done: {outcome.step} steps")
            for line in summarise(workdir / "metrics.jsonl", guessing(recipe.model, sets)):
                say(line)
        return outcome


def begin_of(plan: Plan, before: dict[str, Any] | None, start: Opened | None) -> int | None:
    """The id that segments begin with (rows.make_row): as the run's own steps say, else as texts of `start` begin.

    Where neither says anything it is end-of-text. Args: before: the identity that the newest step was saved with.
    """
    if before is not None:
        return before["data"].get("begin")
    if start is not None and len(start.begin) == 1:
        with contextlib.suppress(UserError):  # a checkpoint without a tokenizer has no say in what its ids mean
            if next(iter(plan.sources.values())).made_with(start.tokenizer()):
                return start.begin[0]
    return plan.begin


def open_start(config: Config) -> Opened:
    """The weights to start from, the same on all processes. Collective. Raises: UserError."""
    with agreement.alike("start weights", config.processes.initialization_timeout) as facts:
        facts.add({"init_from": sampled_digest(config.init_from)}, {"init_from": config.init_from})
    return open_checkpoint(config.init_from)


def begin(
    config: Config,
    recipe: Recipe,
    mesh,
    checkpoints: RunCheckpoints,
    first_step: int,
    start: Opened | None,
    made_with: MadeWith,
    say,
) -> TrainState:
    """The state to go on with: restored, or started from `init_from`, or from the seed."""
    if first_step:
        say(f"going on from step {first_step}")
        return checkpoints.restore(first_step, program.abstract_state(recipe, mesh))
    if start is not None:
        for line in check_start(start, recipe.model, made_with):
            say(line)
        say(f"weights of {config.init_from}; step, optimizer and data begin anew")
        return program.initial_state(recipe, mesh, load_params(start, mesh))
    return program.initial_state(recipe, mesh)


def check_start(opened: Opened, model: ModelConfig, made_with: MadeWith) -> list[str]:
    """Whether the weights of `opened` can start `model`. -> lines about what differs and may.

    Raises: UserError naming every field that differs and is not of CHANGED_BY_CONTEXT.
    """
    changed = configs.differences(dataclasses.asdict(opened.model), dataclasses.asdict(model))
    wanted = {key: pair for key, pair in changed.items() if key.split(".")[0] in CHANGED_BY_CONTEXT}
    refused = [
        f"model.{key} is {old!r} there, {new!r} here" for key, (old, new) in changed.items() if key not in wanted
    ]
    if refused:
        raise UserError(
            f"init_from={opened.path} is the checkpoint of another model:\n  "
            + "\n  ".join(refused)
            + "\nNothing is cast, cut or reshaped: set the config to the checkpoint's, or take other weights."
        )
    lines = [
        f"init_from: model.{key} was {reprlib.repr(old)}, goes on with {reprlib.repr(new)}"
        for key, (old, new) in wanted.items()
    ]
    with contextlib.suppress(UserError):  # a checkpoint without a tokenizer is no mistake: the data have one
        if not made_with(opened.tokenizer()):
            lines.append(f"warning: the tokenizer of {opened.path} is not the one that the data were made with")
    return lines


def run_loop(
    config, recipe, mesh, state, batches, sets, checkpoints, report, programs, first_step, check, say
) -> loop.Outcome:
    pace = loop.Pace(
        recipe.total_steps,
        config.evaluation.every_steps,
        config.checkpoint.every_steps,
        config.optimizer.max_skipped_steps,
    )
    stop, watchdog = StopSignal(), Watchdog(config.processes.watchdog_seconds)
    gate = Gate(check, first_step, recipe.total_steps, stop.asked, watchdog.beat, report.pause, say)
    try:
        return loop.train(
            state,
            batches.starting_at(first_step),
            Programs(recipe, mesh, batches, report, programs),
            pace,
            evaluators=[
                make_evaluator(recipe, mesh, one, config.evaluation.max_rows, batches.plan.begin, programs)
                for one in sets
            ],
            report=report,
            checkpoints=checkpoints,
            gate=gate,
            stop=stop,
            watchdog=watchdog,
        )
    finally:
        watchdog.close()
        stop.close()


class Programs:
    """step -> the compiled train step of its phase, compiled when the phase begins, outside of any step's time."""

    def __init__(self, recipe: Recipe, mesh, batches: Loader, report: Report, cache: CompileCache):
        self._recipe, self._mesh, self._batches, self._report, self._cache = recipe, mesh, batches, report, cache
        self._compiled: dict[BatchShape, Any] = {}

    def __call__(self, step: int):
        phases = self._batches.plan.phases
        shape = self._batches.shape(phases[mixture.phase_of_step(phases, step)[0]])
        if shape not in self._compiled:
            with self._report.pause():
                lowered = program.lower_train_step(self._recipe, self._mesh, shape)
                self._compiled[shape] = self._cache.tried(program.compile_with_options(lowered, self._recipe))
        return self._compiled[shape]


def make_evaluator(
    recipe: Recipe, mesh, held_out: EvaluationSet, max_rows: int | None, begin: int | None, cache: CompileCache
) -> HeldOut:
    _, rows, length = held_out.shape
    compiled = cache.tried(_compiled_eval(recipe, mesh, held_out.shape))
    batches = functools.partial(
        loader.validation_batches,
        held_out.path,
        held_out.shards,
        length=length,
        batch_size=rows,
        max_rows=max_rows,
        mesh=mesh,
        begin=begin,
    )
    return HeldOut(held_out.name, compiled, batches)


@functools.lru_cache(maxsize=8)
def _compiled_eval(recipe: Recipe, mesh, shape: BatchShape):
    """One program for all sets of a shape."""
    return program.compile_with_options(program.lower_eval_step(recipe, mesh, shape), recipe)


def open_report(config: Config, workdir: epath.Path, recipe: Recipe, plan: Plan, sets, first_step: int, mesh) -> Report:
    device = mesh.devices.flat[0]
    return reports.open_report(
        config.logging,
        workdir,
        first_step=first_step,
        total_steps=recipe.total_steps,
        tokens_before=functools.partial(tokens_before, plan),
        flops_per_token=lambda step: train_flops_per_token(
            recipe.model, plan.phases[mixture.phase_of_step(plan.phases, step)[0]].sequence_length
        ),
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


def tokens_before(plan: Plan, step: int) -> int:
    """Tokens of steps 0 .. step - 1."""
    total, start = 0, 0
    for phase in plan.phases:
        done = min(max(step - start, 0), phase.steps)
        total += done * phase.global_batch_size * phase.sequence_length
        start += phase.steps
    return total


def check_identity(before: dict[str, Any], now: dict[str, Any], step: int) -> None:
    """Whether the run in this workdir is this run. Raises: UserError naming the first difference."""
    now = json.loads(json.dumps(now))
    changed = configs.differences(before["model"], now["model"])
    if changed:
        key, (old, new) = next(iter(changed.items()))
        raise UserError(
            f"The checkpoint of step {step} is of another model: model.{key} was {old!r}, now {new!r}"
            + (f" (and {len(changed) - 1} more)" if len(changed) > 1 else "")
            + ".\nSet it back, or take another --workdir (--config.init_from takes over weights of an equal model)."
        )
    loader.check_resume(before["data"], now["data"], step)


def keep_config(config: Config, workdir: epath.Path, step: int, say) -> None:
    """Writes config.json; what differs from the last start is said, and added to config_history.jsonl."""
    path, now = workdir / "config.json", configs.to_dict(config)
    if path.exists():
        try:
            before = json.loads(path.read_text())
        except ValueError:
            before = {}
            say(f"{path} cannot be read; written anew")
        changed = configs.differences(before, now) if before else {}
        for key, (old, new) in changed.items():
            say(f"config: {key} was {old!r}, from step {step} on {new!r}")
        if changed:
            line = {"time": time.time(), "step": step, "changed": {k: list(v) for k, v in changed.items()}}
            history = workdir / "config_history.jsonl"
            history.write_text((history.read_text() if history.exists() else "") + json.dumps(line) + "\n")
    durable.write_json(path, now)


def shapes_by_phase(config: Config) -> dict[str, BatchShape]:
    return {
        f"phase {number} ({phase.steps:,} steps)": batch_shape(
            phase.global_batch_size, config.data.micro_batches, phase.sequence_length
        )
        for number, phase in enumerate(config.data.phases)
    }
