"""The loader end to end on real shard files: equal rows on any mesh, after any restart; damage named; resume rules."""

import copy
import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from synthetic_shards import small_tokenizer, write_synthetic

from phijax.data import loader
from phijax.data.batch import TEXT_KEYS
from phijax.data.loader import DataConfig, Loader, check_resume
from phijax.data.mixture import Phase, Source
from phijax.data.rows import RowIndex, ShardRows
from phijax.data.shards import Shards
from phijax.errors import UserError
from phijax.parallel.sharding import MESH_AXES
from phijax.report.meter import host_memory_bytes
from phijax.text.train_tokenizer import train_tokenizer

BLOCK = 16
END = small_tokenizer().end_of_text
MESHES = [(8, 1, 1, 1), (1, 8, 1, 1), (1, 2, 2, 2), (1, 1, 1, 8)]


def mesh_of(*shape):
    return Mesh(np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape), MESH_AXES)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    for seed, name in enumerate(("a", "b", "c")):
        write_synthetic(root / name, seed=seed, block=BLOCK)
    return root


@pytest.fixture(scope="module")
def phases(root):
    def source(name, weight):
        return Source(str(root / name), weight)

    return (
        Phase(steps=4, sequence_length=32, global_batch_size=16, mixture=(source("a", 2), source("b", 1))),
        Phase(steps=4, sequence_length=16, global_batch_size=32, mixture=(source("b", 1), source("c", 3))),
        Phase(steps=3, sequence_length=64, global_batch_size=16, mixture=(source("c", 1),)),
    )


def make_plan(phases, seed=0):
    return ShardRows(phases, loader.open_sources(phases, vocab_size=300), seed=seed, begin=END)


def stream(plan, config, mesh, start=0):
    """(step, batch) from `start` to the last."""
    batch_of = Loader(plan, TEXT_KEYS, config, mesh).starting_at(start)
    return ((step, batch_of(step, None)) for step in range(start, plan.total_steps))


def run(phases, config=None, mesh=None, start=0, seed=0):
    """step -> arrays on the host, each with its micro-batches joined: (rows of the step, T)."""
    config = config or DataConfig()
    out = {}
    for step, batch in stream(make_plan(phases, seed), config, mesh or mesh_of(1, 1, 1, 1), start):
        assert {a.shape[0] for a in batch.values()} == {config.micro_batches}
        out[step] = {name: np.asarray(a).reshape(-1, a.shape[-1]) for name, a in batch.items()}
    return out


def assert_equal_runs(ours, expected):
    assert list(ours) == list(expected)
    for step, batch in expected.items():
        for name, array in batch.items():
            np.testing.assert_array_equal(ours[step][name], array, err_msg=f"{name} of step {step}")


@pytest.fixture(scope="module")
def reference(phases):
    return run(phases)


def test_batches_are_the_plans_rows(phases, reference):
    plan = make_plan(phases)
    assert list(reference) == list(range(11))
    for step, batch in reference.items():
        for i in range(plan.phase_at(step).global_batch_size):
            (row,) = plan.read([plan.place(step, i)])
            for name, array in batch.items():
                np.testing.assert_array_equal(array[i], row[name])
    assert any((reference[0]["tokens"] != reference[1]["tokens"]).ravel())


@pytest.mark.parametrize("sizes", MESHES)
def test_rows_are_the_same_on_every_mesh(phases, reference, sizes):
    assert_equal_runs(run(phases, mesh=mesh_of(*sizes)), reference)


@pytest.mark.parametrize("start", [1, 3, 4, 6, 10, 11])
def test_a_restart_goes_on_with_the_same_batches(phases, reference, start):
    """Inside a phase, at its border, before the last step, and when nothing is left."""
    assert_equal_runs(run(phases, start=start), {s: b for s, b in reference.items() if s >= start})


@pytest.mark.parametrize("micro_batches", [2, 4, 8])
def test_micro_batches_keep_the_rows_and_their_order(phases, reference, micro_batches):
    assert_equal_runs(run(phases, DataConfig(micro_batches=micro_batches), mesh_of(1, 2, 1, 1)), reference)


@pytest.mark.parametrize(("threads", "ahead"), [(0, 0), (1, 1), (16, 32)])
def test_threads_and_read_ahead_change_nothing(phases, reference, threads, ahead):
    assert_equal_runs(run(phases, DataConfig(read_threads=threads, read_ahead=ahead)), reference)


