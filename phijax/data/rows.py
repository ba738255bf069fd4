"""Rows out of token shards: (step, index) -> a row of a shard folder, and that row's arrays."""

import bisect
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from phijax.data import mixture
from phijax.data.mixture import Phase
from phijax.data.row_source import Row
from phijax.data.shards import Shards
from phijax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a row of training comes from."""

    path: str
    epoch: int
    row: int
    length: int


class ShardRows:
    """The row source of pretraining: mixtures of shard folders, by phases and epochs. Holds them open, no position."""

    needs_params = False

    def __init__(self, phases: Sequence[Phase], shards: Mapping[str, Shards], *, seed: int, begin: int | None):
        """
        Args:
          shards: path -> opened folder, for every path that a phase names.
          begin: as `make_row` takes it.
        Raises: UserError for a length that is no multiple of the block, a source that is too short or runs out.
        """
        mixture.check_phases(phases)
        self.phases = tuple(phases)
        self.shards = dict(shards)
        self.seed = seed
        self.begin = begin
        self._rows = {}
        for number, phase in enumerate(self.phases):
            for source in phase.mixture:
                length = phase.sequence_length
                where = f"data.phases[{number}]"
                self._rows[source.path, length] = RowIndex(
                    self.shards[source.path], length, where, source.path, begin=begin
                )
        self._starts = [self._cursors(number) for number in range(len(self.phases))]
        self._check_epochs()

    def beginning_with(self, begin: int | None) -> "ShardRows":
        """The same rows under another rule of what segments begin with."""
        return ShardRows(self.phases, self.shards, seed=self.seed, begin=begin)

    @property
    def total_steps(self) -> int:
        return mixture.total_steps(self.phases)

    def phase_at(self, step: int) -> Phase:
        return self.phases[mixture.phase_of_step(self.phases, step)[0]]

    def place(self, step: int, index: int) -> Place:
        """Which row is row `index` of `step`."""
        number, start = mixture.phase_of_step(self.phases, step)
        phase = self.phases[number]
        weights = tuple(source.weight for source in phase.mixture)
        which, before = mixture.source_of_row(weights, (step - start) * phase.global_batch_size + index)
        path = phase.mixture[which].path
        rows = self._rows[path, phase.sequence_length]
        cursor = self._starts[number][path] + before
        epoch, row = mixture.shuffled(cursor, len(rows), seed=self.seed, source_key=self.shards[path].digest)
        return Place(path, epoch, row, phase.sequence_length)

    def read(self, places: Sequence[Place], state: Any = None) -> list[Row]:
        """`state` has no part in them."""
        return [self._rows[place.path, place.length].read(place.row) for place in places]

    def fingerprint(self) -> dict[str, Any]:
        """What decides the rows, as JSON."""
        return {
            "seed": self.seed,
            "tokenizer": next(iter(self.shards.values())).tokenizer_fingerprint,
            "phases": [
                {
                    "steps": phase.steps,
                    "sequence_length": phase.sequence_length,
                    "global_batch_size": phase.global_batch_size,
                    "mixture": [
                        {"digest": self.shards[s.path].digest, "path": s.path, "weight": s.weight}
                        for s in phase.mixture
                    ],
                }
                for phase in self.phases
            ],
            # Runs that were begun before there was the rule have no such key, and keep theirs.
            **({} if self.begin is None else {"begin": self.begin}),
        }

    def summary(self) -> list[str]:
        """A line for each source: its size, how often the run sees it, what of it no row takes."""
        lines = []
        for path, epochs in self.epochs().items():
            unused = self.unused_records(path)
            tails = f"; {unused:,} at the ends of shards fill no row" if unused else ""
            lines.append(f"{path}: {self.shards[path].num_records:,} records, seen {epochs:.3g} times{tails}")
        return lines

    def unused_records(self, path: str) -> int:
        """Records of a source that no row takes: at the ends of its shards, where they fill none of the longest."""
        return max(rows.unused_records for (source, _), rows in self._rows.items() if source == path)

    def warnings(self) -> list[str]:
        """A line for each source of which one batch takes more rows than there are, from a phase's first step on."""
        lines = []
        for number, phase in enumerate(self.phases):
            weights = tuple(source.weight for source in phase.mixture)
            for which, source in enumerate(phase.mixture):
                taken = mixture.rows_taken(weights, which, phase.global_batch_size)
                rows = len(self._rows[source.path, phase.sequence_length])
                if taken > rows:
                    lines.append(
                        f"data.phases[{number}]: a step takes {taken:,} rows of {phase.sequence_length} tokens from "
                        f"{source.path}, which has {rows:,}: they are repeated to fill the batch"
                    )
        return lines

    def _cursors(self, number: int) -> dict[str, int]:
        """Path -> rows of it, in this phase's length, that the phases before have used.

        Counted in records, since a row of another length is another number of them; a record begun counts as used.
        """
        phase, cursors = self.phases[number], {}
        for source in phase.mixture:
            block = self.shards[source.path].block
            records = sum(
                _rows_of(earlier, source.path) * (earlier.sequence_length // block) for earlier in self.phases[:number]
            )
            cursors[source.path] = -(-records // (phase.sequence_length // block))
        return cursors

    def _check_epochs(self) -> None:
        for number, phase in enumerate(self.phases):
            for source in phase.mixture:
                if source.max_epochs is None:
                    continue
                rows = len(self._rows[source.path, phase.sequence_length])
                needed = self._starts[number][source.path] + _rows_of(phase, source.path)
                if needed > source.max_epochs * rows:
                    raise UserError(
                        f"data.phases[{number}]: {source.path} runs out. It has {rows:,} rows of "
                        f"{phase.sequence_length} tokens and may be seen {source.max_epochs} times; this phase ends at "
                        f"row {needed:,}, epoch {needed / rows:.2f}.\nRaise max_epochs, lower its weight or the steps, "
                        f"or prepare more data."
                    )

    def epochs(self) -> dict[str, float]:
        """Path -> how often the whole run sees it."""
        seen = {}
        for number, phase in enumerate(self.phases):
            for source in phase.mixture:
                rows = len(self._rows[source.path, phase.sequence_length])
                seen[source.path] = (self._starts[number][source.path] + _rows_of(phase, source.path)) / rows
        return seen


def _rows_of(phase: Phase, path: str) -> int:
    """Rows that a whole phase takes from a source."""
    paths = [source.path for source in phase.mixture]
    if path not in paths:
        return 0
    weights = tuple(source.weight for source in phase.mixture)
    return mixture.rows_taken(weights, paths.index(path), phase.steps * phase.global_batch_size)


class RowIndex:
    """Rows of length T in one shard folder: row -> T / block neighbouring records. Rows do not cross shards."""

    def __init__(self, shards: Shards, length: int, where: str, path: str, *, begin: int | None):
        """Args: begin: as `make_row` takes it. Raises: UserError for a length that these shards cannot give."""
        if length % shards.block:
            raise UserError(
                f"{where}.sequence_length={length} is not a multiple of {shards.block}, the block of {path}.\n"
                f"Nearest that is: {max(1, round(length / shards.block)) * shards.block}; or prepare with --block."
            )
        self._shards = shards
        self._begin = begin
        self._records = length // shards.block
        self._ends = list(itertools.accumulate(n // self._records for n in shards.records_per_shard))
        if not self._ends or self._ends[-1] == 0:
            raise UserError(
                f"{path} has no row of {length} tokens: its longest shard holds "
                f"{max(shards.records_per_shard, default=0) * shards.block} tokens. Prepare more data, or fewer shards."
            )

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def unused_records(self) -> int:
        """Records at the ends of shards that fill no row."""
        return self._shards.num_records - len(self) * self._records

    def read(self, row: int) -> Row:
        shard = bisect.bisect_right(self._ends, row)
        first = (row - (self._ends[shard - 1] if shard else 0)) * self._records
        return make_row(self._shards.read(shard, range(first, first + self._records)), self._begin)


def make_row(records: Sequence[tuple[np.ndarray, np.ndarray]], begin: int | None) -> Row:
    """Neighbouring records -> the arrays of one row.

    A segment begins with the end-of-text that stands before its document: that token is the last target of the document
    before and the first context of this one. So every token is a target once, and a model learns how documents begin.
    Positions and segments restart there.

    Args:
      records: (tokens (block + 1,), starts (block + 1,) bool) each; the last token of one is the first of the next.
      begin: the id that documents begin with: end-of-text, or the BOS of the weights that the run started from. None:
        the rule of runs that were started before this one existed: a segment begins with its document's first token,
        which nothing predicts.
    Returns: arrays (T,), T = records * block. Segments count from 1; 0 is left for padding.
    """
    tokens = np.concatenate([tokens[:-1] for tokens, _ in records] + [records[-1][0][-1:]])
    starts = np.concatenate([starts[:-1] for _, starts in records] + [records[-1][1][-1:]])
    context, targets = tokens[:-1].astype(np.int32), tokens[1:].astype(np.int32)
    inner = (starts[:-1] if begin is None else starts[1:]).copy()
    if begin is not None:
        context[inner] = begin
    inner[0] = True
    index = np.arange(len(context), dtype=np.int32)
    first = np.maximum.accumulate(np.where(inner, index, 0))
    predicted = ~starts[1:] if begin is None else np.ones(len(context), np.bool_)
    return {
        "tokens": context,
        "targets": targets,
        "segment_ids": np.cumsum(inner, dtype=np.int32),
        "positions": (index - first).astype(np.int32),
        "weights": predicted.astype(np.float32),
    }
