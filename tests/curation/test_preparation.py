"""Raw text -> shards: every token accounted for, the same bytes however it is run, stopped and started again."""

import collections
import dataclasses
import os
import pathlib
import shutil
import sys

import numpy as np
import pytest
from preparation_case import CHAPTERS, OTHERS, contents, leave_unfinished, run, silent

from phijax.curation import preparation
from phijax.curation.preparation import finished, make_plan, prepare
from phijax.curation.tokenize_shards import is_validation
from phijax.data.shards import Shards
from phijax.errors import UserError
from phijax.text.tokenizer import Tokenizer
from phijax.text.train_tokenizer import train_tokenizer


def documents_in(folder):
    """Text of every document, the last of each shard perhaps cut, in order: put together again from the records."""
    shards, found = Shards.open(folder), []
    tokenizer = shards.tokenizer()
    for shard, count in enumerate(shards.records_per_shard):
        records = shards.read(shard, range(count))
        stream = np.concatenate([records[0][0][:1], *(tokens[1:] for tokens, _ in records)])
        starts = np.concatenate([records[0][1][:1], *(starts[1:] for _, starts in records)])
        assert starts[0]
        pieces = np.split(stream, np.flatnonzero(starts)[1:])
        assert all(piece[-1] == tokenizer.end_of_text for piece in pieces[:-1])
        whole = pieces[-1][-1] == tokenizer.end_of_text
        found += [tokenizer.decode(piece[:-1].tolist()) for piece in pieces[: None if whole else -1]]
    return found


def test_an_output_whose_name_is_no_utf_8_is_refused_before_the_work(request_of, tmp_path):
    """ArrayRecord takes names in UTF-8 alone."""
    output = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    with pytest.raises(UserError, match=r"caf\\udce9 is no name in UTF-8"):
        make_plan(dataclasses.replace(request_of(), output=output))
    with pytest.raises(UserError, match="is no name in UTF-8"):
        Shards.open(output)


def test_input_files_whose_names_are_no_utf_8_are_named_in_manifests_that_are_read(request_of, tmp_path):
    texts = tmp_path / "odd"
    texts.mkdir()
    (texts / "a.txt").write_text(CHAPTERS[0] * 50)
    with open(os.fsencode(texts) + b"/b\xff.txt", "w") as file:
        file.write(CHAPTERS[1] * 50)
    request = dataclasses.replace(request_of(), input=str(texts), output=str(tmp_path / "shards"))
    run(request)
    again = Shards.open(request.output).manifest
    assert [entry.file for entry in again.inputs] == ["a.txt", "b\udcff.txt"]
    assert finished(make_plan(request)) is not None


def test_a_seed_that_no_reader_takes_is_refused(request_of):
    with pytest.raises(UserError, match="--seed=4611686018427387905 must be 4,611,686,018,427,387,904 or less"):
        make_plan(dataclasses.replace(request_of(), seed=2**62 + 1))


def test_every_document_is_there_once_and_in_another_order(request_of):
    (manifest,) = run(request_of())
    assert (manifest.documents_read, manifest.documents_kept, manifest.documents_in_other_split) == (67, 64, 0)
    assert manifest.documents_dropped == {"empty": 1, "malformed JSON": 1, "no text field": 1}
    assert manifest.ignored_files == ("picture.png",)
    assert sum(shard.documents for shard in manifest.shards) == 64
    tokenizer = Tokenizer.open(request_of().tokenizer)
    assert manifest.num_tokens == sum(len(tokenizer.encode(text)) + 1 for text in CHAPTERS + OTHERS)
    found = documents_in(request_of().output)
    assert not collections.Counter(found) - collections.Counter(CHAPTERS + OTHERS)
    lost = collections.Counter(CHAPTERS + OTHERS) - collections.Counter(found)
    assert lost.total() <= 2 * len(manifest.shards)  # what lies in a tail: the last of a shard, at times the one before
    assert manifest.num_tail_tokens <= 64 * len(manifest.shards)
    Shards.open(request_of().output).verify()
    assert not (pathlib.Path(request_of().output) / "unfinished").exists()