def test_the_loader_reads_ahead_but_not_the_whole_run(phases, monkeypatch):
    read = set()
    original = loader._LocalRows.__getitem__

    def counted(self, step):
        read.add(int(step))
        return original(self, step)

    monkeypatch.setattr(loader._LocalRows, "__getitem__", counted)
    long = [dataclasses.replace(phases[0], steps=200)]
    batches = stream(make_plan(long), DataConfig(read_threads=4, read_ahead=8), mesh_of(1, 1, 1, 1), 50)
    first, _ = next(batches)
    for _ in itertools.islice(batches, 5):
        pass
    batches.close()
    assert first == 50 and min(read) == 50
    assert max(read) > 56  # beyond the six that were taken
    assert max(read) < 56 + 8 + 4 + 1


class WeighedRows(ShardRows):
    """Rows that depend on the weights: their tokens are moved by what the state says."""

    needs_params = True

    def read(self, places, state):
        return [row | {"tokens": (row["tokens"] + state).astype(np.int32)} for row in super().read(places)]


def test_rows_that_need_the_weights_are_made_when_the_step_begins_with_its_state(phases, reference):
    plan = make_plan(phases)
    source = WeighedRows(phases, plan.shards, seed=0, begin=END)
    batch_of = Loader(source, TEXT_KEYS, DataConfig(micro_batches=2), mesh_of(1, 2, 1, 1)).starting_at(3)
    for step in range(3, 6):  # over the border of a phase
        tokens = np.asarray(batch_of(step, 100 * step)["tokens"])
        np.testing.assert_array_equal(tokens.reshape(-1, tokens.shape[-1]), reference[step]["tokens"] + 100 * step)


def test_batches_come_in_turn(phases):
    batch_of = Loader(make_plan(phases), TEXT_KEYS, DataConfig(), mesh_of(1, 1, 1, 1)).starting_at(3)
    batch_of(3, None)
    with pytest.raises(ValueError, match="the batch of step 3 was asked for, that of 4 is due"):
        batch_of(3, None)


def test_another_seed_gives_other_rows(phases, reference):
    assert any((run(phases, seed=1)[0]["tokens"] != reference[0]["tokens"]).ravel())


def test_a_batch_that_the_mesh_cannot_share_is_refused_before_anything_is_read(phases):
    odd = [phases[0], dataclasses.replace(phases[1], global_batch_size=12)]
    with pytest.raises(UserError, match=r"data.phases\[1\].global_batch_size=12 .*\nNearest that can: 8 or 16\."):
        Loader(make_plan(odd), TEXT_KEYS, DataConfig(), mesh_of(2, 4, 1, 1))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (dict(micro_batches=0), r"data.micro_batches=0 must be at least 1"),
        (dict(read_threads=-1), r"data.read_threads=-1"),
        (dict(read_threads=9), r"data.read_ahead=8 must be at least data.read_threads=9.*--config.data.read_ahead=18"),
    ],
)
def test_numbers_that_make_no_loader_are_refused(keys, message):
    with pytest.raises(UserError, match=message):
        DataConfig(**keys)


def test_tokenizers_that_differ_are_refused(phases, tmp_path):
    other = write_synthetic(tmp_path / "other", block=BLOCK)
    tokenizer = train_tokenizer(["quite other words, to train another tokenizer on. " * 3], vocab_size=300)
    tokenizer.save(other)
    edit_manifest(other, tokenizer_fingerprint=tokenizer.fingerprint)
    mixed = [phases[0], dataclasses.replace(phases[0], mixture=(Source(str(other)),))]
    with pytest.raises(UserError, match=f"/b and {other} were made with different tokenizers"):
        make_plan(mixed)


def test_a_tokenizer_larger_than_the_model_is_refused(phases):
    loader.open_sources(phases, vocab_size=300)
    with pytest.raises(
        UserError, match=r"tokenizer of 300 ids, but model.vocab_size=299.*--config.model.vocab_size=300"
    ):
        loader.open_sources(phases, vocab_size=299)


