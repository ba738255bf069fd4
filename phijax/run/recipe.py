"""What a run computes and reads, checked before memory is taken: by training, planning, preflight and dry run."""

import dataclasses
from collections.abc import Iterator

from phijax.config import Config
from phijax.data import loader, mixture
from phijax.data.batch import batch_shape, check_batch, check_row
from phijax.data.row_source import Row, RowSource
from phijax.data.rows import RowIndex
from phijax.data.shards import Shards
from phijax.errors import UserError
from phijax.evaluation.held_out import check_sets, score_name
from phijax.model import params
from phijax.model.backend import choose_backend
from phijax.model.config import ModelConfig
from phijax.model.kernels.splash import check_splash
from phijax.parallel.hardware import compiler_options
from phijax.readiness import agreement
from phijax.readiness.agreement import Facts
from phijax.report import config as logging
from phijax.run import start
from phijax.tasks import TASKS
from phijax.training.objectives import Objective
from phijax.training.program import BatchShape, Recipe


@dataclasses.dataclass(frozen=True)
class EvaluationSet:
    name: str
    path: str
    shards: Shards
    shape: BatchShape


def make_recipe(
    config: Config, sizes: dict[str, int], platform: str, chip: str | None, model: ModelConfig | None = None
) -> Recipe:
    """Checks what can be checked without data.

    Args:
      platform, chip: of the devices that it will run on, "tpu" and "v5p", say (hardware.generation).
      model: that of the config, where it is resolved already (start.resolve).
    Raises: UserError.
    """
    model = model or start.resolve(config)
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
    recipe = Recipe(
        model, backend, config.optimizer, config.loss, total, config.seed, options, TASKS[config.task].make_objective
    )
    best_score(config, recipe)
    return recipe


def declared(config: Config, recipe: Recipe) -> Objective:
    """The objective of the first phase: what it declares is the same for each."""
    return recipe.objective(config.data.phases[0].sequence_length)


def best_score(config: Config, recipe: Recipe) -> str | None:
    """The metric that `checkpoint.keep_best` means. Raises: UserError."""
    return score_name(config.evaluation, config.checkpoint.keep_best, declared(config, recipe).score)


def open_rows(config: Config, model: ModelConfig) -> RowSource:
    """The rows of the run, their segments beginning with end-of-text; `resume.begin_of` says with what a run's do.

    Raises: UserError for what is missing, damaged, too short, or of another tokenizer.
    """
    return TASKS[config.task].open_rows(config.data, vocab_size=model.vocab_size, seed=config.seed)


def open_evaluation(config: Config, recipe: Recipe, rows: RowSource, sizes: dict[str, int]) -> list[EvaluationSet]:
    model, reads, sets = recipe.model, declared(config, recipe).reads, []
    shape = _, batch_size, length = evaluation_shape(config)
    check_batch("evaluation", batch_size, 1, length, sizes, size_key="batch_size")
    if length > model.max_position:
        raise UserError(f"evaluation.sequence_length={length} exceeds model.max_position={model.max_position}.")
    tokenizer = next(iter(rows.shards.values())).tokenizer_fingerprint
    for held_out in config.evaluation.sets:
        shards = loader.open_for_model(held_out.path, vocab_size=model.vocab_size)
        if shards.tokenizer_fingerprint != tokenizer:
            raise UserError(f"evaluation.sets: {held_out.path} was made with another tokenizer than the training data.")
        # Refuses a length that these shards cannot give, and rows that the objective cannot read.
        index = RowIndex(shards, length, "evaluation", held_out.path, begin=rows.begin)
        check_row(index.read(0), reads, length)
        sets.append(EvaluationSet(held_out.name, held_out.path, shards, shape))
    return sets


def evaluation_shape(config: Config) -> BatchShape:
    """Of every batch of evaluation.sets."""
    first = config.data.phases[0]
    rows = config.evaluation.batch_size or first.global_batch_size // config.data.micro_batches
    return 1, rows, config.evaluation.sequence_length or first.sequence_length


def rows_of_step_0(config: Config, recipe: Recipe, rows: RowSource) -> Iterator[Row]:
    """Each is read when it is asked for; none of a source whose rows are made of weights, which are not there yet.

    Raises: UserError, for a row that the objective cannot read too.
    """
    phase, reads = rows.phases[0], declared(config, recipe).reads
    for index in range(0 if rows.needs_params else phase.global_batch_size):
        (row,) = rows.read([rows.place(0, index)], None)
        check_row(row, reads, phase.sequence_length)
        yield row


def data_facts(rows: RowSource, sets: list[EvaluationSet]) -> Facts:
    """What must be the same on all processes of the data, wherever each has them."""
    return agreement.of_data(rows.fingerprint(), [(one.path, one.shards.digest) for one in sets])


def shapes_by_phase(config: Config) -> dict[str, BatchShape]:
    return {
        f"phase {number} ({phase.steps:,} steps)": batch_shape(
            phase.global_batch_size, config.data.micro_batches, phase.sequence_length
        )
        for number, phase in enumerate(config.data.phases)
    }