def test_documents_are_shuffled_within_a_shard(request_of):
    run(request_of(num_shards=1))
    order = [CHAPTERS.index(text) for text in documents_in(request_of().output) if text in CHAPTERS[:50]]
    assert len(order) >= 49
    assert abs(np.corrcoef(order, range(len(order)))[0, 1]) < 0.4  # in the order of the file it would be 1


def test_the_same_bytes_with_any_number_of_processes_and_anywhere(request_of, texts, tmp_path):
    run(request_of("one", validation_fraction=0.2))
    run(request_of("two", validation_fraction=0.2), workers=2)
    moved = shutil.copytree(texts, tmp_path / "moved")
    run(request_of("three", input=str(moved), validation_fraction=0.2))
    one = contents(tmp_path / "one")
    assert len(one) == 10  # three shards and one, two manifests, two tokenizers
    assert contents(tmp_path / "two") == one and contents(tmp_path / "three") == one


def test_parts_on_several_machines_give_the_same_bytes(request_of, tmp_path):
    run(request_of("whole"))
    plan = make_plan(request_of("parts"))
    doing = []

    def watch(name, total, results):
        doing.append((name, total))
        return results

    assert preparation.prepare_part(plan, 1, watch, 2, 3) + preparation.prepare_part(plan, 1, watch, 0, 3) == 3
    with preparation._only_one(tmp_path / "parts" / "unfinished", but_parts=True):  # one part still works
        preparation.prepare_part(plan, 1, watch, 1, 3)
        with pytest.raises(UserError, match="Another process is preparing"):
            prepare(plan, 1, watch)
    assert finished(plan) is None
    prepare(plan, 1, watch)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert [total for name, total in doing if name == "tokenizing"] == [1, 2, 1, 4]
    assert preparation.prepare_part(plan, 1, watch, 0, 3) == 0  # complete already


def test_a_part_needs_the_tokenizer_of_all(request_of):
    with pytest.raises(UserError, match="A part needs --tokenizer"):
        preparation.prepare_part(make_plan(request_of(tokenizer=None, vocab_size=500)), 1, silent, 0, 2)


def test_the_seed_decides_the_order_alone(request_of):
    (one,) = run(request_of("one"))
    (two,) = run(request_of("two", seed=1))
    assert one.digest != two.digest
    assert one.num_tokens == two.num_tokens
    assert documents_in(request_of("one").output) != documents_in(request_of("two").output)


def test_the_tokenizer_is_trained_on_training_text(request_of):
    request = request_of(tokenizer=None, vocab_size=800, validation_fraction=0.2, block=32)
    train, validation = run(request)
    assert train.vocab_size == 800 and train.dtype == "uint16"
    kept = [text for text in CHAPTERS[:50] if not is_validation(text, 0.2)]
    texts = [text for text in CHAPTERS[50:] + OTHERS if not is_validation(text, 0.2)]
    names = sorted(range(14), key=lambda i: f"{i}.txt")  # in the order of the files, the rows after them
    in_order = [(CHAPTERS[50:] + OTHERS)[i] for i in names if (CHAPTERS[50:] + OTHERS)[i] in texts]
    assert train.tokenizer_fingerprint == train_tokenizer(in_order + kept, 800).fingerprint
    assert validation.tokenizer_fingerprint == train.tokenizer_fingerprint


def test_a_large_input_is_sampled_for_the_tokenizer(request_of, monkeypatch):
    monkeypatch.setattr(preparation, "SAMPLE_BYTES", 20_000)
    monkeypatch.setattr(preparation, "UNIT_BYTES", 10_000)
    plan = make_plan(request_of())
    # A name that is not UTF-8, as of a file of another system, has its place among the parts too.
    odd = dataclasses.replace(plan.files[0], name="caf\udce9.txt")
    units = tuple(
        tuple(dataclasses.replace(part, file=odd) if part.file == plan.files[0] else part for part in unit)
        for unit in plan.units
    )
    assert list(preparation._sample(dataclasses.replace(plan, units=units)))
    sample = list(preparation._sample(plan))
    assert 10_000 < sum(len(text.encode()) for text in sample) <= 20_000 + 3 * len(sample)
    assert sample == list(preparation._sample(plan))
    assert sample[0] not in CHAPTERS[:3] or sample[-1] in CHAPTERS[10:]  # not the beginning of the input alone


