"""The shards format both ways, and every way in which a folder of shards can be wrong."""

import hashlib
import json
import pickle
import struct
import threading

import numpy as np
import pytest
from array_record.python import array_record_module

from phijax.data.shard_manifest import Manifest
from phijax.data.shards import Shards, ShardWriter, decode_record, encode_record, token_dtype
from phijax.errors import UserError
from phijax.text.sentencepiece_model import put_together, take_apart
from phijax.text.tokenizer import Tokenizer
from phijax.text.train_tokenizer import train_tokenizer

BLOCK = 8


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["some words to train a tokenizer on, " * 3], vocab_size=300)


@pytest.fixture(scope="module")
def documents(tokenizer):
    draw = np.random.default_rng(0)
    lengths = [1, 40, 3, 7, 8, 9, 1, 2, 100, 5]
    return [np.append(draw.integers(3, 280, length - 1), tokenizer.end_of_text).astype(np.uint16) for length in lengths]


def write_shards(folder, tokenizer, documents, vocab_size=None, shards=2):
    """Every `shards`-th document in each shard."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for i in range(shards):
        with ShardWriter(folder / f"shard-{i:05d}-of-{shards:05d}.arrayrecord", BLOCK, documents[0].dtype) as writer:
            for document in documents[i::shards]:
                writer.add(document)
            entries.append(writer.close())
    manifest = Manifest(
        block=BLOCK,
        dtype=documents[0].dtype.name,
        seed=0,
        split="all",
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=vocab_size or tokenizer.vocab_size,
        end_of_text=tokenizer.end_of_text,
        shards=tuple(entries),
        inputs=(),
        ignored_files=(),
        documents_read=len(documents),
        documents_kept=len(documents),
        documents_in_other_split=0,
        documents_dropped={},
        unknown_tokens=0,
        settings={},
    )
    tokenizer.save(folder)
    (folder / "manifest.json").write_text(manifest.to_json())
    return manifest


@pytest.fixture
def folder(tmp_path, tokenizer, documents):
    write_shards(tmp_path / "shards", tokenizer, documents)
    return tmp_path / "shards"


def edit_manifest(folder, edit):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_record_round_trip(dtype):
    draw = np.random.default_rng(1)
    for length in (2, 17, 1025):
        tokens = draw.integers(0, np.iinfo(dtype).max // 2, length).astype(dtype)
        starts = draw.random(length) < 0.1
        data = encode_record(tokens, starts)
        decoded, decoded_starts = decode_record(data)
        assert decoded.dtype == np.int32 and decoded_starts.dtype == np.bool_
        np.testing.assert_array_equal(decoded, tokens)
        np.testing.assert_array_equal(decoded_starts, starts)


def test_record_bytes_are_the_documented_ones():
    data = encode_record(np.array([1, 258, 3], np.uint16), np.array([True, False, True]))
    assert data == b"pjxr" + bytes([1, 2, 0, 0]) + struct.pack("<II", 3, 2) + b"\1\0\2\1\3\0" + struct.pack("<II", 0, 2)


def test_malformed_records_are_refused():
    data = encode_record(np.arange(9, dtype=np.uint16), np.arange(9) % 4 == 0)
    rng = np.random.default_rng(2)
    for cut in range(len(data)):
        with pytest.raises(UserError, match="record 7 of x"):
            decode_record(data[:cut], "record 7 of x")
    with pytest.raises(UserError, match="corrupt"):
        decode_record(data + b"\0")
    for i in range(16):  # any change of the header
        for _ in range(4):
            broken = bytearray(data)
            broken[i] ^= int(rng.integers(1, 256))
            with pytest.raises(UserError, match="corrupt"):
                decode_record(bytes(broken))
    for starts in ((4, 0, 8), (0, 0, 4), (0, 4, 9)):  # not rising, twice, outside
        with pytest.raises(UserError, match="document starts"):
            decode_record(data[:-12] + struct.pack("<III", *starts))
    huge = encode_record(np.array([1, 2**31], np.uint32), np.array([True, False]))
    with pytest.raises(UserError, match="2147483648"):
        decode_record(huge)


def test_records_are_the_documents_cut_with_one_token_overlap(folder, documents):
    shards = Shards.open(folder)
    for shard in range(2):
        stream = np.concatenate(documents[shard::2])
        starts = np.concatenate([np.arange(len(d)) == 0 for d in documents[shard::2]])
        count = (len(stream) - 1) // BLOCK
        assert shards.records_per_shard[shard] == count
        records = shards.read(shard, range(count))
        for r, (tokens, record_starts) in enumerate(records):
            np.testing.assert_array_equal(tokens, stream[r * BLOCK : r * BLOCK + BLOCK + 1])
            np.testing.assert_array_equal(record_starts, starts[r * BLOCK : r * BLOCK + BLOCK + 1])
        entry = shards.manifest.shards[shard]
        assert entry.tokens == len(stream) and entry.documents == len(documents[shard::2])
        assert entry.records * BLOCK + 1 + entry.tail_tokens == entry.tokens
        assert entry.sha256 == hashlib.sha256((folder / entry.file).read_bytes()).hexdigest()
    assert shards.num_records == sum(shards.records_per_shard)
    shards.verify()


def test_batch_reads_in_any_order_from_threads_and_after_pickling(folder):
    shards = Shards.open(folder)
    in_order = shards.read(0, range(shards.records_per_shard[0]))
    copy = pickle.loads(pickle.dumps(shards))
    failures = []

    def read(seed):
        order = np.random.default_rng(seed).integers(0, len(in_order), 200)
        for (tokens, starts), record in zip(copy.read(0, order), order, strict=True):
            if (tokens != in_order[record][0]).any() or (starts != in_order[record][1]).any():
                failures.append(record)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not failures
    assert copy.read(0, []) == []
    with pytest.raises(IndexError):
        copy.read(0, [len(in_order)])
    with pytest.raises(IndexError):
        copy.read(0, [-1])


def test_digest_moves_with_what_decides_the_rows(folder, tokenizer, documents, tmp_path):
    digest = Shards.open(folder).digest
    assert write_shards(tmp_path / "again", tokenizer, documents).digest == digest
    assert write_shards(tmp_path / "other", tokenizer, documents[::-1]).digest != digest
    edit_manifest(folder, lambda m: m.update(documents_read=17))
    assert Shards.open(folder).digest == digest
    edit_manifest(folder, lambda m: m["shards"].reverse())
    assert Shards.open(folder).digest != digest


def test_a_missing_or_shortened_shard_is_named(folder):
    shard = folder / "shard-00001-of-00002.arrayrecord"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"shard-00001-of-00002.arrayrecord has \d+ bytes; the manifest says"):
        Shards.open(folder)
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-00001-of-00002.arrayrecord is missing"):
        Shards.open(folder)


def test_a_flipped_byte_is_refused_by_record(tmp_path, tokenizer):
    documents = [np.arange(3, 250, dtype=np.uint16)] * 400
    write_shards(tmp_path, tokenizer, documents, shards=1)
    path = tmp_path / "shard-00000-of-00001.arrayrecord"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    shards = Shards.open(tmp_path)
    with pytest.raises(UserError, match=r"Record \d+ of .*shard-00000-of-00001.arrayrecord is corrupt"):
        shards.read(0, range(shards.num_records))
    with pytest.raises(UserError, match="its sha256 is not the manifest's"):
        shards.verify()


def test_a_shard_that_is_no_arrayrecord_file(folder):
    path = folder / "shard-00000-of-00002.arrayrecord"
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(UserError, match=r"shard-00000-of-00002.arrayrecord cannot be read"):
        Shards.open(folder).read(0, [0])


def test_a_shard_of_other_counts(folder, tokenizer, documents):
    edit_manifest(folder, lambda m: m["shards"][0].update(records=3))
    with pytest.raises(UserError, match=r"holds 14 records; the manifest says 3"):
        Shards.open(folder).read(0, [0])


def test_records_of_another_block(folder):
    edit_manifest(folder, lambda m: m.update(block=4))
    with pytest.raises(UserError, match="holds 9 tokens; the manifest says 5"):
        Shards.open(folder).read(0, [0])


def test_records_that_are_not_ours(tmp_path, tokenizer, documents):
    write_shards(tmp_path, tokenizer, documents, shards=1)
    path = tmp_path / "shard-00000-of-00001.arrayrecord"
    records = Shards.open(tmp_path).num_records
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for _ in range(records):
        writer.write(b"another format")
    writer.close()
    edit_manifest(tmp_path, lambda m: m["shards"][0].update(bytes=path.stat().st_size))
    with pytest.raises(UserError, match=r"Record 2 of .* is corrupt"):
        Shards.open(tmp_path).read(0, [2])


def test_a_token_outside_the_vocabulary_is_refused(tmp_path, tokenizer, documents):
    outside = [*documents, np.array([tokenizer.vocab_size] * 20, np.uint16)]
    write_shards(tmp_path, tokenizer, outside, shards=1)
    shards = Shards.open(tmp_path)
    with pytest.raises(UserError, match=r"Record 21 of .* holds the token id 300; the vocabulary has 300 ids"):
        shards.read(0, range(shards.num_records))


def test_another_tokenizer_is_refused(folder, tokenizer):
    other = train_tokenizer(["quite different words, " * 3], vocab_size=290)
    shards = Shards.open(folder)
    shards.require_tokenizer(tokenizer, "the model")
    pieces = take_apart(tokenizer._model).pieces  # as a GGUF file has them
    same = Tokenizer(put_together(pieces, dummy_space=True, where="a file"), tokenizer.added_tokens)
    assert same.fingerprint != tokenizer.fingerprint
    shards.require_tokenizer(same, "the model")
    assert shards.tokenizer().fingerprint == tokenizer.fingerprint
    with pytest.raises(UserError, match=r"tokenizer of the model \(290 ids"):
        shards.require_tokenizer(other, "the model")
    other.save(folder)
    with pytest.raises(UserError, match="is not the one its shards were made with"):
        Shards.open(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(version=99), "has version 99"),
        (lambda m: m.update(format="other"), "is not the manifest of token shards"),
        (lambda m: m.pop("block"), "block is missing.*Prepare the shards again"),
        (lambda m: m.update(block="8"), "block='8' must be a whole number"),
        (lambda m: m.update(block=0), "block=0 must be a whole number from 1"),
        (lambda m: m.update(dtype="float32"), "dtype"),
        (lambda m: m.update(vocab_size=70_000), "vocab_size=70000 must be a whole number from 1 to 65,536"),
        (
            lambda m: m["shards"][0].update(file="../other.arrayrecord"),
            "must be the name of a file in this",
        ),
        (lambda m: m["shards"][0].update(file=m["shards"][1]["file"]), "named twice"),
        (lambda m: m["shards"][0].update(records=-1), r"shards\[0\].records=-1 must be"),
        (lambda m: m["shards"][0].pop("sha256"), r"shards\[0\].sha256 is missing"),
    ],
)
def test_damaged_manifests_are_refused(folder, edit, message):
    edit_manifest(folder, edit)
    with pytest.raises(UserError, match=message):
        Shards.open(folder)


def test_folders_without_shards(tmp_path, folder):
    with pytest.raises(UserError, match="there is no such folder"):
        Shards.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no manifest.json"):
        Shards.open(tmp_path)
    folder.rename(tmp_path / "train")
    with pytest.raises(UserError, match=r"is split: take .*/train"):
        Shards.open(tmp_path)
    (tmp_path / "train" / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        Shards.open(tmp_path / "train")


def test_writer_leaves_no_half_shard(tmp_path):
    path = tmp_path / "shard"
    with pytest.raises(RuntimeError, match="stop"), ShardWriter(path, BLOCK, np.dtype(np.uint16)) as writer:
        writer.add(np.arange(100, dtype=np.uint16))
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="nowhere/shard could not be written"):
        ShardWriter(tmp_path / "nowhere" / "shard", BLOCK, np.dtype(np.uint16))


def test_a_shard_shorter_than_a_record_is_all_tail(tmp_path):
    with ShardWriter(tmp_path / "shard", BLOCK, np.dtype(np.uint16)) as writer:
        writer.add(np.arange(BLOCK, dtype=np.uint16))
        entry = writer.close()
    assert (entry.records, entry.tokens, entry.tail_tokens) == (0, BLOCK, BLOCK)


def test_token_dtype():
    assert token_dtype(32064) == np.uint16 and token_dtype(65536) == np.uint16
    assert token_dtype(65537) == np.uint32 and token_dtype(200064) == np.uint32
    with pytest.raises(UserError):
        token_dtype(2**31 + 1)
