"""What goes wrong in a run, each with the message and the exit code that a person then sees."""

import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import synthetic_shards
from run_case import ROOT, Ended, environment, flip_byte, last_step, learned, saved_steps, state

from phijax import config as configs
from phijax.data.shards import Shards
from phijax.errors import UserError
from phijax.text.train_tokenizer import train_tokenizer

FIRST_SOURCE = "--config.data.phases[0].mixture[0].path"

# what -> (arguments, devices, texts of the message)
REFUSED = {
    "a bad key": (
        ["--config.optimizer.learning_rat=1"],
        1,
        ["there is no key 'optimizer.learning_rat'", "Nearest: optimizer.learning_rate"],
    ),
    "a value of another type": (["--config.seed=one"], 1, ["--config.seed=one: expected int"]),
    "a batch that cannot be split": (
        ["--config.data.phases[1].global_batch_size=9"],
        2,
        ["data.phases[1].global_batch_size=9 cannot be split", "Nearest that can: 8 or 10", "global_batch_size=10"],
    ),
    "a mesh of other devices": (["--config.mesh.fsdp=3"], 2, ["needs 3 devices, but there are 2"]),
    "no shards": (["--config.data.phases[1].mixture[0].path=nowhere"], 1, ["No shards at nowhere"]),
    "a tokenizer larger than the model": (
        ["--config.model.vocab_size=290"],
        1,
        ["a tokenizer of 300 ids, but model.vocab_size=290", "Try --config.model.vocab_size=300"],
    ),
    "an argument that is no flag": (["tiny"], 1, ["'tiny' is not a flag"]),
    "an unknown flag": (["--workdri=x"], 1, ["workdri"]),
}


@pytest.fixture(scope="module")
def refusals(runs, tmp_path_factory) -> dict[str, tuple[pathlib.Path, Ended]]:
    """What -> (workdir, how a start with that mistake ended)."""
    folder = tmp_path_factory.mktemp("refusals")
    commands = [(folder / str(i), arguments, devices) for i, (arguments, devices, _) in enumerate(REFUSED.values())]
    ended = runs.run_all(commands)
    return {what: (command[0], end) for what, command, end in zip(REFUSED, commands, ended, strict=True)}


@pytest.mark.parametrize("what", REFUSED)
def test_a_mistake_is_refused_before_anything_is_written(refusals, what):
    workdir, ended = refusals[what]
    ended.refused(*REFUSED[what][2])
    assert [path.name for path in workdir.iterdir()] == ["compile_cache"]


def test_a_missing_shard_is_named(runs, tmp_path):
    shards = shutil.copytree(runs.shards / "a", tmp_path / "a")
    lost = shards / "shard-00001-of-00002.arrayrecord"
    lost.unlink()
    runs.run(tmp_path / "run", f"{FIRST_SOURCE}={shards}").refused(f"The shard {lost} is missing")


def test_sources_of_two_tokenizers_are_refused(runs, tmp_path, monkeypatch):
    other = train_tokenizer(["quite other words for another tokenizer, " * 3], vocab_size=290)
    monkeypatch.setattr(synthetic_shards, "small_tokenizer", lambda: other)
    shards = synthetic_shards.write_synthetic(tmp_path / "other", documents=60)
    ended = runs.run(tmp_path / "run", f"{FIRST_SOURCE}={shards}")
    ended.refused(str(shards), str(runs.shards / "b"), "were made with different tokenizers")


def test_a_corrupt_record_stops_the_run_and_is_named(runs, tmp_path):
    shards = synthetic_shards.write_synthetic(tmp_path / "a", seed=1, documents=60)
    damaged = flip_byte(shards, offset=2000).relative_to(shards)  # among the records: an index follows them
    opened = Shards.open(shards)
    number = [entry.file for entry in opened.manifest.shards].index(str(damaged))
    corrupt = []
    for record in range(opened.records_per_shard[number]):
        try:
            opened.read(number, [record])
        except UserError:
            corrupt.append(record)
    assert len(corrupt) == 1
    ended = runs.run(tmp_path / "run", f"{FIRST_SOURCE}={shards}", "--config.data.verify=false")  # or it is seen before
    ended.refused(f"Record {corrupt[0]} of {shards / damaged} is corrupt", "Copy or prepare the shard again")
    assert "contents are not compared with the manifests" in ended.output
    assert not (tmp_path / "run" / "writer.lock").exists()


