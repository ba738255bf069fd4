"""Counts in a file that it does not hold, and what is no file at all: one message, nothing built, nothing waits."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import struct
import tracemalloc
import zlib

import pytest
from gguf_case import gguf, key, tensor
from saved_run import MODEL, TEXT, exported, save_run
from synthetic_shards import write_synthetic

from phijax.checkpoint.manifest import MANIFEST_FILE
from phijax.curation.given_tokenizer import open_given
from phijax.data.shards import Shards
from phijax.errors import UserError
from phijax.interchange.open import open_checkpoint
from phijax.text.train_tokenizer import train_tokenizer

PROCESSOR_SECONDS = 10  # far more than any of these needs, far less than what is to be refused would take
NEVER = 60  # seconds: who waits for a pipe waits for ever


@contextlib.contextmanager
def bounded():
    """Ends what would not end by itself, and what takes more than 64 MB."""

    def end(*_):
        raise AssertionError("it does not end")

    before = signal.signal(signal.SIGVTALRM, end), signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, PROCESSOR_SECONDS)
    signal.alarm(NEVER)
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.alarm(0)
        signal.signal(signal.SIGVTALRM, before[0]), signal.signal(signal.SIGALRM, before[1])


def refused(path, message: str, opened=open_checkpoint) -> None:
    with bounded(), pytest.raises(UserError, match=message):
        opened(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    return save_run(tmp_path_factory.mktemp("run") / "run", MODEL, train_tokenizer([TEXT * 3], MODEL.vocab_size))


@pytest.fixture(scope="module")
def huggingface(run, tmp_path_factory) -> pathlib.Path:
    return exported(run, tmp_path_factory.mktemp("exported") / "hf", "--format=llama")


@pytest.fixture
def folder(huggingface, tmp_path) -> pathlib.Path:
    return shutil.copytree(huggingface, tmp_path / "hf")


@pytest.fixture
def step(run, tmp_path) -> pathlib.Path:
    return shutil.copytree(run / "checkpoints" / "9", tmp_path / "step")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_hidden_layers", 100_000, "100,000 layers; its files hold 21 tensors"),
        ("num_hidden_layers", (1 << 31) - 1, "2,147,483,647 layers; its files hold 21 tensors"),
        ("num_hidden_layers", 5, "differences"),
        ("num_attention_heads", (1 << 31) - 1, "does not divide"),
        ("hidden_size", (1 << 31) - 1, "differences"),
        ("intermediate_size", (1 << 31) - 1, "differences"),
        ("vocab_size", (1 << 31) - 1, "differences"),
        ("head_dim", (1 << 31) - 2, "differences"),
        ("num_key_value_heads", (1 << 31) - 1, "does not divide"),
    ],
)
def test_sizes_in_config_json_are_those_of_its_tensors(folder, name, value, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {name: value}))
    refused(folder, message)


def test_many_tensors_that_belong_nowhere_are_compared_with_few_names(folder):
    """Looking for the nearest of 3,000 names to each of 21 that are missing would take a minute."""
    empty = dict(dtype="F32", shape=[0], data_offsets=[0, 0])
    names = {f"model.layer.{i}.self_attn.q_proj.weight": empty for i in range(3_000)}
    header = json.dumps(names).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    refused(folder, "3021 differences")


@pytest.mark.parametrize("layers", [100_000, (1 << 31) - 1])
def test_layers_in_a_gguf_header_are_those_of_its_tensors(tmp_path, layers):
    pytest.importorskip("gguf")
    sizes = {"block_count": layers, "embedding_length": 32, "attention.head_count": 4, "feed_forward_length": 64}
    keys = [key("general.architecture", "str", "llama"), *(key(f"llama.{name}", "u32", n) for name, n in sizes.items())]
    embedding = tensor("token_embd.weight", [32, 8])
    (tmp_path / "m.gguf").write_bytes(gguf(keys, tensors=[embedding], data=b"\0" * 1024))
    refused(tmp_path / "m.gguf", f"block_count={layers}, with 1 tensors")


def rewrite(step: pathlib.Path, change) -> None:
    """Changes a step's manifest and gives it a right digest, as anybody can."""
    path = step / MANIFEST_FILE
    content = json.loads(path.read_text())
    del content["crc32"]
    change(content)
    digest = f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"
    path.write_text(json.dumps(content | {"crc32": digest}))


@pytest.mark.parametrize("name", ["/dev/zero", "state/../../zero", "state/zero", "state/pipe", "", 3])
def test_a_manifest_names_regular_files_of_its_step(step, name):
    os.symlink("/dev/zero", step / "state" / "zero")
    os.symlink("/dev/zero", step.parent / "zero")
    os.mkfifo(step / "state" / "pipe")
    rewrite(step, lambda content: content["files"].append({"path": name, "bytes": 0, "crc32": "00000000"}))
    refused(step, "is no regular file|must be a path below state/|must be text")


def test_weights_that_the_files_of_a_step_cannot_hold(step):
    """Chunks that are missing read as zeros: memory would be taken for all of them."""

    def change(content):
        content["identity"]["model"]["num_layers"] = 100_000
        for leaf in content["leaves"]:
            if "/blocks/" in leaf["path"]:
                leaf["shape"][0] = 100_000

    rewrite(step, change)
    refused(step, r"describes [\d,]+ numbers; the step's files have")


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer_config.json", "generation_config.json"]
)
@pytest.mark.parametrize("kind", ["pipe", "endless"])
def test_what_is_no_regular_file_is_never_read(folder, name, kind):
    (folder / name).unlink()
    os.mkfifo(folder / name) if kind == "pipe" else os.symlink("/dev/zero", folder / name)
    refused(folder, f"{name} is no regular file")


@pytest.mark.parametrize("opened", [open_checkpoint, open_given])
def test_a_checkpoint_or_tokenizer_that_is_a_pipe(tmp_path, opened):
    os.mkfifo(tmp_path / "pipe")
    os.symlink("/dev/zero", tmp_path / "m.gguf")
    refused(tmp_path / "pipe", "is no regular file", opened)
    refused(tmp_path / "m.gguf", "is no regular file", opened)


@pytest.mark.parametrize("name", [MANIFEST_FILE, "tokenizer.model", "shard-00000-of-00002.arrayrecord"])
def test_shards_that_are_pipes(tmp_path, name):
    shards = write_synthetic(tmp_path / "shards")
    (shards / name).unlink()
    os.mkfifo(shards / name)
    if name.startswith("shard"):
        manifest = json.loads((shards / MANIFEST_FILE).read_text())
        manifest["shards"][0]["bytes"] = 0  # as a pipe says of itself
        (shards / MANIFEST_FILE).write_text(json.dumps(manifest))
    refused(shards, "is no regular file", Shards.open)