def test_validation_is_chosen_by_the_text_alone(request_of, tmp_path):
    request = request_of(validation_fraction=0.25, num_shards=1, block=16)
    train, validation = run(request)
    assert train.split == "train" and validation.split == "validation"
    assert train.documents_kept + validation.documents_kept == 64
    assert train.documents_in_other_split == validation.documents_kept
    held_out = set(documents_in(tmp_path / "out" / "validation"))
    assert held_out <= {text for text in CHAPTERS + OTHERS if is_validation(text, 0.25)}
    assert not held_out & set(documents_in(tmp_path / "out" / "train"))
    share = np.mean([is_validation(f"document {i}", 0.25) for i in range(4000)])
    assert abs(share - 0.25) < 0.03  # four standard deviations of 4000 draws
    assert not any(is_validation(text, 0.0) for text in CHAPTERS)


@pytest.mark.parametrize("trained", [False, True])
def test_killed_at_any_instant_it_gives_the_same_bytes(request_of, tmp_path, trained):
    """The folder is copied before each change that the process makes to the disk: a kill at that moment."""
    changes = dict(tokenizer=None, vocab_size=500) if trained else {}
    request = request_of(validation_fraction=0.2, num_shards=2, **changes)
    copies = []

    def before_change(event, arguments):
        writes = event == "open" and isinstance(arguments[1], str) and arguments[1][:1] in "wax"
        if not watching or not (writes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir")):
            return
        if not str(arguments[0]).startswith(request.output) and event != "os.rmdir":
            return
        watching.clear()  # the copy is no change to look at
        copies.append(tmp_path / f"copy-{len(copies)}")
        if os.path.exists(request.output):
            shutil.copytree(request.output, copies[-1])
        watching.append(True)

    watching = [True]
    sys.addaudithook(before_change)
    try:
        run(request)
    finally:
        watching.clear()
    unbroken = contents(request.output)
    assert len(copies) > 40
    if trained:  # the rest is the same as with a given tokenizer
        copies = [copy for copy in copies if not (copy / "unfinished" / "tokenizer").exists()]
        assert len(copies) > 5
    for copy in copies:
        shutil.rmtree(request.output)
        if copy.exists():
            shutil.copytree(copy, request.output)
        run(request)
        assert contents(request.output) == unbroken, copy


def test_half_written_files_of_a_killed_run_go_away(request_of, tmp_path):
    run(request_of("unbroken"))
    work = tmp_path / "out" / "unfinished"
    work.mkdir(parents=True)
    (work / "unit-00000.123.tmp").write_bytes(b"half")
    (tmp_path / "out" / "shard-00000-of-00003.arrayrecord.123.tmp").write_bytes(b"half")
    run(request_of())
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")


def test_what_is_complete_is_left_alone(request_of, tmp_path):
    assert finished(make_plan(request_of())) is None
    first = run(request_of())
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert finished(make_plan(request_of())) == first and run(request_of()) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == times


@pytest.mark.parametrize("complete", [False, True])
def test_another_request_for_the_same_output_is_refused(request_of, tmp_path, texts, tokenizer_folder, complete):
    moved = shutil.copytree(texts, tmp_path / "moved")
    request = request_of(input=str(moved))
    if complete:
        run(request)
    else:
        leave_unfinished(request)
    before = contents(request.output)
    other = tmp_path / "other_tokenizer"
    train_tokenizer(CHAPTERS[:10], 700).save(other)
    for changes, message in [
        (dict(block=128), "block: 64 there, 128 now"),
        (dict(seed=3), "seed: 0 there, 3 now"),
        (dict(num_shards=4), "num_shards: 3 there, 4 now"),
        (dict(validation_fraction=0.5), "validation_fraction: 0.0 there, 0.5 now"),
        (dict(tokenizer=str(other)), "tokenizer: .*fingerprint"),
        (dict(tokenizer=None, vocab_size=900), "tokenizer: .*'trained': True, 'vocab_size': 900"),
    ]:
        with pytest.raises(UserError, match=f"(?s)was made from something else.*{message}"):
            run(dataclasses.replace(request, **changes))
    if not complete:  # then it goes on with another input: below
        return
    (moved / "0.txt").write_text("changed")
    (moved / "1.txt").unlink()
    (moved / "new.txt").write_text("new")
    with pytest.raises(UserError) as error:
        run(request)
    for line in ("input 0.txt: changed", "input 1.txt: there, gone now", "input new.txt: not there"):
        assert line in str(error.value)
    assert contents(request.output) == before


def test_a_second_run_at_the_same_time_is_refused(request_of):
    def second(doing, total, results):
        with pytest.raises(UserError, match=r"Another process is preparing .*out now"):
            run(request_of())
        return results

    prepare(make_plan(request_of()), 1, second)


def test_an_output_that_is_something_else_is_not_touched(request_of, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is in use: it holds thesis\.txt"):
        run(request_of())
    with pytest.raises(UserError, match="is a file"):
        run(request_of("out/thesis.txt"))
    assert contents(tmp_path / "out") == {"thesis.txt": b"mine"}


def test_output_below_the_input_is_no_input(request_of, texts, tmp_path):
    moved = shutil.copytree(texts, tmp_path / "moved")
    (first,) = run(request_of(input=str(moved), output="moved/shards"))
    assert first.documents_read == 67 and first.ignored_files == ("picture.png",)
    assert run(request_of(input=str(moved), output="moved/shards")) == [first]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(block=0), "--block=0 must be 1 or more"),
        (dict(num_shards=0), "--num_shards=0 must be 1 or more"),
        (dict(validation_fraction=1.0), "at least 0 and below 1"),
        (dict(output="gs://bucket/out"), "not a local folder"),
        (dict(tokenizer="/nowhere"), "No tokenizer at /nowhere"),
        (dict(input="/nowhere/*"), "means no file"),
        (dict(text_field="body", num_shards=1, block=1), None),
        (dict(block=100_000), "fill no record of 100001"),
    ],
)
def test_requests_that_cannot_be(request_of, tmp_path, changes, message):
    request = request_of(**{k: v for k, v in changes.items() if k != "output"})
    request = dataclasses.replace(request, output=changes.get("output", request.output))
    if message is None:  # one row has that field, and the text files need none
        (manifest,) = run(request)
        assert manifest.documents_dropped["no text field"] == 51
        return
    with pytest.raises(UserError, match=message):
        run(request)


