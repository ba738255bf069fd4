"""Which row comes next: closed forms over phases, mixtures and epochs. No iterator, no state.

Global row g of a phase -> slot g mod n of the mixture's pattern -> source, and how many rows of that source came
before -> its epoch and place in it -> the row, by a keyed permutation. Each step is O(1) in g.
"""

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Sequence

from grain.experimental import index_shuffle

from phijax.errors import UserError

SHUFFLE_ROUNDS = 4  # of the block cipher behind index_shuffle
MAX_PATTERN = 100_000  # slots: the pattern is kept in memory, and no share needs to be finer


@dataclasses.dataclass(frozen=True)
class Source:
    """One entry of a mixture: a shard folder, its share in rows, and how often it may be repeated."""

    path: str = ""  # a folder of shards
    weight: int = 1  # its share in rows, beside the weights of the others
    max_epochs: int | None = None  # how often it may be read; None: without end


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of steps with one shape and one mixture. Changing either later means adding a phase."""

    steps: int = 0  # optimizer steps
    sequence_length: int = 0  # T, tokens of a row; a multiple of the shards' block
    global_batch_size: int = 0  # rows a step
    mixture: tuple[Source, ...] = ()


@functools.lru_cache(maxsize=256)
def pattern(weights: tuple[int, ...]) -> tuple[int, ...]:
    """sum(weights) slots, each the index of a source: the one with the largest credit first, the earlier on a tie."""
    total, credit, slots = sum(weights), [0] * len(weights), []
    for _ in range(total):
        credit = [c + w for c, w in zip(credit, weights, strict=True)]
        pick = max(range(len(weights)), key=lambda i: credit[i])
        credit[pick] -= total
        slots.append(pick)
    return tuple(slots)


@functools.lru_cache(maxsize=256)
def _before(weights: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """For each source: how many of its slots lie before slot 0, 1, ... n."""
    slots = pattern(weights)
    return tuple(
        tuple(itertools.accumulate((slot == source for slot in slots), initial=0)) for source in range(len(weights))
    )


def rows_taken(weights: tuple[int, ...], source: int, rows: int) -> int:
    """How many of a phase's first `rows` rows come from `source`."""
    cycles, rest = divmod(rows, sum(weights))
    return cycles * weights[source] + _before(weights)[source][rest]


def source_of_row(weights: tuple[int, ...], row: int) -> tuple[int, int]:
    """Row of a phase -> (source, number of rows of that source before it in the phase)."""
    source = pattern(weights)[row % sum(weights)]
    return source, rows_taken(weights, source, row)


def shuffled(cursor: int, num_rows: int, *, seed: int, source_key: str) -> tuple[int, int]:
    """A source's cursor -> (epoch, row). Every epoch visits every row once, each in its own order.

    Args:
      source_key: identifies the content (a digest), so that a folder that moves keeps its order.
    """
    epoch, position = divmod(cursor, num_rows)
    if num_rows == 1:
        return epoch, 0
    key = zlib.crc32(f"{seed}/{source_key}/{epoch}".encode())
    return epoch, index_shuffle(position, max_index=num_rows - 1, seed=key, rounds=SHUFFLE_ROUNDS)


def phase_of_step(phases: Sequence[Phase], step: int) -> tuple[int, int]:
    """Step -> (phase, first step of that phase). Raises IndexError past the last."""
    start = 0
    for number, phase in enumerate(phases):
        if step < start + phase.steps:
            return number, start
        start += phase.steps
    raise IndexError(f"step {step} lies past the {start} steps of all phases")


def total_steps(phases: Sequence[Phase]) -> int:
    return sum(phase.steps for phase in phases)


def check_phases(phases: Sequence[Phase]) -> None:
    """Raises: UserError for phases that describe no run."""
    if not phases:
        raise UserError("data.phases is empty: at least one phase says how many steps, of what, in which shape.")
    for number, phase in enumerate(phases):
        where = f"data.phases[{number}]"
        for name in ("steps", "sequence_length", "global_batch_size"):
            if getattr(phase, name) < 1:
                raise UserError(f"{where}.{name}={getattr(phase, name)} must be at least 1.")
        if not phase.mixture:
            raise UserError(f"{where}.mixture is empty: name at least one shard folder, dict(path=..., weight=1).")
        paths = [source.path for source in phase.mixture]
        for source in phase.mixture:
            if not source.path:
                raise UserError(f"{where}.mixture: a source without a path.")
            if source.weight < 1:
                raise UserError(f"{where}.mixture: weight {source.weight} of {source.path}: whole numbers from 1.")
            if paths.count(source.path) > 1:
                raise UserError(f"{where}.mixture names {source.path} twice: add up its weights.")
        total = sum(source.weight for source in phase.mixture)
        if total > MAX_PATTERN:
            raise UserError(
                f"{where}.mixture: the weights add up to {total:,}; at most {MAX_PATTERN:,}. They are shares in rows: "
                f"divide them all by {-(-total // MAX_PATTERN)}."
            )
