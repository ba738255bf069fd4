"""Input that is broken, mended, left out or added between two starts; and where what was dropped had lain."""

import dataclasses
import gzip
import json
import os
import shutil

import pytest
from preparation_case import CHAPTERS, contents, leave_unfinished, run, silent

from phijax.curation import preparation
from phijax.curation.dropped import said
from phijax.curation.preparation import make_plan, prepare
from phijax.curation.tokenize_shards import tokenize_unit
from phijax.errors import UserError


def tokenized(request):
    """Runs it -> the names of files in the units that were tokenized, and what was said."""
    done, lines = [], []

    def noted(parts, *rest):
        done.append({part.file.name for part in parts})
        return tokenize_unit(parts, *rest)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(preparation, "tokenize_unit", noted)
        prepare(make_plan(request), 1, silent, lines.append)
    return done, "\n".join(lines)


@pytest.fixture
def broken(texts, tmp_path):
    """The texts, 20 more files of a unit each, and one that breaks off among them."""
    moved = tmp_path / "moved"
    shutil.copytree(texts, moved)
    for i in range(20):
        (moved / f"b{i:02d}.jsonl").write_text("\n".join(json.dumps({"text": f"{i} {text}"}) for text in CHAPTERS[:20]))
    (moved / "b10.jsonl.gz").write_bytes(gzip.compress(b'{"text": "whole"}\n' * 3)[:-4])
    return moved


