"""Batches of a run, read ahead by Grain; and validation batches. Position is the step, nothing else."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
from jax.sharding import Mesh

from phijax.data import batch as batches
from phijax.data import mixture
from phijax.data.mixture import Phase
from phijax.data.rows import Plan, Row, RowIndex, padding_row
from phijax.data.shards import Shards
from phijax.errors import UserError
from phijax.storage.strict_json import Fields


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Section `data`."""

    phases: tuple[Phase, ...] = ()
    micro_batches: int = 1  # A: gradients are summed over them, activations of only one are held
    read_threads: int = 4  # of one process
    read_ahead: int = 8  # steps held ready on the host; at least read_threads
    verify: bool = True  # every shard's sha256 is compared with its manifest, in the background, once (gate.py)

    def __post_init__(self):
        if self.micro_batches < 1:
            raise UserError(f"data.micro_batches={self.micro_batches} must be at least 1.")
        if self.read_threads < 0 or self.read_ahead < self.read_threads:
            raise UserError(
                f"data.read_ahead={self.read_ahead} must be at least data.read_threads={self.read_threads}, and that "
                f"at least 0: a thread holds the step that it reads.  Try --config.data.read_ahead="
                f"{2 * max(self.read_threads, 1)}"
            )


def open_sources(phases: Sequence[Phase], *, vocab_size: int) -> dict[str, Shards]:
    """Path -> shards, all made with one tokenizer that fits the model.

    Raises: UserError for what is missing, damaged, or made with another tokenizer.
    """
    sources: dict[str, Shards] = {}
    for phase in phases:
        for source in phase.mixture:
            if source.path not in sources:
                sources[source.path] = open_for_model(source.path, vocab_size=vocab_size)
    prints = {shards.tokenizer_fingerprint: path for path, shards in sources.items()}
    if len(prints) > 1:
        (one, first), (two, second) = list(prints.items())[:2]
        raise UserError(
            f"data: {first} and {second} were made with different tokenizers ({one[:12]} and {two[:12]}): the same id "
            f"means different text in them. Prepare one again with --tokenizer of the other."
        )
    return sources


def open_for_model(path: str, *, vocab_size: int) -> Shards:
    """Raises: UserError when the tokenizer has ids that the model has no row for."""
    shards = Shards.open(path)
    if shards.vocab_size > vocab_size:
        raise UserError(
            f"{path} was made with a tokenizer of {shards.vocab_size} ids, but model.vocab_size={vocab_size}: ids from "
            f"{vocab_size} on have no row. Try --config.model.vocab_size={shards.vocab_size}, or prepare it again."
        )
    return shards


class Loader:
    """The batches of a run on this process's devices."""

    def __init__(self, plan: Plan, config: DataConfig, mesh: Mesh):
        self.plan = plan
        self._config = config
        self._placed = batches.batch_sharding(mesh)
        sizes = dict(mesh.shape)
        for number, phase in enumerate(plan.phases):
            where = f"data.phases[{number}]"
            batches.check_batch(where, phase.global_batch_size, config.micro_batches, phase.sequence_length, sizes)

    def shape(self, phase: Phase) -> tuple[int, int, int]:
        return batches.batch_shape(phase.global_batch_size, self._config.micro_batches, phase.sequence_length)

    def starting_at(self, step: int) -> Iterator[tuple[int, batches.Batch]]:
        """(step, batch) from `step` to the last."""
        rows = grain.MapDataset.source(_LocalRows(self.plan, self._config, self._placed))
        options = grain.ReadOptions(num_threads=self._config.read_threads, prefetch_buffer_size=self._config.read_ahead)
        for number, local in enumerate(rows[step:].to_iter_dataset(options), start=step):
            phase = self.plan.phases[mixture.phase_of_step(self.plan.phases, number)[0]]
            yield number, batches.assemble(self.shape(phase), self._placed, local)


