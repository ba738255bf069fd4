"""Which row a step reads, against a count of one row at a time; and the arrays of a row, against its documents."""

import dataclasses
import itertools
import math
import shutil

import numpy as np
import pytest
from round_robin import sources_one_by_one
from synthetic_shards import small_tokenizer, write_synthetic

from phijax.data import mixture
from phijax.data.batch import TEXT_KEYS
from phijax.data.batch import check_row as check_arrays
from phijax.data.mixture import Phase, Source
from phijax.data.rows import Place, RowIndex, ShardRows, make_row
from phijax.data.shards import Shards
from phijax.errors import UserError

BLOCK = 16
END = small_tokenizer().end_of_text


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three folders of unequal size."""
    root = tmp_path_factory.mktemp("sources")
    sizes = {"a": (60, 2), "b": (40, 3), "c": (25, 1)}
    return {
        name: Shards.open(write_synthetic(root / name, seed=i, documents=count, block=BLOCK, shards=files))
        for i, (name, (count, files)) in enumerate(sizes.items())
    }


PHASES = (
    Phase(steps=7, sequence_length=32, global_batch_size=6, mixture=(Source("a", 2), Source("b", 1))),
    Phase(steps=5, sequence_length=16, global_batch_size=4, mixture=(Source("b", 3), Source("c", 1), Source("a", 1))),
    Phase(steps=9, sequence_length=48, global_batch_size=8, mixture=(Source("c", 1), Source("a", 1))),
)


def places_one_by_one(phases, shards, seed):
    """(step, index) -> Place, by counting."""
    used, places, step = {path: 0 for path in shards}, {}, 0  # records of each source, in all
    for phase in phases:
        per_row = phase.sequence_length // BLOCK
        paths = [source.path for source in phase.mixture]
        cursor = {path: math.ceil(used[path] / per_row) for path in paths}
        turns = sources_one_by_one([source.weight for source in phase.mixture])
        for s, index in itertools.product(range(phase.steps), range(phase.global_batch_size)):
            path = paths[next(turns)]
            rows = sum(n // per_row for n in shards[path].records_per_shard)
            epoch, row = mixture.shuffled(cursor[path], rows, seed=seed, source_key=shards[path].digest)
            places[step + s, index] = Place(path, epoch, row, phase.sequence_length)
            cursor[path] += 1
            used[path] += per_row
        step += phase.steps
    return places


def all_places(plan):
    return {
        (step, index): plan.place(step, index)
        for step in range(plan.total_steps)
        for index in range(plan.phase_at(step).global_batch_size)
    }


def test_three_phases_equal_the_count(shards):
    places = all_places(ShardRows(PHASES, shards, seed=3, begin=None))
    assert places == places_one_by_one(PHASES, shards, seed=3)
    assert {place.epoch for place in places.values()} >= {0, 1}  # some source began anew


def test_rows_that_are_repeated_to_fill_a_batch_are_said(shards):
    rows = sum(n // 2 for n in shards["c"].records_per_shard)

    def repeats(batch):
        phases = [Phase(2, 32, 4, (Source("a"),)), Phase(2, 32, batch, (Source("c", 1), Source("a", 1)))]
        return ShardRows(phases, shards, seed=0, begin=None).warnings()

    assert repeats(2 * rows) == []
    (line,) = repeats(2 * rows + 1)
    assert line.startswith(f"data.phases[1]: a step takes {rows + 1} rows of 32 tokens from c, which has {rows}:")


def test_a_later_phase_moves_no_earlier_row(shards):
    before = all_places(ShardRows(PHASES, shards, seed=3, begin=None))
    first_two = {key: place for key, place in before.items() if key[0] < 12}
    edits = [
        PHASES[:2],
        (*PHASES[:2], dataclasses.replace(PHASES[2], sequence_length=16, global_batch_size=3)),
        (*PHASES[:2], dataclasses.replace(PHASES[2], mixture=(Source("b", 5),)), PHASES[0]),
    ]
    for phases in edits:
        after = all_places(ShardRows(phases, shards, seed=3, begin=None))
        assert {key: after[key] for key in first_two} == first_two


def test_a_phase_cut_in_two_keeps_its_rows_where_the_mixtures_cycles_meet(shards):
    whole = dataclasses.replace(PHASES[0], steps=8)
    half = dataclasses.replace(whole, steps=4)  # 24 rows, 8 cycles of the mixture
    assert all_places(ShardRows([half, half], shards, seed=3, begin=None)) == all_places(
        ShardRows([whole], shards, seed=3, begin=None)
    )


def test_an_epoch_visits_every_row_of_a_source_once(shards):
    rows = len(RowIndex(shards["a"], 32, "", "a", begin=None))
    plan = ShardRows([Phase(2 * rows, 32, 1, (Source("a"),))], shards, seed=0, begin=None)
    visits = [plan.place(step, 0) for step in range(2 * rows)]
    assert [v.epoch for v in visits] == [0] * rows + [1] * rows
    orders = [[v.row for v in visits if v.epoch == epoch] for epoch in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(rows)) and orders[0] != orders[1]
    assert plan.epochs() == {"a": 2.0}


def test_the_content_decides_the_order_not_the_path(shards, tmp_path):
    shutil.copytree(shards["a"]._folder, tmp_path / "moved")
    other = write_synthetic(tmp_path / "other", seed=0, documents=59, block=BLOCK)  # nearly the same content

    def order(path, opened):
        plan = ShardRows([Phase(30, 32, 1, (Source(path),))], {path: opened}, seed=0, begin=None)
        return [plan.place(step, 0).row for step in range(30)]

    moved = Shards.open(tmp_path / "moved")
    assert order("moved", moved) == order("a", shards["a"])
    assert order("a", Shards.open(other)) != order("a", shards["a"])


def test_a_source_that_runs_out_is_refused_at_the_start(shards):
    rows = len(RowIndex(shards["a"], 32, "", "a", begin=None))
    fits = Phase(2 * rows, 32, 1, (Source("a", 1, max_epochs=2),))
    ShardRows([fits], shards, seed=0, begin=None)
    message = rf"data.phases\[0\]: a runs out. It has {rows} rows of 32 tokens.*2 times.*row {2 * rows + 1}, epoch 2.01"
    with pytest.raises(UserError, match=message):
        ShardRows([dataclasses.replace(fits, steps=2 * rows + 1)], shards, seed=0, begin=None)
    # What earlier phases took counts, in another length too.
    earlier = Phase(2 * rows, 16, 1, (Source("a"),))
    ShardRows([earlier, dataclasses.replace(fits, steps=rows)], shards, seed=0, begin=None)
    with pytest.raises(UserError, match=r"data.phases\[1\]: a runs out.*epoch 2.01"):
        ShardRows([earlier, dataclasses.replace(fits, steps=rows + 1)], shards, seed=0, begin=None)


@pytest.mark.parametrize(("length", "nearest"), [(40, 32), (41, 48), (7, 16), (15, 16)])
def test_a_length_that_is_no_multiple_of_the_block_is_refused(shards, length, nearest):
    with pytest.raises(UserError, match=rf"data.phases\[0\].sequence_length={length} .* 16, .*\nNearest.*: {nearest};"):
        ShardRows([Phase(1, length, 1, (Source("a"),))], shards, seed=0, begin=None)


def test_a_length_that_no_shard_holds_is_refused(shards):
    longest = max(shards["b"].records_per_shard) * BLOCK
    assert len(RowIndex(shards["b"], longest, "", "b", begin=None)) >= 1
    with pytest.raises(UserError, match=rf"b has no row of {longest + BLOCK} tokens: .* holds {longest} tokens"):
        ShardRows([Phase(1, longest + BLOCK, 1, (Source("b"),))], shards, seed=0, begin=None)


@pytest.mark.parametrize("begin", [None, END, 1], ids=["runs of before", "end-of-text", "another id"])
@pytest.mark.parametrize("records", [1, 2, 3, 5])
def test_rows_are_cut_from_each_shards_stream(shards, records, begin):
    """Row r of a shard is tokens r T .. r T + T of its stream, document starts and all; no row crosses shards."""
    source, length = shards["b"], records * BLOCK
    index, row = RowIndex(source, length, "", "b", begin=begin), 0
    for shard, count in enumerate(source.records_per_shard):
        parts = source.read(shard, range(count))
        stream = np.concatenate([parts[0][0][:1], *(tokens[1:] for tokens, _ in parts)])
        starts = np.concatenate([parts[0][1][:1], *(starts[1:] for _, starts in parts)])
        for first in range(0, count // records * length, length):
            got = index.read(row)
            check_row(got, stream[first : first + length + 1], starts[first : first + length + 1], begin)
            row += 1
    assert row == len(index)
    assert index.unused_records == source.num_records - row * records
    phases = [Phase(1, T, 1, (Source("b"),)) for T in sorted({BLOCK, length})]
    plan = ShardRows(phases, {"b": source}, seed=0, begin=None)
    assert plan.unused_records("b") == index.unused_records


def check_row(row, tokens, starts, begin):
    """Each array written out token by token."""
    length = len(tokens) - 1
    segment, position = 0, 0
    for i in range(length):
        if i == 0 or (starts[i] if begin is None else starts[i + 1]):
            segment, position = segment + 1, 0
        context = begin if begin is not None and starts[i + 1] else tokens[i]
        assert row["tokens"][i] == context and row["targets"][i] == tokens[i + 1]
        assert row["segment_ids"][i] == segment and row["positions"][i] == position
        assert row["weights"][i] == (0 if begin is None and starts[i + 1] else 1)
        position += 1
    assert {name: (a.shape, a.dtype.name) for name, a in row.items()} == {
        **{name: ((length,), "int32") for name in ("tokens", "targets", "segment_ids", "positions")},
        "weights": ((length,), "float32"),
    }


@pytest.mark.parametrize("begin", [None, END])
def test_no_token_is_lost_between_the_rows_of_a_shard(shards, begin):
    """Every token of the stream but the first is a target once, and counts (in old runs documents' first do not)."""
    source = shards["c"]  # one shard
    parts = source.read(0, range(source.num_records))
    stream = np.concatenate([parts[0][0][:1], *(tokens[1:] for tokens, _ in parts)])
    starts = np.concatenate([parts[0][1][:1], *(starts[1:] for _, starts in parts)])
    index = RowIndex(source, BLOCK, "", "c", begin=begin)
    rows = [index.read(i) for i in range(len(index))]
    np.testing.assert_array_equal(np.concatenate([row["targets"] for row in rows]), stream[1:])
    np.testing.assert_array_equal(np.concatenate([row["tokens"] for row in rows]), stream[:-1])
    assert sum(row["weights"].sum() for row in rows) == len(stream) - 1 - (begin is None) * starts[1:].sum()
    assert starts[1:].sum() > 10


def test_a_row_by_hand():
    #         [..] document 1 goes on, then documents 2 (3 tokens), 3 (1 token), 4; 9 is end-of-text
    first = np.array([5, 9, 6, 7, 9]), np.array([0, 0, 1, 0, 0], bool)
    second = np.array([9, 9, 8, 4, 4]), np.array([0, 1, 1, 0, 0], bool)
    row = make_row([first, second], 9)
    assert row["tokens"].tolist() == [5, 9, 6, 7, 9, 9, 8, 4]
    assert row["targets"].tolist() == [9, 6, 7, 9, 9, 8, 4, 4]
    assert row["segment_ids"].tolist() == [1, 2, 2, 2, 3, 4, 4, 4]
    assert row["positions"].tolist() == [0, 0, 1, 2, 0, 0, 1, 2]
    assert row["weights"].tolist() == [1] * 8
    # Weights that were trained with a BOS of their own before each document go on so; targets keep the end-of-text.
    assert make_row([first, second], 1)["tokens"].tolist() == [5, 1, 6, 7, 1, 1, 8, 4]
    assert make_row([first, second], 1)["targets"].tolist() == row["targets"].tolist()


def test_a_row_of_a_run_from_before_the_rule_by_hand():
    first = np.array([5, 9, 6, 7, 9]), np.array([0, 0, 1, 0, 0], bool)
    second = np.array([9, 9, 8, 4, 4]), np.array([0, 1, 1, 0, 0], bool)
    row = make_row([first, second], None)
    assert row["tokens"].tolist() == [5, 9, 6, 7, 9, 9, 8, 4]
    assert row["targets"].tolist() == [9, 6, 7, 9, 9, 8, 4, 4]
    assert row["segment_ids"].tolist() == [1, 1, 2, 2, 2, 3, 4, 4]
    assert row["positions"].tolist() == [0, 1, 0, 1, 2, 0, 0, 1]
    assert row["weights"].tolist() == [1, 0, 1, 1, 0, 0, 1, 1]


def test_a_row_has_the_arrays_that_next_token_prediction_reads(shards):
    check_arrays(RowIndex(shards["a"], 32, "", "a", begin=None).read(0), TEXT_KEYS, 32)
