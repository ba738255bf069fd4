"""A tokenizer trained on the way: what the text does not give, and what keeps the text from being read."""

import dataclasses
import gzip
import re

import pytest

from phijax.curation.preparation import Request, make_plan, prepare
from phijax.errors import UserError


def run(request):
    return prepare(make_plan(request), 1, lambda doing, total, results: results)


def test_what_the_text_does_not_give_can_be_asked_for_otherwise(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "some words, and some more words"}\n')
    request = Request(str(tmp_path / "a.jsonl"), str(tmp_path / "out"), vocab_size=400, block=2)
    with pytest.raises(UserError, match=r"(?s)No document of 1 .*1 dropped: no text field.*--text_field=text"):
        run(request)
    request = dataclasses.replace(request, text_field="body")
    with pytest.raises(UserError, match="Largest that it has: ") as error:
        run(request)
    most = int(re.search(r"Largest that it has: (\d+)", str(error.value))[1])
    (manifest,) = run(dataclasses.replace(request, vocab_size=most))
    assert manifest.vocab_size == most and manifest.documents_kept == 1


def test_a_broken_file_is_named(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "words"}\n' * 10_000)[:-20])
    with pytest.raises(UserError, match=rf"^{path} is broken"):
        run(Request(str(path), str(tmp_path / "out")))
