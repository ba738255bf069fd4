"""Whole runs whose workdir is gs://: trained, killed, resumed, damaged, shown, generated from."""

import json
import os
import signal
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
import tensorstore
from bucket_case import bucket as open_bucket
from etils import epath
from run_case import LIMIT, ROOT, environment, free_address
from synthetic_shards import write_synthetic

from phijax.checkpoint import upkeep
from phijax.checkpoint.array_spec import array_spec
from phijax.errors import UserError
from phijax.storage import durable
from phijax.training import compile_cache

STEPS, EVERY = 10, 2
EXPERIMENT = f"""
import phijax.config


def get_config():
    c = phijax.config.defaults()
    sizes = dict(vocab_size=300, num_layers=1, model_dim=32, num_heads=4, num_kv_heads=4, head_dim=8, ffn_dim=64)
    c.model.update(sizes)
    mixture = [dict(path="SHARDS", weight=1)]
    c.data.phases = [dict(steps={STEPS}, sequence_length=64, global_batch_size=8, mixture=mixture)]
    c.optimizer.warmup_steps = 1
    c.checkpoint.every_steps = {EVERY}
    c.checkpoint.keep_last = 2
    c.logging.every_steps = 1
    return c
"""
LEARNED = ("loss", "nll", "grad_norm", "learning_rate", "predicted_tokens", "skipped_steps", "tokens")


@pytest.fixture(scope="module")
def bucket():
    with open_bucket() as found:
        yield found


