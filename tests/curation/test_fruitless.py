"""Plans that nothing comes of name a cure, and the cure may be tried with the same --output."""

import json

import pytest

from phijax.curation.preparation import Request, make_plan, prepare
from phijax.data.shards import Shards
from phijax.errors import UserError
from phijax.text.train_tokenizer import train_tokenizer

LINE = "The file object has a method that reads a line. "


@pytest.fixture
def request_of(tmp_path):
    train_tokenizer([LINE * 20], 300).save(tmp_path / "tokenizer")
    rows = (json.dumps({"text": f"{number} {LINE * 3}"}) for number in range(40))
    (tmp_path / "text.jsonl").write_text("\n".join(rows))

    def make(**changes) -> Request:
        where = {"input": str(tmp_path / "text.jsonl"), "output": str(tmp_path / "out")}
        return Request(**where | {"tokenizer": str(tmp_path / "tokenizer"), "block": 32} | changes)

    return make


def made(request: Request):
    return prepare(make_plan(request), 1, lambda doing, total, results: results)


@pytest.mark.parametrize(
    ("wrong", "message", "right"),
    [
        ({"validation_fraction": 0.001}, "a larger --validation_fraction", {"validation_fraction": 0.3}),
        ({"validation_fraction": 0.001}, "of 40", {}),
        ({"block": 100_000}, "a smaller --block", {}),
        ({"text_field": "body"}, "--text_field=body", {"text_field": "text"}),
        ({"text_field": "body", "tokenizer": None, "vocab_size": 300}, "--text_field=body", {}),
    ],
)
def test_the_cure_is_named_and_taken_at_the_same_output(request_of, tmp_path, wrong, message, right):
    with pytest.raises(UserError, match=message):
        made(request_of(**wrong))
    assert list((tmp_path / "out").iterdir()) == []
    manifests = made(request_of(**right))
    assert all(manifest.num_records for manifest in manifests)
    for folder in (tmp_path / "out" / "train", tmp_path / "out" / "validation") if len(manifests) == 2 else ():
        Shards.open(folder).verify()