def edit_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def one_folder(tmp_path):
    """A folder of its own, to damage, and a run of one epoch over it."""
    folder = write_synthetic(tmp_path / "web", block=BLOCK)
    rows = len(RowIndex(Shards.open(folder), BLOCK, "", "", begin=None))
    return folder, [Phase(rows, BLOCK, 1, (Source(str(folder)),))]


def test_missing_shards_are_named(one_folder, tmp_path):
    folder, phases = one_folder
    nowhere = [dataclasses.replace(phases[0], mixture=(Source(str(tmp_path / "nowhere")),))]
    with pytest.raises(UserError, match=f"No shards at {tmp_path}/nowhere"):
        make_plan(nowhere)
    (folder / "shard-00001-of-00002.arrayrecord").unlink()
    with pytest.raises(UserError, match=r"shard-00001-of-00002.arrayrecord is missing"):
        make_plan(phases)


def test_a_truncated_shard_is_named(one_folder):
    folder, phases = one_folder
    shard = folder / "shard-00000-of-00002.arrayrecord"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"shard-00000-of-00002.arrayrecord has \d+ bytes; the manifest says \d+"):
        make_plan(phases)


@pytest.mark.parametrize("threads", [0, 4])
def test_a_corrupt_record_is_named_also_from_a_reading_thread(one_folder, threads):
    folder, phases = one_folder
    shard = folder / "shard-00001-of-00002.arrayrecord"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 0xFF  # inside one of the first records
    shard.write_bytes(content)
    with pytest.raises(UserError, match=rf"Record \d+ of {shard} is corrupt"):
        run(phases, DataConfig(read_threads=threads))


