"""`python -m phijax.show`: what it prints of shards and of checkpoints, and what it refuses."""

import json
import pydoc_data.topics
import re
import subprocess
import sys

import pytest

from phijax.curation.preparation import Request, make_plan, prepare
from phijax.data.shards import Shards
from phijax.show import decoded_rows

CHAPTERS = [text for _, text in sorted(pydoc_data.topics.topics.items())][:20]


def show(*arguments):
    return subprocess.run([sys.executable, "-m", "phijax.show", *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    texts = [*CHAPTERS, "\x1b[31mred\x07 and \u202e turned", ""] + [f"short {i}" for i in range(20)]
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    request = Request(
        str(folder / "a.jsonl"), str(folder / "out"), vocab_size=600, block=256, num_shards=2, validation_fraction=0.3
    )
    prepare(make_plan(request), 1, lambda doing, total, results: results)
    return folder / "out"


def test_the_table_of_a_manifest(output):
    result = show(output / "train", "--rows=0", "--verify")
    assert result.returncode == 0, result.stderr
    manifest = Shards.open(output / "train").manifest
    lines = dict(re.split(r"\s{2,}| (?=/)", line, maxsplit=1) for line in result.stdout.splitlines()[:9])
    assert lines["records"] == f"{manifest.num_records:,} of 256 + 1 tokens, uint16"
    assert lines["dropped"] == "1 empty, of 42 read"
    assert lines["digest"] == manifest.digest[:12]
    for shard in manifest.shards:
        assert re.search(rf"{shard.file} +{shard.records} +{shard.documents} +{shard.tokens:,}", result.stdout)
    assert "Every shard has the sha256 of the manifest." in result.stdout


def test_both_splits_of_an_output(output):
    result = show(output, "--rows=1")
    assert result.returncode == 0
    assert "out/train (train)" in result.stdout and "out/validation (validation)" in result.stdout
    assert result.stdout.count("\n--- record ") == 2 and "[document begins]" in result.stdout


def test_rows_are_the_text_with_borders_and_without_control_sequences(output):
    shards = Shards.open(output / "train")
    rows = list(decoded_rows(shards, 10_000))
    assert len(rows) == shards.num_records == len({row.splitlines()[0] for row in rows})
    assert len(list(decoded_rows(shards, 3))) == 3
    for row in rows:
        begun = int(re.search(r": (\d+) documents begin ---", row.splitlines()[0])[1])
        assert row.count("[document begins]") == begun
    text = "".join(rows) + "".join(decoded_rows(Shards.open(output / "validation"), 10_000))
    assert "short 7<|endoftext|>" in text.replace("\n", "")
    assert "\\x1b[31mred\\x07 and \\u202e turned" in text and "\x1b" not in text


def test_a_corrupt_shard(output, tmp_path):
    import shutil

    shutil.copytree(output / "train", tmp_path / "train")
    path = next((tmp_path / "train").glob("*.arrayrecord"))
    content = bytearray(path.read_bytes())
    content[3000] ^= 1
    path.write_bytes(content)
    result = show(tmp_path / "train", "--rows=0", "--verify")
    assert result.returncode == 2 and f"{path} is corrupt" in result.stderr and "Traceback" not in result.stderr


def test_a_checkpoint(tmp_path):
    import numpy as np

    from phijax.checkpoint import manifest

    step = tmp_path / "checkpoints" / "12"
    (step / "state").mkdir(parents=True)
    (step / "state" / "array").write_bytes(b"1234")
    from etils import epath

    leaves = manifest.describe_leaves({"params/embed": np.zeros((4, 2), np.float32)})
    manifest.write(epath.Path(step), step=12, leaves=leaves, identity={"model": "tiny"}, extra={}, version=1)
    for folder in (step, tmp_path / "checkpoints", tmp_path):
        result = show(folder)
        assert result.returncode == 0, result.stderr
        assert "step 12" in result.stdout and "8 float32" in result.stdout and '"tiny"' in result.stdout


def test_what_is_neither(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    result = show(tmp_path)
    assert result.returncode == 2
    assert "holds neither token shards" in result.stderr and "It has: notes.txt" in result.stderr
    assert show(tmp_path / "nowhere").returncode == 2
    assert show().returncode == 2 and show(tmp_path, tmp_path).returncode == 2


def test_a_reader_that_stops_early(output):
    result = subprocess.run(
        f"{sys.executable} -m phijax.show {output} --rows=100 | head -1", shell=True, capture_output=True, text=True
    )
    assert result.stdout.count("\n") == 1 and result.stderr == ""