@pytest.mark.parametrize("cure", ["mended", "left out", "others too"])
@pytest.mark.parametrize("num_shards", [3, None])
def test_after_a_broken_file_it_goes_on_with_what_changed(request_of, broken, tmp_path, cure, num_shards, monkeypatch):
    """To the bytes of a first start, and nothing is done twice: the number of shards, by size, is another by then."""
    monkeypatch.setattr(preparation, "SHARD_BYTES", 47_000)
    request = request_of(input=str(broken), num_shards=num_shards)
    with pytest.raises(UserError, match=r"b10\.jsonl\.gz is broken.*--on_error=skip"):
        tokenized(request)
    if cure == "mended":
        text = "\n".join(json.dumps({"text": text}) for text in CHAPTERS[:30])
        (broken / "b10.jsonl.gz").write_bytes(gzip.compress(text.encode(), 0))
    else:
        (broken / "b10.jsonl.gz").unlink()
    if cure == "others too":  # before and behind the broken one
        (broken / "b01.jsonl").unlink()
        (broken / "b05.jsonl").write_text(json.dumps({"text": "another"}))
        (broken / "zz.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in CHAPTERS[30:]))
    done, said = tokenized(request)
    fresh = request_of("fresh", input=str(broken), num_shards=num_shards)
    all_units, nothing = tokenized(fresh)
    assert contents(request.output) == contents(fresh.output) and nothing == ""
    first = {f"b{i:02d}.jsonl" for i in range(9)} | {f"{i}.txt" for i in range(14)}  # in units of the first start
    again = set().union(*done) & first
    assert again == ({"b05.jsonl"} if cure == "others too" else set()) and len(done) < len(all_units)
    assert ("b10.jsonl.gz: changed" if cure == "mended" else "b10.jsonl.gz: there, gone now") in said
    assert "pieces of what is as it was are tokenized already" in said


def test_a_change_after_the_shards_were_begun_makes_them_anew(request_of, broken):
    (broken / "b10.jsonl.gz").unlink()
    request = request_of(input=str(broken), num_shards=2, validation_fraction=0.3)

    def stop_behind_one(doing, total, results):
        for result in results:
            yield result
            if doing == "writing shards":
                raise InterruptedError

    with pytest.raises(InterruptedError):
        prepare(make_plan(request), 1, stop_behind_one)
    (broken / "b03.jsonl").unlink()
    run(request)
    fresh = request_of("fresh", input=str(broken), num_shards=2, validation_fraction=0.3)
    run(fresh)
    assert contents(request.output) == contents(fresh.output)


def test_an_output_begun_by_an_older_phijax_is_begun_anew(request_of, broken, tmp_path):
    (broken / "b10.jsonl.gz").unlink()
    request = request_of(input=str(broken))
    plan, work = make_plan(request), tmp_path / "out" / "unfinished"
    work.mkdir(parents=True)
    inputs = {file.name: [file.bytes, int(os.stat(file.path).st_mtime)] for file in plan.files}
    (work / "plan.json").write_text(json.dumps({"settings": plan.settings, "inputs": inputs}))
    (work / "unit-00000").write_bytes(b"12345678")
    (work / "unit-00000.done.json").write_text('{"output_bytes": 8, "counts": {}}')
    run(request)
    run(request_of("fresh", input=str(broken)))
    assert contents(request.output) == contents(tmp_path / "fresh")


def test_on_error_skip_counts_the_file_and_goes_on(request_of, broken, tmp_path):
    """The same shards as without that file; it is tried again at the next start."""
    (broken / "gone.txt").symlink_to(broken / "nowhere")
    request = request_of(input=str(broken), skip_broken=True)
    with pytest.raises(UserError, match=r"is a link to .*--on_error=skip"):
        run(dataclasses.replace(request, skip_broken=False))
    leave_unfinished(request)
    (broken / "gone.txt").unlink()
    with pytest.raises(UserError, match=r"b10\.jsonl\.gz is broken"):  # asked to stop, now
        run(dataclasses.replace(request, skip_broken=False))
    (broken / "gone.txt").symlink_to(broken / "nowhere")
    (manifest,) = run(request)
    assert sorted(manifest.files_skipped) == ["b10.jsonl.gz", "gone.txt"]
    assert "is broken" in manifest.files_skipped["b10.jsonl.gz"]
    assert str(tmp_path) not in manifest.files_skipped["b10.jsonl.gz"]
    (broken / "b10.jsonl.gz").unlink()
    (broken / "gone.txt").unlink()
    (fresh,) = run(request_of("fresh", input=str(broken)))
    assert fresh.digest == manifest.digest and fresh.documents_read == manifest.documents_read
    assert fresh.documents_dropped == manifest.documents_dropped and fresh.files_skipped == {}


def test_what_was_dropped_has_its_place(request_of, tmp_path):
    folder = tmp_path / "bad"
    folder.mkdir()
    good = json.dumps({"text": CHAPTERS[0]})
    lines = [good, "", "{", good, '{"text": ""}'] * 100  # several units, and several parts of one file
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("\n".join([good, "", "{"] * 3).encode()))
    (folder / "c.txt").write_text("a text".encode("utf-16").decode("latin-1"), encoding="latin-1")
    (manifest,) = run(request_of(input=str(folder), num_shards=1))
    assert manifest.documents_dropped == {"empty": 100, "malformed JSON": 103, "not UTF-8": 1}
    places = manifest.documents_dropped_at
    assert places["empty"]["first"] == [{"file": "a.jsonl", "line": line} for line in range(5, 501, 5)]
    assert places["malformed JSON"]["first"] == [{"file": "a.jsonl", "line": line} for line in range(3, 501, 5)]
    assert places["malformed JSON"]["files"] == {"a.jsonl": 100, "b.jsonl.gz": 3}
    assert places["not UTF-8"] == {"first": [{"file": "c.txt"}], "files": {"c.txt": 1}}
    run(request_of("two", input=str(folder), num_shards=1), workers=2)
    assert contents(tmp_path / "two") == contents(tmp_path / "out")
    assert said(places, "malformed JSON") == "a.jsonl:3 and 1 other file" and said(places, "not UTF-8") == "c.txt"


def test_a_refusal_of_utf_16_names_the_file(request_of, tmp_path):
    folder = tmp_path / "wide"
    folder.mkdir()
    (folder / "a.txt").write_bytes("a text".encode("utf-16"))
    for more in (dict(), dict(tokenizer=None, vocab_size=500)):
        with pytest.raises(UserError, match=r"1 dropped: not UTF-8, in a\.txt\n.*a\.txt is UTF-16.*iconv"):
            run(request_of(f"out{len(more)}", input=str(folder), **more))