@pytest.fixture(scope="module")
def command(bucket, tmp_path_factory):
    """command("main", "--workdir=...") -> a child process on one virtual device, which sees the bucket."""
    folder = tmp_path_factory.mktemp("on_bucket")
    write_synthetic(folder / "shards", seed=1, documents=300)
    (folder / "experiment.py").write_text(EXPERIMENT.replace("SHARDS", str(folder / "shards")))

    def start(verb, *arguments, **more):
        config = [f"--config={folder / 'experiment.py'}"] if verb in ("main", "preflight") else []
        return subprocess.Popen(
            [sys.executable, "-m", f"phijax.{verb}", *config, *arguments],
            cwd=ROOT,
            env=environment(1) | bucket.environment | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def end(child, code=0):
    output, _ = child.communicate(timeout=LIMIT)
    assert child.returncode == code, output
    assert "Traceback" not in output, output
    return output


def learned(lines):
    """Step -> what must not depend on where the run is kept."""
    rows = [json.loads(line) for line in lines.splitlines()]
    return {row["step"]: {name: row[name] for name in LEARNED if name in row} for row in rows}


def check_manifest(bucket, folder):
    """None of its objects was overlooked in a listing that a client had kept."""
    files = json.loads(bucket.read(f"{folder}/manifest.json"))["files"]
    assert sorted(f"{folder}/{entry['path']}" for entry in files) == bucket.names(f"{folder}/state/")


@pytest.fixture(scope="module")
def trained(command):
    """gs://bucket/trained, done, after a SIGKILL on the way."""
    child = command("main", "--workdir=gs://bucket/trained")
    for line in child.stdout:
        if line.startswith(f"saved step {2 * EVERY}"):
            break
    child.kill()
    assert child.wait() == -signal.SIGKILL
    output = end(command("main", "--workdir=gs://bucket/trained"))
    assert "going on from step" in output and f"done: {STEPS} steps" in output
    return "trained"


def test_what_others_write_into_a_folder_is_seen(bucket):
    durable.prepare_store(epath.Path("gs://bucket/listed"))
    folder = epath.Path("gs://bucket/listed")
    (folder / "ours").write_text("1")
    assert [path.name for path in folder.iterdir()] == ["ours"]
    bucket.write("listed/theirs", b"2")  # as TensorStore and other processes do: not through this client
    assert sorted(path.name for path in folder.iterdir()) == ["ours", "theirs"]


def test_a_killed_run_on_a_bucket_is_the_unbroken_local_one(trained, command, bucket, tmp_path):
    end(command("main", f"--workdir={tmp_path / 'local'}"))
    local = (tmp_path / "local/metrics.jsonl").read_text()
    assert learned(bucket.read("trained/metrics.jsonl").decode()) == learned(local)
    names = set(bucket.names("trained/"))
    assert "trained/writer.lock" not in names and "trained/config.json" in names
    check_manifest(bucket, f"trained/checkpoints/{STEPS}")


@pytest.mark.slow
def test_a_damaged_step_is_set_aside_and_made_again(trained, command, bucket):
    folder = f"trained/checkpoints/{STEPS}"
    victim = max(bucket.names(f"{folder}/state/"), key=lambda name: len(bucket.read(name)))
    data = bytearray(bucket.read(victim))
    data[len(data) // 2] ^= 1
    bucket.write(victim, bytes(data))
    output = end(command("main", "--workdir=gs://bucket/trained"))
    assert "has changed since it was written" in output and f"Using step {STEPS - EVERY} instead" in output
    assert f"saved step {STEPS}" in output and f"{folder}/damaged.json" not in bucket.names(folder)
    check_manifest(bucket, folder)


@pytest.mark.slow
def test_what_a_bucket_holds_is_shown_and_generated_from(trained, command):
    output = end(command("show", "gs://bucket/trained/checkpoints"))
    assert f"gs://bucket/trained/checkpoints/{STEPS}: step {STEPS}, written" in output
    output = end(command("generate", "--checkpoint=gs://bucket/trained", "--prompt=some words", "--max_tokens=4"))
    assert output.strip()


def test_what_is_in_the_way_of_a_save_is_refused_at_the_start_and_left_alone(command, bucket):
    bucket.write(f"strayed/checkpoints/{EVERY}/notes.txt", b"somebody else's")
    output = end(command("main", "--workdir=gs://bucket/strayed"), 2)
    folder = f"gs://bucket/strayed/checkpoints/{EVERY}"
    assert f"{folder} is in the way of a save" in output and f"gcloud storage mv {folder} {folder}.stray" in output
    assert bucket.read(f"strayed/checkpoints/{EVERY}/notes.txt") == b"somebody else's"
    assert "strayed/metrics.jsonl" not in bucket.names("strayed/")


def test_what_comes_into_the_way_later_is_refused_by_the_save(bucket):
    durable.prepare_store(epath.Path("gs://bucket/later"))
    bucket.write("later/7/notes.txt", b"somebody else's")
    lock = types.SimpleNamespace(confirm=lambda: None)
    with pytest.raises(UserError, match="gs://bucket/later/7 is in the way of a save"):
        upkeep.make_room(epath.Path("gs://bucket/later"), lock, 7, overwrite=False)
    assert bucket.names("later/") == ["later/7/notes.txt"]


def test_compiled_programs_are_believed_by_their_digest_and_deleted_after_a_crash(bucket, monkeypatch):
    monkeypatch.setattr(compile_cache, "LEAST_SECONDS", 0.0)
    workdir, numbers, said = epath.Path("gs://bucket/programs"), np.arange(4), []
    durable.prepare_store(workdir)
    bucket.write("programs/writer.lock", b"held")

    def compiled():
        jax.clear_caches()
        return jax.jit(lambda x: x + 1).lower(numbers).compile()(numbers).tolist()

    with compile_cache.opened(workdir, said.append):
        assert compiled() == [1, 2, 3, 4] and said == []
    (entry,) = bucket.names("programs/compile_cache/jit")
    written = bucket.read(entry)
    bucket.write(entry, written[:-1] + bytes([written[-1] ^ 1]))
    with pytest.warns(UserWarning, match="dropped"), compile_cache.opened(workdir, said.append):
        assert compiled() == [1, 2, 3, 4]
    assert bucket.read(entry) != b"" and said == []
    with pytest.raises(RuntimeError), compile_cache.opened(workdir, said.append):
        assert compiled() == [1, 2, 3, 4] and bucket.names("programs/compile_cache.unproven") != []
        raise RuntimeError  # a crash
    with compile_cache.opened(workdir, said.append):
        assert bucket.names("programs/compile_cache/jit") == []
    assert "is deleted (a bucket cannot rename)" in said.pop() and bucket.names("programs/compile_cache.unproven") == []


def test_nothing_was_renamed(trained, bucket):
    """Over all requests so far: a bucket can neither rename nor copy at one instant."""
    assert len(bucket.requests) > 100 and bucket.renames() == []


@pytest.mark.slow
def test_two_processes(command, bucket):
    both = [f"--coordinator_address={free_address()}", "--process_count=2", "--workdir=gs://bucket/two"]
    children = [command("main", *both, f"--process_id={i}") for i in range(2)]
    outputs = [end(child) for child in children]
    assert f"done: {STEPS} steps" in outputs[0]
    check_manifest(bucket, f"two/checkpoints/{STEPS}")
    assert any("process_1" in name for name in bucket.names(f"two/checkpoints/{STEPS}/"))  # both wrote


@pytest.mark.slow
def test_a_second_run_is_refused_while_the_first_lives(command, bucket):
    bucket.write("taken/writer.lock", json.dumps(dict(host="elsewhere", pid=1, time="now", token="x")).encode())
    output = end(command("main", "--workdir=gs://bucket/taken"), 2)
    assert "is written by another run: process 1 on host elsewhere" in output


@pytest.mark.slow
def test_preflight_writes_and_reads_through_both_clients(command, bucket):
    output = end(command("preflight", "--workdir=gs://bucket/checked"))
    assert "storage" in output and output.splitlines()[-1].startswith("READY")
    assert bucket.names("checked/") == []


@pytest.mark.slow
def test_a_machine_without_the_client_says_what_to_install(command, tmp_path):
    (tmp_path / "gcsfs.py").write_text("raise ImportError('not here')")
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    assert "pip install -e '.[gcs]'" in end(command("main", "--workdir=gs://bucket/x", PYTHONPATH=path), 2)


def test_tensorstore_is_told_the_names_of_objects_as_they_are(bucket):
    for number, name in enumerate(("run b", "run%20b", "été")):
        spec = array_spec(epath.Path(f"gs://bucket/named/{name}"), "params/w")
        spec["metadata"] = {"shape": [1], "dtype": "<f4", "chunks": [1]}
        tensorstore.open(spec, create=True).result()[...] = number
        assert any(found.startswith(f"named/{name}/") for found in bucket.names("named/")), name
    found = tensorstore.open(array_spec(epath.Path("gs://bucket/named/run%20b"), "params/w"), open=True).result()
    assert found[0].read().result() == 1