def test_a_directory_in_use_is_refused_and_names_the_run(runs, tmp_path):
    workdir = tmp_path / "run"
    with runs.started(workdir) as first:
        first.wait_for(lambda: last_step(workdir) >= 0, "step 0")
        first.signal(signal.SIGSTOP)
        runs.run(workdir).refused(f"{workdir} is written by another run: process {first.pid}", "another --workdir")
        first.signal(signal.SIGCONT)
        ended = first.end()
    assert ended.code == 0, ended.output


@pytest.mark.parametrize("where", ["/proc/phijax", "FILE/run"])
def test_a_directory_that_cannot_be_written_is_refused(runs, tmp_path, where):
    (tmp_path / "file").touch()
    where = pathlib.Path(where.replace("FILE", str(tmp_path / "file")))
    runs.run(where).refused(f"{where} cannot be written", "Choose another --workdir")


def run_with_files_up_to(runs, workdir, size: int):
    """A run none of whose files may grow beyond `size` bytes."""
    with runs.started(workdir) as process:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))
        return process.end()


def test_metrics_that_cannot_be_written_end_the_run(runs, unbroken, tmp_path):
    workdir = runs.copy(unbroken, tmp_path / "run", 20)
    ended = run_with_files_up_to(runs, workdir, (workdir / "metrics.jsonl").stat().st_size)
    ended.failed(1, f"error: {workdir / 'metrics.jsonl'} cannot be written: ", "File too large", "start it again")
    assert saved_steps(workdir)[-1] == 20


def test_a_save_that_cannot_be_written_ends_the_run_and_keeps_the_steps_before(runs, unbroken, tmp_path):
    workdir = runs.copy(unbroken, tmp_path / "run", 12)
    before = state(workdir, 12)
    ended = run_with_files_up_to(runs, workdir, 50_000)  # metrics.jsonl fits, the state does not
    ended.failed(1, "The save of step 16", "failed:", "Saved steps are untouched: [4, 8, 12]", others_speak=True)
    assert saved_steps(workdir) == [4, 8, 12] and state(workdir, 12) == before


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte and a half."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "phijax-test", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk needs the right to mount one")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_ends_the_run_and_with_room_it_goes_on(runs, unbroken, small_disk):
    workdir = small_disk / "run"
    ended = runs.run(workdir)
    ended.failed(1, "No space left on device", others_speak=True)
    kept = saved_steps(workdir)
    assert kept and kept[-1] < 24, kept
    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    again = runs.run(workdir)
    assert again.code == 0 and f"going on from step {kept[-1]}" in again.output, again.output
    assert learned(workdir) == learned(unbroken)
    assert state(workdir, 24) == state(unbroken, 24)


def test_print_config_is_the_config(runs):
    ended = runs.run(None, "--print_config", "--config.seed=3")
    assert ended.code == 0, ended.output
    printed = json.loads(ended.output)
    assert printed["seed"] == 3
    assert configs.from_dict(printed) == configs.load(str(runs.experiment), [("seed", "3")])


def test_dry_run_trains_nothing_and_a_missing_shard_is_two(runs, tmp_path):
    ended = runs.run(None, "--dry_run")
    assert ended.code == 0 and "Nothing was trained." in ended.output, ended.output
    assert "data: all 4 shards are what their manifests say: 4 read whole" in ended.output
    missing = runs.run(None, "--dry_run", f"{FIRST_SOURCE}={tmp_path}/nowhere")
    missing.refused(f"No shards at {tmp_path}/nowhere", "parameters")


def test_a_run_without_a_workdir_is_refused(runs):
    runs.run(None).refused("--workdir=DIR")


def test_help_lists_the_flags_without_loading_jax():
    command = [sys.executable, "-X", "importtime", "-m", "phijax.main", "--help"]
    ended = subprocess.run(command, cwd=ROOT, env=environment(1), capture_output=True, text=True)
    assert ended.returncode == 0
    for flag in ("--config", "--workdir", "--[no]dry_run", "--[no]print_config", "--process_count"):
        assert flag in ended.stdout
    assert "absl.flags" in ended.stderr and " jax" not in ended.stderr