class _LocalRows:
    """Element s: this process's rows of step s, index -> arrays. What Grain reads from."""

    def __init__(self, plan: Plan, config: DataConfig, placed):
        self._plan = plan
        self._local = {}
        for phase in plan.phases:
            shape = batches.batch_shape(phase.global_batch_size, config.micro_batches, phase.sequence_length)
            self._local[shape] = batches.local_rows(shape, placed)
        self._micro_batches = config.micro_batches

    def __len__(self) -> int:
        return self._plan.total_steps

    def __getitem__(self, step: int) -> dict[int, Row]:
        phase = self._plan.phases[mixture.phase_of_step(self._plan.phases, step)[0]]
        shape = batches.batch_shape(phase.global_batch_size, self._micro_batches, phase.sequence_length)
        return {
            index: self._plan.read(self._plan.place(step, index), phase.sequence_length) for index in self._local[shape]
        }


def validation_batches(
    path: str, shards: Shards, *, length: int, batch_size: int, max_rows: int | None, mesh: Mesh, begin: int | None
) -> Iterator[batches.Batch]:
    """Rows 0 .. n-1 in file order, once; the last batch is filled with rows of weight 0. Leaves (1, B, T)."""
    rows = RowIndex(shards, length, "evaluation", path, begin=begin)
    count = len(rows) if max_rows is None else min(max_rows, len(rows))
    placed = batches.batch_sharding(mesh)
    shape = (1, batch_size, length)
    local = batches.local_rows(shape, placed)
    for first in range(0, count, batch_size):
        yield batches.assemble(
            shape,
            placed,
            {i: rows.read(first + i) if first + i < count else padding_row(length) for i in local},
        )


def fingerprint(plan: Plan) -> dict[str, Any]:
    """What decides the rows of a run, as JSON: compared when it is resumed."""
    return {
        "seed": plan.seed,
        "tokenizer": next(iter(plan.sources.values())).tokenizer_fingerprint,
        "phases": [
            {
                "steps": phase.steps,
                "sequence_length": phase.sequence_length,
                "global_batch_size": phase.global_batch_size,
                "mixture": [
                    {"digest": plan.sources[s.path].digest, "path": s.path, "weight": s.weight} for s in phase.mixture
                ],
            }
            for phase in plan.phases
        ],
        # Runs that were begun before there was the rule have no such key, and keep theirs.
        **({} if plan.begin is None else {"begin": plan.begin}),
    }


def check_resume(before: Mapping[str, Any], now: Mapping[str, Any], step: int) -> None:
    """Whether a run that did `step` steps under `before` may go on under `now`.

    Phases that have ended must be the same; the one under way may only end elsewhere, not before `step`; what follows
    is free. Paths may change, contents may not.

    Raises: UserError naming the first difference.
    """
    for name in ("seed", "tokenizer", "begin"):
        if before.get(name) != now.get(name):
            raise UserError(
                f"This run began with another {name} ({before.get(name)}, now {now.get(name)}): its next rows would "
                f"not be those of the run. Set it back, or start a new workdir (init_from takes over the weights)."
            )
    start = 0
    for number, phase in enumerate(Fields(before, f"The checkpoint of step {step}", "data").objects("phases")):
        phase.objects("mixture")
        old, end = phase.values, start + phase.integer("steps")
        if start >= step and number > 0:
            return
        if number >= len(now["phases"]):
            raise UserError(f"data.phases[{number}] is gone, but the run is in it or past it (step {step}).")
        new = now["phases"][number]
        ended = end < step  # one that ends just here can still be made longer: a finished run goes on
        for name in ("sequence_length", "global_batch_size", "mixture", *(("steps",) if ended else ())):
            if _content(old.get(name)) != _content(new[name]):
                raise UserError(
                    f"data.phases[{number}].{name} was {_shown(old.get(name))}, now {_shown(new[name])}, but this "
                    f"phase {'has ended' if ended else f'is under way (step {step})'}.\nKeep it"
                    + ("." if ended else f", set its steps to {step - start}, and add a phase with the new value.")
                )
        if not ended and start + new["steps"] < step:
            raise UserError(
                f"data.phases[{number}].steps={new['steps']} ends before step {step}, where the run is. At least "
                f"{step - start}."
            )
        start = end


def _content(value: Any) -> Any:
    """A mixture without its paths: the digests say what is in them."""
    if isinstance(value, list):
        return [{k: v for k, v in source.items() if k != "path"} for source in value]
    return value


def _shown(value: Any) -> Any:
    if isinstance(value, list):
        return [f"{source.get('path')} x {source.get('weight')} ({str(source.get('digest'))[:8]})" for source in value]
    return value