def test_no_document_that_can_be_used(request_of, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jsonl").write_text('{"body": "x"}\n{"body": "y"}\n{')
    with pytest.raises(UserError) as error:
        run(request_of(input=str(tmp_path / "bad")))
    assert "No document of 3" in str(error.value) and "2 dropped: no text field" in str(error.value)
    assert "--text_field=text" in str(error.value)


def test_tokens_that_the_tokenizer_does_not_know_are_counted(request_of, tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CHAPTERS), model_prefix=str(tmp_path / "plain"), vocab_size=300, model_type="bpe",
        minloglevel=2,
    )  # fmt: skip
    (manifest,) = run(request_of(tokenizer=str(tmp_path / "plain.model")))
    assert manifest.unknown_tokens > 30  # Chinese, Russian, emoji
    assert run(request_of("known"))[0].unknown_tokens == 0


def test_a_byte_level_tokenizer(request_of, tmp_path):
    """tokenizer.json alone, as SmolLM2's and phi-4's folders have it; the shards carry it on."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CHAPTERS, trainer)
    (tmp_path / "bpe").mkdir()
    made.save(str(tmp_path / "bpe" / "tokenizer.json"))
    (manifest,) = run(request_of(tokenizer=str(tmp_path / "bpe")), workers=2)
    shards = Shards.open(tmp_path / "out")
    assert (manifest.vocab_size, shards.tokenizer().end_of_text) == (600, 0)
    tokens, _ = shards.read(0, [0])[0]
    text = made.decode(tokens.tolist(), skip_special_tokens=False)
    assert shards.tokenizer().decode(tokens.tolist()) == text
    assert any(part and part in "\n".join(CHAPTERS + OTHERS) for part in text.split("<|endoftext|>"))