def test_validation_reads_in_file_order_once_and_fills_the_last_batch(root):
    shards = Shards.open(root / "a")
    rows = RowIndex(shards, 32, "", "", begin=END)
    assert len(rows) % 8
    batches = list(validation(root, shards))
    assert len(batches) == -(-len(rows) // 8)
    assert {a.shape for batch in batches for a in batch.values()} == {(1, 8, 32)}
    joined = {name: np.concatenate([np.asarray(batch[name])[0] for batch in batches]) for name in batches[0]}
    for i in range(len(rows)):
        for name, array in rows.read(i).items():
            np.testing.assert_array_equal(joined[name][i], array)
    assert not any(array[len(rows) :].any() for array in joined.values())


@pytest.mark.parametrize(("max_rows", "expected"), [(1, 1), (8, 8), (11, 11), (10**6, None), (None, None)])
def test_validation_stops_at_max_rows(root, max_rows, expected):
    shards = Shards.open(root / "a")
    expected = expected or len(RowIndex(shards, 32, "", "", begin=END))
    batches = list(validation(root, shards, max_rows))
    assert len(batches) == -(-expected // 8)
    filled = sum(int(np.asarray(batch["segment_ids"]).any(axis=-1).sum()) for batch in batches)  # padding has segment 0
    assert filled == expected


def test_validation_rows_are_the_same_on_every_mesh(root):
    shards = Shards.open(root / "b")
    expected = list(validation(root, shards, mesh=mesh_of(1, 1, 1, 1)))
    for sizes in MESHES:
        for ours, theirs in zip(validation(root, shards, mesh=mesh_of(*sizes)), expected, strict=True):
            for name in theirs:
                np.testing.assert_array_equal(ours[name], theirs[name])


def validation(root, shards, max_rows=None, mesh=None):
    mesh = mesh or mesh_of(2, 4, 1, 1)
    rows = RowIndex(shards, 32, "", "x", begin=END)
    return loader.held_out_batches(rows, TEXT_KEYS, length=32, batch_size=8, max_rows=max_rows, mesh=mesh)


def edited(found, phase, **changes):
    found = copy.deepcopy(found)
    found["phases"][phase].update(changes)
    return found


@pytest.fixture(scope="module")
def before(phases):
    """The fingerprint of a run of phases of 4, 4 and 3 steps, as it comes back out of a checkpoint."""
    return json.loads(json.dumps(make_plan(phases).fingerprint()))


class TestResume:
    @pytest.mark.parametrize("step", range(12))
    def test_the_same_data_is_accepted_at_every_step(self, before, phases, step):
        check_resume(before, make_plan(phases).fingerprint(), step)

    @pytest.mark.parametrize("key", ["steps", "sequence_length", "global_batch_size"])
    def test_a_past_phase_that_changed_is_refused(self, before, key):
        value = before["phases"][0][key]
        with pytest.raises(UserError, match=rf"data.phases\[0\].{key} was {value}, now 64, but this phase has ended"):
            check_resume(before, edited(before, 0, **{key: 64}), 5)

    @pytest.mark.parametrize("key", ["sequence_length", "global_batch_size"])
    def test_the_shape_of_the_current_phase_is_refused_with_the_way_to_have_it(self, before, key):
        message = rf"data.phases\[1\].{key} was \d+, now 64, but this phase is under way \(step 6\)"
        with pytest.raises(UserError, match=rf"{message}.\nKeep it, set its steps to 2, and add a phase with the new"):
            check_resume(before, edited(before, 1, **{key: 64}), 6)

    def test_the_mixture_of_the_current_phase_is_refused(self, before):
        b, c = before["phases"][1]["mixture"]
        for other in ([b], [c, b], [b, {**c, "weight": 4}], [b, {**c, "digest": "0" * 64}]):
            with pytest.raises(UserError, match=r"(?s)phases\[1\].mixture was .*/b x 1 .*, now .*set its steps to 2"):
                check_resume(before, edited(before, 1, mixture=other), 6)

    def test_the_advice_is_accepted_and_keeps_every_row_that_was_read(self, before, phases, reference):
        changed = dataclasses.replace(phases[1], global_batch_size=16, steps=5)
        advised = (phases[0], dataclasses.replace(phases[1], steps=2), changed, phases[2])
        check_resume(before, make_plan(advised).fingerprint(), 6)
        assert_equal_runs(dict(itertools.islice(run(advised).items(), 6)), dict(itertools.islice(reference.items(), 6)))

    def test_the_current_phase_may_end_elsewhere_but_not_before_the_run(self, before):
        for steps in (2, 3, 40):
            check_resume(before, edited(before, 1, steps=steps), 6)
        with pytest.raises(UserError, match=r"data.phases\[1\].steps=1 ends before step 6.*At least 2"):
            check_resume(before, edited(before, 1, steps=1), 6)

    def test_a_finished_run_may_be_made_longer(self, before, phases, reference):
        longer = (*phases[:2], dataclasses.replace(phases[2], steps=5))
        check_resume(before, make_plan(longer).fingerprint(), 11)
        assert_equal_runs(dict(itertools.islice(run(longer).items(), 11)), reference)
        with pytest.raises(UserError, match=r"data.phases\[2\].steps=2 ends before step 11"):
            check_resume(before, edited(before, 2, steps=2), 11)

    def test_later_phases_are_free(self, before):
        for step in (1, 4):  # 4: the second is about to begin
            check_resume(before, edited(before, 2, sequence_length=16), step)
            check_resume(before, edited(before, 1, global_batch_size=8) if step == 4 else before, step)
            check_resume(before, before | {"phases": before["phases"][: 1 if step == 4 else 2]}, step)

    def test_a_phase_that_is_needed_and_gone_is_refused(self, before):
        with pytest.raises(UserError, match=r"data.phases\[1\] is gone, but the run is in it or past it \(step 5\)"):
            check_resume(before, before | {"phases": before["phases"][:1]}, 5)

    def test_a_folder_may_move(self, before):
        moved = copy.deepcopy(before)
        for source in moved["phases"][0]["mixture"] + moved["phases"][1]["mixture"]:
            source["path"] = "gs://elsewhere/" + source["path"]
        check_resume(before, moved, 6)

    @pytest.mark.parametrize(("name", "value"), [("seed", 1), ("tokenizer", "0" * 64), ("prompts", "p")])
    def test_another_seed_or_tokenizer_is_refused(self, before, name, value):
        with pytest.raises(UserError, match=f"This run began with another {name}"):
            check_resume(before, before | {name: value}, 1)


@pytest.mark.slow
def test_memory_stays_flat_over_thousands_of_batches(phases):
    """A step whose rows stay alive keeps 10 KB: 20 MB in the 2000 that are measured."""
    plan = make_plan([dataclasses.replace(phases[0], steps=3000)])
    sizes = [host_memory_bytes() for step, _ in stream(plan, DataConfig(), mesh_of(1, 1, 1, 1)) if step % 1000 == 999]
    assert len(sizes) == 3
    assert sizes[2] - sizes[0] < 5e6, sizes
