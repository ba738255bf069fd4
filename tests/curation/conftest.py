"""A folder of texts, a tokenizer, and requests for them."""

import json

import pytest
from preparation_case import CHAPTERS, OTHERS

from phijax.curation import preparation
from phijax.curation.preparation import Request
from phijax.text.train_tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(CHAPTERS, 1000).save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder with 64 good documents in three formats, 3 bad ones, and a file that is not read."""
    folder = tmp_path_factory.mktemp("texts")
    rows = [json.dumps({"text": text}) for text in CHAPTERS[:50]] + ['{"text": ""}', "{", '{"body": "x"}']
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    for i, text in enumerate(CHAPTERS[50:] + OTHERS):
        (folder / f"{i}.txt").write_bytes(text.encode())
    (folder / "picture.png").write_bytes(b"\x89PNG")
    return folder


@pytest.fixture
def request_of(texts, tokenizer_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "UNIT_BYTES", 30_000)  # four units of the rows, and one of the text files

    def make(output="out", **changes):
        settings = dict(input=str(texts), output=str(tmp_path / output), tokenizer=tokenizer_folder, block=64)
        return Request(**{**settings, "num_shards": 3, **changes})

    return make
