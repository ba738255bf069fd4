"""A shard of equal size and count with other content: named, nothing of it trained past the deadline, nothing saved."""

import contextlib
import json
import os
import pathlib
import shutil
import signal

import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from run_case import free_address, last_step, saved_steps

from phijax.data.shards import Shards

NAMED = "Copy or prepare the shard again"
SHARD = "shard-00001-of-00002.arrayrecord"
SOURCE = "--config.data.phases[0].mixture[0].path"
HELD_OUT = "--config.evaluation.sets[0].path"
LONGER = "--config.data.phases[0].steps=290"  # with the other phase 300: three of them may be trained before the check
UNREAD = "shard-00002-of-00002.arrayrecord"


@pytest.fixture
def copied(runs, tmp_path) -> pathlib.Path:
    return shutil.copytree(runs.shards / "a", tmp_path / "a")


def swap(folder: pathlib.Path) -> pathlib.Path:
    """Puts a shard of the same size and as many records, all sound, in a shard's place; its time is the old one.

    An interrupted copy of a folder that was prepared again leaves this.
    """
    path = folder / SHARD
    before, old = path.stat(), path.read_bytes()
    records = ArrayRecordReader(str(path)).read_all()
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in reversed(records):
        writer.write(record)
    writer.close()
    assert path.stat().st_size == before.st_size and path.read_bytes() != old
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    Shards.open(folder).read(1, range(len(records)))  # nothing of it is corrupt
    return path


def endless(folder: pathlib.Path) -> None:
    """Adds a shard whose reading does not end in a test's time, and of which no row is ever taken."""
    manifest = json.loads((folder / "manifest.json").read_text())
    size = 1 << 41
    entry = dict(file=UNREAD, records=0, tokens=0, tail_tokens=0, documents=0, bytes=size, sha256="0" * 64)
    manifest["shards"].append(entry)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with open(folder / UNREAD, "wb") as file:
        file.truncate(size)


def test_a_shard_swapped_after_it_was_checked_is_named_at_the_next_start(runs, unbroken, copied, tmp_path):
    workdir, source = runs.copy(unbroken, tmp_path / "run", 20), f"{SOURCE}={copied}"
    first = runs.run(workdir, source)
    assert first.code == 0, first.output
    # Those of folder b, which `unbroken` has read, are known again; the copies of the other are read.
    assert "data: all 4 shards are what their manifests say: 2 read whole" in first.output, first.output
    assert "2 as when last read whole" in first.output and saved_steps(workdir)[-1] == 24
    path = swap(copied)
    again = runs.run(workdir, source, "--config.data.phases[1].steps=16")
    again.refused(f"The shard {path} is corrupt, or another", NAMED, "Nothing was trained")
    assert saved_steps(workdir)[-1] == 24


def test_a_swapped_shard_to_a_fresh_run_and_a_dry_run_and_for_evaluation(runs, copied, tmp_path):
    path = swap(copied)
    ended = runs.run_all(
        [
            (tmp_path / "fresh", [f"{SOURCE}={copied}"], 1),
            (tmp_path / "held_out", [f"{HELD_OUT}={copied}"], 1),
            (tmp_path / "dry", ["--dry_run", f"{SOURCE}={copied}"], 1),
        ]
    )
    for end in ended:
        end.refused(f"The shard {path} is corrupt", NAMED)
    for name in ("fresh", "held_out"):  # one step in a hundred is none of 24
        assert last_step(tmp_path / name) == -1 and saved_steps(tmp_path / name) == []


def test_no_step_past_the_deadline_nor_a_save_before_the_check_is_done(runs, copied, tmp_path):
    endless(copied)
    workdir = tmp_path / "run"
    with runs.started(workdir, f"{SOURCE}={copied}", LONGER) as process:
        process.wait_for(lambda: "step 3: waiting for the check of the data" in process.said(), "the wait")
        process.signal(signal.SIGTERM)
        ended = process.end()
    assert ended.code == 75 and "Traceback" not in ended.output, ended.output
    assert "stopped before the data were checked" in ended.output and "since step 0 is not saved" in ended.output
    assert last_step(workdir) == 2 and saved_steps(workdir) == [] and not (workdir / "writer.lock").exists()
    known = json.loads((workdir / "data_checked" / "0.json").read_text())["files"]
    assert {pathlib.Path(file["path"]).name for file in known} >= {SHARD} and UNREAD not in str(known)


def started_on_their_own_disks(runs, stack, workdir, folders):
    address = free_address()
    for index, folder in enumerate(folders):
        together = [f"--coordinator_address={address}", f"--process_count={len(folders)}", f"--process_id={index}"]
        yield stack.enter_context(
            runs.started(workdir, f"{SOURCE}={folder}", LONGER, "--config.mesh.fsdp=2", *together, devices=1)
        )


def test_what_one_process_finds_on_its_disk_ends_both_alike(runs, copied, tmp_path):
    other = shutil.copytree(copied, tmp_path / "other")
    path = swap(other)
    with contextlib.ExitStack() as stack:
        processes = list(started_on_their_own_disks(runs, stack, tmp_path / "run", [copied, other]))
        for ended in [process.end() for process in processes]:
            ended.refused(f"The shard {path} is corrupt", "(process 1 has read it)", NAMED)
    assert last_step(tmp_path / "run") < 3 and saved_steps(tmp_path / "run") == []


@pytest.mark.slow
def test_sigterm_to_one_of_two_that_wait_for_the_check_stops_both(runs, copied, tmp_path):
    endless(copied)
    with contextlib.ExitStack() as stack:
        first, second = started_on_their_own_disks(runs, stack, tmp_path / "run", [copied, copied])
        first.wait_for(lambda: "step 3: waiting for the check of the data" in first.said(), "the wait")
        second.signal(signal.SIGTERM)
        for process in (first, second):
            ended = process.end()
            assert ended.code == 75 and "stopped before the data were checked" in ended.output, ended.output
    assert last_step(tmp_path / "run") == 2 and saved_steps(tmp_path / "run") == []
